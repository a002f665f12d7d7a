"""Tensors in which an engine has put shares of several parameters, one after the other, and the bases of the matrices among them.

DeepSpeed's stage 3 cuts each parameter, row-major, into equal shares over its ranks; those of a rank lie in one tensor, which the optimizer
steps. Where every share of a matrix is whole rows of it, it has a frame as any other (`frame.py`). The state of the tensor then has the
bases of all its matrices, one after the other, in one 1-D tensor for each key; the other states are laid as the tensor itself.

All functions here also take a parameter that is no such tensor, and then do what `frame.py` does.
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
    """What a rank has of a parameter: as much as every other, the last ones' filled up with padding."""

    name: str
    shape: tuple[int, ...]
    """The whole parameter's."""
    offset: int
    """Where it begins in the tensor."""
    numel: int
    """Its elements, padding included."""

    @property
    def columns(self) -> int:
        """Of the parameter as a matrix of its first dimension against all others."""
        return prod(self.shape[1:])

    def length(self, side: Side) -> int:
        """Elements of a side, on this rank."""
        return self.columns if side == "columns" else self.numel // self.columns

    def of(self, tensor: Tensor) -> Tensor:
        """Its part of a tensor that is laid as the whole, as a matrix: a view."""
        return tensor[self.offset : self.offset + self.numel].view(-1, self.columns)


@dataclass(frozen=True)
class Layout:
    """What lies in a tensor."""

    shares: tuple[Share, ...]
    """In the order of their offsets."""
    group: dist.ProcessGroup | None = None
    """Whose ranks have the other shares, in their order; None: there are none."""
    device: torch.device | None = None
    """On which these ranks talk; None: the tensor's."""

    @property
    def ranks(self) -> int:
        """Among which each parameter is cut."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def keeps_rows(self, share: Share) -> bool:
        """Whether all ranks have whole rows of a parameter, equally many."""
        return share.numel % share.columns == 0 and share.numel * self.ranks == prod(share.shape)


Turned = tuple[Share, tuple[Side, ...]]

_layouts: MutableMapping[Tensor, Layout] = WeakTensorKeyDictionary()


def lay_out(p: Tensor, layout: Layout) -> None:
    """Say what lies in a 1-D tensor that an optimizer steps, before its state is made; the same on every rank, but for group and device."""
    _layouts[p] = layout


def layout_of(p: Tensor) -> Layout | None:
    """What lies in it, if it has been said."""
    return _layouts.get(p)


def turned(layout: Layout, group: Group) -> list[Turned]:
    """The matrices that are turned, with their sides.

    Raises:
        RuntimeError: some are cut within a row, or across the blocks of a side; naming the remedy. On every rank alike.
    """
    found = _sides(layout, group)
    cut = [share for share, _ in found if not layout.keeps_rows(share)]
    if cut:
        more = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
        raise RuntimeError(
            f"Anon: basis={group['basis']!r} needs whole rows on each rank, and the {cut[0].shape[0]} rows of {cut[0].name}{more} do not "
            f"divide among {layout.ranks} ranks. Take basis=None for their param group, FSDP2, or another number of ranks"
        )
    for share, sides in found:
        if "rows" in sides:
            frame.check_cuts(share.shape, "rows", [layout.ranks], min(group["basis_block"], share.shape[0]))
    return found


def kind(p: Tensor, group: Group) -> str | None:
    """How a parameter is stepped: None, element by element; "matrix", turned; "flat", as matrices are in it that may be turned."""
    if not group["basis"]:
        return None
    return "flat" if layout_of(p) is not None else "matrix" if frame.sides(p, group) else None


# -- state ---------------------------------------------------------------------------------------------------------------------


def fresh(p: Tensor, group: Group, dtype: torch.dtype) -> dict[str, Tensor]:
    """The bases and covariances of all sides that are turned, as they are at first; see `frame.fresh`.

    Raises:
        RuntimeError: a matrix is cut in a way that its basis cannot follow.
    """
    found: dict[str, Tensor] = {}
    if (layout := layout_of(p)) is None:
        for side in frame.sides(p, group):
            found |= frame.fresh(p, side, group, dtype)
        return found
    lengths = [(side, share.length(side)) for share, sides in turned(layout, group) for side in sides]
    return _joined(
        dict(zip(KEYS[side], frame.start(n, min(group["basis_block"], n), dtype, p.device), strict=True))
        for side, n in lengths
    )


def shapes(p: Tensor, group: Group) -> dict[str, tuple[int, ...]]:
    """Of what `fresh` makes."""
    if (layout := layout_of(p)) is not None:
        lengths = _lengths(turned(layout, group))
        sizes = {side: _numel(of_matrices, group["basis_block"]) for side, of_matrices in lengths.items()}
        return {key: (size,) for side, size in sizes.items() for key in KEYS[side]}
    found = {side: frame.length(p, side) for side in frame.sides(p, group)}
    return {key: (n, min(group["basis_block"], n)) for side, n in found.items() for key in KEYS[side]}


def check(p: Tensor, group: Group) -> None:
    """Refuse a basis of what is cut in a way that it cannot follow.

    Raises:
        RuntimeError: naming the remedy; on every rank alike.
    """
    if (layout := layout_of(p)) is not None:
        turned(layout, group)
    else:
        frame.check(p, group)


def change(p: Tensor, state: State, after: Group, gamma: float, exponents: str) -> None:
    """Bring a state to the sides and blocks of a group; see `frame.change`."""
    if (layout := layout_of(p)) is None:
        frame.change(p, state, after, gamma, exponents)
        return
    new = dict(turned(layout, after))
    every = [one for one in _sides(layout, {"basis": "both"}) if layout.keeps_rows(one[0])]
    lengths = _lengths(every)
    blocks = {s: _block(n, state[KEYS[s][0]].numel()) for s, n in lengths.items() if KEYS[s][0] in state}
    states = [{**own, "step": state["step"]} for _, own in _split(every, state, blocks)]
    for (share, _), own in zip(every, states, strict=True):
        frame.change(share.of(p.detach()), own, after, gamma, exponents, new.get(share, ()))
    for side in blocks:
        for key in KEYS[side]:
            del state[key]
    state.update(_joined({k: v for k, v in own.items() if k in frame.BASIS_KEYS} for own in states))


def matrices(p: Tensor, state: Mapping[str, Tensor], group: Group) -> Iterator[tuple[Turned, Mapping[str, Tensor]]]:
    """The matrices in a tensor that are turned, and the state of each but its step: views."""
    layout = layout_of(p)
    assert layout is not None
    return _split(turned(layout, group), state, dict.fromkeys(KEYS, int(group["basis_block"])))


def summed_over(p: Tensor, side: Side) -> tuple[tuple[dist.ProcessGroup, ...], torch.device]:
    """The process groups over which a side's covariance is a sum (`frame.cut_over`), and the device on which they talk."""
    layout, here = layout_of(p), frame.device_of(p)
    if layout is None:
        return frame.cut_over(p, side), here
    groups = () if layout.group is None or layout.ranks == 1 or side == "rows" else (layout.group,)
    return groups, layout.device or here


