"""Checksums of the blocks of shards: what a training reads is compared at the first touch, so that no start has to read a whole corpus.

`{split}.sums` holds the xxh3_64 of each block of each shard of a split, in their order, as little-endian uint64: 8 bytes for each 128 KiB.
Each shard begins a block.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from anon_dist.data.errors import ShardError
from anon_dist.data.stored.index import ShardInfo
from anon_dist.data.stored.remote import UPLOAD
from anon_dist.stores import is_address

BLOCK_BYTES = 1 << 17
"""What the kernel reads anyway for one token that is not in memory."""
SUM_BYTES = 8
RESTORE = "Copy it again from where it came from, or prepare the data again: `anon-dist data prepare … --overwrite`, as at first."
AGAIN = "Put it back where it was, or index it again with `anon-dist data index`."


def remedy(shard: ShardInfo, place: str = "") -> str:
    """What brings a shard back; `place`: its folder or itself, which may be at an address."""
    if is_address(place):
        return UPLOAD
    return AGAIN if shard.is_elsewhere else RESTORE


def sums_file(split: str) -> str:
    """Name, inside the folder, of the checksums of a split's blocks."""
    return f"{split}.sums"


def blocks_of(shard: ShardInfo) -> int:
    """Blocks of a shard, the last of which may be short."""
    return -(-shard.bytes // BLOCK_BYTES)


class Tokens(Protocol):
    """Of a shard: a stretch of them is read when it is asked for."""

    @property
    def itemsize(self) -> int:
        """Bytes of one."""

    def __getitem__(self, span: slice) -> NDArray[Any]:
        """Raises: ShardError: they cannot be read."""


class BlockDigests:
    """Takes the bytes of a shard in pieces of any size, and has the checksums of its blocks."""

    def __init__(self) -> None:
        self._done: list[int] = []
        self._open, self._filled = xxhash.xxh3_64(), 0

    def update(self, data: memoryview) -> None:
        """The next bytes of the shard."""
        at = 0
        while at < len(data):
            piece = data[at : at + BLOCK_BYTES - self._filled]
            self._open.update(piece)
            self._filled += len(piece)
            at += len(piece)
            if self._filled == BLOCK_BYTES:
                self._done.append(self._open.intdigest())
                self._open, self._filled = xxhash.xxh3_64(), 0

    def sums(self) -> bytes:
        """Of the blocks so far, as they stand in the file."""
        last = [self._open.intdigest()] if self._filled else []
        return np.array([*self._done, *last], "<u8").tobytes()


def write_sums(folder: Path, split: str, before: Sequence[ShardInfo], sums: bytes) -> None:
    """Put the checksums of a shard behind those of the shards before it, and on the disk; what stood there is replaced."""
    path = folder / sums_file(split)
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.seek(SUM_BYTES * sum(map(blocks_of, before)))
        file.truncate()
        file.write(sums)
        file.flush()
        os.fsync(file.fileno())


class FirstTouch:
    """Compares blocks of the shards of a split with their checksums, each when it is first read.

    Args:
        folder: of the shards.
        shards: those with tokens, in their order.
        digest: of the file of checksums.
        place: where the shards are read, for messages; None: in `folder`.

    Raises:
        ShardError: that file is missing or altered.
    """

    def __init__(
        self, folder: Path, split: str, shards: Sequence[ShardInfo], digest: str, place: str | None = None
    ) -> None:
        path = folder / sums_file(split)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise ShardError(f"{path} is missing. {RESTORE}") from None
        if xxhash.xxh3_64_hexdigest(content) != digest:
            raise ShardError(f"{path} is altered: its checksum is not that of the index. {RESTORE}")
        self._place, self._shards, self._called = str(folder) if place is None else place, shards, path.name
        self._sums = np.frombuffer(content, "<u8")
        counts = [blocks_of(shard) for shard in shards]
        self._first = (np.cumsum(counts) - counts).tolist()
        self._seen = bytearray(len(self._sums))

    def check(self, shard: int, data: Tokens, start: int, end: int) -> None:
        """Tokens [start, end) of a shard, `data`, are about to be read. `shard` is its number.

        Raises:
            ShardError: a block that holds some of them is altered.
        """
        size, first = data.itemsize, self._first[shard]
        a, b = first + start * size // BLOCK_BYTES, first + (end * size - 1) // BLOCK_BYTES + 1
        if 0 in self._seen[a:b]:
            for block in range(a, b):
                if not self._seen[block]:
                    self._compare(shard, data, block)

    def _compare(self, shard: int, data: Tokens, block: int) -> None:
        at = (block - self._first[shard]) * BLOCK_BYTES
        self.compare(shard, at, data[at // data.itemsize : (at + BLOCK_BYTES) // data.itemsize].data)
        self._seen[block] = 1  # only now: a thread beside this one may compare it too

    def compare(self, shard: int, at: int, content: memoryview) -> None:
        """The block of a shard that begins at byte `at` with its checksum, whether it was seen before or not.

        Raises:
            ShardError: it is altered.
        """
        found, wanted = xxhash.xxh3_64_intdigest(content), self._sums[self._first[shard] + at // BLOCK_BYTES]
        if found != wanted:
            info = self._shards[shard]
            place = info.file if info.is_elsewhere else f"{self._place}/{info.file}"
            raise ShardError(
                f"{place} is altered: bytes {at:,} to {min(at + BLOCK_BYTES, info.bytes):,} have checksum "
                f"{found:016x}, {self._called} says {wanted:016x}. {remedy(info, place)}"
            )
