"""Torch's distributed checkpoint folders (DCP), read without a process group, a model, or running code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from anon_dist.checkpoint.boxes import Box, Boxes
from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.pickles import ForbiddenClass, restricted
from anon_dist.checkpoint.safefile import Entry, read_header
from anon_dist.checkpoint.torchfile import MappedFile, open_embedded

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


class DcpFolder:
    """One folder with a `.metadata` file.

    Attributes:
        tree: what was saved, nested as it was; tensors with dimensions are `Boxes`.
        world_size: ranks that wrote files.

    Raises:
        CheckpointError: a file is missing, damaged or truncated; the metadata asks for more than its own classes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tried: set[str] = set()
        self._meta = read_metadata(folder)
        self._file: Callable[[str], MappedFile] = cache(lambda name: MappedFile(folder / name))
        self._places = {(i.fqn, tuple(i.offset or ())): info for i, info in (self._meta.storage_data or {}).items()}
        ranks = {m[1] for _, info in self._places.items() if (m := re.match(r"__(\d+)_", info.relative_path))}
        self.world_size = max(map(int, ranks), default=0) + 1
        self._check_files()
        paths: Mapping[str, tuple[Any, ...]] = self._meta.planner_data or {}
        self.tree: dict[str, Any] = {}
        for key, description in self._meta.state_dict_metadata.items():
            _insert(self.tree, paths.get(key, (key,)), self._leaf(key, description))
        self.tree = _lists(self.tree)

    def _check_files(self) -> None:
        """That every piece lies within its file."""
        for (key, _), info in self._places.items():
            if getattr(info, "transform_descriptors", None):
                raise CheckpointError(
                    f"{self._folder}: {key} is stored with the extension {info.transform_descriptors[0]}, which is not read here"
                )
            if info.offset + info.length > (size := self._file(info.relative_path).size):
                raise CheckpointError(
                    f"{self._folder}/{info.relative_path} has {size} bytes, but {key} ends at byte {info.offset + info.length}: "
                    "it is truncated. Take another checkpoint, or copy it again"
                )

    def _leaf(self, key: str, description: Any) -> Any:
        if isinstance(description, metadata.BytesStorageMetadata):
            info = self._place(key, ())
            return open_embedded(self._file(info.relative_path), info.offset, info.length)
        shape, dtype = tuple(description.size), description.properties.dtype
        boxes = []
        for chunk in description.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if 0 in sizes:
                continue
            info = self._place(key, offsets)
            boxes.append(Box(offsets, sizes, cache(partial(self._load, key, dtype, sizes, info))))
            if (state := key.rpartition(".")[2]) not in self._tried:  # a subclass shows in the pickle alone
                self._tried.add(state)
                boxes[-1].load()
        unique = {b.offsets: b for b in boxes}
        try:
            found = Boxes(shape, dtype, list(unique.values()))
        except CheckpointError as error:
            raise CheckpointError(f"{self._folder}/{METADATA}: {key}: {error}; a rank's part is missing") from None
        return found if shape else found.read(0, 1).clone().reshape(())

    def _place(self, key: str, offsets: tuple[int, ...]) -> Any:
        info = self._places.get((key, offsets))
        if info is None:
            raise CheckpointError(
                f"{self._folder}/{METADATA} does not say where {key}{list(offsets) or ''} is; it is damaged"
            )
        return info

    def _load(self, key: str, dtype: torch.dtype, sizes: tuple[int, ...], info: Any) -> Tensor:
        file = self._file(info.relative_path)
        if file.read(info.offset, 2) == b"PK":
            tensor = open_embedded(file, info.offset, info.length)
        else:
            entry = _safetensors(file).get(key)
            if entry is None:
                raise CheckpointError(f"{file.path}: {key} is in neither of DCP's formats there; it is damaged")
            tensor = file.tensor(entry.dtype, entry.start, entry.numel).view(entry.shape)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != sizes or tensor.dtype != dtype:
            raise CheckpointError(f"{file.path}: {key} is not the {dtype} tensor of shape {sizes} it should be")
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
        with path.open("rb") as file:
            found = restricted(stand_ins=(), also=known).load(file)
        if not isinstance(found, metadata.Metadata):
            raise ValueError(f"it holds a {type(found).__name__}")
        return found
    except ForbiddenClass as error:
        raise CheckpointError(f"{path} holds an object of {error}, which no DCP metadata has; it is not read") from None
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({error}): it is damaged, or no DCP checkpoint") from None


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
