"""Flat tensors, in which an engine has put parts of several parameters one after the other; and the bases of the matrices in them.

DeepSpeed's stage 3 cuts each parameter, in row-major order, into equal parts, one for each rank. A rank's parts, here *shares*, lie in one
1-D tensor, and the optimizer steps this tensor. A matrix can have bases if each of its shares is made of whole rows; it then has a frame as
any matrix (`frame.py`). The state of the flat tensor has one 1-D tensor for each key of `frame.BASIS_KEYS`, in which those of all its
matrices lie one after the other. Its other states are laid out as the flat tensor itself.

The functions here take any parameter. For one that is no flat tensor they do what `frame.py` does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from anon_dist.optim import frame
from anon_dist.optim.basis import Side
from anon_dist.optim.frame import KEYS, Group

State = MutableMapping[str, Tensor]


@dataclass(frozen=True)
class Share:
    """A rank's part of a parameter. All ranks' shares are of one size; those of the last ranks end with padding."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    offset: int
    """Where the share begins in the flat tensor."""
    numel: int
    """Elements of the share, padding included."""

    @property
    def columns(self) -> int:
        """The columns of the parameter as a matrix."""
        return prod(self.shape[1:])

    def length(self, side: Side) -> int:
        """The number of columns, or of this rank's rows."""
        return self.columns if side == "columns" else self.numel // self.columns

    def of(self, tensor: Tensor) -> Tensor:
        """The share in a tensor that is laid out as the flat tensor is: a view, as a matrix."""
        return tensor[self.offset : self.offset + self.numel].view(-1, self.columns)


@dataclass(frozen=True)
class Layout:
    """What lies in a flat tensor."""

    shares: tuple[Share, ...]
    """In the order of their offsets."""
    group: dist.ProcessGroup | None = None
    """The ranks that have shares of these parameters, in the order of the shares. None: this rank has the whole parameters."""
    device: torch.device | None = None
    """The device on which these ranks communicate. None: the flat tensor's."""

    @property
    def ranks(self) -> int:
        """How many shares each parameter has."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def keeps_rows(self, share: Share) -> bool:
        """Whether each rank's share of this parameter is made of whole rows, without padding."""
        return share.numel % share.columns == 0 and share.numel * self.ranks == prod(share.shape)


Turned = tuple[Share, tuple[Side, ...]]

_layouts: MutableMapping[Tensor, Layout] = WeakTensorKeyDictionary()


def lay_out(p: Tensor, layout: Layout) -> None:
    """Say what lies in a 1-D tensor that an optimizer steps, before its state is made. All ranks must say the same, but for the process
    group and the device."""
    _layouts[p] = layout


def layout_of(p: Tensor) -> Layout | None:
    """What lies in a tensor; None: it is no flat tensor, since `lay_out` has not been called for it."""
    return _layouts.get(p)


def turned(layout: Layout, group: Group) -> list[Turned]:
    """The turned matrices, each with the sides that have a basis.

    Raises:
        RuntimeError: a row, or a block of rows, of one of them lies on two ranks; naming the remedy. On every rank alike.
    """
    found = _sides(layout, group)
    cut = [share for share, _ in found if not layout.keeps_rows(share)]
    if cut:
        more = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
        raise RuntimeError(
            f"Anon: basis={group['basis']!r} needs whole rows on each rank, and the {cut[0].shape[0]} rows of {cut[0].name}{more} do not "
            f"divide among {layout.ranks} ranks. Take basis=None for their param group, FSDP2, or another number of ranks"
        )
    cuts = [frame.Cut(share.shape, "rows", (layout.ranks,)) for share, sides in found if "rows" in sides]
    for one in cuts:
        frame.check_cut(one, group["basis_block"], lambda: cuts)
    return found


def kind(p: Tensor, group: Group) -> str | None:
    """How a parameter is stepped. None: element by element. "matrix": it is a turned matrix. "flat": it is a flat tensor, with matrices in
    it that may be turned."""
    if not group["basis"]:
        return None
    return "flat" if layout_of(p) is not None else "matrix" if frame.sides(p, group) else None


# -- state ---------------------------------------------------------------------------------------------------------------------


def initial(p: Tensor, group: Group, dtype: torch.dtype) -> dict[str, Tensor]:
    """The first bases and covariances of a parameter; see `frame.initial`.

    Raises:
        RuntimeError: a matrix is cut in a way that allows no basis.
    """
    found: dict[str, Tensor] = {}
    if (layout := layout_of(p)) is None:
        for side in frame.sides(p, group):
            found |= frame.initial(p, side, group, dtype)
        return found
    lengths = [(side, share.length(side)) for share, sides in turned(layout, group) for side in sides]
    return _joined(
        dict(zip(KEYS[side], frame.initial_of(n, min(group["basis_block"], n), dtype, p.device), strict=True))
        for side, n in lengths
    )


def shapes(p: Tensor, group: Group) -> dict[str, tuple[int, ...]]:
    """The shapes of what `initial` makes, by key."""
    if (layout := layout_of(p)) is not None:
        lengths = _lengths(turned(layout, group))
        sizes = {side: _numel(of_matrices, group["basis_block"]) for side, of_matrices in lengths.items()}
        return {key: (size,) for side, size in sizes.items() for key in KEYS[side]}
    found = {side: frame.length(p, side) for side in frame.sides(p, group)}
    return {key: (n, min(group["basis_block"], n)) for side, n in found.items() for key in KEYS[side]}


