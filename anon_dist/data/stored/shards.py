"""Reading prepared tokens: shards, files here or brought from a store, that look like one long sequence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from anon_dist.data.errors import ShardError
from anon_dist.data.samples.opening import check_size, open_reader
from anon_dist.data.stored import cache
from anon_dist.data.stored.blocks import BLOCK_BYTES, RESTORE, remedy
from anon_dist.data.stored.digests import file_checksum
from anon_dist.data.stored.index import Index, ShardInfo, SplitInfo
from anon_dist.data.stored.ranges import RangeReader
from anon_dist.data.stored.reading import FolderReader, Piece
from anon_dist.stores import is_address

__all__ = ["Index", "ShardError", "ShardInfo", "SplitInfo", "TokenShards", "file_checksum", "verify_checksums"]

Tokens = NDArray[np.int64]


class TokenShards:
    """The tokens of one split.

    A sample is `seq_len + 1` tokens: inputs and targets overlap in all but one. Sample i starts at token i·seq_len, so that every
    token but the first is a target once, and the last, incomplete sample is left out.

    Args:
        directory: a folder made by `anon-dist data prepare`, or the address of one.
        split: `train` or `val`.
        verify: `size` compares the size of each file with the index, which costs nothing. `read` also compares each block of 128 KiB with
            its checksum when it is first read; a folder of an earlier version has no such checksums (`Index.has_sums`), and is not
            compared. `checksum` reads and hashes all files now; in a job of many ranks let them share that, with `verify_checksums`. At an
            address it is `read`.

    Raises:
        ShardError: the folder has no index, or a shard is missing, torn (wrong size) or altered (wrong checksum); with `read` also
            where tokens are read.
        DataError: there is no such split.
    """

    def __init__(
        self, directory: str | Path, split: str = "train", verify: Literal["size", "read", "checksum"] = "size"
    ) -> None:
        self.directory = directory if is_address(directory) else Path(directory)
        self.index = Index.load(directory)
        self.info = self.index.split(split)
        self.split = split
        self._reader = open_reader(directory, self.index, split, verify != "size")
        if verify == "checksum" and isinstance(self.directory, Path):
            _check_contents(self.directory, self.info.shards, quiet=True)
        self._sizes = [shard.tokens for shard in self.info.shards if shard.tokens]
        self._ends = np.cumsum(self._sizes, dtype=np.int64)

    def __len__(self) -> int:
        """Tokens in the split."""
        return self.info.tokens

    def tokens(self, start: int, count: int) -> Tokens:
        """Tokens [start, start + count) as int64, across the borders of shards.

        Raises:
            IndexError: the range is not inside the split.
            ShardError: a token is outside of the vocabulary.
        """
        out = np.empty(count, np.int64)
        self._copy(start, out)
        return self._known(out)

    def num_samples(self, seq_len: int) -> int:
        """Whole samples of `seq_len + 1` tokens: (T − 1) // seq_len, never below 0."""
        return max(0, len(self) - 1) // seq_len

    def sample(self, index: int, seq_len: int) -> Tokens:
        """Sample `index`, int64 of shape (seq_len + 1,).

        Raises:
            IndexError: there is no such sample.
        """
        return self.tokens(index * seq_len, seq_len + 1)

    def samples(self, indices: Tokens, seq_len: int) -> Tokens:
        """The samples at `indices`, int64 of shape (len(indices), seq_len + 1).

        Raises:
            IndexError: there is no such sample.
            ShardError: a token is outside of the vocabulary.
        """
        out = np.empty((len(indices), seq_len + 1), np.int64)
        for row, index in zip(out, indices.tolist(), strict=True):
            self._copy(index * seq_len, row)
        return self._known(out)

    def expect(self, starts: Tokens, counts: Tokens) -> None:
        """The `counts` tokens from `starts` on, (n,) each, are read next, in this order: have them brought if they are not here."""
        spans = zip(starts.tolist(), counts.tolist(), strict=True)
        self._reader.expect([piece for start, count in spans for piece in self._pieces(start, count)])

    def forget(self) -> None:
        """What was expected is not read any more."""
        self._reader.forget()

    @property
    def is_here(self) -> bool:
        """Whether the split is a folder's of this machine."""
        return isinstance(self._reader, FolderReader)

    @property
    def by_ranges(self) -> bool:
        """Whether each sample is a request to a store."""
        return isinstance(self._reader, RangeReader)

    def read_how(self, seq_len: int) -> str:
        """How a split at an address is read, in words."""
        size, place = sum(shard.bytes for shard in self.info.shards), cache.present()
        if isinstance(self._reader, RangeReader):
            each = (seq_len + 1) * self.index.numpy_dtype.itemsize
            blocks = -(-each // BLOCK_BYTES) * BLOCK_BYTES
            how = (
                f"{blocks:,} bytes or a block more, which are compared with their checksums"
                if self._reader.is_checked
                else f"{each:,} bytes, which are compared with no checksum"
            )
            return (
                f"{size:,} bytes are more than the {place.room():,} that data.cache_bytes leaves them in {place.folder}: each sample is a "
                f"request of {how}"
            )
        return f"{size:,} bytes are copied into {place.folder}, shard by shard, as they are read"

    def _known(self, tokens: Tokens) -> Tokens:
        """The tokens, none of which is outside of the vocabulary. It costs next to nothing beside reading them."""
        if tokens.size and tokens.max() >= self.index.vocab_size:
            raise ShardError(
                f"{self.directory}, split {self.split}: token {tokens.max()} is not in the vocabulary, which index.json says has "
                f"{self.index.vocab_size} tokens. {RESTORE}"
            )
        return tokens

    def _copy(self, start: int, out: Tokens) -> None:
        if start < 0 or start + len(out) > len(self):
            raise IndexError(
                f"tokens [{start}, {start + len(out)}) of {self.directory} {self.split}, which has {len(self)}"
            )
        shard = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        while done < len(out):
            offset = start + done - int(self._ends[shard]) + self._sizes[shard]
            piece = out[done : done + self._sizes[shard] - offset]
            self._reader.read(shard, offset, piece)
            done += len(piece)
            shard += 1

    def _pieces(self, start: int, count: int) -> Iterator[Piece]:
        """The parts of shards that hold these tokens."""
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while count:
            offset = start - int(self._ends[shard]) + self._sizes[shard]
            here = min(count, self._sizes[shard] - offset)
            yield Piece(shard, offset, here)
            start, count, shard = start + here, count - here, shard + 1


def verify_checksums(directory: str | Path, *, quiet: bool = False, reader: int = 0, readers: int = 1) -> Index:
    """Read every shard of every split and compare it with the index; returns the index. Shows progress on a terminal unless `quiet`.

    Args:
        reader, readers: of several that share the work, which takes every `readers`-th shard.

    Raises:
        ShardError: naming the first shard that is missing, torn or altered.
    """
    index = Index.load(directory)
    for shard in index.shards:
        check_size(Path(directory), shard)
    _check_contents(Path(directory), index.shards[reader::readers], quiet=quiet)
    return index


def _check_contents(directory: Path, shards: tuple[ShardInfo, ...], *, quiet: bool) -> None:
    total = sum(shard.bytes for shard in shards)
    hide = quiet or not sys.stderr.isatty()
    with tqdm(total=total, desc="verifying", unit="B", unit_scale=True, disable=hide) as bar:
        for shard in shards:
            found = file_checksum(
                directory / shard.file, lambda data: bar.update(len(data)), shard.start, shard.bytes
            ).hexdigest()
            if found != shard.xxh3_64:
                raise ShardError(
                    f"{directory / shard.file} is altered: checksum {found}, the index says {shard.xxh3_64}. {remedy(shard)}"
                )
