"""A checkpoint whose tensors are put together of pieces of mapped files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anon_dist.checkpoint.errors import DamagedCheckpoint
from anon_dist.checkpoint.schema import EXTRA, Checkpoint, Key, Manifest, Ref, TensorInfo
from anon_dist.checkpoint.torchfiles.mapped import verified

LARGE = 1 << 20
"""Elements above which a tensor among the extras is streamed, not kept."""


class Piece(NamedTuple):
    """Elements [start, stop) of a flattened tensor."""

    start: int
    stop: int
    values: Tensor
    """Of any shape, with them from `offset` on; a view of a mapped file. No view of its own for each piece: there may be very many."""
    offset: int
    file: Path


def entire(values: Tensor, file: Path) -> list[Piece]:
    """A tensor that lies in one piece."""
    return [Piece(0, values.numel(), values, 0, file)]


class Pieces(Checkpoint):
    """See `schema.Checkpoint`. Nothing is read before it is asked for.

    Raises:
        CheckpointError: the pieces of a tensor leave a gap, overlap, or go beyond it; naming file and tensor.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.tensors: dict[Key, TensorInfo] = {}
        self._pieces: dict[Key, list[Piece]] = {}

    def add(self, key: Key, info: TensorInfo, pieces: Iterable[Piece]) -> None:
        """A tensor; a piece of another dtype is cast when it is read."""
        ordered = sorted(pieces, key=lambda piece: piece.start)
        reached, file = 0, ordered[0].file if ordered else Path()
        for piece in ordered:
            if piece.start != reached:
                what = f"elements {reached} to {piece.start} are missing" if piece.start > reached else "pieces overlap"
                raise DamagedCheckpoint(f"{piece.file}: {key.parameter}, {key.state}: {what}")
            reached, file = piece.stop, piece.file
        if reached != info.numel:
            raise DamagedCheckpoint(f"{file}: {key.parameter}, {key.state}: {reached} elements, shape {info.shape}")
        self.tensors[key], self._pieces[key] = info, ordered

    def add_nested(self, path: str, value: Any, file: Path, parameter: str | None = None) -> Any:
        """A value for `Manifest.extras`, or for `scalars` of a parameter: copied, `Ref`s instead of its (of extras: large) tensors."""
        if isinstance(value, Tensor):
            if value.dim() == 0 or (parameter is None and value.numel() <= LARGE):
                return verified(value).detach().clone()
            key = Key(path, EXTRA) if parameter is None else Key(parameter, path)
            self.add(key, TensorInfo(tuple(value.shape), value.dtype), entire(value, file))
            return Ref(key)
        if isinstance(value, Mapping):
            return {k: self.add_nested(f"{path}.{k}", v, file, parameter) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.add_nested(f"{path}.{i}", v, file, parameter) for i, v in enumerate(value))
        return value

    def read(self, key: Key, start: int, stop: int) -> Tensor:
        """See `schema.Checkpoint`."""
        dtype, found = self.tensors[key].dtype, []
        for piece in self._pieces[key]:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                values, shift = piece.values.detach(), piece.offset - piece.start
                flat = values.view(-1) if values.is_contiguous() else verified(values).reshape(-1)
                found.append(verified(flat[first + shift : last + shift]).to(dtype))
        if len(found) == 1:
            return found[0]
        return torch.cat(found) if found else torch.empty(0, dtype=dtype)

    def close(self) -> None:
        """See `schema.Checkpoint`."""
        self._pieces.clear()
