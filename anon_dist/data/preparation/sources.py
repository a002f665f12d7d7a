"""Where documents come from: the standard library, text, JSON Lines, parquet and Arrow files, or anything that `datasets` loads.

A source is a fixed sequence of parts (files), each a sequence of items: documents, and notes of what was skipped. A `Cursor` names a
place in it, so that an interrupted reader goes on without reading the earlier parts again.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import xxhash

from anon_dist.data.config import OnBadText, TextUnit
from anon_dist.data.errors import SourceError
from anon_dist.data.preparation.source_files import Version, find_files, stamp, unread
from anon_dist.data.preparation.tally import UNREAD
from anon_dist.data.preparation.texts import Found, Noted, TextReader
from anon_dist.data.stored.remote_files import find_at
from anon_dist.exits import may_pass
from anon_dist.stores import is_address


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
    note: Noted | None = None
    """What is to be counted: why and where it was skipped, or that characters of the document were replaced."""


class Source(Protocol):
    """A corpus that always gives the same documents in the same order."""

    parts: int
    """Number of parts."""

    @property
    def sizes(self) -> Sequence[int | None]:
        """Bytes of each part, None where that is not known."""

    @property
    def versions(self) -> Sequence[Version]:
        """Of each part as it was when it was found; of a limited source, of each of the whole."""

    def read(self, start: Cursor = START) -> Iterator[Item]:
        """All items from `start` on."""

    def read_part(self, part: int, item: int = 0) -> Iterator[Item]:
        """The items of one part, from its `item`-th on."""

    def position(self) -> int:
        """Bytes of the part that is being read that have been read, as far as that is known."""

    def describe(self) -> dict[str, Any]:
        """Plain JSON values that change when the corpus does, as far as that shows without reading it."""


def open_source(
    spec: str,
    *,
    text_field: str,
    split: str,
    streaming: bool,
    text_unit: TextUnit,
    on_bad_text: OnBadText = "skip",
) -> Source:
    """The source that `spec` names: `stdlib`, `hf:NAME[:CONFIG]`, or a file, folder or glob, here or at an address.

    Args:
        text_field: column of JSON Lines, parquet, Arrow and `hf:` sources that holds the text.
        split: split of an `hf:` dataset.
        streaming: whether an `hf:` dataset is streamed instead of downloaded first.
        text_unit: what of a plain-text file is one document.
        on_bad_text: see `PrepareConfig`.

    Raises:
        SourceError: there is no such source, or it has nothing to read.
    """
    if spec == "stdlib":
        return standard_library(on_bad_text)
    reader = TextReader(text_field, text_unit, on_bad_text)
    if spec.startswith("hf:"):
        return HubSource(spec.removeprefix("hf:"), split, streaming, text_field, reader)
    if not is_address(spec) and is_saved(Path(spec).expanduser()):
        raise SourceError(f"--source {spec} was saved by datasets (save_to_disk). Give it as --source hf:{spec}.")
    found = find_at(spec) if is_address(spec) else find_files(spec)
    return FileSource(*found, reader, origin=spec)


def standard_library(on_bad_text: OnBadText = "skip") -> FileSource:
    """The Python sources of the running interpreter's standard library, one document per file: about 30 MB on any machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages", "__pycache__"}
    files = [path for path in root.rglob("*.py") if installed.isdisjoint(path.relative_to(root).parts)]
    if not files:
        raise SourceError(f"--source stdlib: {root} holds no .py files (is it zipped?). Name a folder of text instead.")
    return FileSource(root, sorted(files), unread(0), TextReader("text", "file", on_bad_text), origin="stdlib")


