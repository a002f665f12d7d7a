"""How tensors come to a backend: lists by role, and what a kernel that works on addresses needs of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from itertools import chain
from operator import is_not
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from anon_dist.optim.plan import ROLES, StepPlan

Lists = tuple[list[Tensor], ...]
"""θ, g, m, s, v (`ROLES`): the i-th members belong to one parameter, or to one piece of one; all are local tensors of one device, and each
list has one dtype. g need not be the parameter's own gradient, nor θ the parameter (see `StepPlan.handing_back`)."""

Addresses: TypeAlias = "array[int]"  # of Python's own: NumPy's take the host longer, where its code is in no cache
"""Where the tensors in `Lists` lie, each parameter's in row-major order without gaps: `ADDRESSES` 64-bit integers for each parameter, the
addresses of θ, g, m, s, v and their number of elements."""
ADDRESSES = len(ROLES) + 1

Copies = list[tuple[list[Tensor], list[Tensor]]]
"""Of some parameters, θ, g, m, s, v and what was taken in their place."""


def by_plan(plans: list[StepPlan]) -> dict[int, list[int]]:
    """Positions by plan: `id(plan)` → indices of the tensors that follow it."""
    found: dict[int, list[int]] = {}
    for i, plan in enumerate(plans):
        found.setdefault(id(plan), []).append(i)
    return found


def unfit(lists: Lists, device_type: str, dtypes: Mapping[str, Iterable[torch.dtype]]) -> str | None:
    """Why a kernel for these dtypes by role cannot take the lists. Nothing that differs between ranks, such as strides, counts."""
    for role, tensors in zip(ROLES, lists, strict=True):
        if tensors[0].device.type != device_type:
            return f"a tensor is on {tensors[0].device}"
        if tensors[0].dtype not in dtypes[role]:
            return f"a tensor is {str(tensors[0].dtype).removeprefix('torch.')}"
        kinds: set[type[Tensor]] = set(map(type, tensors))
        for kind in kinds - {Tensor, nn.Parameter}:
            if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not issubclass(kind, AsyncCollectiveTensor):
                return f"a tensor is a {kind.__name__}"
    return None


def addresses_of(tensors: list[Tensor]) -> list[int] | None:
    """Their addresses, if they are plain tensors in row-major order without gaps."""
    plain = set(map(type, tensors)) <= {Tensor, nn.Parameter} and all(map(Tensor.is_contiguous, tensors))
    return list(map(Tensor.data_ptr, tensors)) if plain and not any(map(Tensor.is_neg, tensors)) else None


def table(columns: list[list[int]], theta: list[Tensor]) -> Addresses:
    """`Addresses` of their columns."""
    return array("q", chain.from_iterable(zip(*columns, map(Tensor.numel, theta), strict=True)))


def chosen(addresses: Addresses, indices: Iterable[int]) -> Addresses:
    """The addresses of some of the parameters."""
    return array("q", chain.from_iterable(addresses[ADDRESSES * i : ADDRESSES * (i + 1)] for i in indices))


def laid_out(lists: Lists, row_major: bool) -> tuple[Copies, Addresses, Lists]:
    """Addresses of the lists as a kernel can take them, and of which parameters these are copies.

    Each parameter's tensors lie in memory in one order without gaps; in row-major order if that is asked for.

    Returns:
        Copies, addresses, and the tensors at these addresses, to be kept as long as they are used.
    """
    addresses = [found for members in lists if (found := addresses_of(members)) is not None]
    if len(addresses) == len(lists):
        return [], table(addresses, lists[0]), lists
    pairs = [same_layout(list(tensors)) for tensors in zip(*lists, strict=True)]
    if row_major:
        pairs = [(given, [t.contiguous() for t in used]) for given, used in pairs]
    copies = [(given, used) for given, used in pairs if any(map(is_not, given, used))]
    columns = tuple(list(members) for members in zip(*(used for _, used in pairs), strict=True))
    return copies, table([list(map(Tensor.data_ptr, members)) for members in columns], lists[0]), columns


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
