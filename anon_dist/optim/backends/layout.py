"""How tensors come to a backend: as lists by role; and for the kernels as addresses."""

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
"""Five lists: of θ, g, m, s and v, in the order of `plan.ROLES`, which says what each is. The i-th members belong together: to one
parameter, or to one piece of it. All are local tensors on one device. Within a list they have one dtype."""

Addresses: TypeAlias = "array[int]"  # of Python's own: NumPy's take the host longer, where its code is in no cache
"""Where the tensors in `Lists` lie. For each parameter it has `ADDRESSES` integers of 64 bits: the addresses of θ, g, m, s and v, and their
number of elements. The elements of a tensor lie in row-major order without gaps."""
ADDRESSES = len(ROLES) + 1

Copies = list[tuple[list[Tensor], list[Tensor]]]
"""For some parameters: their tensors by role; and the tensors that a kernel takes in their place, some of them copies."""


def by_plan(plans: list[StepPlan]) -> dict[int, list[int]]:
    """`id(plan)` → indices of the parameters that have this plan."""
    found: dict[int, list[int]] = {}
    for i, plan in enumerate(plans):
        found.setdefault(id(plan), []).append(i)
    return found


def unfit(lists: Lists, device_type: str, dtypes: Mapping[str, Iterable[torch.dtype]]) -> str | None:
    """Why a kernel cannot take the lists; None: it can. All ranks get the same answer, since nothing counts that may differ between them,
    such as strides.

    Args:
        device_type: the kernel's.
        dtypes: role → dtypes that the kernel takes.
    """
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
    """The addresses of plain tensors in row-major order without gaps; None if one is not so."""
    plain = set(map(type, tensors)) <= {Tensor, nn.Parameter} and all(map(Tensor.is_contiguous, tensors))
    return list(map(Tensor.data_ptr, tensors)) if plain and not any(map(Tensor.is_neg, tensors)) else None


def table(columns: list[list[int]], theta: list[Tensor]) -> Addresses:
    """`Addresses` from the addresses of each role (`columns`) and the parameters' sizes."""
    return array("q", chain.from_iterable(zip(*columns, map(Tensor.numel, theta), strict=True)))


def chosen(addresses: Addresses, indices: Iterable[int]) -> Addresses:
    """The addresses of some of the parameters."""
    return array("q", chain.from_iterable(addresses[ADDRESSES * i : ADDRESSES * (i + 1)] for i in indices))


def laid_out(lists: Lists, row_major: bool) -> tuple[Copies, Addresses, Lists]:
    """The addresses of the lists, in a layout that a kernel can take; tensors in another layout are copied.

    In this layout the elements of a parameter's five tensors lie in one common order, without gaps.

    Args:
        row_major: this order must be row-major.

    Returns:
        The copies, for `write_back`; the addresses; and the lists of the tensors at these addresses, to be kept alive during the step.
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
    """Copy what a kernel has computed in copies to the tensors themselves."""
    for given, used in copies:
        for role, stored, computed in zip(ROLES, given, used, strict=True):
            if computed is not stored and role != "grad":
                stored.copy_(computed)


def same_layout(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """A parameter's tensors; and the same or, where they do not lie in one common order without gaps, contiguous copies."""
    tensors = [t.wait() if isinstance(t, AsyncCollectiveTensor) else t for t in tensors]
    plain = not any(t.is_neg() for t in tensors)
    if plain and all(t.is_contiguous() for t in tensors):
        return tensors, tensors
    strides = tensors[0].stride()
    if plain and all(t.stride() == strides for t in tensors) and _is_dense(tensors[0]):
        return tensors, tensors
    return tensors, [t.resolve_neg().contiguous() for t in tensors]


def _is_dense(t: Tensor) -> bool:
    """Whether its elements lie in memory without gaps, in some order. `empty_like` keeps the strides of such a tensor alone."""
    return torch.empty_like(t, device="meta").stride() == t.stride()
