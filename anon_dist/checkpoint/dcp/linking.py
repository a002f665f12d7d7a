"""DCP files that are not written again: states that are what they were in an earlier checkpoint of the run are linked to its files.

`precond` and the bases of matrices change at refreshes only, `exp_avg_sq` and the covariances in the windows before them. So each rank
writes each state of that kind into a file of its own. Where all that a file would hold is bit for bit what one of an earlier checkpoint
holds, the file gets a second name (a hard link) in the new folder: DCP, and what copies or removes one of the folders, sees plain files.

Two names are one file, and damage to it is damage to both. So a checkpoint shares files with the last but one, never with the last: of the
last two each can be read whatever befalls the other.
"""

from __future__ import annotations

import os
import queue
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from anon_dist.checkpoint.checksums import checksums
from anon_dist.checkpoint.errors import CheckpointError

_STATE = "optimizer.state."
_MOVING = ("exp_avg", "momentum_buffer")
"""States that change at every step: they lie in the first file of a rank, with the weights."""


@dataclass
class _File:
    """What a rank wrote into a file: a digest of it, and where each piece lies."""

    digest: str
    places: dict[tuple[str, Any], WriteResult]


@dataclass
class _Folder:
    """A checkpoint, as far as this rank wrote it."""

    path: Path
    files: dict[str, _File] = field(default_factory=dict)


class Links:
    """What this rank wrote into the last two checkpoints of a run, for the next one to share.

    Args:
        back: 2: the next shares files with the last but one. 1: with the last, which is to go when that is complete.

    Attributes:
        written: bytes that this rank wrote into data files of the last checkpoint.
        linked: bytes that it linked instead.
    """

    def __init__(self, back: int = 2) -> None:
        self._back = back
        self._published: list[_Folder] = []
        self._writing: dict[str, _File] = {}
        self.written = self.linked = 0

    def source(self) -> _Folder | None:
        """The checkpoint whose files the next one may share."""
        return self._published[-self._back] if len(self._published) >= self._back else None

    def wrote(self, files: dict[str, _File], written: int, linked: int) -> None:
        """Take note of this rank's files in a checkpoint that has not got its place yet."""
        self._writing, self.written, self.linked = files, written, linked

    def published(self, folder: Path) -> None:
        """The checkpoint that was written last has got its place."""
        others = [known for known in self._published if known.path != folder]
        self._published = [*others, _Folder(folder, self._writing)][-self._back :]
        self._writing = {}


class LinkingWriter(FileSystemWriter):
    """torch's writer, into one file for each kind of state; files that would be what `links` knows are linked."""

    def __init__(self, folder: Path, links: Links) -> None:
        super().__init__(folder, sync_files=True)
        self._folder, self._links = folder, links

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See torch's."""
        files: queue.Queue[Any] = queue.Queue()
        results: list[WriteResult] = []
        digests = {}
        for number, items in _by_kind(plan.items).items():
            name = f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}"
            digests[name] = _digest(items, planner) if number else ""
            if (linked := self._linked(name, digests[name], items)) is None:
                files.put((self._folder / name, name, items))
            else:
                results += linked
        written = self._write_data(planner, files).wait()
        sizes = [sum(result.size_in_bytes for result in found) for found in (written, results)]
        results += written
        own: dict[str, _File] = {name: _File(digest, {}) for name, digest in digests.items()}
        for result in results:
            own[result.storage_data.relative_path].places[_place(result.index)] = result
        self._links.wrote(own, *sizes)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _linked(self, name: str, digest: str, items: Sequence[WriteItem]) -> list[WriteResult] | None:
        """Where the pieces lie in a file that was linked; None if it must be written."""
        source = self._links.source()
        if source is None or not digest or (known := source.files.get(name)) is None or known.digest != digest:
            return None
        with suppress(OSError, CheckpointError):  # it is gone, damaged, or on a file system without hard links
            sums = checksums(source.path)
            if sums is None or sums.difference(name) is not None:
                return None
            os.link(source.path / name, self._folder / name)
            found = [known.places[_place(item.index)] for item in items]
            return [
                WriteResult(item.index, r.size_in_bytes, r.storage_data) for item, r in zip(items, found, strict=True)
            ]
        return None


def _by_kind(items: Sequence[WriteItem]) -> dict[int, list[WriteItem]]:
    """The pieces of each of a rank's files, by its number; the first has what changes at every step, and what is no tensor."""
    kinds: dict[str, list[WriteItem]] = defaultdict(list)
    for item in items:
        kinds[_kind(item)].append(item)
    return {number: kinds[kind] for number, kind in enumerate(sorted({"", *kinds})) if kinds[kind]}


def _kind(item: WriteItem) -> str:
    state = item.index.fqn.rpartition(".")[2]
    tensor = item.type != WriteItemType.BYTE_IO and item.tensor_data is not None and len(item.tensor_data.size) > 0
    return state if tensor and item.index.fqn.startswith(_STATE) and state not in _MOVING else ""


def _place(index: Any) -> tuple[str, Any]:
    return index.fqn, index.offset


def _digest(items: Sequence[WriteItem], planner: SavePlanner) -> str:
    """Of all that a file of these pieces holds."""
    found = xxhash.xxh3_128()
    for item in items:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor)
        host = tensor.detach().cpu()
        layout = (_place(item.index), str(host.dtype), tuple(host.shape), host.stride())
        found.update(repr(layout).encode())
        found.update(_bytes(host))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
