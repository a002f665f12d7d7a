"""The backend of the Triton kernel `gpu_step.py`: a step on an NVIDIA GPU in one pass over memory. `run` does not wait for the GPU.

One launch steps all parameters whose plans have the same variant. It reads three tables in device memory:

- of tensors: a row (`gpu_layout.ROW`) for each parameter, with addresses;
- of plans: a row (`gpu_layout.VALUES`) for each different plan;
- of chunks: which parameter, and which run of elements of it, each program of the launch steps.

The first and the last are sent to the device only when they change.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from anon_dist.optim import update
from anon_dist.optim.backends import layout
from anon_dist.optim.backends.build import BuildError
from anon_dist.optim.backends.gpu_layout import ALIGNMENT, ROW, TILE, WARPS
from anon_dist.optim.backends.layout import ADDRESSES, Addresses, Copies, Lists, laid_out, unfit, write_back
from anon_dist.optim.plan import ROLES, STORED, StepPlan, Variant

_WIDE = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_STATE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
DTYPES = dict(zip(ROLES, (_WIDE, _WIDE, {**_STATE, torch.int8: "int8"}, _STATE, _STATE), strict=True))


def obstacle(lists: Lists) -> str | None:
    """Why the kernel cannot take these lists; see `layout.unfit`."""
    return unfit(lists, "cuda", DTYPES)


def check() -> None:
    """Compile the kernel, and compare it on this GPU with torch's operations: once in this process.

    Raises:
        BuildError: naming the obstacle, at every call.
    """
    found = _trial()
    if found is not None:
        raise BuildError(found)


@lru_cache(maxsize=1)
def _trial() -> str | None:
    if torch.version.hip is not None:
        return "the kernel has only been written for NVIDIA GPUs"
    try:
        return next(
            (
                f"its {name} step differs from torch's operations on {torch.cuda.get_device_name()}; please report it"
                for name, variant in ((v.name.lower(), v) for v in Variant)
                if not agrees(variant, torch.device("cuda"))
            ),
            None,
        )
    except Exception as error:  # no triton, no C compiler for its launcher, a GPU too old for it, ...
        return f"{type(error).__name__}: {error}"[:1000]


def agrees(variant: Variant, device: torch.device) -> bool:
    """Whether the kernel's step of a few numbers equals that of torch's operations, but for rounding. It waits for the device."""
    drawn = torch.randn(5, 3 * TILE + 7, generator=torch.Generator().manual_seed(0))
    theta, g, m, s, v = (x.to(device) for x in (drawn[0], drawn[1], drawn[2], drawn[3].abs(), drawn[4].abs() + 0.1))
    mine = tuple([x.clone()] for x in (theta, g, m, s, v))
    plan = StepPlan(
        step=3,
        variant=variant,
        lr=0.1,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
        clip=1.0,
        debias_s=0.3,
        keep_d=0.5,
        gamma=0.5,
        gamma_ratio=-0.5,
        nesterov=True,
    )
    run(mine, [plan])
    update.update_momentum([m], [g], 0.9)
    if variant != Variant.PLAIN:
        update.accumulate([s], [g], 0.95)
    if variant == Variant.REFRESH:
        how = {"gamma": 0.5, "gamma_ratio": -0.5, "keep": 0.5, "eps": 1e-16, "debias": 0.3}
        update.refresh([v], [s], **how, hold_silent=False)
    ahead = update.looked_ahead([m], [g], 0.9)
    update.apply_update([theta], [v], ahead, lr=0.1, debias=1.0 - 0.9**4, clip=1.0, decay=1.0 - 0.1 * 0.1)
    pairs = zip(mine, (theta, g, m, s, v), strict=True)
    return all(torch.allclose(x[0], y, rtol=1e-5, atol=1e-5) for x, y in pairs)


def run(
    lists: Lists,
    plans: list[StepPlan],
    exponents: list[Tensor] | None = None,
    addresses: Addresses | None = None,
) -> None:
    """One step of each parameter, in place.

    Args:
        lists: see `layout.Lists`; on one GPU, with dtypes of `DTYPES`, with any strides.
        plans: one for each parameter; equal plans are the same object. All have the same `grad_scale` and `found_inf`, and the same `lr`
            if that is a tensor on the GPU.
        exponents: of each parameter's blocks, if m is int8 (uint8, see `rounding.exponents_for`).
        addresses: of the tensors in `lists`, if they are known.
    """
    for variant in Variant:
        chosen = [i for i, plan in enumerate(plans) if plan.variant == variant and lists[0][i].numel()]
        if chosen:
            some = tuple([members[i] for i in chosen] for members in lists)
            at = None if addresses is None else layout.chosen(addresses, chosen)
            scales = None if exponents is None else [exponents[i] for i in chosen]
            _launch(some, [plans[i] for i in chosen], scales, at)


def _launch(lists: Lists, plans: list[StepPlan], exponents: list[Tensor] | None, addresses: Addresses | None) -> None:
    import triton.language as tl

    from anon_dist.optim.backends import gpu_step

    copies, kept_alive = Copies(), lists
    if addresses is None:
        copies, addresses, kept_alive = laid_out(lists, row_major=exponents is not None)
    theta, first = lists[0], plans[0]
    device = theta[0].device
    places: dict[int, int] = {}
    for plan in plans:
        places.setdefault(id(plan), len(places))
    different = {id(plan): plan for plan in plans}
    values = sent([_values(different[key]) for key in places], torch.float64, device)
    table = np.frombuffer(addresses, np.int64).reshape(-1, ADDRESSES)
    at, lengths = table[:, :-1], table[:, -1]
    scales = [0] * len(theta) if exponents is None else list(map(Tensor.data_ptr, exponents))
    aligned, follows = (at % ALIGNMENT == 0).all(1), [places[id(plan)] for plan in plans]
    rows = np.column_stack([at, scales, lengths, aligned, follows])
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    chunks = _chunks(tuple(lengths.tolist()), device, stream)
    one, zero = _constants(device, stream)
    with torch.cuda.device_of(theta[0]):
        gpu_step.step[(len(chunks),)](
            _table(rows.astype(np.int64).tobytes(), device, stream),
            chunks,
            values,
            first.lr if isinstance(first.lr, Tensor) and first.lr.device.type == device.type else values,
            one if first.grad_scale is None else first.grad_scale,
            zero if first.found_inf is None else first.found_inf,
            VARIANT=int(first.variant),
            TYPES=tuple(getattr(tl, DTYPES[role][x[0].dtype]) for role, x in zip(ROLES, lists, strict=True)),
            STOCHASTIC=tuple(role in first.stochastic for role in STORED),
            LR_APART=isinstance(first.lr, Tensor),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    del kept_alive  # their memory may be used again: what comes later in the stream runs after this launch
    write_back(copies)
    torch.autograd.graph.increment_version(lists[0])


def _values(plan: StepPlan) -> list[float]:
    """A plan's row: `gpu_layout.VALUES`."""
    return [
        0.0 if isinstance(plan.lr, Tensor) else plan.lr,
        plan.weight_decay,
        plan.debias_m,
        plan.beta1,
        plan.beta1 - 1.0 if plan.maximize else 1.0 - plan.beta1,
        plan.beta2,
        1.0 - plan.beta2,
        plan.debias_s,
        plan.keep_d,
        plan.gamma,
        plan.eps,
        math.inf if plan.clip is None else plan.clip * plan.debias_m,
        0.0 if plan.hold_silent else -1.0,  # an element whose s is no larger than this keeps its preconditioner
        float(plan.step),
        plan.gamma_ratio,
        float(plan.nesterov),
        float(plan.cautious),
    ]


def sent(numbers: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers in device memory. The copy is queued in the current stream; torch's allocator keeps the pinned memory until it is done."""
    here = torch.as_tensor(numbers, dtype=dtype)
    return here if device.type == "cpu" else here.pin_memory().to(device, non_blocking=True)


# A table is kept for the stream in which its copy was queued. Another stream could read it before the copy, or after its memory was freed.


@lru_cache(maxsize=64)
def _table(rows: bytes, device: torch.device, stream: int) -> Tensor:
    return sent(np.frombuffer(rows, np.int64).reshape(-1, ROW).copy(), torch.int64, device)


@lru_cache(maxsize=16)
def _constants(device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """1 and 0, in place of a `grad_scale` and a `found_inf` that are not given."""
    numbers = sent([1.0, 0.0], torch.float64, device)
    return numbers[:1], numbers[1:]


@lru_cache(maxsize=64)
def _chunks(lengths: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    counts = torch.tensor([-(-length // TILE) for length in lengths])
    rows = torch.repeat_interleave(counts)
    numbers = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    return sent(torch.stack([rows, numbers], 1), torch.int32, device)
