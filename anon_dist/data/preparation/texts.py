"""The texts of one file: plain, JSON Lines, parquet or Arrow, as it is or packed; and what to do with text that is none."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from anon_dist.data.config import OnBadText, TextUnit
from anon_dist.data.errors import SourceError
from anon_dist.data.preparation.encodings import PROBE, UTF8_MARK, wide_encoding
from anon_dist.data.preparation.tally import REPLACED
from anon_dist.data.preparation.unpacking import COMPRESSIONS, RubbishError, Unpacked, lines
from anon_dist.exits import may_pass

JSON_LINES = (".jsonl", ".json", ".ndjson")
NO_TEXT = (
    *(".warc", ".wet", ".arc", ".pdf", ".docx", ".doc", ".odt", ".epub", ".xlsx", ".pptx", ".rtf"),
    *(".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".lz4", ".npy", ".pkl", ".safetensors"),
)
"""Formats whose text has to be extracted first, though they may begin like text."""
PARQUET_ROWS = 256
ARROW_FILE = b"ARROW1"
"""What the Arrow format with an index begins with; `datasets` writes the one without, a stream."""
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
"""Of a stream: one that is cut between two batches reads as a whole one."""


class Noted(NamedTuple):
    """A document to be counted under a reason: left out, or with characters in place of what could not be read."""

    reason: str
    place: str
    text: str | None = None


Found = str | Noted


class TextReader:
    """Reads files one after the other.

    Args:
        field: of JSON Lines, parquet and Arrow, that holds the text; `a.b` is `b` of the record in `a`.
        unit: what of a plain-text file is one document.
        on_bad_text: see `PrepareConfig`.
    """

    def __init__(self, field: str, unit: TextUnit, on_bad_text: OnBadText) -> None:
        self._field, self._unit, self._bad = field, unit, on_bad_text
        self._raw: IO[bytes] | None = None
        self._share = 0.0

    def position(self, size: int) -> int:
        """Bytes of the present file, which has `size`, that have been read, as far as that is known."""
        if self._raw is None or self._raw.closed:
            return int(self._share * size)
        return self._raw.tell()

    def read(self, path: Path, shown: str, first: bool = False) -> Iterator[Found]:
        """The texts of a file.

        Args:
            shown: its name among what was left out.
            first: it is the source's first: if its first record has no text, the settings are wrong, and not the record.

        Raises:
            SourceError: that, or the system does not give its content, or with `fail` anything at all is wrong with it.
        """
        suffix = (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()
        self._raw, self._share = None, 0.0
        try:
            if suffix in NO_TEXT or path.suffix.lower() in NO_TEXT:
                yield Noted("no text format", shown)
            elif suffix == ".parquet":
                yield from self._parquet_rows(path, shown, first)
            elif suffix == ".arrow":
                yield from self._arrow_rows(path, shown, first)
            elif suffix in JSON_LINES:
                yield from self._json_lines(path, shown, first)
            else:
                yield from self._plain_text(path, shown)
        except RubbishError as error:
            said = f"{path}: {error}. Cut it off, or pack the file again."
            yield self.bad("rubbish behind packed text", f"{shown}: {error}", said)
        except (OSError, EOFError, zlib.error) as error:
            what = f"{path}: cannot be read ({error})"
            if isinstance(error, PermissionError):
                yield self.bad("unreadable", shown, f"{what}. Give yourself the right to read it.")
            elif getattr(error, "errno", None) is None:  # not the system's: of what unpacks it
                yield self.bad("damaged", f"{shown}: {error}", f"{what}. Repair or remove the file.")
            else:
                raise may_pass(SourceError(f"{what}. The same command goes on when it can be.")) from error

    def text_of(self, row: dict[str, Any], shown: str, path: str, place: str, first: bool) -> Found:
        """The text of a record. `place` in the file `path`, which is called `shown` among what was left out."""
        where = f"{path}, {place}"
        try:
            text = _value(row, self._field)
        except KeyError:
            said = f"{where}: no field {self._field!r}; there are {', '.join(_names(row))}. Set --text-field."
            return self.bad(f"no field {self._field!r}", f"{shown}, {place}", said, wrong=first)
        if text is None:
            return Noted("null", f"{shown}, {place}")
        if not isinstance(text, str):
            said = (
                f"{where}: field {self._field!r} is {type(text).__name__}, not text. Set --text-field to a text column."
            )
            return self.bad("not text", f"{shown}, {place}: {type(text).__name__}", said, wrong=first)
        return self._whole(text, f"{shown}, {place}", where)

    def bad(self, reason: str, place: str, said: str, *, wrong: bool = False) -> Noted:
        """A record that cannot be taken.

        Args:
            said: what to say if it may not be left out.
            wrong: it cannot be, since it is the settings that are wrong.
        """
        if wrong or self._bad == "fail":
            leave = "" if wrong else " Or leave such out, with --on-bad-text skip: the same command then goes on."
            raise SourceError(said + leave)
        return Noted(reason, place)

    def _whole(self, text: str, place: str, where: str) -> Found:
        """A text of JSON, which can spell lone surrogates, that UTF-8 cannot hold."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if self._bad == "replace":
                whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                return Noted("lone surrogates" + REPLACED, place, whole)
            detail = f"character {error.start:,} is half of a surrogate pair"
            return self.bad("lone surrogates", f"{place}: {detail}", f"{where}: {detail}, which no text can hold.")
        return Noted("empty", place) if not text or text.isspace() else text

    def _decode(self, data: bytes, place: str, where: str) -> Found:
        """The text of a document of plain text, or of a line of JSON that is not UTF-8."""
        reason = detail = remedy = ""
        try:
            text = data.decode()
            if "\0" in text:
                reason, detail = "NUL characters", f"byte {data.index(0):,} is 0"
                remedy = "Remove them (tr -d '\\000')."
        except UnicodeDecodeError as error:
            text = data.decode(errors="replace") if self._bad == "replace" else ""
            reason, detail = "not UTF-8", f"byte {error.start:,} is 0x{data[error.start]:02x}"
            remedy = "Convert it (such as iconv -f LATIN1 -t UTF-8)."
        if reason and self._bad != "replace":
            return self.bad(reason, f"{place}: {detail}", f"{where}: {reason} ({detail}). {remedy}")
        text = text.replace("\0", "\ufffd") if reason else text
        if not text or text.isspace():
            return Noted("empty", place)
        return Noted(reason + REPLACED, place, text) if reason else text

    def _open(self, path: Path) -> Unpacked:
        """The content of a file, to be closed."""
        file = Unpacked(path)
        self._raw = file.raw
        return file

    def _beginning(
        self, pieces: Iterator[bytes], path: Path, shown: str
    ) -> tuple[Iterator[bytes], bytes, Noted | None]:
        """All pieces, without the mark that some put before UTF-8; the first bytes; and why the file cannot be read as text, if so."""
        head = b""
        try:
            while len(head) < PROBE and (piece := next(pieces, b"")):
                head += piece
        except Exception as error:  # after what was read before it
            pieces = _raising(error)
        noted = None
        if name := wide_encoding(head[:PROBE]):
            noted = self.bad(name[:6], shown, f"{path}: is {name}. Convert it (iconv -f {name} -t UTF-8).")
        return chain((head.removeprefix(UTF8_MARK),), pieces), head[:PROBE], noted

    def _plain_text(self, path: Path, shown: str) -> Iterator[Found]:
        with self._open(path) as file:
            pieces, head, noted = self._beginning(file.pieces(), path, shown)
            if noted is not None:
                yield noted
            elif b"\0" in head:
                yield Noted("binary", shown)
            elif self._unit == "file":
                data, rubbish = _joined(pieces)
                yield self._decode(data, shown, str(path))
                if rubbish is not None:
                    raise rubbish
            else:
                for number, text in _units(lines(pieces), self._unit):
                    yield self._decode(text, f"{shown}, line {number}", f"{path}, line {number}")

    def _json_lines(self, path: Path, shown: str, first: bool) -> Iterator[Found]:
        with self._open(path) as file:
            pieces, _, noted = self._beginning(file.pieces(), path, shown)
            if noted is not None:
                yield noted
                return
            for number, line in enumerate(lines(pieces), 1):
                if line and not line.isspace():
                    yield self._record(line, path, shown, f"line {number}", first)
                    first = False

    def _record(self, line: bytes, path: Path, shown: str, place: str, first: bool) -> Found:
        """The text of a line of JSON."""
        replaced = False
        try:
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                if self._bad != "replace" and isinstance(
                    noted := self._decode(line, f"{shown}, {place}", f"{path}, {place}"), Noted
                ):
                    return noted
                row, replaced = json.loads(line.decode(errors="replace")), True
            kind = f"a JSON {type(row).__name__}, not an object"
        except (ValueError, RecursionError) as error:  # nested a thousand times
            row, kind = None, f"not JSON ({error})"
        if not isinstance(row, dict):
            said = f"{path}, {place}: {kind}. Each line must be one JSON object."
            return self.bad("not JSON", f"{shown}, {place}: {kind}", said, wrong=first)
        found = self.text_of(row, shown, str(path), place, first)
        if replaced and isinstance(found, str) and "\ufffd" in found:
            return Noted("not UTF-8" + REPLACED, f"{shown}, {place}", found)
        return found

    def _parquet_rows(self, path: Path, shown: str, first: bool) -> Iterator[Found]:
        import pyarrow
        import pyarrow.parquet

        try:
            with path.open("rb") as content, pyarrow.parquet.ParquetFile(content) as file:
                leaves = [file.schema.column(i).path for i in range(len(file.schema))]
                if self._field not in (*file.schema_arrow.names, *leaves):
                    yield self._no_column(leaves, path, shown, first)
                    return
                batches = file.iter_batches(PARQUET_ROWS, columns=[self._field])
                for number, text in enumerate(self._rows(batches, path, shown, first), 1):
                    yield text
                    self._share = number / max(1, file.metadata.num_rows)
        except pyarrow.ArrowException as error:
            said = f"{path}: not a readable parquet file ({error}). Repair or remove the file."
            yield self.bad("damaged", f"{shown}: {str(error).splitlines()[0]}", said)

    def _arrow_rows(self, path: Path, shown: str, first: bool) -> Iterator[Found]:
        import pyarrow

        try:
            with path.open("rb") as content:
                self._raw = content
                indexed = content.read(len(ARROW_FILE)) == ARROW_FILE
                content.seek(0)
                with pyarrow.ipc.open_file(content) if indexed else pyarrow.ipc.open_stream(content) as file:
                    column = self._field if self._field in file.schema.names else self._field.partition(".")[0]
                    if column not in file.schema.names:
                        yield self._no_column(file.schema.names, path, shown, first)
                        return
                    every = map(file.get_batch, range(file.num_record_batches)) if indexed else file
                    yield from self._rows((batch.select([column]) for batch in every), path, shown, first)
                content.seek(-len(ARROW_END), os.SEEK_END)
                if not indexed and content.read() != ARROW_END:
                    raise pyarrow.ArrowInvalid("the end of the stream is missing")
        except pyarrow.ArrowException as error:
            said = f"{path}: not a readable Arrow file ({error}). Repair or remove the file."
            yield self.bad("damaged", f"{shown}: {str(error).splitlines()[0]}", said)

    def _rows(self, batches: Iterable[Any], path: Path, shown: str, first: bool) -> Iterator[Found]:
        """The texts of tables' rows."""
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield self.text_of(row, shown, str(path), f"row {number}", first and number == 1)

    def _no_column(self, names: Sequence[str], path: Path, shown: str, first: bool) -> Noted:
        said = f"{path}: no column {self._field!r}; there are {', '.join(names)}. Set --text-field."
        return self.bad(f"no field {self._field!r}", shown, said, wrong=first)


