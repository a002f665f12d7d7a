"""The canonical folder: safetensors shards, a JSON index and a JSON manifest. It holds whatever any other format holds.

manifest.json                          format version, groups, scalars, extras; all but tensors
index.json                             each tensor's parameter, state, shape, dtype and file
tensors-00001-of-00002.safetensors     tensors; a checksum of each, in the header's order, in its metadata
extras.pt                              what JSON cannot say (torch.load with weights_only=True, or see `pickles`)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from anon_dist.checkpoint.beside import json_file
from anon_dist.checkpoint.boxes import Boxes
from anon_dist.checkpoint.copy import BLOCK
from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.hf import SHARD, shard_file
from anon_dist.checkpoint.inside import inside
from anon_dist.checkpoint.json_values import decode, encode
from anon_dist.checkpoint.mapped import MappedFile
from anon_dist.checkpoint.options import ReadOptions, WriteOptions
from anon_dist.checkpoint.safefile import DTYPES, Entry, Header, read_header
from anon_dist.checkpoint.schema import Checkpoint, Key, Manifest, OutFile, ParamGroup
from anon_dist.checkpoint.statedict import Pieces
from anon_dist.checkpoint.torchfile import lay_out, open_torch

VERSION = 1
_MARK = "anon_dist_checkpoint"
_MANIFEST, _INDEX, _EXTRAS = "manifest.json", "index.json", "extras.pt"
_DIGITS = 16


def detect(path: Path) -> bool:
    """A folder whose manifest says so."""
    try:
        return _MARK in json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (path / _MANIFEST).is_file() and (path / _INDEX).is_file()


class Canonical(Pieces):
    """A canonical folder, opened; `check` compares its contents with the checksums."""

    def __init__(self, folder: Path, options: ReadOptions) -> None:
        described, index = _json(folder / _MANIFEST), _json(folder / _INDEX)
        if described.get(_MARK) != VERSION:
            raise CheckpointError(
                f"{folder / _MANIFEST} is of format version {described.get(_MARK)}; this version of anon-dist reads {VERSION}"
            )
        beyond = open_torch(folder / _EXTRAS, options.unsafe) if (folder / _EXTRAS).is_file() else []
        try:
            manifest = replace(_manifest(decode(described["manifest"], beyond)), format="canonical")
            self._headers = {
                name: _header(inside(folder, name, _INDEX))
                for name in dict.fromkeys(t["file"] for t in index["tensors"])
            }
            sources = {Key(t["parameter"], t["state"]): self._source(folder, t) for t in index["tensors"]}
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise DamagedCheckpoint(f"{folder}: {_MANIFEST} or {_INDEX} is damaged: {error!r}") from None
        super().__init__(manifest, sources, str(folder))

    def _source(self, folder: Path, tensor: Mapping[str, Any]) -> Boxes:
        file, header = self._headers[tensor["file"]]
        entry = header.entries.get(_name(Key(tensor["parameter"], tensor["state"])))
        if entry is None or entry.shape != tuple(tensor["shape"]) or entry.dtype != DTYPES[tensor["dtype"]]:
            raise DamagedCheckpoint(
                f"{file.path} does not hold {tensor['state']} of {tensor['parameter']} as {_INDEX} says"
            )
        return Boxes.whole(file.tensor(entry.dtype, entry.start, entry.numel).view(entry.shape))

    def check(self) -> list[str]:
        """Every tensor against its checksum; those that differ, with their files."""
        wrong = []
        for file, header in self._headers.values():
            recorded = header.metadata.get("xxh3", "")
            for i, (name, entry) in enumerate(header.entries.items()):
                if _digest(file, entry, {}) != recorded[i * _DIGITS : (i + 1) * _DIGITS]:
                    wrong.append(f"{file.path}: {name} is damaged (its checksum differs)")
        return wrong


def open_canonical(path: Path, options: ReadOptions) -> Checkpoint:
    """See `formats.Format`.

    Raises:
        CheckpointError: a file is missing or damaged, or of a later version.
    """
    opened = Canonical(path, options)
    if options.check and (wrong := opened.check()):
        raise DamagedCheckpoint(
            f"{wrong[0]}{f', and {len(wrong) - 1} more' if len(wrong) > 1 else ''}. Take another checkpoint"
        )
    return opened


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
        blank = {"xxh3": "0" * _DIGITS * len(keys)}
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
    files.append(json_file(_MANIFEST, {_MARK: VERSION, "manifest": encode(manifest, beyond)}))
    files.append(json_file(_INDEX, {"tensors": index}))
    return [*files, lay_out(PurePosixPath(_EXTRAS), beyond)] if beyond else files


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


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _header(path: Path) -> tuple[MappedFile, Header]:
    file = MappedFile(path)
    return file, read_header(file)


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
        known = {offset: block.digest() for offset, block in self._blocks.items()}
        digests = "".join(_digest(file, entry, known) for entry in read_header(file).entries.values())
        blank = file.read(0, 64 + len(digests)).index(b'"xxh3":"') + len('"xxh3":"')
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.pwrite(descriptor, digests.encode(), blank)
        finally:
            os.close(descriptor)


def _digest(file: MappedFile, entry: Entry, known: Mapping[int, bytes]) -> str:
    """xxh3 of the xxh3 of each block of a tensor."""
    whole = xxhash.xxh3_64()
    stop = entry.start + entry.numel * entry.dtype.itemsize
    for start in range(entry.start, stop, BLOCK):
        block = known.get(start)
        whole.update(block or xxhash.xxh3_64_digest(file.read(start, min(BLOCK, stop - start))))
    return whole.hexdigest()
