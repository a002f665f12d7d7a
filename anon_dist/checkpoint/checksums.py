"""Checksums of every file of a training checkpoint: taken by the ranks as they save, compared by each rank as it reads.

`checksums.json` lists all files but itself and trainer.json: size, and the xxh3 of each block of `BLOCK` bytes. trainer.json, which is
written last, has the xxh3 of checksums.json and of itself. A rank that reads a part of a file checks the blocks that the part lies in,
each when it is first touched, so that the bytes it checks are the ones it is about to use. What a start does not read (random states of
ranks that there are no more, DeepSpeed's zero_to_fp32.py) has no effect on it, and is compared by `verify` alone.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from anon_dist.agreement import Group
from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.json_values import loads
from anon_dist.checkpoint.keeping.names import PROGRESS
from anon_dist.checkpoint.together import on_every_rank
from anon_dist.files import write_json

NAME = "checksums.json"
BLOCK = 1 << 20
"""Bytes under one checksum. The first and last block of a part are read whole, so a rank reads at most two blocks too many of each."""
DIGITS = 16
"""Hexadecimal digits of a checksum."""
_MARK = "anon_dist_checksums"
_SEAL = "xxh3"
"""Key of trainer.json."""
_RANK = re.compile(r"(?:^__|pp_rank_|^random-)(\d+)[_.]")
"""How the names of files say which rank wrote them: DCP's, DeepSpeed's, the random states."""
_THREADS = 4


@dataclass(frozen=True)
class FileSums:
    """What a file was when it was written."""

    checkpoint: Path
    name: str
    """Relative to the checkpoint."""
    size: int
    starts: Sequence[int]
    """First byte of each block, which ends where the next one begins. What lies before the first block has no checksum."""
    digests: str
    """Of each block, `DIGITS` hexadecimal digits."""

    def __post_init__(self) -> None:
        if len(self.digests) != len(self.starts) * DIGITS:
            raise ValueError(f"it has {len(self.digests) // DIGITS} checksums of {self.name}, {self.size} bytes")

    def blocks(self, start: int, stop: int) -> range:
        """The blocks in which bytes [start, stop) lie."""
        return range(max(bisect_right(self.starts, start) - 1, 0), bisect_left(self.starts, min(stop, self.size)))

    def bounds(self, index: int) -> tuple[int, int]:
        """First byte of a block, and the first after it."""
        return self.starts[index], self.starts[index + 1] if index + 1 < len(self.starts) else self.size

    def check(self, index: int, data: Any) -> None:
        """Raises `DamagedCheckpoint` unless `data` is block `index` as it was written."""
        if xxhash.xxh3_64_hexdigest(data) != self.digests[index * DIGITS : (index + 1) * DIGITS]:
            start = self.starts[index]
            raise self.damaged(f"the checksum of bytes {start} to {start + len(data)} differs")

    def damaged(self, how: str) -> DamagedCheckpoint:
        """An error that names file and checkpoint."""
        return DamagedCheckpoint(
            f"{self.checkpoint / self.name} is damaged: {how}. Take an earlier checkpoint than {self.checkpoint.name}"
        )


# -- saving -----------------------------------------------------------------------------------------------------------


def take(folder: Path, group: Group = None) -> dict[str, dict[str, Any]]:
    """Checksums of all files in a folder that is being written, each taken by the rank that wrote it; complete on the first rank.

    Every rank must call it, after all have written. `group`: see `agreement.agree`.
    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    mine: dict[str, dict[str, Any]] = {}
    with on_every_rank(group), ThreadPoolExecutor(_THREADS) as pool:
        names = [n for n in _names(folder) if _owner(n) % ranks == rank]
        mine = dict(zip(names, pool.map(lambda name: _sums(folder / name), names), strict=True))
    if ranks == 1:
        return mine
    found: list[Any] | None = [None] * ranks if rank == 0 else None
    dist.gather_object(mine, found, dst=0, group=group)
    return {name: sums for theirs in found or () for name, sums in theirs.items()}


def seal(folder: Path, files: Mapping[str, Mapping[str, Any]], progress: Mapping[str, Any]) -> dict[str, Any]:
    """Write `checksums.json`; what trainer.json is to hold: `progress`, and the checksums of both."""
    write_json(folder / NAME, {_MARK: 1, "block": BLOCK, "files": dict(sorted(files.items()))})
    sealed = {**progress, _SEAL: {NAME: xxhash.xxh3_64_hexdigest((folder / NAME).read_bytes())}}
    return {**progress, _SEAL: {**sealed[_SEAL], "self": _digest(sealed)}}


def are_sums(data: bytes) -> bool:
    """Whether a file of the name `checksums.json` is one that `seal` wrote."""
    return f'"{_MARK}"'.encode() in data[:100]


def _names(folder: Path) -> list[str]:
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if name not in (NAME, PROGRESS))


def _owner(name: str) -> int:
    found = _RANK.search(name.rpartition("/")[2])
    return int(found[1]) if found else 0


def _sums(path: Path) -> dict[str, Any]:
    digests, size = [], 0
    with path.open("rb", buffering=0) as file:
        while data := _read(file, BLOCK):
            digests.append(xxhash.xxh3_64_hexdigest(data))
            size += len(data)
    return {"size": size, "xxh3": "".join(digests)}


