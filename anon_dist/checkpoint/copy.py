"""Files that have been laid out are written: block by block, by several threads, resumable, complete or absent."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from anon_dist.checkpoint.checksums import NAME, seal, take, unsealed
from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.inside import is_inside
from anon_dist.checkpoint.keeping.names import PROGRESS
from anon_dist.checkpoint.schema import Checkpoint, OutFile, Region
from anon_dist.checkpoint.torchfiles.mapped import will_need
from anon_dist.exits import may_pass
from anon_dist.files import sync, sync_tree, write_json

BLOCK = 8 << 20
"""Bytes that are read and written at a time. The canonical format's checksums are of such blocks: another size is another version of it."""
SEGMENT = 256 << 20
"""Bytes after which a thread has what it wrote on the disk and notes it in the journal."""


@dataclass
class _Segment:
    """What one thread writes before the next note in the journal."""

    file: int
    number: int
    regions: list[Region] = field(default_factory=list)
    size: int = 0


def write_files(
    files: Sequence[OutFile], source: Checkpoint, fingerprint: Any, target: Path, workers: int = 2, quiet: bool = False
) -> None:
    """Write a plan to `target`, which does not exist; it is complete when it appears.

    Until then everything is in `target + ".partial"`, with a journal: the same call after a kill or a full disk goes on.

    Args:
        fingerprint: JSON; a partial target of another fingerprint or plan is begun again.
        workers: threads.

    Raises:
        CheckpointError: the source cannot be read, the disk is full, or another process writes this target.
    """
    partial = target.with_name(target.name + ".partial")
    if odd := next((f.path for f in files if not is_inside(str(f.path))), None):
        raise CheckpointError(
            f"the source asks for a file {odd}, which would lie outside {target}; it is not converted"
        )
    _return_memory()
    journal = _Journal(partial, {"plan": _digest(files), "source": fingerprint})
    try:
        _Writing(files, source, partial / "data", journal, workers, quiet).run()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CheckpointError(
                f"no room for {target} ({error.strerror}): it needs {_gigabytes(sum(f.size for f in files))}. "
                f"Free some space and run the same command again, which goes on where it stopped, or remove {partial}"
            ) from None
        raise CheckpointError(f"{target} cannot be written: {error}") from None
    finally:
        journal.close()
    data = partial / "data"
    if (data / PROGRESS).is_file():  # for the training loop, whose own have checksums too
        (data / NAME).unlink(missing_ok=True)  # of a run that was killed here
        write_json(data / PROGRESS, seal(data, take(data), unsealed(data / PROGRESS)[0]))
    sync_tree(data) if data.is_dir() else sync(data)
    data.rename(target)
    sync(target.parent)
    shutil.rmtree(partial, ignore_errors=True)


