"""The header of a safetensors file: where each tensor lies."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch

from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.json_values import loads
from anon_dist.checkpoint.torchfiles.mapped import MappedFile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    """In bytes from the beginning of the file."""

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def stop(self) -> int:
        """The first byte after it."""
        return self.start + self.numel * self.dtype.itemsize


class Header(NamedTuple):
    """What a safetensors file says of itself."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(file: MappedFile) -> Header:
    """Its tensors and metadata.

    Raises:
        CheckpointError: it is no safetensors file, or truncated.
    """
    try:
        (length,) = struct.unpack("<Q", file.read(0, 8))
        if length > file.size:
            raise ValueError("its header is longer than the file")
        content = loads(file.read(8, length))
        metadata = content.pop("__metadata__", {})
        entries = {}
        for name, described in content.items():
            start, stop = described["data_offsets"]
            entry = Entry(tuple(described["shape"]), DTYPES[described["dtype"]], 8 + length + start)
            if entry.numel * entry.dtype.itemsize != stop - start:
                raise ValueError(f"{name} has {stop - start} bytes for shape {entry.shape}")
            if 8 + length + stop > file.size:
                raise ValueError(f"it ends before {name} does: truncated")
            entries[name] = entry
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise DamagedCheckpoint(f"{file.path} is no safetensors file, or damaged: {error}") from None
    return Header(entries, metadata)


def write_header(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The bytes before the tensors' data, and where in the file each tensor begins. The data is aligned to 64 bytes.

    Raises:
        CheckpointError: a dtype that safetensors does not have.
    """
    content: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset, offsets = 0, {}
    for name, (shape, dtype) in tensors.items():
        if dtype not in _CODES:
            raise CheckpointError(f"{name} is {dtype}, which safetensors does not have")
        size = prod(shape) * dtype.itemsize
        content[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offsets[name] = offset
        offset += size
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text, {name: 8 + len(text) + at for name, at in offsets.items()}
