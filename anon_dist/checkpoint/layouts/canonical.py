"""The canonical folder: safetensors shards, a JSON index and a JSON manifest. It holds whatever any other format holds.

manifest.json                          format version, groups, scalars, extras; all but tensors
index.json                             each tensor's parameter, state, shape, dtype and file; checksums of the files with no tensors
tensors-00001-of-00002.safetensors     tensors; in the metadata a checksum of each of their blocks, in the header's order
extras.pt                              what JSON cannot say (torch.load with weights_only=True, or see `pickles`)

Nothing of it is taken unchecked: a block of a tensor is compared with its checksum when a byte of it is first read, the small files when
the folder is opened, and the headers say the same as the index. Version 1, which is still read, had one checksum for a tensor and none
of the small files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash
from torch import Tensor

from anon_dist.checkpoint.beside import json_file
from anon_dist.checkpoint.boxes import Box, Boxes
from anon_dist.checkpoint.checksums import DIGITS, FileSums
from anon_dist.checkpoint.copy import BLOCK
from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.inside import inside
from anon_dist.checkpoint.json_values import decode, encode, loads
from anon_dist.checkpoint.layouts.hf import SHARD, shard_file
from anon_dist.checkpoint.layouts.statedict import Pieces
from anon_dist.checkpoint.options import ReadOptions, WriteOptions
from anon_dist.checkpoint.schema import Checkpoint, Key, Manifest, OutFile, ParamGroup
from anon_dist.checkpoint.torchfiles.mapped import MappedFile
from anon_dist.checkpoint.torchfiles.safefile import DTYPES, Header, read_header
from anon_dist.checkpoint.torchfiles.torchfile import open_torch, to_bytes
from anon_dist.optim.frame import present_key

VERSION = 2
_MARK = "anon_dist_checkpoint"
_MANIFEST, _INDEX, _EXTRAS = "manifest.json", "index.json", "extras.pt"
_SUMS, _SEAL = "xxh3", "self"
"""In the index: file → checksum; and the index's own, taken without it."""


def detect(path: Path) -> bool:
    """A folder whose manifest says so."""
    try:
        return _MARK in json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (path / _MANIFEST).is_file() and (path / _INDEX).is_file()


class Canonical(Pieces):
    """A canonical folder, opened."""

    def __init__(self, folder: Path, options: ReadOptions) -> None:
        try:
            index = _index(folder)
            described = _loaded(folder / _MANIFEST, index.get(_SUMS))
            if (version := described.get(_MARK)) not in (1, VERSION):
                raise CheckpointError(
                    f"{folder / _MANIFEST} is of format version {version}; this version of anon-dist reads {VERSION}"
                )
            if version == VERSION and _SUMS not in index:
                raise KeyError(_SUMS)
            beyond = _beyond(folder, index.get(_SUMS), options.unsafe)
            manifest = replace(_manifest(decode(described["manifest"], beyond)), format="canonical")
            names = dict.fromkeys(t["file"] for t in index["tensors"])
            self._shards = {name: _shard(folder, name, version) for name in names}
            states: dict[str, set[str]] = {}
            for t in index["tensors"]:
                states.setdefault(t["parameter"], set()).add(t["state"])
            keys = [Key(t["parameter"], present_key(t["state"], states[t["parameter"]])) for t in index["tensors"]]
            sources = {key: self._source(t) for key, t in zip(keys, index["tensors"], strict=True)}
            if len(sources) < len(index["tensors"]):
                raise ValueError("a tensor is in the index twice")
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise DamagedCheckpoint(f"{folder}: {_MANIFEST} or {_INDEX} is damaged: {error!r}") from None
        super().__init__(manifest, sources, str(folder))

    def _source(self, tensor: Mapping[str, Any]) -> Boxes:
        file, header = self._shards[tensor["file"]]
        entry = header.entries.get(_name(Key(tensor["parameter"], tensor["state"])))
        if entry is None or entry.shape != tuple(tensor["shape"]) or entry.dtype != DTYPES[tensor["dtype"]]:
            raise DamagedCheckpoint(
                f"{file.path} does not hold {tensor['state']} of {tensor['parameter']} as {_INDEX} says"
            )

        def load() -> Tensor:
            return file.tensor(entry.dtype, entry.start, entry.numel).view(entry.shape)

        return Boxes(entry.shape, entry.dtype, [Box((0,) * len(entry.shape), entry.shape, load)])

    def check(self) -> list[str]:
        """Every tensor against its checksums; what is wrong with those that differ."""
        wrong = []
        for file, header in self._shards.values():
            for name, entry in header.entries.items():
                try:
                    file.check(entry.start, entry.stop)
                except DamagedCheckpoint as error:
                    wrong.append(f"{name}: {error}")
        return wrong


def open_canonical(path: Path, options: ReadOptions) -> Checkpoint:
    """See `formats.Format`.

    Raises:
        CheckpointError: a file is missing or damaged, or of a later version.
    """
    return Canonical(path, options)


