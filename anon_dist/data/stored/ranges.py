"""Samples read from a store one by one, each as a range of bytes of its shard: for corpora that are larger than the disks here.

A process of any number of ranks asks for the ranges of its own samples alone, ahead of their use. A range is widened to the blocks that
have checksums, and these are compared. Where they are not to be, only its length is and, as of all tokens, their place in the vocabulary.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anon_dist.data.errors import ShardError
from anon_dist.data.stored.blocks import BLOCK_BYTES, FirstTouch
from anon_dist.data.stored.index import ShardInfo
from anon_dist.data.stored.reading import Piece
from anon_dist.data.stored.remote import RemoteFolder

log = logging.getLogger(__name__)
Int64 = NDArray[np.int64]

REQUESTS = 16
"""Ranges that a process asks for at a time."""
READY_BYTES = 1 << 25
"""Of ranges that have come and were not read yet."""


class _Coming:
    """A range that was asked for."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.done = threading.Event()
        self.tokens: NDArray[Any] | None = None
        self.error: Exception | None = None


class RangeReader:
    """Shards of a folder at an address, read by ranges of bytes.

    Args:
        touch: has the checksums of blocks, which then are asked for whole.
    """

    def __init__(
        self, remote: RemoteFolder, shards: Sequence[ShardInfo], dtype: np.dtype[Any], touch: FirstTouch | None = None
    ) -> None:
        self._remote, self._shards, self._dtype, self._touch = remote, shards, dtype, touch
        self._lock = threading.Lock()
        self._waiting: deque[Piece] = deque()
        """To be asked for."""
        self._altered: set[int] = set()
        """Shards of which something came altered, and was said to."""
        self._asked: dict[Piece, deque[_Coming]] = {}
        """Asked for ahead."""
        self._awaited: list[_Coming] = []
        """Being read."""
        self._bytes = self._running = 0
        """Of what has been asked for ahead; threads that do."""

    def read(self, shard: int, start: int, out: Int64) -> None:
        """See `Reader`. What was not said before is asked for now."""
        with self._lock:
            coming = self._take(Piece(shard, start, len(out)))
            self._start()
        coming.done.wait()
        with self._lock:
            self._awaited = [other for other in self._awaited if other is not coming]
        if coming.error is not None:
            raise ShardError(str(coming.error)) from coming.error
        assert coming.tokens is not None
        out[:] = coming.tokens

    def expect(self, pieces: Iterable[Piece]) -> None:
        """See `Reader`."""
        with self._lock:
            self._waiting.extend(pieces)
            self._start()

    def forget(self) -> None:
        """See `Reader`."""
        with self._lock:
            given_up = ShardError(f"{self._remote.address} is not waited for any more")
            for coming in self._awaited:
                coming.error = given_up
                coming.done.set()
            self._waiting.clear()
            self._asked.clear()
            self._awaited.clear()
            self._bytes = 0

    def _take(self, piece: Piece) -> _Coming:
        """What was asked for; or is going to be, now, if it was said before or not."""
        if found := self._asked.get(piece):
            coming = found.popleft()
            if not found:
                del self._asked[piece]
            self._bytes -= self._size(piece)
        else:
            with suppress(ValueError):
                self._waiting.remove(piece)
            coming = _Coming(piece)
            threading.Thread(target=self._bring, args=(coming,), name="range", daemon=True).start()
        self._awaited.append(coming)
        return coming

    def _size(self, piece: Piece) -> int:
        return piece.length * self._dtype.itemsize

    def _start(self) -> None:
        for _ in range(min(REQUESTS - self._running, len(self._waiting)) if self._has_room() else 0):
            self._running += 1
            threading.Thread(target=self._run, name="ranges", daemon=True).start()

    def _has_room(self) -> bool:
        return self._bytes < READY_BYTES

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or not self._has_room():
                    self._running -= 1
                    return
                coming = _Coming(self._waiting.popleft())
                self._asked.setdefault(coming.piece, deque()).append(coming)
                self._bytes += self._size(coming.piece)
            self._bring(coming)

    def _bring(self, coming: _Coming) -> None:
        try:
            coming.tokens = self._fetch(coming.piece)
        except Exception as error:  # is raised where the tokens are read
            coming.error = error
        coming.done.set()

    @property
    def is_checked(self) -> bool:
        """Whether what comes is compared with checksums."""
        return self._touch is not None

    def _fetch(self, piece: Piece) -> NDArray[Any]:
        shard, width = self._shards[piece.shard], self._dtype.itemsize
        start, end = piece.start * width, (piece.start + piece.length) * width
        if self._touch is None:
            return np.frombuffer(self._remote.piece(shard.file, start, end, shard.bytes), self._dtype)
        first, last = start // BLOCK_BYTES * BLOCK_BYTES, min(-(-end // BLOCK_BYTES) * BLOCK_BYTES, shard.bytes)
        data = self._remote.piece(shard.file, first, last, shard.bytes)
        try:
            self._compare(piece.shard, first, data)
        except ShardError as error:
            with self._lock:
                is_news = piece.shard not in self._altered
                self._altered.add(piece.shard)
            if is_news:  # of many samples in one block, and many blocks of one file, one line
                log.warning("%s It is asked for again, as is whatever else of the file comes altered.", error)
            data = self._remote.piece(shard.file, first, last, shard.bytes)
            self._compare(piece.shard, first, data)
        return np.frombuffer(data[start - first : end - first], self._dtype)  # the rest of the blocks is let go

    def _compare(self, shard: int, first: int, data: bytes) -> None:
        assert self._touch is not None
        for at in range(0, len(data), BLOCK_BYTES):
            self._touch.compare(shard, first + at, memoryview(data)[at : at + BLOCK_BYTES])
