"""Torch's distributed checkpoint folders (DCP), laid out as FSDP2 on any number of ranks writes them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from anon_dist.checkpoint.schema import OutFile, Part, Region, Stub
from anon_dist.checkpoint.torchfiles.torchfile import lay_out, to_bytes

Path = tuple[str | int, ...]


def flatten(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Leaves with their paths, as torch's `flatten_state_dict` has them: lists are opened if tensors or dictionaries are in them."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from flatten(value, (*path, str(key)))
    elif isinstance(tree, list) and not _terminal(tree):
        for index, value in enumerate(tree):
            yield from flatten(value, (*path, index))
    else:
        yield path, tree


def _terminal(value: list[Any]) -> bool:
    return not any(isinstance(v, Tensor | Stub | Mapping) or (isinstance(v, list) and not _terminal(v)) for v in value)


class _RankFile:
    """One rank's file: saved objects one after the other."""

    def __init__(self, path: PurePosixPath) -> None:
        self.path, self.size = path, 0
        self._literals: list[tuple[int, bytes]] = []
        self._regions: list[Region] = []

    def add(self, obj: Any) -> _StorageInfo:
        """Append what `torch.save(obj)` writes."""
        if isinstance(obj, Stub):
            laid_out = lay_out(self.path, obj)
            literals, regions, size = laid_out.literals, laid_out.regions, laid_out.size
        else:
            data = to_bytes(obj)
            literals, regions, size = [(0, data)], [], len(data)
        start = self.size
        self._literals += [(start + offset, data) for offset, data in literals]
        self._regions += [Region(r.part, r.dtype, start + r.offset) for r in regions]
        self.size += size
        return _StorageInfo(self.path.name, start, size)

    def file(self) -> OutFile:
        """What has been added."""
        return OutFile(self.path, self.size, self._literals, self._regions)


def dcp_files(folder: PurePosixPath, tree: Mapping[str, Any], world_size: int) -> list[OutFile]:
    """The files of a DCP folder: rank files, then `.metadata`.

    Tensors of one or more dimensions are cut along the first as `torch.chunk` does, a piece for each rank; everything else is on rank 0.
    """
    ranks = [_RankFile(folder / f"__{rank}_0.distcp") for rank in range(world_size)]
    meta = Metadata({}, {}, {}, StorageMeta(), "1.0.0")
    for path, value in flatten(tree):
        key = ".".join(map(str, path))
        if key in meta.state_dict_metadata:
            raise ValueError(f"two values have the flat key {key}")
        meta.planner_data[key] = path
        if not isinstance(value, Tensor | Stub):
            meta.state_dict_metadata[key] = BytesStorageMetadata()
            meta.storage_data[MetadataIndex(key)] = ranks[0].add(value)
            continue
        shape = tuple(value.shape)
        described = TensorStorageMetadata(TensorProperties(dtype=value.dtype), torch.Size(shape), [])
        meta.state_dict_metadata[key] = described
        for rank, first, rows in _chunks(shape, world_size if isinstance(value, Stub) else 1):
            offsets, sizes = torch.Size((first, *(0,) * (len(shape) - 1)))[: len(shape)], torch.Size((rows, *shape[1:]))
            described.chunks.append(ChunkStorageMetadata(offsets, sizes if shape else torch.Size(())))
            piece = _rows(value, first, rows) if isinstance(value, Stub) and shape else value
            meta.storage_data[MetadataIndex(key, offsets, len(described.chunks) - 1)] = ranks[rank].add(piece)
    data = pickle.dumps(meta, protocol=4)
    files = [rank.file() for rank in ranks]
    return [*files, OutFile(folder / ".metadata", len(data), [(0, data)], [])]


def _chunks(shape: Sequence[int], world_size: int) -> Iterator[tuple[int, int, int]]:
    """Rank, first row, number of rows; ranks without rows have no piece."""
    rows = shape[0] if shape else 1
    each = -(-rows // world_size)
    for rank in range(world_size):
        first = rank * each
        if first < rows or (rank == 0 and rows == 0):
            yield rank, first, min(each, rows - first)


def _rows(stub: Stub, first: int, rows: int) -> Stub:
    row = prod(stub.shape[1:])
    return Stub((rows, *stub.shape[1:]), stub.dtype, list(cut(stub.parts, first * row, (first + rows) * row)))


def cut(parts: Sequence[Part], start: int, stop: int) -> Iterator[Part]:
    """Elements [start, stop) of parts that lie one after the other."""
    at = 0
    for part in parts:
        size = part.stop - part.start
        low, high = max(start - at, 0), min(stop - at, size)
        if low < high:
            yield part._replace(start=part.start + low, stop=part.start + high)
        at += size
