"""Where the tokens of a split come from: from files here, from copies that are brought here, or sample by sample from a store.

Whoever reads may say before what comes next, in its order: then it is there, or on its way, when it is read.
"""

from __future__ import annotations

import logging
import os
import resource
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from anon_dist.data.errors import ShardError
from anon_dist.data.stored.blocks import FirstTouch, remedy
from anon_dist.data.stored.cache import Claim
from anon_dist.data.stored.index import ShardInfo
from anon_dist.data.stored.remote import RemoteFolder

log = logging.getLogger(__name__)
Int64 = NDArray[np.int64]

DOWNLOADS = 4
"""Shards that a process brings here at a time."""
SPARE_FILES = 256
"""Descriptors for all else than shards, each of which has one."""


class Piece(NamedTuple):
    """Tokens [start, start + length) of a shard."""

    shard: int
    start: int
    length: int


class Reader(Protocol):
    """Of the shards of a split, by their number among those that have tokens."""

    def read(self, shard: int, start: int, out: Int64) -> None:
        """Copy tokens from `start` of a shard on into `out`, (n,).

        Raises:
            ShardError: they are not there, or not as the index says.
        """

    def expect(self, pieces: Iterable[Piece]) -> None:
        """These are read next, in this order, after those that were said before."""

    def forget(self) -> None:
        """What was said is not read any more; who waits for it is given an error."""


class FolderReader:
    """Files in a folder here.

    Args:
        touch: compares what is read for the first time.

    Raises:
        ShardError: they are more than this process may open.
    """

    def __init__(
        self, directory: Path, shards: Sequence[ShardInfo], dtype: np.dtype[Any], touch: FirstTouch | None = None
    ) -> None:
        allow_files(len(shards))
        self._touch = touch
        self._files = [ShardFile(directory / shard.file, dtype, shard) for shard in shards]

    def read(self, shard: int, start: int, out: Int64) -> None:
        """See `Reader`."""
        tokens, end = self._files[shard], start + len(out)
        if self._touch is not None:
            self._touch.check(shard, tokens, start, end)
        out[:] = tokens[start:end]

    def expect(self, pieces: Iterable[Piece]) -> None:
        """Nothing: they are here."""

    def forget(self) -> None:
        """Nothing."""


class CachedReader:
    """Shards of a folder at an address, brought whole into the cache of this machine, in the order in which they are read.

    Args:
        claim: of all of them.
        touch: compares what is read for the first time; a copy that is damaged is brought again.
    """

    def __init__(
        self,
        remote: RemoteFolder,
        claim: Claim,
        shards: Sequence[ShardInfo],
        dtype: np.dtype[Any],
        touch: FirstTouch | None = None,
    ) -> None:
        allow_files(len(shards))
        self._remote, self._claim, self._shards, self._dtype, self._touch = remote, claim, shards, dtype, touch
        self._files: dict[int, ShardFile] = {}
        self._failed: dict[int, Exception] = {}
        self._forgotten = 0
        self._jobs = Jobs(self._bring, DOWNLOADS)

    def read(self, shard: int, start: int, out: Int64) -> None:
        """See `Reader`. Waits for the shard."""
        tokens, end = self._files.get(shard), start + len(out)
        if tokens is None:
            tokens = self._wait(shard)
        if self._touch is not None:
            try:
                self._touch.check(shard, tokens, start, end)
            except ShardError as error:
                log.warning("%s It is brought again.", error)
                tokens = self._again(shard)
                self._touch.check(shard, tokens, start, end)
        out[:] = tokens[start:end]

    def expect(self, pieces: Iterable[Piece]) -> None:
        """See `Reader`."""
        wanted = dict.fromkeys(piece.shard for piece in pieces)
        self._jobs.add([shard for shard in wanted if shard not in self._files])

    def forget(self) -> None:
        """See `Reader`. Shards that are on their way come all the same."""
        with self._jobs.changed:
            self._jobs.clear()
            self._forgotten += 1
            self._jobs.changed.notify_all()

    def _wait(self, shard: int) -> ShardFile:
        with self._jobs.changed:
            self._failed.pop(shard, None)
            if shard not in self._files:
                self._jobs.hurry(shard)
            before = self._forgotten
            self._jobs.changed.wait_for(
                lambda: shard in self._files or shard in self._failed or self._forgotten != before
            )
            if shard in self._files:
                return self._files[shard]
            error = self._failed.get(shard, ShardError(f"{self._shards[shard].file} is not waited for any more"))
        raise ShardError(str(error)) from error

    def _bring(self, number: int) -> None:
        try:
            self._files[number] = ShardFile(self._claim.shard(*self._wanted(number)), self._dtype, self._shards[number])
        except Exception as error:  # is raised where the shard is read
            self._failed[number] = error

    def _again(self, number: int) -> ShardFile:
        self._files[number] = ShardFile(self._claim.replace(*self._wanted(number)), self._dtype, self._shards[number])
        return self._files[number]

    def _wanted(self, number: int) -> tuple[ShardInfo, str, Callable[[], Iterator[bytes]]]:
        shard = self._shards[number]
        return shard, f"{self._remote.address}/{shard.file}", lambda: self._remote.blocks(shard.file, shard.bytes)


