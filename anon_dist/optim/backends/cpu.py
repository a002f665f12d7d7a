"""The backend of the C kernel `anon.c`: a step on the CPU in one pass over memory."""

from __future__ import annotations

import ctypes
import math
import struct
import threading
from array import array
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from anon_dist.optim.backends.build import BuildError, load
from anon_dist.optim.backends.layout import Addresses, Copies, Lists, laid_out, unfit, write_back
from anon_dist.optim.plan import ROLES, StepPlan

ABI = 8
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_WIDE = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = dict(zip(ROLES, (_WIDE, _WIDE, tuple(CODES), _WIDE, _WIDE), strict=True))

STEP = struct.Struct("@4i15d")
"""`struct step` of anon.c, which says what each field is."""

MOST_EXPONENT = 126
"""Of the powers of two by which gradients are multiplied: float32 holds them."""

_BITS = {role: 1 << i for i, role in enumerate(ROLES)}
_building = threading.Lock()


def library() -> ctypes.CDLL:
    """The compiled kernel; built at the first call in a process.

    Raises:
        BuildError: naming the obstacle, at every call.
    """
    with _building:
        found = _library()
    if isinstance(found, BuildError):
        raise found
    return found


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | BuildError:
    try:
        found = load(Path(__file__).with_name("anon.c"))
        found.anon_abi.restype = ctypes.c_int
        if found.anon_abi() != ABI:
            raise BuildError(f"the kernel has version {found.anon_abi()} where {ABI} is needed")
        pointer = ctypes.c_void_p
        found.anon_step.argtypes = [pointer, ctypes.c_int32, pointer, pointer, ctypes.c_int64, pointer, pointer]
        found.anon_step.restype = None
    except (BuildError, AttributeError) as error:
        return error if isinstance(error, BuildError) else BuildError(str(error))
    return found


def check() -> None:
    """Build the kernel, if that has not been done.

    Raises:
        BuildError: naming the obstacle.
    """
    library()


def obstacle(lists: Lists) -> str | None:
    """Why the kernel cannot take these lists; see `layout.unfit`."""
    return unfit(lists, "cpu", DTYPES)


def run(
    lists: Lists,
    plans: list[StepPlan],
    exponents: list[Tensor] | None = None,
    addresses: Addresses | None = None,
) -> None:
    """One step of each parameter, in place.

    Args:
        lists: see `layout.Lists`; on the CPU, with dtypes of `DTYPES`, with any strides.
        plans: one for each parameter; equal plans are the same object.
        exponents: of each parameter's blocks, if m is int8 (see `rounding.encode_blocks`).
        addresses: of the tensors in `lists`, if they are known.
    """
    if not plans or (plans[0].found_inf is not None and bool(plans[0].found_inf)):
        return
    copies, kept_alive = Copies(), lists
    if addresses is None:
        copies, addresses, kept_alive = laid_out(lists, row_major=exponents is not None)
    steps, which = _table(plans)
    dtypes = array("i", [CODES[members[0].dtype] for members in lists])
    blocks = None if exponents is None else array("q", map(Tensor.data_ptr, exponents))
    library().anon_step(
        dtypes.buffer_info()[0],
        torch.get_num_threads(),
        steps,
        which.buffer_info()[0],
        len(plans),
        addresses.buffer_info()[0],
        None if blocks is None else blocks.buffer_info()[0],
    )
    del kept_alive
    write_back(copies)
    torch.autograd.graph.increment_version(lists[0])


def _table(plans: list[StepPlan]) -> tuple[bytes, array[int]]:
    """The different plans, packed as `STEP`; and for each parameter the index of its plan among them."""
    keys = list(map(id, plans))
    different = dict(zip(keys, plans, strict=True))
    places = {key: i for i, key in enumerate(different)}
    return b"".join([STEP.pack(*_row(plan)) for plan in different.values()]), array("i", [places[key] for key in keys])


def _row(plan: StepPlan) -> tuple[float, ...]:
    """A plan as the fields of `struct step`, in their order."""
    lr = float(plan.lr)
    pre, inverse = (1.0, 1.0) if plan.grad_scale is None else _divided(float(plan.grad_scale))
    add_m, debias_m = (1.0 - plan.beta1) * inverse, plan.debias_m
    add_m, decay = -add_m if plan.maximize else add_m, 1.0 - lr * plan.weight_decay
    return (
        plan.variant,
        plan.hold_silent,
        _mask(plan.stochastic),
        plan.step,
        decay,
        plan.beta1,
        add_m,
        plan.beta2,
        (1.0 - plan.beta2) * (inverse * inverse),
        plan.debias_s,
        plan.keep_d,
        plan.gamma,
        plan.gamma_ratio,
        plan.eps,
        math.inf if plan.clip is None else plan.clip * debias_m,
        lr / debias_m,
        plan.nesterov,
        1.0 if plan.cautious else decay,
        pre,
    )


def _divided(scale: float) -> tuple[float, float]:
    """A division by `scale` as two products: with a power of two, which is exact and brings a gradient to its own size, where its square
    does not overflow; and with a number near 1. As `_divided` of gpu_step.py."""
    if not scale:
        return 2.0**MOST_EXPONENT, math.copysign(math.inf, scale)
    mantissa, exponent = math.frexp(scale) if math.isfinite(scale) else (scale, MOST_EXPONENT)
    exponent -= abs(mantissa) < 0.75  # to the nearest
    pre = math.ldexp(1.0, -max(-MOST_EXPONENT, min(MOST_EXPONENT, exponent)))
    return pre, 1.0 / (scale * pre)


@lru_cache(maxsize=16)
def _mask(roles: frozenset[str]) -> int:
    return sum(_BITS[role] for role in roles)
