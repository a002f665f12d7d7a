"""Where documents come from: the standard library, text, JSON Lines and parquet files, or anything that `datasets` loads.

A source is a fixed sequence of parts (files), each a sequence of items: documents, and notes of what was skipped. A `Cursor` names a
place in it, so that an interrupted reader goes on without reading the earlier parts again.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import xxhash

from anon_dist.data.config import TextUnit
from anon_dist.data.errors import SourceError
from anon_dist.data.remote_files import find_at
from anon_dist.stores import is_address

JSON_LINES = (".jsonl", ".json", ".ndjson")
COMPRESSIONS = (".gz", ".zst")
BINARY_PROBE = 8192
PARQUET_ROWS = 256
UNREADABLE = (OSError, EOFError, zlib.error)


class Cursor(NamedTuple):
    """The place before item `item` of part `part`."""

    part: int = 0
    item: int = 0


START = Cursor()


@dataclass(frozen=True)
class Item:
    """One document, or a note of something skipped."""

    text: str
    """The document; empty if it was skipped."""
    skipped: str | None
    """Why it was skipped, None for a document."""
    after: Cursor
    """The place after this item."""


class Source(Protocol):
    """A corpus that always gives the same documents in the same order."""

    parts: int
    """Number of parts."""

    def read(self, start: Cursor = START) -> Iterator[Item]:
        """All items from `start` on."""

    def read_part(self, part: int, item: int = 0) -> Iterator[Item]:
        """The items of one part, from its `item`-th on."""

    def describe(self) -> dict[str, Any]:
        """Plain JSON values that change when the corpus does, as far as that shows without reading it."""


def open_source(spec: str, *, text_field: str, split: str, streaming: bool, text_unit: TextUnit) -> Source:
    """The source that `spec` names: `stdlib`, `hf:NAME[:CONFIG]`, or a file, folder or glob, here or at an address.

    Args:
        text_field: column of JSON Lines, parquet and `hf:` sources that holds the text.
        split: split of an `hf:` dataset.
        streaming: whether an `hf:` dataset is streamed instead of downloaded first.
        text_unit: what of a plain-text file is one document.

    Raises:
        SourceError: there is no such source, or it has nothing to read.
    """
    if spec == "stdlib":
        return standard_library()
    if spec.startswith("hf:"):
        return HubSource(spec.removeprefix("hf:"), split, streaming, text_field)
    found = find_at(spec) if is_address(spec) else _find_files(spec)
    return FileSource(*found, text_field=text_field, text_unit=text_unit, origin=spec)


def standard_library() -> FileSource:
    """The Python sources of the running interpreter's standard library, one document per file: about 30 MB on any machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages", "__pycache__"}
    files = [path for path in root.rglob("*.py") if installed.isdisjoint(path.relative_to(root).parts)]
    if not files:
        raise SourceError(f"--source stdlib: {root} holds no .py files (is it zipped?). Name a folder of text instead.")
    return FileSource(root, sorted(files), 0, text_field="text", text_unit="file", origin="stdlib")


