"""The bytes of a prepared folder's shards where they lie, here or at an address: for those who read them once, and keep nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from anon_dist.data.samples.opening import check_size, check_there
from anon_dist.data.stored.index import ShardInfo
from anon_dist.data.stored.remote import RemoteFolder
from anon_dist.stores import is_address

PIECE = 1 << 23
REMEDY = ". Give the same command again when the store answers"


class Stretches:
    """Reads shards of a folder, which may be at an address; nothing is copied."""

    def __init__(self, directory: str | Path) -> None:
        self._remote = RemoteFolder(str(directory), remedy=REMEDY) if is_address(directory) else None
        self._folder = Path(directory)

    @property
    def is_here(self) -> bool:
        """Whether it is a folder of this machine."""
        return self._remote is None

    def place(self, shard: ShardInfo) -> str:
        """Of a shard, for messages."""
        return f"{self._remote.address}/{shard.file}" if self._remote else str(self._folder / shard.file)

    def check_sizes(self, shards: Sequence[ShardInfo]) -> None:
        """That all are there, and as long as the index says.

        Raises:
            ShardError: naming the first that is not.
        """
        if self._remote is not None:
            check_there(self._remote, shards)
            return
        for shard in shards:
            check_size(self._folder, shard)

    def read(self, shard: ShardInfo, start: int, size: int) -> bytes:
        """Bytes [start, start + size) of a shard, or up to its end.

        Raises:
            ShardError: of a store, as of `RemoteFolder.piece`.
            OSError: of a file here.
        """
        size = min(size, shard.bytes - start)
        if self._remote is not None:
            return self._remote.piece(shard.file, start, start + size, shard.bytes)
        with (self._folder / shard.file).open("rb") as file:
            file.seek(shard.start + start)
            return file.read(size)

    def pieces(self, shard: ShardInfo, size: int = PIECE) -> Iterator[bytes]:
        """All of a shard. Errors as of `read`."""
        for start in range(0, shard.bytes, size):
            yield self.read(shard, start, size)
