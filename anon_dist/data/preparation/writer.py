"""Writing shards so that a killed preparation can go on: all that a split's files hold is described by a small state, taken at commits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from anon_dist.data.errors import PreparationError
from anon_dist.data.stored.blocks import SUM_BYTES, BlockDigests, blocks_of, sums_file, write_sums
from anon_dist.data.stored.index import ShardInfo, SplitInfo
from anon_dist.data.stored.shards import file_checksum
from anon_dist.files import sync

RESTART = "Start the preparation again with --overwrite."


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents of one split as tokens, each followed by the end-of-document token."""

    tokens: NDArray[Any]
    """In the dtype of the shards."""
    ends: NDArray[np.int64]
    """Where each document ends, its end-of-document token included: ascending, the last is `len(tokens)`."""
    text_bytes: int


@dataclass(frozen=True)
class SplitState:
    """What the files of a split hold at a commit. Whatever they hold beyond it is cut off on resume."""

    shards: tuple[ShardInfo, ...] = ()
    """The finished shards."""
    open: ShardInfo | None = None
    """The shard being written, as far as it was at the commit."""
    documents: int = 0
    text_bytes: int = 0

    @property
    def tokens(self) -> int:
        """Tokens in all shards, the open one included."""
        return sum(s.tokens for s in self.shards) + (self.open.tokens if self.open else 0)

    def info(self) -> SplitInfo:
        """The split's entry in the index, once no shard is open; without the checksum of its `sums`."""
        return SplitInfo(self.shards, self.tokens, self.documents, self.text_bytes)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The reverse of `dataclasses.asdict`."""
        shards = tuple(ShardInfo(**shard) for shard in content["shards"])
        open_shard = ShardInfo(**content["open"]) if content["open"] else None
        return cls(shards, open_shard, content["documents"], content["text_bytes"])


class SplitWriter:
    """Appends the tokens of a split to its shards, `{split}-00000.bin` and so on, each of at most `shard_tokens` tokens.

    Args:
        state: what an earlier run had committed; its open shard is checked, cut back to that, and continued.

    Raises:
        PreparationError: the files on disk do not hold what the state says.
    """

    def __init__(
        self, directory: Path, split: str, dtype: np.dtype[Any], shard_tokens: int, state: SplitState = SplitState()
    ) -> None:
        self._directory, self._split, self._dtype, self._capacity = directory, split, dtype, shard_tokens
        self._state = state
        self._file: IO[bytes] | None = None
        self._digest, self._blocks = xxhash.xxh3_64(), BlockDigests()
        self._tokens = self._documents = 0
        for shard in state.shards:
            self._check(shard, exact=True)
        self._check_sums()
        if state.open:
            self._reopen(state.open)

    def append(self, documents: EncodedDocuments) -> int:
        """Write documents behind those before, over as many shards as it takes. Returns how many shards that finished."""
        before, done = len(self._state.shards), 0
        while done < len(documents.tokens):
            piece = documents.tokens[done : done + self._capacity - self._tokens]
            self._write(piece)
            first, last = np.searchsorted(documents.ends, [done, done + len(piece)], side="right")
            self._documents += int(last - first)
            done += len(piece)
            if self._tokens == self._capacity:
                self.finish_shard()
        self._state = replace(
            self._state,
            documents=self._state.documents + len(documents.ends),
            text_bytes=self._state.text_bytes + documents.text_bytes,
        )
        return len(self._state.shards) - before

    def commit(self) -> SplitState:
        """Bring everything to the disk and say what is there."""
        if self._file is None:
            return self._state
        _sync(self._file)
        return replace(self._state, open=self._shard())

    def finish_shard(self) -> None:
        """Close the open shard, if there is one: the next token begins another."""
        if self._file is None:
            return
        _sync(self._file)
        self._file.close()
        write_sums(self._directory, self._split, self._state.shards, self._blocks.sums())
        self._state = replace(self._state, shards=(*self._state.shards, self._shard()), open=None)
        self._file, self._digest, self._blocks = None, xxhash.xxh3_64(), BlockDigests()
        self._tokens = self._documents = 0

    def close(self) -> None:
        """Close the file without finishing the shard."""
        if self._file is not None:
            self._file.close()

    def _write(self, tokens: NDArray[Any]) -> None:
        if self._file is None:
            self._file = self._path().open("wb")
            sync(self._directory)
        data = np.ascontiguousarray(tokens, self._dtype).data.cast("B")
        self._file.write(data)
        self._digest.update(data)
        self._blocks.update(data)
        self._tokens += len(tokens)

    def _path(self) -> Path:
        return self._directory / f"{self._split}-{len(self._state.shards):05d}.bin"

    def _shard(self) -> ShardInfo:
        size = self._tokens * self._dtype.itemsize
        return ShardInfo(self._path().name, self._tokens, self._documents, size, self._digest.hexdigest())

    def _reopen(self, shard: ShardInfo) -> None:
        path = self._check(shard, exact=False)
        os.truncate(path, shard.bytes)
        self._digest = file_checksum(path, self._blocks.update)
        if self._digest.hexdigest() != shard.xxh3_64:
            raise PreparationError(f"{path} was changed since the preparation was interrupted. {RESTART}")
        self._file = path.open("ab")
        self._tokens, self._documents = shard.tokens, shard.documents
        self._state = replace(self._state, open=None)

    def _check_sums(self) -> None:
        path = self._directory / sums_file(self._split)
        wanted = SUM_BYTES * sum(map(blocks_of, self._state.shards))
        size = path.stat().st_size if path.exists() else 0
        if size < wanted:
            raise PreparationError(f"{path} has {size:,} bytes, the progress file says {wanted:,}. {RESTART}")

    def _check(self, shard: ShardInfo, *, exact: bool) -> Path:
        path = self._directory / shard.file
        size = path.stat().st_size if path.exists() else 0
        if size < shard.bytes or (exact and size > shard.bytes):
            raise PreparationError(f"{path} has {size:,} bytes, the progress file says {shard.bytes:,}. {RESTART}")
        return path


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