class FileSource:
    """Documents from files, one part per file.

    A plain-text file is one document (or one per paragraph or line), a line of JSON Lines or a row of parquet or Arrow is one.
    The kind follows from the name: `.jsonl`, `.json`, `.ndjson`, `.parquet`, `.arrow`; all else is text. `.gz` and `.zst` are unpacked.

    Args:
        root, files: the files, in their order, and a folder above them.
        unread: how many files were left out without being opened, by kind: `hidden_files`, `special_files`.
        origin: how the source was asked for.

    Raises (while reading):
        SourceError: see `TextReader.read`.
    """

    def __init__(
        self, root: Path, files: list[Path], unread: Mapping[str, int], reader: TextReader, *, origin: str
    ) -> None:
        self.root, self.files, self.parts = root, files, len(files)
        self._unread, self._reader, self._origin = unread, reader, origin
        self.recursive = Path(origin).expanduser().is_dir() or "**" in origin
        """Whether files that come to lie anywhere below `root` are taken in."""
        self._present = 0

    @cached_property
    def sizes(self) -> Sequence[int | None]:
        """Bytes of each file."""
        return [stat.st_size for stat in self._stats]

    @cached_property
    def versions(self) -> Sequence[Version]:
        """Of each file; those of the standard library are the same everywhere, whenever they were installed."""
        known = self._origin != "stdlib"
        pairs = zip(self.files, self._stats, strict=True)
        return [Version(self._shown(path), stamp(stat) if known else "") for path, stat in pairs]

    @cached_property
    def _stats(self) -> list[Any]:
        return [path.stat() for path in self.files]

    def _shown(self, path: Path) -> str:
        name = (Path(self.root.name) / path.relative_to(self.root)).as_posix()
        if name.isprintable():
            return name
        # Line ends, and bytes that are not UTF-8, of which JSON can hold nothing.
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)

    def read(self, start: Cursor = START) -> Iterator[Item]:
        """All items from `start` on."""
        for part in range(start.part, self.parts):
            yield from self.read_part(part, start.item if part == start.part else 0)

    def read_part(self, part: int, item: int = 0) -> Iterator[Item]:
        """The items of one part, from its `item`-th on."""
        path, self._present = self.files[part], part
        found = self._reader.read(path, self._shown(path), part == 0)
        for number, text in enumerate(islice(found, item, None), item + 1):
            yield _item(text, Cursor(part, number))
        self._refuse_changed(part)

    def _refuse_changed(self, part: int) -> None:
        path, before = self.files[part], self._stats[part]
        try:
            now = path.stat()
        except OSError as error:
            raise may_pass(
                SourceError(f"{path} is gone while it was read ({error}). Put it back; the same command goes on.")
            ) from error
        if (now.st_size, stamp(now)) != (before.st_size, stamp(before)):
            raise may_pass(
                SourceError(
                    f"{path} was changed while the source was read. Start again with --overwrite, when nothing writes there."
                )
            )

    def position(self) -> int:
        """Bytes of the file that is being read that have been read, as far as that is known."""
        return self._reader.position(self.sizes[self._present] or 0)

    def describe(self) -> dict[str, Any]:
        """Names and sizes of the files, as a hash; not their contents."""
        names = (path.relative_to(self.root).as_posix() for path in self.files)
        listing = list(zip(names, self.sizes, strict=True))
        return {
            "kind": "files",
            "origin": self._origin,
            "files": len(listing),
            "bytes": sum(size or 0 for _, size in listing),
            **self._unread,
            "listing": xxhash.xxh3_64_hexdigest(json.dumps(listing).encode()),
        }


class HubSource:
    """Documents from a dataset of the Hugging Face hub, or a local folder that `datasets` loads or has saved; one part.

    Raises:
        SourceError: the dataset cannot be loaded, or has no such column.
    """

    parts, sizes = 1, (None,)

    def __init__(self, name: str, split: str, streaming: bool, text_field: str, reader: TextReader) -> None:
        self._path, self._config = (name, "") if Path(name).exists() else _halves(name)
        self.versions = [Version(f"hf:{name}", "")]
        self._split, self._streaming, self._field, self._reader = split, streaming, text_field, reader

    def read(self, start: Cursor = START) -> Iterator[Item]:
        """All items from `start` on."""
        return self.read_part(0, start.item) if start.part == 0 else iter(())

    def read_part(self, part: int, item: int = 0) -> Iterator[Item]:
        """The items of one part, from its `item`-th on."""
        # Dataset.skip refuses to skip everything; IterableDataset has no length.
        rows = () if not self._streaming and item >= len(self._data) else self._data.skip(item)
        for number, row in enumerate(rows, item + 1):
            text = self._reader.text_of(row, self._path, f"hf:{self._path}", f"row {number}", number == 1)
            yield _item(text, Cursor(part, number))

    def position(self) -> int:
        """Not known."""
        return 0

    @property
    def folder(self) -> Path | None:
        """Where it lies, if it is a folder of this machine."""
        return Path(self._path) if Path(self._path).is_dir() else None

    def describe(self) -> dict[str, Any]:
        """The name, not what is behind it: a dataset that changes on the hub is not noticed."""
        return {"kind": "hf", "name": self._path, "config": self._config or None, "split": self._split}

    @cached_property
    def _data(self) -> Any:
        """The dataset, loaded when it is first read: a folder that is complete does without."""
        import datasets

        try:
            if is_saved(Path(self._path)):
                data = self._saved(datasets.load_from_disk(self._path))
            else:
                kind = self._config or None
                data = datasets.load_dataset(self._path, kind, split=self._split, streaming=self._streaming)
        except SourceError:
            raise
        except Exception as error:  # datasets raises anything, from its builders too
            raise SourceError(
                f"--source hf:{self._path}: {type(error).__name__}: {error}. "
                "Check the name, --split and the network; or name local files with --source PATH."
            ) from error
        columns = data.column_names
        if columns is not None and self._field not in columns and self._field.partition(".")[0] not in columns:
            raise SourceError(
                f"--source hf:{self._path}: no column {self._field!r}; there are {', '.join(columns)}. Set --text-field."
            )
        return data

    def _saved(self, found: Any) -> Any:
        """The split of what `save_to_disk` left. A folder of one split may not say which it is."""
        splits = found if isinstance(found, dict) else {str(found.split or "train"): found}
        if self._split not in splits:
            raise SourceError(
                f"--source hf:{self._path}: there is no split {self._split!r}. Set --split {' or '.join(splits)}."
            )
        data = splits[self._split]
        return data.to_iterable_dataset() if self._streaming else data