def _read(file: Any, size: int) -> bytes:
    """That many bytes, fewer only at the end of the file."""
    data: bytes = file.read(size)
    while data and len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


def _digest(progress: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(progress, sort_keys=True).encode())


# -- reading ----------------------------------------------------------------------------------------------------------


def unsealed(path: Path) -> tuple[dict[str, Any], str | None]:
    """What a trainer.json holds, and the checksum of the checksums.json beside it; None where it was written without.

    Raises:
        DamagedCheckpoint: it is not as it was written.
        OSError: there is none.
    """
    try:
        if path.exists() and not path.is_file():  # to open a pipe is to wait for ever
            raise ValueError("it is no file")
        progress = loads(path.read_text(encoding="utf-8"))
        if not isinstance(progress, dict):
            raise ValueError("it is no JSON object")
        sums = progress.pop(_SEAL, None)
        if sums is None:
            if (path.parent / NAME).exists():
                raise ValueError(f"the checksum of {NAME} is missing in it")
            return progress, None
        if _digest({**progress, _SEAL: {NAME: sums[NAME]}}) != sums["self"]:
            raise ValueError("its checksum differs")
        return progress, sums[NAME]
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(
            f"{path} is damaged: {error}. Take an earlier checkpoint than {path.parent.name}"
        ) from None


class Checksums:
    """The `checksums.json` of a checkpoint."""

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.folder = folder
        self.files = {
            name: FileSums(folder, name, sums["size"], range(0, sums["size"], content["block"]), sums["xxh3"])
            for name, sums in content["files"].items()
        }

    def check_present(self) -> None:
        """Raises `DamagedCheckpoint` if a file is missing or of another size."""
        for sums in self.files.values():
            self._check_present(sums)

    def _check_present(self, sums: FileSums) -> None:
        path = self.folder / sums.name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DamagedCheckpoint(
                f"{path} is missing ({error.strerror}). Take an earlier checkpoint than {self.folder.name}"
            ) from None
        if size != sums.size:
            raise sums.damaged(f"it has {size} bytes, and had {sums.size}")

    def foreign(self) -> list[str]:
        """Files in the folder that are none of the checkpoint's. Whatever would read one is refused (`sums_of`)."""
        return [name for name in _names(self.folder) if name not in self.files]

    def verify(self, workers: int = 2) -> list[tuple[str, str]]:
        """Every file against its checksums: those that differ, and how."""

        with ThreadPoolExecutor(max(workers, 1)) as pool:
            found = zip(self.files, pool.map(self.difference, self.files), strict=True)
            return [(name, how) for name, how in found if how is not None]

    def difference(self, name: str) -> str | None:
        """How a file differs from what was written; None if it does not."""
        if (sums := self.files.get(name)) is None:
            return f"{self.folder / name} is none of the checkpoint's files"
        try:
            self._check_present(sums)
            with (self.folder / name).open("rb", buffering=0) as file:
                for index in range(len(sums.starts)):
                    start, stop = sums.bounds(index)
                    sums.check(index, _read(file, stop - start))
        except (OSError, CheckpointError) as error:
            return str(error)
        return None


def checksums(folder: Path) -> Checksums | None:
    """Those of a checkpoint; None if it was written without.

    Raises:
        DamagedCheckpoint: they are missing or altered.
    """
    stamps: list[Any] = []
    for name in (NAME, PROGRESS):
        try:
            status = os.stat(folder / name)
            stamps.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            stamps.append(None)
    return _checksums(folder, tuple(stamps)) if any(stamps) else None


@lru_cache(maxsize=16)
def _checksums(folder: Path, stamps: tuple[Any, ...]) -> Checksums | None:
    path, sealed = folder / NAME, None
    if stamps[1] is not None:
        sealed = unsealed(folder / PROGRESS)[1]
    if stamps[0] is None:
        if sealed is None:
            return None
        raise DamagedCheckpoint(f"{path} is missing. Take an earlier checkpoint than {folder.name}")
    data = path.read_bytes()
    if sealed is not None and xxhash.xxh3_64_hexdigest(data) != sealed:
        raise DamagedCheckpoint(
            f"{path} is damaged: its checksum differs. Take an earlier checkpoint than {folder.name}"
        )
    try:
        content = loads(data)
        return Checksums(folder, content) if content.get(_MARK) == 1 else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged: {error}. Take an earlier checkpoint than {folder.name}") from None


def sums_of(path: Path) -> FileSums | None:
    """The checksums of a file of a checkpoint, or of a folder in it; None if it was written without.

    Raises:
        DamagedCheckpoint: the checkpoint's other files have some, and this one none.
    """
    for folder in (path.parent, path.parent.parent):
        found = checksums(folder)
        if found is None:
            continue
        name = path.relative_to(folder).as_posix()
        if name in found.files:
            return found.files[name]
        if any(other.rpartition("/")[0] == name.rpartition("/")[0] for other in found.files):
            raise DamagedCheckpoint(
                f"{path} is none of the files that {folder / NAME} lists; remove it, or take another checkpoint"
            )
    return None
