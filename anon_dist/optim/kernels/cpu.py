"""The kernel `anon.c`, called on lists of tensors."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from operator import is_not
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from anon_dist.optim.kernels.build import BuildError, load
from anon_dist.optim.rounding import EXP_AVG, EXP_AVG_SQ, THETA, salt_of

ABI = 3
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
PLAIN, ACCUMULATE, REFRESH = range(3)
ROLES = ("theta", "grad", "m", "s", "v")
CHUNK = 1 << 16
"""The kernel hands out work in pieces of this many elements."""

_building = threading.Lock()


class StepArguments(ctypes.Structure):
    """`struct step` of anon.c, which says what each field is."""

    _fields_ = (
        ("variant", ctypes.c_int32),
        ("hold_silent", ctypes.c_int32),
        ("dtypes", ctypes.c_int32 * len(ROLES)),
        ("stochastic", ctypes.c_int32 * len(ROLES)),
        ("salts", ctypes.c_uint32 * len(ROLES)),
        ("threads", ctypes.c_int32),
        ("decay", ctypes.c_double),
        ("keep_m", ctypes.c_double),
        ("add_m", ctypes.c_double),
        ("keep_s", ctypes.c_double),
        ("add_s", ctypes.c_double),
        ("debias_s", ctypes.c_double),
        ("keep_d", ctypes.c_double),
        ("gamma", ctypes.c_double),
        ("gamma_ratio", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("bound", ctypes.c_double),
        ("scale", ctypes.c_double),
    )


def library() -> ctypes.CDLL:
    """The compiled kernel; built at the first call in a process.

    Raises:
        BuildError: naming what is in the way, each time.
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
        found.anon_step.argtypes = [ctypes.POINTER(StepArguments), ctypes.c_int64, pointer, pointer]
        found.anon_step.restype = None
    except (BuildError, AttributeError) as error:
        return error if isinstance(error, BuildError) else BuildError(str(error))
    return found


def obstacle(lists: Iterable[list[Tensor]]) -> str | None:
    """Why the kernel cannot take these lists, each of one device and dtype. Nothing that differs between ranks, such as strides, counts."""
    for tensors in lists:
        if tensors[0].device.type != "cpu":
            return f"a tensor is on {tensors[0].device}"
        if tensors[0].dtype not in DTYPES:
            return f"a tensor is {str(tensors[0].dtype).removeprefix('torch.')}"
        kinds: set[type[Tensor]] = set(map(type, tensors))
        for kind in kinds:
            if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not issubclass(kind, AsyncCollectiveTensor):
                return f"a tensor is a {kind.__name__}"
    return None


