"""Reading prepared tokens: memory-mapped shards that look like one long sequence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm

from anon_dist.data.blocks import RESTORE, FirstTouch
from anon_dist.data.errors import ShardError
from anon_dist.data.index import Index, ShardInfo, SplitInfo

__all__ = ["Index", "ShardError", "ShardInfo", "SplitInfo", "TokenShards", "file_checksum", "verify_checksums"]

Tokens = NDArray[np.int64]

READ_BLOCK = 1 << 24


def file_checksum(path: Path, seen: Callable[[memoryview], object] = lambda data: None) -> xxhash.xxh3_64:
    """The hash of a file, which may go on being updated. `seen` is given each piece that is read."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(READ_BLOCK):
            digest.update(block)
            seen(memoryview(block))
    return digest


class TokenShards:
    """The tokens of one split, read from memory-mapped files.

    A sample is `seq_len + 1` tokens: inputs and targets overlap in all but one. Sample i starts at token i·seq_len, so that every
    token but the first is a target once, and the last, incomplete sample is left out.

    Args:
        directory: a folder made by `anon-dist data prepare`.
        split: `train` or `val`.
        verify: `size` compares the size of each file with the index, which costs nothing. `read` also compares each block of 128 KiB with
            its checksum when it is first read; a folder of an earlier version has no such checksums (`Index.has_sums`), and is not
            compared. `checksum` reads and hashes all files now; in a job of many ranks let them share that, with `verify_checksums`.

    Raises:
        ShardError: the folder has no index, or a shard is missing, torn (wrong size) or altered (wrong checksum); with `read` also
            where tokens are read.
        DataError: there is no such split.
    """

    def __init__(
        self, directory: str | Path, split: str = "train", verify: Literal["size", "read", "checksum"] = "size"
    ) -> None:
        self.directory = Path(directory)
        self.index = Index.load(directory)
        self.info = self.index.split(split)
        self.split = split
        for shard in self.info.shards:
            _check_size(self.directory, shard)
        if verify == "checksum":
            _check_contents(self.directory, self.info.shards, quiet=True)
        shards = [shard for shard in self.info.shards if shard.tokens]
        self._maps = [_open(self.directory / shard.file, self.index.numpy_dtype) for shard in shards]
        by_block = verify == "read" and bool(self.info.sums)
        self._touch = FirstTouch(self.directory, split, shards, self.info.sums) if by_block else None
        self._ends = np.cumsum([len(m) for m in self._maps], dtype=np.int64)

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
            tokens = self._maps[shard]
            offset = start + done - int(self._ends[shard]) + len(tokens)
            piece = tokens[offset : offset + len(out) - done]
            if self._touch is not None:
                self._touch.check(shard, tokens, offset, offset + len(piece))
            out[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1


def verify_checksums(directory: str | Path, *, quiet: bool = False, reader: int = 0, readers: int = 1) -> Index:
    """Read every shard of every split and compare it with the index; returns the index. Shows progress on a terminal unless `quiet`.

    Args:
        reader, readers: of several that share the work, which takes every `readers`-th shard.

    Raises:
        ShardError: naming the first shard that is missing, torn or altered.
    """
    index = Index.load(directory)
    for shard in index.shards:
        _check_size(Path(directory), shard)
    _check_contents(Path(directory), index.shards[reader::readers], quiet=quiet)
    return index


def _check_size(directory: Path, shard: ShardInfo) -> None:
    path = directory / shard.file
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ShardError(f"{path} is missing. {RESTORE}") from None
    if size != shard.bytes:
        raise ShardError(f"{path} is torn: {size:,} bytes, the index says {shard.bytes:,}. {RESTORE}")


def _check_contents(directory: Path, shards: tuple[ShardInfo, ...], *, quiet: bool) -> None:
    total = sum(shard.bytes for shard in shards)
    hide = quiet or not sys.stderr.isatty()
    with tqdm(total=total, desc="verifying", unit="B", unit_scale=True, disable=hide) as bar:
        for shard in shards:
            found = file_checksum(directory / shard.file, lambda data: bar.update(len(data))).hexdigest()
            if found != shard.xxh3_64:
                raise ShardError(
                    f"{directory / shard.file} is altered: checksum {found}, the index says {shard.xxh3_64}. {RESTORE}"
                )


def _open(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    # A plain array over the map: np.memmap's own slicing costs more than the copy of a short sample.
    return np.memmap(path, dtype, mode="r").view(np.ndarray)