def _value(row: Mapping[str, Any], field: str) -> Any:
    """Of a field, or, where its name has a dot, of one in a record in the record.

    Raises:
        KeyError: there is none.
    """
    if field in row:
        return row[field]
    outer, dot, inner = field.partition(".")
    found = row[outer] if dot else None
    if dot and found is None:
        return None
    if not isinstance(found, Mapping):
        raise KeyError(field)
    return _value(found, inner)


def _names(row: Mapping[str, Any]) -> Iterator[str]:
    """Of the fields, as `--text-field` takes them; of records in the record, those of theirs."""
    for name, value in row.items():
        yield from (f"{name}.{inner}" for inner in value) if isinstance(value, Mapping) and value else (str(name),)


def _joined(pieces: Iterator[bytes]) -> tuple[bytes, RubbishError | None]:
    """All of them, and what follows them that does not belong there."""
    found: list[bytes] = []
    try:
        found.extend(pieces)
    except RubbishError as error:
        return b"".join(found), error
    return b"".join(found), None


def _raising(error: Exception) -> Iterator[bytes]:
    yield from ()
    raise error


def _units(every: Iterator[bytes], unit: TextUnit) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, or runs of them, each with the number of its first line."""
    paragraph: list[bytes] = []
    begun = 0
    for number, line in enumerate(every, 1):
        if line.strip():
            begun = begun if paragraph else number
            paragraph.append(line)
        if paragraph and (unit == "line" or not line.strip()):
            yield begun, b"\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield begun, b"\n".join(paragraph)
