"""Token files of other tools, read where they lie: datatrove's, and those of Megatron-LM and its kin.

datatrove: `NAME.ds` holds the tokens, uint16 or uint32; `NAME.ds.index` the end of each document in tokens, as uint64; `NAME.ds.metadata`
names the tokenizer. Megatron-LM: `NAME.bin` holds the tokens of sequences, `NAME.idx` behind a header their dtype, lengths and places, and
which sequence each document ends before. All numbers are little-endian.
"""

from __future__ import annotations

import glob
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anon_dist.data.errors import SourceError

Int64 = NDArray[np.int64]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
"""Of an .idx file: magic, version, code of the dtype, sequences, entries of the list of documents."""
DTYPES = {2: "int8", 1: "uint8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
READ_AS = {"uint16": "uint16", "int32": "uint32", "uint32": "uint32"}
"""Ids are not negative: those of int32 are those of uint32."""

HEAD = 1024
"""Numbers at the start of a file that are looked at: of uint32 every second is the upper half of an id, which no uint16 are."""


@dataclass(frozen=True)
class TokenFile:
    """A file of documents, one after the other."""

    path: Path
    kind: str
    dtype: str
    """`uint16` or `uint32`."""
    tokens: int
    ends: Callable[[], Int64]
    """Ends of the documents, in tokens from the start of the file, ascending; those without tokens are left out."""
    tokenizer: str | None = None
    """The name of the one that made it, if it is written there."""

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.tokens * np.dtype(self.dtype).itemsize


def find_token_files(source: str) -> list[TokenFile]:
    """The files that a folder, a file, a glob, or Megatron-LM's prefix of both files names; in the order of their names.

    Raises:
        SourceError: there are none, or of several kinds or dtypes, or one is not whole.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix in (".ds", ".bin")]
    elif path.is_file():
        of_ds = path.name.endswith((".ds.index", ".ds.metadata"))
        found = [path.with_suffix(".bin") if path.suffix == ".idx" else path.with_suffix("") if of_ds else path]
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if p.endswith((".ds", ".bin"))]
        found = found or [p for p in [Path(f"{path}.bin")] if p.is_file()]
    if not found:
        raise SourceError(f"{source}: no .ds files of datatrove there, and no .bin and .idx files of Megatron-LM")
    files = [_datatrove(p) if p.suffix == ".ds" else _megatron(p) for p in sorted(found)]
    for each in files[1:]:
        for what, first, this in (("a file of", files[0].kind, each.kind), ("tokens as", files[0].dtype, each.dtype)):
            if first != this:
                raise SourceError(
                    f"{each.path} is {what} {this}, and {files[0].path} {what} {first}; index them one by one, and mix them with "
                    "data.sources"
                )
    return files


def _datatrove(path: Path) -> TokenFile:
    if not path.is_file():
        raise SourceError(f"{path} is missing: it holds the tokens")
    index = path.with_name(path.name + ".index")
    if not index.is_file():
        raise SourceError(
            f"{index} is missing: it says where documents end (datatrove writes it unless save_index=False)"
        )
    size, there = path.stat().st_size, index.stat().st_size
    if there % 8 or not there:
        raise SourceError(f"{index} is torn: {there:,} bytes are no list of documents' ends")
    tokens = int(np.memmap(index, "<u8", mode="r")[-1])
    widths = {2: "uint16", 4: "uint32"}
    width = size // tokens if tokens else 0
    if width not in widths or width * tokens != size:
        raise SourceError(
            f"{path} is torn, or is not of its index: {size:,} bytes, and documents end at token {tokens:,}"
        )
    head = np.fromfile(path, "<u2", HEAD)
    if width == 2 and len(head) == HEAD and head[1::2].max() < 4 <= head[::2].max():
        raise SourceError(
            f"{path} is torn: its tokens look like uint32 (as uint16 every second is below 4), and it has 2 bytes for each token of its "
            "index. Copy it again from where it came from"
        )
    name = _named(path.with_name(path.name + ".metadata"), width)
    return TokenFile(path, "datatrove", widths[width], tokens, lambda: _datatrove_ends(index), name)


def _named(metadata: Path, width: int) -> str | None:
    """The tokenizer: in the first line, before the width of a token."""
    try:
        name, _, said = metadata.read_text(encoding="utf-8").partition("\n")[0].strip().rpartition("|")
    except (OSError, UnicodeDecodeError):
        return None
    if said.isdecimal() and int(said) != width:
        raise SourceError(f"{metadata} says {said} bytes a token, and the index of the file {width}")
    return None if not name or name.startswith("Unknown Tokenizer") else name


def _datatrove_ends(index: Path) -> Int64:
    return _ascending(index, np.fromfile(index, "<u8").astype(np.int64))


def _megatron(path: Path) -> TokenFile:
    index = path.with_suffix(".idx")
    if not path.is_file():
        raise SourceError(f"{path} is missing: it holds the tokens")
    if not index.is_file():
        raise SourceError(f"{index} is missing: it says where documents end, and how wide a token is")
    with index.open("rb") as file:
        head = file.read(HEADER.size)
    magic, version, code, sequences, documents = HEADER.unpack(head) if len(head) == HEADER.size else (b"", 0, 0, 0, 0)
    if magic != MAGIC or version != 1:
        raise SourceError(f"{index} is no index of Megatron-LM's indexed datasets, version 1")
    dtype = DTYPES.get(code, f"of code {code}")
    if dtype not in READ_AS:
        raise SourceError(f"{path}: token ids are {dtype}; what is read is uint16 and int32, so make the files again")
    needed = HEADER.size + 12 * sequences + 8 * documents
    if (there := index.stat().st_size) != needed:
        what = "is of a multimodal data set" if there == needed + sequences else f"is torn, {needed:,} are needed"
        raise SourceError(f"{index}: {there:,} bytes; it {what}")
    tokens = int(np.memmap(index, "<i4", "r", HEADER.size, (sequences,)).sum(dtype=np.int64)) if sequences else 0
    width = np.dtype(dtype).itemsize
    if path.stat().st_size != tokens * width:
        raise SourceError(
            f"{path} is torn, or is not of its index: {path.stat().st_size:,} bytes, and {tokens:,} tokens of {width} bytes"
        )
    if not tokens:
        raise SourceError(f"{path} is empty")
    return TokenFile(
        path, "Megatron-LM", READ_AS[dtype], tokens, lambda: _megatron_ends(index, sequences, documents, width)
    )


def _megatron_ends(index: Path, sequences: int, documents: int, width: int) -> Int64:
    lengths = np.fromfile(index, "<i4", sequences, offset=HEADER.size)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    places = np.fromfile(index, "<i8", sequences, offset=HEADER.size + 4 * sequences)
    if not np.array_equal(places, ends[:-1] * width):
        raise SourceError(f"{index}: its sequences do not follow each other in the file; merge or make the files again")
    borders = np.fromfile(index, "<i8", documents, offset=HEADER.size + 12 * sequences)
    if len(borders) < 2 or borders[0] != 0 or borders[-1] != sequences:
        raise SourceError(f"{index}: its list of documents does not go over all sequences; the file is damaged")
    if not 0 <= borders.min() <= borders.max() <= sequences:
        at = int(np.argmax((borders < 0) | (borders > sequences)))
        raise SourceError(
            f"{index}: document {at:,} ends before sequence {borders[at]:,}, of {sequences:,}; the file is damaged, so make it again"
        )
    return _ascending(index, ends[borders[1:]])


def _ascending(index: Path, ends: Int64) -> Int64:
    steps: NDArray[Any] = np.diff(ends, prepend=0)
    if (steps < 0).any():
        raise SourceError(f"{index}: documents end before they begin; the file is damaged")
    return ends[steps > 0]
