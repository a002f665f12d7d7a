"""The kernel `gpu_step.py`, launched on lists of tensors on an NVIDIA GPU. Nothing here waits for the GPU.

One launch takes a whole bucket. It finds the tensors through a table of addresses in device memory, and its share of the work through a
table of chunks; both are sent again only when they change. What changes from step to step is read from device memory too, so that a launch
that a CUDA graph has captured can be replayed at a later step (see `graphs.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from anon_dist.optim import update
from anon_dist.optim.kernels.build import BuildError
from anon_dist.optim.kernels.cpu import ACCUMULATE, PLAIN, REFRESH, ROLES, Copies, laid_out, write_back

BLOCK, WARPS = 512, 4
"""Elements and warps of a program: 4 elements a thread, one load of 16 bytes for each float32 tensor. The fastest of eight choices on an
H100, above all at refreshes, whose float64 arithmetic needs registers. BLOCK is a multiple of `rounding.BLOCK`."""
ROW = 8
"""Numbers in a row of the table: six addresses, the number of elements, and whether all addresses are multiples of `ALIGNMENT`."""
ALIGNMENT = 16
ROUNDED = ("theta", "m", "s")
"""What can be rounded stochastically."""

_WIDE = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_STATE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
DTYPES = dict(zip(ROLES, (_WIDE, _WIDE, {**_STATE, torch.int8: "int8"}, _STATE, _STATE), strict=True))


def obstacle(lists: Iterable[list[Tensor]]) -> str | None:
    """Why the kernel cannot take these lists (θ, g, m, s, v), each of one device and dtype; nothing that differs between ranks counts."""
    for role, tensors in zip(ROLES, lists, strict=True):
        if tensors[0].device.type != "cuda":
            return f"a tensor is on {tensors[0].device}"
        if tensors[0].dtype not in DTYPES[role]:
            return f"a tensor is {str(tensors[0].dtype).removeprefix('torch.')}"
        kinds: set[type[Tensor]] = set(map(type, tensors))
        for kind in kinds:
            if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not issubclass(kind, AsyncCollectiveTensor):
                return f"a tensor is a {kind.__name__}"
    return None


def check() -> None:
    """Compile the kernel, and compare it on this GPU with torch's operations: once in this process.

    Raises:
        BuildError: naming what is in the way, each time.
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
                for name, variant in (("plain", PLAIN), ("accumulating", ACCUMULATE), ("refreshing", REFRESH))
                if not agrees(variant, torch.device("cuda"))
            ),
            None,
        )
    except Exception as error:  # no triton, no C compiler for its launcher, a GPU too old for it, ...
        return f"{type(error).__name__}: {error}"[:1000]


def agrees(variant: int, device: torch.device) -> bool:
    """Whether a step of a few numbers is torch's, but for rounding. It waits for the device."""
    drawn = torch.randn(5, 3 * BLOCK + 7, generator=torch.Generator().manual_seed(0))
    theta, g, m, s, v = (x.to(device) for x in (drawn[0], drawn[1], drawn[2], drawn[3].abs(), drawn[4].abs() + 0.1))
    mine = tuple([x.clone()] for x in (theta, g, m, s, v))
    numbers: dict[str, Any] = {
        "beta1": 0.9,
        "beta2": 0.95,
        "debias_s": 0.3,
        "keep_d": 0.5,
        "gamma": 0.5,
        "gamma_ratio": -0.5,
    }
    run(
        mine,
        lr=0.1,
        variant=variant,
        weight_decay=0.1,
        step=3,
        clip=1.0,
        eps=1e-16,
        hold_silent=False,
        maximize=False,
        **numbers,
    )
    update.decay_weights([theta], 1.0 - 0.1 * 0.1)
    update.update_momentum([m], [g], 0.9)
    if variant != PLAIN:
        update.accumulate([s], [g], 0.95)
    if variant == REFRESH:
        how = {"gamma": 0.5, "gamma_ratio": -0.5, "keep": 0.5, "eps": 1e-16, "debias": 0.3}
        update.refresh([v], [s], **how, hold_silent=False)
    update.apply_update([theta], [v], [m], lr=0.1, debias=1.0 - 0.9**3, clip=1.0)
    pairs = zip(mine, (theta, g, m, s, v), strict=True)
    return all(torch.allclose(x[0], y, rtol=1e-5, atol=1e-5) for x, y in pairs)


