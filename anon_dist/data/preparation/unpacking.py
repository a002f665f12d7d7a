"""The bytes of a file of texts, unpacked, piece by piece up to where it is damaged."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

COMPRESSIONS = (".gz", ".zst")
PIECE = 1 << 16
_NOT_PACKED = ("Not a gzipped file", "Unknown frame descriptor")
"""What gzip and Arrow say where something packed should begin."""


class RubbishError(Exception):
    """What is packed is whole, and something else follows it in the file."""


class Unpacked:
    """A file that is read once, from its beginning to its end.

    Args:
        path: what its name ends with says how it is packed.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._kind = path, path.suffix.lower()
        self.raw: BinaryIO = path.open("rb")
        self._given = 0

    def __enter__(self) -> Unpacked:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()

    def pieces(self) -> Iterator[bytes]:
        """All bytes in their order; then, where there is damage, its error.

        Raises:
            RubbishError: behind all that was packed.
            OSError, EOFError, zlib.error: the file cannot be read, or is damaged. `errno` is None, or missing, if it is damaged.
        """
        try:
            yield from self._read(self.raw)
        except OSError as error:
            if error.errno is not None:
                raise
            if self._kind == ".zst":  # Arrow keeps to itself what it had unpacked of the piece that failed
                yield from self._last_piece()
            if self._given and str(error).partition(" (")[0].endswith(_NOT_PACKED):
                raise RubbishError(f"something that is not packed follows {self._given:,} bytes of text") from error
            raise

    def _read(self, raw: BinaryIO) -> Iterator[bytes]:
        file = _opened(raw, self._kind)
        while data := file.read1(PIECE):
            self._given += len(data)
            yield data

    def _last_piece(self) -> Iterator[bytes]:
        """What lies before the damage and was not given yet, byte by byte."""
        found = bytearray()
        with self._path.open("rb") as raw:
            file = _opened(raw, self._kind, 1)
            try:
                for _ in range(self._given // PIECE):
                    file.read(PIECE)
                file.read(self._given % PIECE)
                while byte := file.read(1):
                    found += byte
            except OSError:
                pass
        self._given += len(found)
        yield bytes(found)


def _opened(raw: BinaryIO, kind: str, buffer: int = io.DEFAULT_BUFFER_SIZE) -> io.BufferedIOBase:
    if kind == ".zst":
        import pyarrow

        # The zstandard package would take a file that breaks off for a whole one.
        return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"), buffer)
    return gzip.GzipFile(fileobj=raw, mode="rb") if kind == ".gz" else raw  # type: ignore[return-value]


def lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their ends. A line that damage cuts off is not given; one that rubbish follows is whole."""
    rest: list[bytes] = []
    rubbish = None
    try:
        for piece in pieces:
            first, *more = piece.split(b"\n")
            rest.append(first)
            if more:
                yield b"".join(rest)
                yield from more[:-1]
                rest = [more[-1]]
    except RubbishError as error:
        rubbish = error
    if last := b"".join(rest):
        yield last
    if rubbish is not None:
        raise rubbish