def check(p: Tensor, group: Group) -> None:
    """Refuse a basis of a parameter that is cut in a way that allows none.

    Raises:
        RuntimeError: naming the remedy; on every rank alike.
    """
    if (layout := layout_of(p)) is not None:
        turned(layout, group)
    else:
        frame.check(p, group)


def holds(p: Tensor) -> Tensor | None:
    """Which elements of a flat tensor are a parameter's, and no padding; None for a parameter that is no flat tensor."""
    if (layout := layout_of(p)) is None:
        return None
    rank = 0 if layout.group is None else dist.get_rank(layout.group)
    found = torch.zeros(p.shape, dtype=torch.bool, device=p.device)
    for share in layout.shares:
        count = min(share.numel, max(0, prod(share.shape) - rank * share.numel))
        found[share.offset : share.offset + count] = True
    return found


def rebase(p: Tensor, state: State, after: Group, gamma: float, exponents: str) -> None:
    """Bring a state to the `basis` and `basis_block` of a group; see `frame.rebase`."""
    if (layout := layout_of(p)) is None:
        frame.rebase(p, state, after, gamma, exponents)
        return
    new = dict(turned(layout, after))
    every = [one for one in _sides(layout, {"basis": "both"}) if layout.keeps_rows(one[0])]
    lengths = _lengths(every)
    block_sizes = {s: _block_size(n, state[KEYS[s][0]].numel()) for s, n in lengths.items() if KEYS[s][0] in state}
    states = [{**own, "step": state["step"]} for _, own in _split(every, state, block_sizes)]
    for (share, _), own in zip(every, states, strict=True):
        frame.rebase(share.of(p.detach()), own, after, gamma, exponents, new.get(share, ()))
    for side in block_sizes:
        for key in KEYS[side]:
            del state[key]
    state.update(_joined({k: v for k, v in own.items() if k in frame.BASIS_KEYS} for own in states))


def matrices(p: Tensor, state: Mapping[str, Tensor], group: Group) -> Iterator[tuple[Turned, Mapping[str, Tensor]]]:
    """The turned matrices in a flat tensor, each with its state, without the step count: views."""
    layout = layout_of(p)
    assert layout is not None
    return _split(turned(layout, group), state, dict.fromkeys(KEYS, int(group["basis_block"])))


def summed_over(p: Tensor, side: Side) -> tuple[tuple[dist.ProcessGroup, ...], torch.device]:
    """The process groups over which a side's covariance is a sum (`frame.cut_over`), and the device on which they communicate."""
    layout, here = layout_of(p), frame.device_of(p)
    if layout is None:
        return frame.cut_over(p, side), here
    groups = () if layout.group is None or layout.ranks == 1 or side == "rows" else (layout.group,)
    return groups, layout.device or here


def _sides(layout: Layout, group: Group) -> list[Turned]:
    """The matrices that the group wants turned, however they are cut."""
    return [(share, sides) for share in layout.shares if (sides := frame.sides_of(share.shape, group))]


def _lengths(matrices: list[Turned]) -> dict[Side, list[int]]:
    """By side: the lengths of the matrices that have a basis of it."""
    found: dict[Side, list[int]] = {}
    for share, sides in matrices:
        for side in sides:
            found.setdefault(side, []).append(share.length(side))
    return found


def _numel(lengths: list[int], block_size: int) -> int:
    """The number of elements of the bases of sides of these lengths."""
    return sum(n * min(block_size, n) for n in lengths)


def _block_size(lengths: list[int], numel: int) -> int:
    """The `basis_block` with which the bases of sides of these lengths have so many elements: the inverse of `_numel`."""
    return 1 + bisect_left(range(1, max(lengths)), numel, key=lambda size: _numel(lengths, size))


def _split(
    matrices: list[Turned], state: Mapping[str, Tensor], block_sizes: Mapping[Side, int]
) -> Iterator[tuple[Turned, Mapping[str, Tensor]]]:
    """Each matrix with its part of a flat tensor's state. Only sides that are in `block_sizes` (side → `basis_block`) have bases in it."""
    reached = dict.fromkeys(KEYS, 0)
    for share, sides in matrices:
        end = share.offset + share.numel
        places = dict.fromkeys(("exp_avg", "exp_avg_sq", "precond"), (share.offset, end, share.columns))
        for side in (side for side in sides if side in block_sizes):
            n = share.length(side)
            start, block_size = reached[side], min(block_sizes[side], n)
            reached[side] += n * block_size
            places |= dict.fromkeys(KEYS[side], (start, reached[side], block_size))
        yield (share, sides), _State(state, places)


class _State(Mapping[str, Tensor]):
    """The state of a matrix in a flat tensor. Each look-up makes a new view, since an engine may move the flat tensor's state between two
    steps."""

    def __init__(self, state: Mapping[str, Tensor], places: dict[str, tuple[int, int, int]]) -> None:
        self._state, self._places = state, places

    def __getitem__(self, key: str) -> Tensor:
        start, end, columns = self._places[key]
        return self._state[key][start:end].view(-1, columns)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _joined(states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The bases and covariances of several matrices, one after the other, in one 1-D tensor for each key."""
    found: dict[str, list[Tensor]] = {}
    for own in states:
        for key, value in own.items():
            found.setdefault(key, []).append(value.reshape(-1))
    return {key: torch.cat(values) for key, values in found.items()}