class Jobs:
    """Numbers that threads work through, in the order given; threads live only while there is work.

    Args:
        work: done with each number; raises nothing.
        threads: at most.
    """

    def __init__(self, work: Callable[[int], None], threads: int) -> None:
        self._work, self._threads, self._running = work, threads, 0
        self._waiting: deque[int] = deque()
        self._known: set[int] = set()
        """Waiting, or at work."""
        self.changed = threading.Condition(threading.RLock())
        """Notified after each."""

    def add(self, numbers: Iterable[int]) -> None:
        """Further ones, unless they are known."""
        with self.changed:
            for number in numbers:
                if number not in self._known:
                    self._known.add(number)
                    self._waiting.append(number)
            self._start()

    def hurry(self, number: int) -> None:
        """One before all others."""
        with self.changed:
            if number in self._waiting:
                self._waiting.remove(number)
            elif number in self._known:
                return
            self._known.add(number)
            self._waiting.appendleft(number)
            self._start()

    def clear(self) -> None:
        """Forget those that wait."""
        with self.changed:
            self._known.difference_update(self._waiting)
            self._waiting.clear()

    def _start(self) -> None:
        while self._running < min(self._threads, len(self._known)):
            self._running += 1
            # A daemon: the end of the process waits for no store.
            threading.Thread(target=self._run, name="shards", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self.changed:
                if not self._waiting:
                    self._running -= 1
                    return
                number = self._waiting.popleft()
            try:
                self._work(number)
            finally:
                with self.changed:
                    self._known.discard(number)
                    self.changed.notify_all()


class ShardFile:
    """The tokens of a shard in a file here, each stretch of which is read when it is asked for.

    The file is not mapped: where it becomes shorter, or its server loses it, the next look at a map kills the process without a word.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], shard: ShardInfo) -> None:
        self._path, self._dtype, self._shard = path, dtype, shard
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    @property
    def itemsize(self) -> int:
        """Bytes of a token."""
        return self._dtype.itemsize

    def __getitem__(self, span: slice) -> NDArray[Any]:
        """Raises: ShardError: the file is not what it was; naming it, and what brings it back."""
        first, last, _ = span.indices(self._shard.tokens)
        tokens = np.empty(last - first, self._dtype)
        left, at = tokens.view(np.uint8).data, self._shard.start + first * self.itemsize
        while left:
            try:
                done = os.preadv(self._file, [left], at)
            except OSError as error:
                raise ShardError(f"{self._path} cannot be read ({error.strerror}). {remedy(self._shard)}") from error
            if not done:
                size, end = os.fstat(self._file).st_size, self._shard.start + self._shard.bytes
                raise ShardError(f"{self._path} was cut: {size:,} bytes of {end:,} are left. {remedy(self._shard)}")
            left, at = left[done:], at + done
        return tokens


def allow_files(shards: int) -> None:
    """Let this process open so many files more.

    Raises:
        ShardError: the system does not allow it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = shards + SPARE_FILES
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise ShardError(
            f"{shards:,} shards, and this process may open {hard:,} files: raise the limit (ulimit -n), or prepare the data with a larger "
            "--shard-tokens"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else hard, hard))