def run(
    lists: tuple[list[Tensor], ...],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    step: int,
    variant: int,
    debias_s: float,
    keep_d: float,
    gamma: float,
    eps: float,
    clip: float | None,
    hold_silent: bool,
    maximize: bool,
    gamma_ratio: float = 1.0,
    stochastic: frozenset[str] = frozenset(),
    exponents: list[Tensor] | None = None,
) -> None:
    """One Anon step, in place.

    Args:
        lists: θ, g, m, s, v of each parameter, as `ROLES`; on the CPU, of `DTYPES`, each list of one dtype, int8 for m alone. Any strides.
        step: t ≥ 1, the step that is taken.
        variant: whether s accumulates, and whether v is refreshed from it: PLAIN, ACCUMULATE or REFRESH.
        debias_s, keep_d, gamma, gamma_ratio, eps, hold_silent: of a refresh; see `update.refresh`. `keep_d` is β3, or 0 at the first.
        stochastic: which of θ, m and s (as `ROLES`), where they are bfloat16 or int8, are rounded as `rounding` says, and not to the
            nearest.
        exponents: of an int8 m's blocks (see `rounding.encode_blocks`).
    """
    copies, columns = laid_out(lists, row_major=exponents is not None)
    if not columns[0]:
        return
    scales = [None] * len(columns[0]) if exponents is None else [e.data_ptr() for e in exponents if e.numel()]
    debias_m = 1.0 - beta1**step
    lengths = list(map(Tensor.numel, columns[0]))
    arguments = StepArguments(
        variant=variant,
        hold_silent=hold_silent,
        dtypes=(ctypes.c_int32 * len(ROLES))(*(DTYPES[x[0].dtype] for x in lists)),
        stochastic=(ctypes.c_int32 * len(ROLES))(*(role in stochastic for role in ROLES)),
        salts=(ctypes.c_uint32 * len(ROLES))(
            salt_of(step, THETA), 0, salt_of(step, EXP_AVG), salt_of(step, EXP_AVG_SQ), 0
        ),
        threads=min(torch.get_num_threads(), sum(-(-n // CHUNK) for n in lengths)),
        decay=1.0 - lr * weight_decay,
        keep_m=beta1,
        add_m=beta1 - 1.0 if maximize else 1.0 - beta1,
        keep_s=beta2,
        add_s=1.0 - beta2,
        debias_s=debias_s,
        keep_d=keep_d,
        gamma=gamma,
        gamma_ratio=gamma_ratio,
        eps=eps,
        bound=math.inf if clip is None else clip * debias_m,
        scale=lr / debias_m,
    )
    addresses = [list(map(Tensor.data_ptr, members)) for members in columns]
    pointers = list(chain.from_iterable(zip(*addresses, scales, strict=True)))
    library().anon_step(
        arguments,
        len(lengths),
        (ctypes.c_void_p * len(pointers))(*pointers),
        (ctypes.c_int64 * len(lengths))(*lengths),
    )
    write_back(copies)
    torch.autograd.graph.increment_version(lists[0])


Copies = list[tuple[list[Tensor], list[Tensor]]]
"""Of some parameters, θ, g, m, s, v and what was taken in their place."""


def laid_out(lists: tuple[list[Tensor], ...], row_major: bool) -> tuple[Copies, list[list[Tensor]]]:
    """The lists as a kernel can take them, without parameters that have no elements; and of which parameters these are copies.

    Each parameter's tensors lie in memory in one order without gaps; in row-major order if that is asked for.
    """
    columns = list(lists)
    if 0 in map(Tensor.numel, lists[0]):
        columns = [[t for t in members if t.numel()] for members in lists]
    every = [t for members in columns for t in members]
    if (
        set(map(type, every)) <= {Tensor, nn.Parameter}
        and all(map(Tensor.is_contiguous, every))
        and not any(map(Tensor.is_neg, every))
    ):
        return [], columns
    pairs = [same_layout(list(tensors)) for tensors in zip(*columns, strict=True)]
    if row_major:
        pairs = [(given, [t.contiguous() for t in used]) for given, used in pairs]
    copies = [(given, used) for given, used in pairs if any(map(is_not, given, used))]
    return copies, [list(members) for members in zip(*(used for _, used in pairs), strict=True)]


def write_back(copies: Copies) -> None:
    """Copy what was computed to where it belongs."""
    for given, used in copies:
        for role, stored, computed in zip(ROLES, given, used, strict=True):
            if computed is not stored and role != "grad":
                stored.copy_(computed)


def same_layout(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors, and the same or copies that lie in memory in one order without gaps."""
    tensors = [t.wait() if isinstance(t, AsyncCollectiveTensor) else t for t in tensors]
    plain = not any(t.is_neg() for t in tensors)
    if plain and all(t.is_contiguous() for t in tensors):
        return tensors, tensors
    strides = tensors[0].stride()
    if plain and all(t.stride() == strides for t in tensors) and _is_dense(tensors[0]):
        return tensors, tensors
    return tensors, [t.resolve_neg().contiguous() for t in tensors]


def _is_dense(t: Tensor) -> bool:
    """Whether its elements fill a stretch of memory, in some order: those strides `empty_like` keeps."""
    return torch.empty_like(t, device="meta").stride() == t.stride()
