"""Torch's distributed checkpoint folders (DCP), read without a process group, a model, or running code."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from anon_dist.checkpoint.boxes import Box, Boxes
from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.inside import inside
from anon_dist.checkpoint.torchfiles.mapped import MappedFile
from anon_dist.checkpoint.torchfiles.pickles import STAND_INS, ForbiddenClass, restricted
from anon_dist.checkpoint.torchfiles.safefile import Entry, read_header
from anon_dist.checkpoint.torchfiles.torchfile import open_embedded
from anon_dist.optim.frame import BASIS_KEYS, FORMER_KEYS, present_key

METADATA = ".metadata"
_CLASSES = {
    "torch.distributed.checkpoint.metadata": metadata,
    "torch.distributed.checkpoint.filesystem": filesystem,
}
_NAMES = (
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "_MEM_FORMAT_ENCODING",
    "MetadataIndex",
    "StorageMeta",
    "_StorageInfo",
)


class DcpFiles:
    """The files of a folder with a `.metadata`, and where in them everything lies.

    Attributes:
        meta: torch's `Metadata`.
        places: (key, offsets of a piece) → file, offset and length.

    Raises:
        DamagedCheckpoint: a file is missing, damaged or truncated.
        CheckpointError: the metadata asks for more than its own classes, or for files elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = read_metadata(folder)
        self.file: Callable[[str], MappedFile] = cache(lambda name: MappedFile(inside(folder, name, METADATA)))
        try:
            self._former = _take_present_keys(self.meta)
            stored = (self.meta.storage_data or {}).items()
            self.places = {(index.fqn, tuple(index.offset or ())): info for index, info in stored}
        except (AttributeError, TypeError) as error:
            raise DamagedCheckpoint(f"{folder}/{METADATA} is damaged: {error}") from None

    def place(self, key: str, offsets: tuple[int, ...]) -> Any:
        """Where a piece lies; its file is opened, and reaches as far."""
        info = self.places.get((key, offsets))
        if info is None:
            raise DamagedCheckpoint(
                f"{self.folder}/{METADATA} does not say where {key}{list(offsets) or ''} is; it is damaged"
            )
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(
                f"{self.folder}: {key} is stored with the extension {info.transform_descriptors[0]}, which is not read here"
            )
        if min(info.offset, info.length) < 0 or info.offset + info.length > (
            size := self.file(info.relative_path).size
        ):
            raise DamagedCheckpoint(
                f"{self.folder}/{info.relative_path} has {size} bytes, but {key} ends at byte {info.offset + info.length}: "
                "it is truncated. Take another checkpoint, or copy it again"
            )
        return info

    def value(self, info: Any, stand_ins: Mapping[str, Collection[str]] | None = None) -> Any:
        """What is no tensor, all of it checked. Stand-ins are none by default: training has no use for them."""
        file = self.file(info.relative_path)
        file.check(info.offset, info.offset + info.length)
        return open_embedded(file, info.offset, info.length, stand_ins or {})

    def tensor(self, key: str, info: Any) -> Tensor:
        """A piece of a tensor; see `MappedFile.tensor`."""
        file = self.file(info.relative_path)
        if file.read(info.offset, 2) == b"PK":
            tensor = open_embedded(file, info.offset, info.length)
        else:
            entry = _safetensors(file).get(self._former.get(key, key))
            if entry is None:
                raise DamagedCheckpoint(f"{file.path}: {key} is in neither of DCP's formats there; it is damaged")
            tensor = file.tensor(entry.dtype, entry.start, entry.numel).view(entry.shape)
        if not isinstance(tensor, Tensor):
            raise DamagedCheckpoint(f"{file.path}: {key} is no tensor, and should be one")
        return tensor