class FileSource:
    """Documents from files, one part per file.

    A plain-text file is one document (or one per paragraph or line, by `text_unit`), a line of JSON Lines or a row of parquet is one.
    The kind follows from the name: `.jsonl`, `.json`, `.ndjson` and `.parquet`; anything else is text. `.gz` and `.zst` are unpacked.
    Binary files, text that is not UTF-8 and empty documents are skipped.

    Raises (while reading):
        SourceError: a file cannot be read or parsed, or has no text field; names the file and line.
    """

    def __init__(
        self, root: Path, files: list[Path], hidden: int, *, text_field: str, text_unit: TextUnit, origin: str
    ) -> None:
        self.root, self.files, self.parts = root, files, len(files)
        self._hidden, self._field, self._unit, self._origin = hidden, text_field, text_unit, origin

    def read(self, start: Cursor = START) -> Iterator[Item]:
        """All items from `start` on."""
        for part in range(start.part, self.parts):
            yield from self.read_part(part, start.item if part == start.part else 0)

    def read_part(self, part: int, item: int = 0) -> Iterator[Item]:
        """The items of one part, from its `item`-th on."""
        path = self.files[part]
        try:
            for number, text in enumerate(islice(self._texts(path), item, None), item + 1):
                yield _item(text, Cursor(part, number))
        except UNREADABLE as error:
            raise SourceError(f"{path}: cannot be read ({error}). Repair or remove the file.") from error

    def describe(self) -> dict[str, Any]:
        """Names and sizes of the files, as a hash; not their contents."""
        listing = [(path.relative_to(self.root).as_posix(), path.stat().st_size) for path in self.files]
        return {
            "kind": "files",
            "origin": self._origin,
            "files": len(listing),
            "bytes": sum(size for _, size in listing),
            "hidden_files": self._hidden,
            "listing": xxhash.xxh3_64_hexdigest(json.dumps(listing).encode()),
        }

    def _texts(self, path: Path) -> Iterator[str | _Skipped]:
        suffix = (path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix.lower()
        if suffix == ".parquet":
            return _parquet_rows(path, self._field)
        if suffix in JSON_LINES:
            return _json_lines(path, self._field)
        return _plain_text(path, self._unit)


class HubSource:
    """Documents from a dataset of the Hugging Face hub, or a local folder that `datasets.load_dataset` understands; one part.

    Raises:
        SourceError: the dataset cannot be loaded, or has no such column.
    """

    parts = 1

    def __init__(self, name: str, split: str, streaming: bool, text_field: str) -> None:
        self._path, self._config = (name, "") if Path(name).exists() else _halves(name)
        self._split, self._streaming, self._field = split, streaming, text_field

    def read(self, start: Cursor = START) -> Iterator[Item]:
        """All items from `start` on."""
        return self.read_part(0, start.item) if start.part == 0 else iter(())

    def read_part(self, part: int, item: int = 0) -> Iterator[Item]:
        """The items of one part, from its `item`-th on."""
        # Dataset.skip refuses to skip everything; IterableDataset has no length.
        rows = () if not self._streaming and item >= len(self._data) else self._data.skip(item)
        for number, row in enumerate(rows, item + 1):
            text = _text_of(row, self._field, f"hf:{self._path}, row {number}")
            yield _item(text, Cursor(part, number))

    def describe(self) -> dict[str, Any]:
        """The name, not what is behind it: a dataset that changes on the hub is not noticed."""
        return {"kind": "hf", "name": self._path, "config": self._config or None, "split": self._split}

    @cached_property
    def _data(self) -> Any:
        """The dataset, loaded when it is first read: a folder that is complete does without."""
        import datasets

        try:
            data = datasets.load_dataset(self._path, self._config or None, split=self._split, streaming=self._streaming)
        except Exception as error:  # datasets raises anything, from its builders too
            raise SourceError(
                f"--source hf:{self._path}: {type(error).__name__}: {error}. "
                "Check the name, --split and the network; or name local files with --source PATH."
            ) from error
        columns = data.column_names
        if columns is not None and self._field not in columns:
            raise SourceError(
                f"--source hf:{self._path}: no column {self._field!r}; there are {', '.join(columns)}. Set --text-field."
            )
        return data


class LimitedSource:
    """The first documents of another source: at most `max_documents`, and none after `max_bytes` of text are reached.

    Seen as a single part, since where a limit falls is known only by counting from the start.
    """

    parts = 1

    def __init__(self, source: Source, max_documents: int | None, max_bytes: int | None) -> None:
        self._source, self._documents, self._bytes = source, max_documents, max_bytes

    def read(self, start: Cursor = START) -> Iterator[Item]:
        """All items from `start` on."""
        return self.read_part(0, start.item) if start.part == 0 else iter(())

    def read_part(self, part: int, item: int = 0) -> Iterator[Item]:
        """The items of one part, from its `item`-th on."""
        return islice(self._limited(), item, None)

    def describe(self) -> dict[str, Any]:
        """What the whole source says of itself, and the limits."""
        return {**self._source.describe(), "max_documents": self._documents, "max_bytes": self._bytes}

    def _limited(self) -> Iterator[Item]:
        documents = size = 0
        for number, item in enumerate(self._source.read(), 1):
            if self._documents is not None and documents >= self._documents:
                return
            if self._bytes is not None and size >= self._bytes:
                return
            documents += item.skipped is None
            size += len(item.text.encode())
            yield Item(item.text, item.skipped, Cursor(0, number))


class _Skipped(NamedTuple):
    reason: str


def _item(text: str | _Skipped, after: Cursor) -> Item:
    if isinstance(text, _Skipped):
        return Item("", text.reason, after)
    return Item(_valid(text), None, after) if text else Item("", "empty", after)


def _valid(text: str) -> str:
    """The text with lone surrogates, which JSON can spell but UTF-8 cannot hold, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _halves(name: str) -> tuple[str, str]:
    path, _, config = name.partition(":")
    return path, config


def _find_files(spec: str) -> tuple[Path, list[Path], int]:
    """Root, sorted files and the number of hidden ones left out, for a file, a folder or a glob."""
    path = Path(spec).expanduser()
    if path.is_file():
        return path.parent, [path], 0
    if path.is_dir():
        root, found = path, _walk(path)
    else:
        pattern = str(path)
        if not glob.has_magic(pattern):
            raise SourceError(f"--source {spec}: no such file or folder. Give a path, a glob, hf:NAME or stdlib.")
        found = sorted(Path(p) for p in glob.glob(pattern, recursive=True, include_hidden=True) if os.path.isfile(p))
        root = Path(os.path.commonpath([p.parent for p in found])) if found else Path(".")
    files = [p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    if not files:
        raise SourceError(f"--source {spec}: no files there ({len(found)} hidden ones left out). Give another path.")
    return root, files, len(found) - len(files)


def _walk(root: Path) -> list[Path]:
    found = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
    return sorted(path for path in found if path.is_file())


def _open(path: Path) -> io.BufferedIOBase:
    """The unpacked content of a file, to be closed."""
    if path.suffix == ".gz":
        return gzip.open(path.open("rb"))
    if path.suffix == ".zst":
        import pyarrow

        # The zstandard package would take a file that breaks off for a whole one.
        return io.BufferedReader(pyarrow.input_stream(path.open("rb"), compression="zstd"))
    return path.open("rb")


def _plain_text(path: Path, unit: TextUnit) -> Iterator[str | _Skipped]:
    with _open(path) as file:
        head = file.read(BINARY_PROBE)
        if b"\0" in head:
            yield _Skipped("binary")
        elif unit == "file":
            yield _decode(head + file.read())
        else:
            yield from _units(_lines(file, head), unit)


def _lines(file: io.BufferedIOBase, head: bytes) -> Iterator[bytes]:
    """Lines without their ends, of a file whose first bytes were read already."""
    *whole, rest = head.split(b"\n")
    yield from whole
    for line in file:
        yield (rest + line).rstrip(b"\n")
        rest = b""
    if rest:
        yield rest


def _units(lines: Iterator[bytes], unit: TextUnit) -> Iterator[str | _Skipped]:
    """Lines that are not blank, or runs of them."""
    paragraph: list[bytes] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        if paragraph and (unit == "line" or not line.strip()):
            yield _decode(b"\n".join(paragraph))
            paragraph = []
    if paragraph:
        yield _decode(b"\n".join(paragraph))


def _decode(data: bytes) -> str | _Skipped:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return _Skipped("not UTF-8")


def _json_lines(path: Path, field: str) -> Iterator[str | _Skipped]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise SourceError(f"{where}: not JSON ({error}). Each line must be one JSON object.") from None
            if not isinstance(row, dict):
                raise SourceError(
                    f"{where}: a JSON {type(row).__name__}, not an object. Each line must be one JSON object."
                )
            yield _text_of(row, field, where)


def _parquet_rows(path: Path, field: str) -> Iterator[str | _Skipped]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as content, pyarrow.parquet.ParquetFile(content) as file:
            if field not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise SourceError(f"{path}: no column {field!r}; there are {names}. Set --text-field.")
            number = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=[field]):
                for row in batch.to_pylist():
                    number += 1
                    yield _text_of(row, field, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise SourceError(f"{path}: not a readable parquet file ({error}). Repair or remove the file.") from error


def _text_of(row: dict[str, Any], field: str, where: str) -> str | _Skipped:
    if field not in row:
        raise SourceError(f"{where}: no field {field!r}; there are {', '.join(map(str, row))}. Set --text-field.")
    text = row[field]
    if text is None:
        return _Skipped("null")
    if not isinstance(text, str):
        raise SourceError(
            f"{where}: field {field!r} is {type(text).__name__}, not text. Set --text-field to a text column."
        )
    return text