class _Journal:
    """`journal` in the partial folder: what was asked, then a line for each segment or file (number -1) that is on the disk."""

    def __init__(self, partial: Path, identity: Any) -> None:
        path = partial / "journal"
        if partial.exists() and not path.exists() and any(partial.iterdir()):
            raise CheckpointError(f"{partial} is in the way and was not written by a conversion; remove or rename it")
        partial.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise may_pass(CheckpointError(f"another process is writing {partial}; wait for it")) from None
        header = json.dumps(identity, sort_keys=True)
        self._file.seek(0)
        lines = self._file.read().split("\n")[:-1]  # the last one may be cut off
        self.done: set[tuple[int, int]] = set()
        if lines[:1] == [header]:
            self.done = {(int(a), int(b)) for a, b in (line.split() for line in lines[1:])}
        self._lock = threading.Lock()
        for path in partial.iterdir() if not self.done else ():
            if path.name == "data":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._file.truncate(0)
        self._file.write("".join(f"{line}\n" for line in [header, *(f"{a} {b}" for a, b in sorted(self.done))]))
        self._sync()

    def note(self, file: int, number: int) -> None:
        """A segment is on the disk."""
        with self._lock:
            self.done.add((file, number))
            self._file.write(f"{file} {number}\n")
            self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let others write."""
        self._file.close()


class _Writing:
    """A plan being carried out."""

    def __init__(
        self, files: Sequence[OutFile], source: Checkpoint, root: Path, journal: _Journal, workers: int, quiet: bool
    ) -> None:
        self._files, self._source, self._root, self._journal, self._workers = files, source, root, journal, workers
        self._segments = [s for i, f in enumerate(files) for s in _segments(i, f)]
        self._left = [sum(s.file == i for s in self._segments) for i in range(len(files))]
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        total = sum(s.size for s in self._segments)
        self._bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, disable=True if quiet else None)

    def run(self) -> None:
        """Write, and sync, every file."""
        self._make_room()
        pool = ThreadPoolExecutor(max_workers=max(self._workers, 1))
        try:
            running = [pool.submit(self._write, segment) for segment in self._segments]
            for future in wait(running, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:
            self._stopped.set()
            pool.shutdown(cancel_futures=True)
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._bar.close()

    def _make_room(self) -> None:
        """Fail before the first byte if the disk cannot hold the rest."""
        left = sum(f.size for i, f in enumerate(self._files) if not self._path(i).exists())
        if left > shutil.disk_usage(self._root.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _path(self, file: int) -> Path:
        return self._root / self._files[file].path

    def _open(self, file: int) -> int:
        """The file's descriptor; its room is reserved and its literals are written when it is first asked for."""
        with self._lock:
            if file not in self._descriptors:
                path = self._path(file)
                path.parent.mkdir(parents=True, exist_ok=True)
                new = not path.exists()
                descriptor = self._descriptors[file] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                if new and self._files[file].size:
                    os.posix_fallocate(descriptor, 0, self._files[file].size)
                os.ftruncate(descriptor, self._files[file].size)
                for offset, data in self._files[file].literals:
                    _write_all(descriptor, memoryview(data), offset)
            return self._descriptors[file]

    def _write(self, segment: _Segment) -> None:
        if self._stopped.is_set():
            return
        if (segment.file, segment.number) not in self._journal.done:
            descriptor = self._open(segment.file)
            for region in segment.regions:
                if self._stopped.is_set():
                    return
                _write_region(descriptor, self._source, region, self._files[segment.file].observe)
                self._bar.update((region.part.stop - region.part.start) * region.dtype.itemsize)
            os.fdatasync(descriptor)
            self._journal.note(segment.file, segment.number)
        else:
            self._bar.update(segment.size)
        with self._lock:
            self._left[segment.file] -= 1
            last = self._left[segment.file] == 0
        if last and (segment.file, -1) not in self._journal.done:
            self._finish(segment.file)

    def _finish(self, file: int) -> None:
        descriptor = self._open(file)
        if (finish := self._files[file].finish) is not None:
            finish(self._path(file))
        os.fsync(descriptor)
        self._journal.note(file, -1)
        with self._lock:
            os.close(self._descriptors.pop(file))


def _segments(number: int, file: OutFile) -> Iterator[_Segment]:
    """A file's regions in blocks, in segments; at least one."""
    current, count = _Segment(number, 0), 0
    for block in _blocks(file):
        current.regions.append(block)
        current.size += (block.part.stop - block.part.start) * block.dtype.itemsize
        if current.size >= SEGMENT:
            yield current
            count += 1
            current = _Segment(number, count)
    if current.regions or count == 0:
        yield current


def _blocks(file: OutFile) -> Iterator[Region]:
    for region in file.regions:
        part, width = region.part, region.dtype.itemsize
        if part.key is None and not part.fill:
            continue  # files begin as zeros
        for start in range(part.start, part.stop, BLOCK // width):
            stop = min(part.stop, start + BLOCK // width)
            yield Region(
                part._replace(start=start, stop=stop), region.dtype, region.offset + (start - part.start) * width
            )


def _write_region(
    descriptor: int, source: Checkpoint, region: Region, observe: Callable[[int, memoryview], None] | None
) -> None:
    part, offset = region.part, region.offset
    if part.key is None:
        tensors = iter([torch.full((part.stop - part.start,), part.fill, dtype=region.dtype)])
    else:
        tensors = source.pieces(part.key, part.start, part.stop)
    for tensor in tensors:
        if tensor.dtype != region.dtype:
            tensor = tensor.to(region.dtype)
        else:
            will_need(tensor.data_ptr(), tensor.nbytes)
        content: Any = tensor.view(torch.uint8).numpy()
        _write_all(descriptor, memoryview(content), offset)
        if observe is not None:
            observe(region.offset, memoryview(content))
        offset += tensor.nbytes
    wanted = (part.stop - part.start) * region.dtype.itemsize
    if part.key is not None and offset - region.offset != wanted:
        raise CheckpointError(
            f"{part.key.state} of {part.key.parameter}: {offset - region.offset} bytes where {wanted} should be"
        )


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _return_memory() -> None:
    """Have blocks given back to the system when they are freed. The C library keeps them otherwise, and they fragment."""
    _libc.mallopt(_MMAP_THRESHOLD, 1 << 20)


_libc = ctypes.CDLL(None, use_errno=True)
_MMAP_THRESHOLD = -3


def _digest(files: Sequence[OutFile]) -> str:
    hashing = hashlib.sha256(f"{BLOCK} {SEGMENT}".encode())
    for file in files:
        hashing.update(f"{file.path} {file.size}".encode())
        for offset, data in file.literals:
            hashing.update(f"{offset}".encode() + data)
        for region in file.regions:
            hashing.update(repr(region).encode())
    return hashing.hexdigest()


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
