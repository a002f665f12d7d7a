"""A tensor that lies in pieces: read by ranges of its flattened elements, whatever boxes the pieces are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.torchfiles.mapped import verified


@dataclass(frozen=True)
class Box:
    """A piece: the elements [offset, offset + size) along each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    load: Callable[[], Tensor]
    """The piece, of shape `sizes`; a view of a mapped file. Called once for each read."""


class Boxes:
    """A tensor in pieces that do not overlap and leave nothing out.

    Raises:
        CheckpointError: elements are missing.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, boxes: Sequence[Box]) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self._boxes = sorted((b for b in boxes if 0 not in b.sizes), key=lambda b: b.offsets)
        held, wanted = sum(prod(b.sizes) for b in self._boxes), prod(self.shape)
        if held != wanted:
            raise CheckpointError(f"pieces of {held} elements for a tensor of shape {self.shape}, {wanted} elements")

    @classmethod
    def whole(cls, tensor: Tensor) -> Boxes:
        """A tensor in one piece."""
        shape = tuple(tensor.shape)
        return cls(shape, tensor.dtype, [Box((0,) * len(shape), shape, lambda: tensor)])

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), 1-D; a view where they lie together in one piece."""
        if stop <= start:
            return torch.empty(0, dtype=self.dtype)
        rows = self._by_rows(start, stop)
        if rows is not None:
            return rows[0] if len(rows) == 1 else torch.cat(rows)
        out = torch.empty(stop - start, dtype=self.dtype)
        pieces = [(b.offsets, b.sizes, b.load()) for b in self._boxes if self._meets(b, start, stop)]
        _gather(out, self.shape, start, pieces)
        return out

    def pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        """The same in consecutive pieces, which are views where the boxes are whole rows."""
        rows = self._by_rows(start, stop) if stop > start else []
        yield from [self.read(start, stop)] if rows is None else rows

    def _row(self) -> int:
        return prod(self.shape[1:]) if self.shape else 1

    def _meets(self, box: Box, start: int, stop: int) -> bool:
        if not self.shape:
            return True
        row = self._row()
        return box.offsets[0] * row < stop and (box.offsets[0] + box.sizes[0]) * row > start

    def _by_rows(self, start: int, stop: int) -> list[Tensor] | None:
        """The elements as views, if the pieces that hold them are contiguous and consist of whole rows."""
        row, found = self._row(), []
        for box in self._boxes:
            if not self._meets(box, start, stop):
                continue
            piece = box.load()
            if tuple(box.sizes[1:]) != self.shape[1:] or not piece.is_contiguous():
                return None
            first = box.offsets[0] * row if self.shape else 0
            found.append(verified(piece.view(-1)[max(start - first, 0) : stop - first]))
        return found


def _gather(
    out: Tensor, shape: tuple[int, ...], start: int, pieces: Sequence[tuple[Sequence[int], Sequence[int], Tensor]]
) -> None:
    """Fill `out` with the elements from `start` on of a tensor of this shape: a part of a row, whole rows, a part of a row."""
    if len(shape) <= 1:
        for offsets, sizes, piece in pieces:
            first, size = (offsets[0], sizes[0]) if shape else (0, 1)
            low, high = max(first, start), min(first + size, start + len(out))
            if low < high:
                out[low - start : high - start] = verified(
                    piece.reshape(1) if not shape else piece[low - first : high - first]
                )
        return
    row, stop = prod(shape[1:]), start + len(out)
    first_whole, last_whole = -(-start // row), stop // row
    for index in sorted({start // row, last_whole}):
        low, high = max(start, index * row), min(stop, (index + 1) * row)
        if low < high and not first_whole <= index < last_whole:
            inside = [(o[1:], s[1:], piece[index - o[0]]) for o, s, piece in pieces if o[0] <= index < o[0] + s[0]]
            _gather(out[low - start : high - start], shape[1:], low - index * row, inside)
    if first_whole < last_whole:
        whole = out[first_whole * row - start : last_whole * row - start].view(last_whole - first_whole, *shape[1:])
        for offsets, sizes, piece in pieces:
            low, high = max(offsets[0], first_whole), min(offsets[0] + sizes[0], last_whole)
            if low < high:
                target = whole[low - first_whole : high - first_whole]
                for dim in range(1, len(shape)):
                    target = target.narrow(dim, offsets[dim], sizes[dim])
                target.copy_(verified(piece[low - offsets[0] : high - offsets[0]]))