def _sides(layout: Layout, group: Group) -> list[Turned]:
    return [(share, sides) for share in layout.shares if (sides := frame.sides_of(share.shape, group))]


def _lengths(matrices: list[Turned]) -> dict[Side, list[int]]:
    """Of each side that some have, those of all that have it."""
    found: dict[Side, list[int]] = {}
    for share, sides in matrices:
        for side in sides:
            found.setdefault(side, []).append(share.length(side))
    return found


def _numel(lengths: list[int], block: int) -> int:
    """Elements of the bases of sides of these lengths."""
    return sum(n * min(block, n) for n in lengths)


def _block(lengths: list[int], numel: int) -> int:
    """The size of their blocks, of so many elements."""
    return 1 + bisect_left(range(1, max(lengths)), numel, key=lambda block: _numel(lengths, block))


def _split(
    matrices: list[Turned], state: Mapping[str, Tensor], blocks: Mapping[Side, int]
) -> Iterator[tuple[Turned, Mapping[str, Tensor]]]:
    """The state of each matrix, with the bases of the sides that are in `blocks`."""
    reached = dict.fromkeys(KEYS, 0)
    for share, sides in matrices:
        end = share.offset + share.numel
        places = dict.fromkeys(("exp_avg", "exp_avg_sq", "precond"), (share.offset, end, share.columns))
        for side in (side for side in sides if side in blocks):
            n = share.length(side)
            start, block = reached[side], min(blocks[side], n)
            reached[side] += n * block
            places |= dict.fromkeys(KEYS[side], (start, reached[side], block))
        yield (share, sides), _State(state, places)


class _State(Mapping[str, Tensor]):
    """The state of a matrix in a tensor. Views are made when they are asked for: an engine may move the tensor's state in between."""

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
    """The bases of several matrices one after the other."""
    found: dict[str, list[Tensor]] = {}
    for own in states:
        for key, value in own.items():
            found.setdefault(key, []).append(value.reshape(-1))
    return {key: torch.cat(values) for key, values in found.items()}
