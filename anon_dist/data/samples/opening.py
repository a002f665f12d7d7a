"""How the shards of a split are read: where they lie; of an address, as copies in the cache if they fit, or else by ranges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anon_dist.data.errors import ShardError
from anon_dist.data.stored import cache
from anon_dist.data.stored.blocks import AGAIN, RESTORE, FirstTouch, remedy
from anon_dist.data.stored.index import Index, ShardInfo
from anon_dist.data.stored.ranges import RangeReader
from anon_dist.data.stored.reading import CachedReader, FolderReader, Reader
from anon_dist.data.stored.remote import UPLOAD, RemoteFolder, located, torn
from anon_dist.stores import is_address


def open_reader(directory: str | Path, index: Index, split: str, by_block: bool) -> Reader:
    """A reader of the shards of a split, which are there, and have the sizes that the index says.

    Args:
        by_block: compare each block with its checksum when it is first read, where there are such checksums.

    Raises:
        ShardError: a shard is missing or torn; the store does not answer; the cache cannot be written, or its disk has no room for what
            it is allowed to hold.
    """
    info, dtype = index.split(split), index.numpy_dtype
    filled = [shard for shard in info.shards if shard.tokens]

    def touch(place: str | None = None) -> FirstTouch | None:
        return FirstTouch(located(directory), split, filled, info.sums, place) if by_block and info.sums else None

    if not is_address(directory):
        for shard in info.shards:
            check_size(Path(directory), shard)
        return FolderReader(Path(directory), filled, dtype, touch())
    remote = RemoteFolder(str(directory))
    check_there(remote, info.shards)
    claim = cache.present().claim(index.fingerprint, filled)
    if claim is None:
        return RangeReader(remote, filled, dtype, touch(remote.address))
    return CachedReader(remote, claim, filled, dtype, touch())


def check_size(directory: Path, shard: ShardInfo) -> None:
    """That a shard is in a folder here, with the size that the index says.

    Raises:
        ShardError: it is not.
    """
    path = directory / shard.file
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ShardError(f"{path} is missing. {remedy(shard)}") from None
    if shard.is_elsewhere and size < shard.start + shard.bytes:
        raise ShardError(
            f"{path} has {size:,} bytes, and had {shard.start + shard.bytes:,} when it was indexed. {AGAIN}"
        )
    if not shard.is_elsewhere and size != shard.bytes:
        raise ShardError(f"{path} is torn: {size:,} bytes, the index says {shard.bytes:,}. {RESTORE}")


def check_there(remote: RemoteFolder, shards: Sequence[ShardInfo]) -> None:
    """That shards are at an address, with the sizes that the index says.

    Raises:
        ShardError: they are not, or the store does not answer.
    """
    there = remote.sizes()
    for shard in shards:
        place = f"{remote.address}/{shard.file}"
        if shard.is_elsewhere:
            raise ShardError(
                f"{remote.address} is the index of {shard.file}, which is not there; use the folder where that file is"
            )
        if shard.file not in there:
            raise ShardError(f"{place} is missing. {UPLOAD}")
        if there[shard.file] != shard.bytes:
            raise torn(place, there[shard.file], shard.bytes)