def is_saved(folder: Path) -> bool:
    """Whether `datasets` has saved this, by `save_to_disk`."""
    one = (folder / "state.json").is_file() and any(folder.glob("*.arrow"))
    return one or (folder / "dataset_dict.json").is_file()


class SeveralSources:
    """Sources one after the other, as one."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self._firsts = list(accumulate((source.parts for source in sources), initial=0))
        self.parts = self._firsts.pop()
        self.sizes: Sequence[int | None] = [size for source in sources for size in source.sizes]
        self.versions = [version for source in sources for version in source.versions]
        self._present = sources[0]

    def read(self, start: Cursor = START) -> Iterator[Item]:
        """All items from `start` on."""
        for part in range(start.part, self.parts):
            yield from self.read_part(part, start.item if part == start.part else 0)

    def read_part(self, part: int, item: int = 0) -> Iterator[Item]:
        """The items of one part, from its `item`-th on."""
        number = max(i for i, first in enumerate(self._firsts) if first <= part and self.sources[i].parts)
        self._present, first = self.sources[number], self._firsts[number]
        for found in self._present.read_part(part - first, item):
            yield replace(found, after=Cursor(first + found.after.part, found.after.item))

    def position(self) -> int:
        """Bytes of the part that is being read that have been read, as far as that is known."""
        return self._present.position()

    def describe(self) -> dict[str, Any]:
        """What each says of itself, and of all what they have in common."""
        found = [source.describe() for source in self.sources]
        known = all("bytes" in each for each in found)
        keys = dict.fromkeys(key for key in ("files", "bytes", *UNREAD) for each in found if key in each)
        totals = {key: sum(each.get(key, 0) for each in found) for key in keys if known}
        return {"kind": "several", "sources": found, **totals}


class LimitedSource:
    """The first documents of another source: at most `max_documents`, and none after `max_bytes` of text are reached.

    Seen as a single part, since where a limit falls is known only by counting from the start.
    """

    parts, sizes = 1, (None,)

    @property
    def versions(self) -> Sequence[Version]:
        """Of the whole source."""
        return self.source.versions

    def __init__(self, source: Source, max_documents: int | None, max_bytes: int | None) -> None:
        self.source, self._documents, self._bytes = source, max_documents, max_bytes

    def read(self, start: Cursor = START) -> Iterator[Item]:
        """All items from `start` on."""
        return self.read_part(0, start.item) if start.part == 0 else iter(())

    def read_part(self, part: int, item: int = 0) -> Iterator[Item]:
        """The items of one part, from its `item`-th on."""
        return islice(self._limited(), item, None)

    def position(self) -> int:
        """Not known."""
        return 0

    def describe(self) -> dict[str, Any]:
        """What the whole source says of itself, and the limits."""
        return {**self.source.describe(), "max_documents": self._documents, "max_bytes": self._bytes}

    def _limited(self) -> Iterator[Item]:
        documents = size = 0
        for number, item in enumerate(self.source.read(), 1):
            if self._documents is not None and documents >= self._documents:
                return
            if self._bytes is not None and size >= self._bytes:
                return
            documents += item.skipped is None
            size += len(item.text.encode())
            yield replace(item, after=Cursor(0, number))


def _item(text: Found, after: Cursor) -> Item:
    if isinstance(text, str):
        return Item(text, None, after)
    return Item(text.text or "", text.reason if text.text is None else None, after, text)


def _halves(name: str) -> tuple[str, str]:
    path, _, config = name.partition(":")
    return path, config
