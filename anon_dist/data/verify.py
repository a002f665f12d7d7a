"""`anon-dist data verify`: all contents of a prepared folder compared with its checksums; where blocks have none, they get them."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import xxhash
from tqdm import tqdm

from anon_dist.data.errors import ShardError, TokenizerError
from anon_dist.data.preparation.meter import say
from anon_dist.data.samples.stretches import Stretches
from anon_dist.data.stored.blocks import RESTORE, BlockDigests, FirstTouch, remedy, sums_file
from anon_dist.data.stored.digests import tokenizer_hash
from anon_dist.data.stored.index import INDEX_FILE, TOKENIZER_FOLDER, Index, ShardInfo
from anon_dist.data.stored.remote import located
from anon_dist.files import sync, write_json


def verify(folder: str | Path, workers: int = 1) -> Index:
    """Compare every shard of every split with the index; returns the index. A folder of an earlier version gets checksums of its blocks.

    Args:
        folder: or an address. There all shards are read, a piece at a time, and none is kept.
        workers: threads that read and hash.

    Raises:
        ShardError: naming the first file that is missing, torn or altered.
        TokenizerError: that is the tokenizer.
    """
    index = Index.load(folder)
    _check_tokenizer(folder, index)
    shards = Stretches(folder)
    shards.check_sizes(index.shards)  # before hours of reading; and the checksums themselves
    for split, info in index.splits.items():
        if info.sums:
            FirstTouch(located(folder), split, info.shards, info.sums)
    total = sum(shard.bytes for shard in index.shards)
    found = {}
    with (
        tqdm(total=total, desc="verifying", unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        for split, info in index.splits.items():
            hashed = pool.map(lambda shard: _hashed(shards, shard, bar), info.shards)
            found[split] = b"".join(hashed)
    said = f"{folder}: {len(index.shards)} shards, {total / 1e9:.3f} GB, are as they were written"
    digests = {split: xxhash.xxh3_64_hexdigest(sums) for split, sums in found.items()}
    for split, info in index.splits.items():
        if info.sums not in ("", digests[split]):
            raise ShardError(f"{folder}/{sums_file(split)} does not belong to the shards. {RESTORE}")
    if not index.has_sums and isinstance(folder, str) and not shards.is_here:
        said += "; checksums of blocks are missing: verify the folder where it came from, and copy it there again"
    elif not index.has_sums:
        folder = Path(folder)
        for split, sums in found.items():
            _replace(folder / sums_file(split), sums)
        splits = {split: replace(info, sums=digests[split]) for split, info in index.splits.items()}
        index = replace(index, splits=splits)
        content = index.to_json()
        if not index.checksum:
            del content["checksum"]  # it would vouch for counts that nothing has compared
        write_json(folder / INDEX_FILE, content)
        said += "; checksums of blocks were added"
    if not index.checksum:
        said += (
            f". {INDEX_FILE} is of an earlier version: no checksum covers its counts of documents and of bytes of text"
        )
    say(said)
    return index


def _check_tokenizer(folder: str | Path, index: Index) -> None:
    here = located(folder) / TOKENIZER_FOLDER
    if not here.is_dir() or tokenizer_hash(here) != index.tokenizer_hash:
        raise TokenizerError(
            f"{here}, the data's tokenizer, {'is altered' if here.is_dir() else 'is missing'}. {RESTORE}"
        )


def _hashed(shards: Stretches, shard: ShardInfo, bar: tqdm[NoReturn]) -> bytes:
    """The checksums of a shard's blocks."""
    blocks, digest = BlockDigests(), xxhash.xxh3_64()
    for piece in shards.pieces(shard):
        digest.update(piece)
        blocks.update(memoryview(piece))
        bar.update(len(piece))
    if digest.hexdigest() != shard.xxh3_64:
        place = shards.place(shard)
        raise ShardError(
            f"{place} is altered: checksum {digest.hexdigest()}, the index says {shard.xxh3_64}. {remedy(shard, place)}"
        )
    return blocks.sums()


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)