def run(
    lists: tuple[list[Tensor], ...],
    *,
    lr: float | Tensor,
    variant: int,
    stochastic: frozenset[str] = frozenset(),
    exponents: list[Tensor] | None = None,
    **numbers: Any,
) -> None:
    """One Anon step, in place.

    Args:
        lists: θ, g, m, s, v of each parameter; on one GPU, each list of one dtype of `DTYPES`. Any strides.
        lr: a tensor of one element is read on the GPU.
        variant: PLAIN, ACCUMULATE or REFRESH of `cpu`.
        stochastic: which of `ROUNDED`, where they are bfloat16 or int8, are rounded as `rounding` says, and not to the nearest.
        exponents: of an int8 m, uint8, as `rounding.exponents_for` makes them.
        numbers: the further arguments of `cpu.run`.
    """
    copies, launch = prepare(lists, lr=lr, variant=variant, stochastic=stochastic, exponents=exponents)
    if launch is None:
        return
    launch(sent(step_values(lr=lr, **numbers), torch.float64, lists[0][0].device))
    write_back(copies)
    torch.autograd.graph.increment_version(lists[0])


@dataclass(frozen=True)
class Launch:
    """A launch of the kernel on certain tensors, which must stay where they are, at any step that takes this variant."""

    columns: tuple[tuple[int, ...], ...]
    """What `table` was made of: addresses, elements."""
    table: Tensor
    chunks: Tensor
    lr: Tensor | None
    """The learning rate, if it lives on the GPU."""
    variant: int
    dtypes: tuple[str, ...]
    stochastic: tuple[bool, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for launches that do the same."""
        return self.columns, self.variant, self.dtypes, self.stochastic, None if self.lr is None else self.lr.data_ptr()

    def __call__(self, values: Tensor) -> None:
        """Launch it with the numbers of a step, `step_values` in device memory."""
        import triton.language as tl

        from anon_dist.optim.kernels import gpu_step

        with torch.cuda.device_of(self.table):
            gpu_step.step[(len(self.chunks),)](
                *(self.table, self.chunks, values, values if self.lr is None else self.lr),
                VARIANT=self.variant,
                TYPES=tuple(getattr(tl, dtype) for dtype in self.dtypes),
                STOCHASTIC=self.stochastic,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )


def prepare(
    lists: tuple[list[Tensor], ...],
    *,
    lr: float | Tensor,
    variant: int,
    stochastic: frozenset[str],
    exponents: list[Tensor] | None,
) -> tuple[Copies, Launch | None]:
    """The parameters that the kernel can only take as copies, and the launch; None if there are no elements."""
    copies, columns = laid_out(lists, row_major=exponents is not None)
    theta = columns[0]
    if not theta:
        return copies, None
    addresses = [tuple(map(Tensor.data_ptr, members)) for members in columns]
    scales = (0,) * len(theta) if exponents is None else tuple(e.data_ptr() for e in exponents if e.numel())
    described = (*addresses, scales, tuple(map(Tensor.numel, theta)))
    device = theta[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return copies, Launch(
        columns=described,
        table=_table(described, device, stream),
        chunks=_chunks(described[-1], device, stream),
        lr=lr.to(device) if isinstance(lr, Tensor) and lr.device.type != "cpu" else None,
        variant=variant,
        dtypes=tuple(DTYPES[role][x[0].dtype] for role, x in zip(ROLES, lists, strict=True)),
        stochastic=tuple(role in stochastic for role in ROUNDED),
    )


def step_values(
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    step: int,
    debias_s: float,
    keep_d: float,
    gamma: float,
    eps: float,
    clip: float | None,
    hold_silent: bool,
    maximize: bool,
    gamma_ratio: float = 1.0,
) -> list[float]:
    """The numbers of a step (see `cpu.run`) in the order in which the kernel reads them."""
    debias_m = 1.0 - beta1**step
    return [
        0.0 if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr),
        weight_decay,
        debias_m,
        beta1,
        beta1 - 1.0 if maximize else 1.0 - beta1,
        beta2,
        1.0 - beta2,
        debias_s,
        keep_d,
        gamma,
        eps,
        math.inf if clip is None else clip * debias_m,
        0.0 if hold_silent else -1.0,  # a second moment up to here holds the preconditioner
        float(step),
        gamma_ratio,
    ]


def sent(numbers: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers in device memory, behind what the current stream has been given. The pinned copy is not used again before it has been read:
    torch's allocator sees to it."""
    here = torch.as_tensor(numbers, dtype=dtype)
    return here if device.type == "cpu" else here.pin_memory().to(device, non_blocking=True)


# Tables belong to the stream that they were sent on: another could run ahead of the copy, or use the memory after it was given back.


@lru_cache(maxsize=64)
def _table(columns: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    rows = torch.tensor(columns).T
    aligned = (rows[:, : len(ROLES)] % ALIGNMENT == 0).all(1, keepdim=True)
    return sent(torch.cat([rows, aligned], 1), torch.int64, device)


@lru_cache(maxsize=64)
def _chunks(lengths: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    counts = torch.tensor([-(-length // BLOCK) for length in lengths])
    rows = torch.repeat_interleave(counts)
    numbers = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    return sent(torch.stack([rows, numbers], 1), torch.int32, device)