def plan(checkpoint: Checkpoint, options: WriteOptions) -> list[OutFile]:
    """The folder's files.

    Raises:
        CheckpointError: a tensor's dtype is none of safetensors'.
    """
    shards = _shards(checkpoint)
    names = [f"tensors-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files, index = [], []
    codes = {dtype: code for code, dtype in DTYPES.items()}
    for name, keys in zip(names, shards, strict=True):
        blocks = sum(
            len(_starts(checkpoint.tensors[key].numel * checkpoint.tensors[key].dtype.itemsize)) for key in keys
        )
        blank = {"xxh3": "0" * DIGITS * blocks}
        file = shard_file(checkpoint, name, {_name(k): k for k in keys}, blank)
        checksums = _Checksums()
        file.finish, file.observe = checksums.finish, checksums.observe
        files.append(file)
        for key in keys:
            info = checkpoint.tensors[key]
            where = {"parameter": key.parameter, "state": key.state, "file": name}
            index.append({**where, "shape": list(info.shape), "dtype": codes[info.dtype]})
    beyond: list[Any] = []
    manifest = {k: v for k, v in vars(checkpoint.manifest).items() if k != "groups"}
    manifest["groups"] = [vars(g) for g in checkpoint.manifest.groups]
    small = [json_file(_MANIFEST, {_MARK: VERSION, "manifest": encode(manifest, beyond)})]
    if beyond:
        data = to_bytes(beyond)
        small.append(OutFile(PurePosixPath(_EXTRAS), len(data), [(0, data)], []))
    sums = {str(file.path): xxhash.xxh3_64_hexdigest(file.literals[0][1]) for file in small}
    content = {"tensors": index, _SUMS: sums}
    return [*files, *small, json_file(_INDEX, {**content, _SEAL: _sealing(content)})]


def _shards(checkpoint: Checkpoint) -> list[list[Key]]:
    shards: list[list[Key]] = []
    size = SHARD
    for key, info in checkpoint.tensors.items():
        nbytes = info.numel * info.dtype.itemsize
        if size + nbytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += nbytes
    return shards


def _name(key: Key) -> str:
    return f"{key.state}:{key.parameter}"


def _manifest(values: dict[str, Any]) -> Manifest:
    groups = [ParamGroup(**g) for g in values.pop("groups")]
    return Manifest(groups=groups, **values)


def _index(folder: Path) -> dict[str, Any]:
    found = _loaded(folder / _INDEX, None)
    if _SUMS in found and found.pop(_SEAL) != _sealing(found):
        raise DamagedCheckpoint(f"{folder / _INDEX} is damaged: its checksum differs. Take another checkpoint")
    return found


def _sealing(index: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(index, sort_keys=True).encode())


def _loaded(path: Path, sums: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        found = loads(_content(path, sums))
    except ValueError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _beyond(folder: Path, sums: Mapping[str, str] | None, unsafe: bool) -> list[Any]:
    if _EXTRAS not in sums if sums is not None else not (folder / _EXTRAS).is_file():
        return []
    _content(folder / _EXTRAS, sums)
    found: list[Any] = open_torch(folder / _EXTRAS, unsafe)
    return found


def _content(path: Path, sums: Mapping[str, str] | None) -> bytes:
    """A small file, compared with its checksum if it has one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from None
    if sums is not None and xxhash.xxh3_64_hexdigest(data) != sums[path.name]:
        raise DamagedCheckpoint(f"{path} is damaged: its checksum differs. Take another checkpoint")
    return data


def _shard(folder: Path, name: str, version: int) -> tuple[MappedFile, Header]:
    """A file of tensors, which are checked as they are read; those of version 1 now."""
    file = MappedFile(inside(folder, name, _INDEX))
    header = read_header(file)
    recorded = header.metadata.get("xxh3", "")
    if version == 1:
        _check_whole(file, header, recorded)
    else:
        file.expect(FileSums(folder, name, file.size, _block_starts(header), recorded))
    return file, header


def _check_whole(file: MappedFile, header: Header, recorded: str) -> None:
    """Of version 1, which has the xxh3 of the xxh3 of each block of a tensor."""
    for i, (name, entry) in enumerate(header.entries.items()):
        whole = xxhash.xxh3_64()
        for start in _starts(entry.stop, entry.start):
            whole.update(xxhash.xxh3_64_digest(file.read(start, min(BLOCK, entry.stop - start))))
        if whole.hexdigest() != recorded[i * DIGITS : (i + 1) * DIGITS]:
            raise DamagedCheckpoint(f"{file.path}: {name} is damaged (its checksum differs). Take another checkpoint")


def _starts(stop: int, start: int = 0) -> range:
    """First bytes of the blocks of a tensor."""
    return range(start, stop, BLOCK)


def _block_starts(header: Header) -> list[int]:
    """Of all tensors, in the header's order, which is that of the file."""
    return [start for entry in header.entries.values() for start in _starts(entry.stop, entry.start)]


class _Checksums:
    """The checksums of a shard, taken from the blocks as they are written; of blocks that were written before, from the file."""

    def __init__(self) -> None:
        self._blocks: dict[int, xxhash.xxh3_64] = {}

    def observe(self, offset: int, data: memoryview) -> None:
        """See `OutFile`."""
        if offset not in self._blocks:
            self._blocks[offset] = xxhash.xxh3_64()
        self._blocks[offset].update(data)

    def finish(self, path: Path) -> None:
        """Fill in the blank that the header has for them."""
        file = MappedFile(path)
        digests = ""
        for entry in read_header(file).entries.values():
            for start in _starts(entry.stop, entry.start):
                known = self._blocks.get(start) or xxhash.xxh3_64(file.read(start, min(BLOCK, entry.stop - start)))
                digests += known.hexdigest()
        blank = file.read(0, 64 + len(digests)).index(b'"xxh3":"') + len('"xxh3":"')
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.pwrite(descriptor, digests.encode(), blank)
        finally:
            os.close(descriptor)
