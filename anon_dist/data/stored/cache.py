"""Copies of shards on this machine: of bounded size, shared by its processes, each whole or absent.

In the cache's folder lie
- FINGERPRINT/, for each prepared folder: its index.json, its tokenizer, and those of its shards that are here;
- FINGERPRINT/SHARD.partial, which the process that holds its lock is writing;
- claims/, a file for each split that a living process reads: that process holds its lock. The shards it names stay; the others go, those
  that were used longest ago first, when there is no room for what is claimed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import xxhash

from anon_dist.data.errors import ShardError
from anon_dist.data.stored.digests import file_checksum

PARTIAL = ".partial"
_OTHERS = (".json", ".sums", ".lock", ".tmp")
"""How files end that are no shards."""


class Shard(Protocol):
    """What the index says of a file of tokens."""

    @property
    def file(self) -> str:
        """Its name."""

    @property
    def bytes(self) -> int:
        """Its size."""

    @property
    def xxh3_64(self) -> str:
        """Its checksum."""


class Claim:
    """Shards of a prepared folder that stay in the cache for as long as this object, or its process, lives."""

    def __init__(self, cache: Cache, fingerprint: str, shards: Mapping[str, int]) -> None:
        self.cache, self.fingerprint = cache, fingerprint
        self.name = uuid.uuid4().hex
        self._path = cache.claims / self.name
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(self._file, json.dumps({"fingerprint": fingerprint, "shards": dict(shards)}).encode())

    def close(self) -> None:
        """Let go. May be called again."""
        if self._file >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    def shard(self, shard: Shard, place: str, blocks: Callable[[], Iterator[bytes]]) -> Path:
        """The path of a claimed shard: as it lies here, or else brought here, by one process at a time.

        Args:
            place: where it comes from, for messages.
            blocks: gives its content.

        Raises:
            ShardError: it does not come as the index says, or there is no room.
        """
        target = self.cache.copy_of(self.fingerprint) / shard.file
        if not _has_size(target, shard):
            with self.cache.writing(target) as partial:
                if not _has_size(target, shard):  # another process may have brought it
                    self._bring(target, partial, shard, place, blocks)
        with suppress(OSError):
            os.utime(target)
        return target

    def replace(self, shard: Shard, place: str, blocks: Callable[[], Iterator[bytes]]) -> Path:
        """`shard`, where the copy is damaged, unless another process has brought it again."""
        target = self.cache.copy_of(self.fingerprint) / shard.file
        with self.cache.writing(target) as partial:
            if not _has_size(target, shard) or file_checksum(target).hexdigest() != shard.xxh3_64:
                self._bring(target, partial, shard, place, blocks)
        return target

    def _bring(
        self, target: Path, partial: Path, shard: Shard, place: str, blocks: Callable[[], Iterator[bytes]]
    ) -> None:
        found = ""
        for _ in range(2):  # the second, in case it was the line
            try:
                found = _write(partial, blocks())
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise self.cache.unwritable(error) from None
                if not self.cache.make_room(shard.bytes):
                    raise self.cache.full(shard) from None
                continue
            if found == shard.xxh3_64:
                partial.replace(target)
                return
        if not found:
            raise self.cache.full(shard)
        raise ShardError(
            f"{place} is altered: checksum {found}, the index says {shard.xxh3_64}. Copy the folder there again, all of it, from where it "
            "came from."
        )


class Cache:
    """A folder with copies of shards.

    Args:
        folder: None: `data` in $ANON_DIST_CACHE, or else in ~/.cache/anon_dist.
        limit: bytes of shards that it may hold. None: half of what its disk could give them.
    """

    def __init__(self, folder: str | Path | None = None, limit: int | None = None) -> None:
        self._wanted, self._limit = folder, limit
        self._made: Path | None = None

    @property
    def folder(self) -> Path:
        """Made if it is missing.

        Raises:
            ShardError: it cannot be.
        """
        if self._made is None:
            try:
                self._made = Path(self._wanted).expanduser() if self._wanted is not None else _default()
                (self._made / "claims").mkdir(parents=True, exist_ok=True)
                with _locked(self._made / "lock"):
                    pass
            except OSError as error:
                self._made = None
                raise self.unwritable(error) from None
        return self._made

    @property
    def claims(self) -> Path:
        """Where claims lie."""
        return self.folder / "claims"

    def copy_of(self, fingerprint: str) -> Path:
        """Where the copy of the prepared folder of this fingerprint lies; made if it is missing."""
        path = self.folder / fingerprint
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise self.unwritable(error) from None
        return path

    def claim(self, fingerprint: str, shards: Sequence[Shard]) -> Claim | None:
        """Room for these shards; None: they do not fit beside what other processes claim.

        Raises:
            ShardError: they are allowed to be here, and the disk has no room for them.
        """
        wanted = {f"{fingerprint}/{shard.file}": shard.bytes for shard in shards}
        with self.guarded(self.folder / "lock"):
            here, claimed = self._here(), {**self._claimed(), **wanted}
            free = shutil.disk_usage(self.folder).free
            total = sum(claimed.values())
            if total > self._most(here, free):
                return None
            spare = {key: found for key, found in here.items() if key not in claimed}
            missing = sum(size for key, size in claimed.items() if key not in here)
            if missing > free + sum(size for size, _ in spare.values()):
                raise ShardError(
                    f"data.cache_dir = {self.folder} has {free:,} bytes free, and {missing:,} are to come there; name a folder with more "
                    f"room, or lower data.cache_bytes = {self._limit}: what it does not hold is read sample by sample"
                )
            self._evict(spare, sum(size for size, _ in spare.values()) + total - self._most(here, free))
            return Claim(self, fingerprint, {shard.file: shard.bytes for shard in shards})

    def room(self) -> int:
        """Bytes that shards may take here."""
        return self._most(self._here(), shutil.disk_usage(self.folder).free)

    def make_room(self, size: int) -> bool:
        """Remove what nobody claims, until so many bytes more are free. Whether there was anything."""
        with self.guarded(self.folder / "lock"):
            claimed = self._claimed()
            spare = {key: found for key, found in self._here().items() if key not in claimed}
            return self._evict(spare, size) > 0

    @contextmanager
    def writing(self, target: Path) -> Iterator[Path]:
        """A block in which no other process brings that shard; the file to write it to."""
        partial = target.with_name(target.name + PARTIAL)
        try:
            file = _hold(partial)
        except OSError as error:
            raise self.unwritable(error) from None
        try:
            yield partial
        finally:
            with suppress(OSError):
                if os.path.samestat(os.fstat(file), os.stat(partial)):
                    partial.unlink()
            os.close(file)

    @contextmanager
    def guarded(self, lock: Path) -> Iterator[None]:
        """A block that one process at a time is in.

        Raises:
            ShardError: something in it cannot be written.
        """
        try:
            with _locked(lock):
                yield
        except OSError as error:
            raise self.unwritable(error) from None

    def lives(self, claim: str) -> bool:
        """Whether the process that made a claim lives, and reads what it claimed."""
        try:
            file = os.open(self.claims / claim, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False

    def unwritable(self, error: OSError) -> ShardError:
        """What to say of an error of the folder."""
        folder = self._made or self._wanted or "~/.cache/anon_dist/data"
        return ShardError(
            f"data.cache_dir = {folder} cannot be written ({error.strerror or error}); set it to a folder on a disk of this machine"
        )

    def full(self, shard: Shard) -> ShardError:
        """What to say when a shard does not fit on the disk."""
        free = shutil.disk_usage(self.folder).free
        return ShardError(
            f"data.cache_dir = {self.folder} is full: {shard.file} has {shard.bytes:,} bytes, and {free:,} are free; free some, or lower "
            "data.cache_bytes: what it does not hold is read sample by sample"
        )

    def _most(self, here: Mapping[str, tuple[int, float]], free: int) -> int:
        if self._limit is not None:
            return self._limit
        return (free + sum(size for size, _ in here.values())) // 2

    def _here(self) -> dict[str, tuple[int, float]]:
        """FINGERPRINT/SHARD → bytes, and when it was last used; what killed processes left unfinished is removed."""
        found = {}
        for folder in self.folder.iterdir():
            if not folder.is_dir() or folder == self.claims:
                continue
            for entry in os.scandir(folder):
                if entry.is_dir() or entry.name.endswith(_OTHERS):
                    continue
                if entry.name.endswith(PARTIAL):
                    _remove_unless_held(Path(entry.path))
                else:
                    stat = entry.stat()
                    found[f"{folder.name}/{entry.name}"] = (stat.st_size, stat.st_mtime)
        return found

    def _claimed(self) -> dict[str, int]:
        """FINGERPRINT/SHARD → bytes, of what living processes claim; claims of others are removed."""
        found: dict[str, int] = {}
        for path in self.claims.iterdir():
            if not self.lives(path.name):
                path.unlink(missing_ok=True)
                continue
            with suppress(OSError, ValueError):
                claim: dict[str, Any] = json.loads(path.read_text())
                found |= {f"{claim['fingerprint']}/{file}": size for file, size in claim["shards"].items()}
        return found

    def _evict(self, spare: Mapping[str, tuple[int, float]], size: int) -> int:
        """Remove of these what was used longest ago, until so many bytes are free. How many are."""
        freed = 0
        for key, (size_of_it, _) in sorted(spare.items(), key=lambda item: item[1][1]):
            if freed >= size:
                break
            (self.folder / key).unlink(missing_ok=True)
            freed += size_of_it
        return freed


_present = Cache()


def use(folder: str | Path | None, limit: int | None) -> None:
    """Which cache this process uses from now on; arguments as of `Cache`."""
    global _present
    _present = Cache(folder, limit)


def present() -> Cache:
    """The cache that this process uses."""
    return _present


def _default() -> Path:
    from anon_dist.optim.backends.build import cache_folder

    return cache_folder() / "data"


def _has_size(path: Path, shard: Shard) -> bool:
    try:
        return path.stat().st_size == shard.bytes
    except FileNotFoundError:
        return False


def _write(path: Path, blocks: Iterator[bytes]) -> str:
    """Write a file, and have it on the disk; its checksum."""
    digest = xxhash.xxh3_64()
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _hold(path: Path) -> int:
    """Wait for the lock of a file, which is made; of the one that has this name when the lock is had."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        os.close(file)


def _remove_unless_held(path: Path) -> None:
    with suppress(OSError):
        file = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        finally:
            os.close(file)