class DcpFolder:
    """A DCP folder as a nested dictionary.

    Attributes:
        tree: what was saved, nested as it was; tensors with dimensions are `Boxes`.
        world_size: ranks that wrote files.

    Raises:
        CheckpointError: see `DcpFiles`.
    """

    def __init__(self, folder: Path) -> None:
        self._files = DcpFiles(folder)
        self._tried: set[str] = set()
        try:
            self._build()
        except CheckpointError:
            raise
        except Exception as error:  # entries that are no metadata's raise whatever the first leads to
            raise DamagedCheckpoint(f"{folder}/{METADATA} is damaged: {type(error).__name__}: {error}") from None

    def _build(self) -> None:
        ranks = {m[1] for info in self._files.places.values() if (m := re.match(r"__(\d+)_", info.relative_path))}
        self.world_size = max(map(int, ranks), default=0) + 1
        for key, offsets in self._files.places:
            self._files.place(key, offsets)
        paths: Mapping[str, tuple[Any, ...]] = self._files.meta.planner_data or {}
        self.tree: dict[str, Any] = {}
        for key, description in self._files.meta.state_dict_metadata.items():
            _insert(self.tree, paths.get(key, (key,)), self._leaf(key, description))
        self.tree = _lists(self.tree)

    def _leaf(self, key: str, description: Any) -> Any:
        if isinstance(description, metadata.BytesStorageMetadata):
            return self._files.value(self._files.place(key, ()), STAND_INS)
        shape, dtype = tuple(description.size), description.properties.dtype
        boxes = []
        for chunk in description.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if 0 in sizes:
                continue
            info = self._files.place(key, offsets)
            boxes.append(Box(offsets, sizes, cache(partial(self._load, key, dtype, sizes, info))))
            if (state := key.rpartition(".")[2]) not in self._tried:  # a subclass shows in the pickle alone
                self._tried.add(state)
                boxes[-1].load()
        unique = {b.offsets: b for b in boxes}
        try:
            found = Boxes(shape, dtype, list(unique.values()))
        except CheckpointError as error:
            raise DamagedCheckpoint(
                f"{self._files.folder}/{METADATA}: {key}: {error}; a rank's part is missing"
            ) from None
        return found if shape else found.read(0, 1).clone().reshape(())

    def _load(self, key: str, dtype: torch.dtype, sizes: tuple[int, ...], info: Any) -> Tensor:
        tensor = self._files.tensor(key, info)
        if tuple(tensor.shape) != sizes or tensor.dtype != dtype:
            path = self._files.file(info.relative_path).path
            raise DamagedCheckpoint(f"{path}: {key} is not the {dtype} tensor of shape {sizes} it should be")
        return tensor


@cache
def _safetensors(file: MappedFile) -> Mapping[str, Entry]:
    try:
        return read_header(file).entries
    except CheckpointError:
        return {}


def read_metadata(folder: Path) -> Any:
    """The `Metadata` of a folder.

    Raises:
        CheckpointError: see `DcpFolder`.
    """
    path = folder / METADATA

    def known(module: str, name: str) -> Any:
        return getattr(_CLASSES[module], name) if module in _CLASSES and name in _NAMES else None

    try:
        file = MappedFile(path)
        found = restricted(stand_ins={}, also=known).load(io.BytesIO(file.read(0, file.size)))
        if not isinstance(found, metadata.Metadata):
            raise ValueError(f"it holds a {type(found).__name__}")
        return found
    except ForbiddenClass as error:
        raise CheckpointError(f"{path} holds an object of {error}, which no DCP metadata has; it is not read") from None
    except CheckpointError:
        raise
    except Exception as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error}): it is damaged, or no DCP checkpoint") from None


def _take_present_keys(meta: Any) -> dict[str, str]:
    """Give Anon's states the keys that they have today, in place. Returns each key that was changed, with what it was."""
    keys = meta.state_dict_metadata
    found: dict[str, str] = {}
    for key in keys:
        parameter, _, state = key.rpartition(".")
        if state in FORMER_KEYS:
            beside = [s for s in ("precond", *BASIS_KEYS) if f"{parameter}.{s}" in keys]
            found[key] = f"{parameter}.{present_key(state, beside)}"
    if not found:
        return {}

    def renamed(path: tuple[Any, ...], key: str) -> tuple[Any, ...]:
        """A path in the nested dictionary. Its last part is the state, or ends with it where keys were flat when they were saved."""
        old, new = (k.rpartition(".")[2] for k in (key, found.get(key, key)))
        return (*path[:-1], str(path[-1]).removesuffix(old) + new) if old != new else path

    meta.state_dict_metadata = {found.get(key, key): value for key, value in keys.items()}
    meta.planner_data = {found.get(key, key): renamed(p, key) for key, p in (meta.planner_data or {}).items()}
    meta.storage_data = {
        replace(index, fqn=found.get(index.fqn, index.fqn)): place for index, place in (meta.storage_data or {}).items()
    }
    return {new: key for key, new in found.items()}


def _insert(tree: dict[Any, Any], path: tuple[Any, ...], leaf: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = leaf


def _lists(tree: Any) -> Any:
    """Dictionaries with keys 0, 1, … (integers, not strings) were lists."""
    if not isinstance(tree, dict):
        return tree
    inner = {k: _lists(v) for k, v in tree.items()}
    if inner and all(type(k) is int for k in inner) and sorted(inner) == list(range(len(inner))):
        return [inner[i] for i in range(len(inner))]
    return inner
