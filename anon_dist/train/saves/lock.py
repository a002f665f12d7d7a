"""One run, or sweep, at a time in a folder: a lock that rank 0 holds, on shared file systems too, and that ends with its process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from anon_dist.agreement import agree, is_first
from anon_dist.train.config.errors import RunError, RunInUseError

LOCK = "run.lock"
"""Names the process that trains in the folder; empty if none does."""
BEAT_SECONDS = 10.0
"""Between two signs of life: the file's time of change."""
SILENT_SECONDS = 35.0
"""A process of another machine that gives no sign for so long, and keeps nobody from locking, is dead."""
LONG_SILENT_SECONDS = 600.0
"""The same without watching, as machines' clocks differ less than that."""
LOOK_SECONDS = 2.0
_BYTE = 1 << 30
"""The locked byte lies behind the text: some file systems let nobody read what is locked."""


@contextmanager
def held(folder: Path, called: str = "run_dir") -> Iterator[RunLock | None]:
    """Hold a run's folder, made if it is not there, against other runs. Every rank must call it.

    Args:
        called: the option that names the folder, for messages.

    Yields:
        The lock on rank 0, None on the others.

    Raises:
        RunInUseError: another run holds the folder; on every rank.
        RunError: it cannot be written; on every rank.
    """
    lock, refusal = None, None
    if is_first():
        try:
            lock = RunLock(folder, called)
        except RunError as error:
            refusal = error
    if refusal := agree(refusal):
        raise refusal
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


class RunLock:
    """The lock itself, for one process.

    A POSIX lock (fcntl), which NFS, Lustre, GPFS and CephFS keep across machines, and which every kernel drops when the process ends,
    however it ends. Where a file system has no locks, or each machine its own, the text in the file and its time of change tell.
    (Such a lock is dropped, too, when the process closes the file by any descriptor: nothing else here may open it.)

    Args:
        called: the option that names the folder, for messages.

    Raises:
        RunInUseError: another process holds it.
        RunError: the folder cannot be written.
    """

    def __init__(self, folder: Path, called: str = "run_dir") -> None:
        self.path, self._called = folder / LOCK, called
        own = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "machine": (machine := _machine()),
            "command": " ".join(sys.argv)[:500],
        }
        self._text = (json.dumps(own) + "\n").encode()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file, in_force = self._open()
            try:
                self._see_that_it_is_free(in_force, machine)
                self._write(self._text)
                if not in_force:
                    time.sleep(LOOK_SECONDS)  # of two that found it free, the later to write has it
                    self.confirm()
            except BaseException:
                os.close(self._file)
                raise
        except OSError as error:
            raise RunError(f"{called} = {folder} cannot be written: {_why(folder, error)}") from None
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="run.lock", daemon=True)
        self._beating.start()

    def confirm(self) -> None:
        """To be called before anything of the run is replaced. A file that somebody removed, and no other run made anew, is made anew.

        Raises:
            RunError: the folder is another run's now, which was told that this one is dead; or it is gone.
        """
        if self._is_ours():
            return
        if not self.path.parent.exists():
            raise RunError(
                f"{self._called} = {self.path.parent} is gone: it was moved or removed while the run was at work"
            )
        if not os.path.lexists(self.path):
            self._file, _ = (
                self._open()
            )  # the old descriptor stays open: its number must not be another file's while the thread beats
            self._write(self._text)
            return
        raise RunError(
            f"{self._called} = {self.path.parent} is another run's now (see {self.path}): this one ends, and writes nothing more there"
        )

    def release(self) -> None:
        """Let go. The file stays: were it removed, two others could each lock one of that name."""
        self._ended.set()
        self._beating.join()
        with suppress(OSError):
            if self._is_ours():
                self._write(b"")
        os.close(self._file)

    def _open(self) -> tuple[int, bool]:
        """The file, locked; and whether the file system knows of locks."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                in_force = self._lock(file)
                if self._is_in_place(file):
                    return file, in_force
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # somebody removed it meanwhile

    def _lock(self, file: int) -> bool:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _BYTE)
        except (BlockingIOError, PermissionError):
            self._refuse(*_read(file))
        except OSError:
            return False  # no locks on this file system
        return True

    def _see_that_it_is_free(self, in_force: bool, machine: str) -> None:
        """A text that was left behind: of a process that this machine knows to be dead, or of another machine, which is watched."""
        owner, seen = _read(self._file)
        if not owner or (in_force and owner.get("machine") == machine) or time.time() - seen > LONG_SILENT_SECONDS:
            return
        print(
            f"{self.path}: waiting up to {SILENT_SECONDS:.0f} s for a sign of {_name(owner)}",
            file=sys.stderr,
            flush=True,
        )
        end = time.monotonic() + SILENT_SECONDS
        while owner and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
            if in_force:  # to lock anew is to look anew, where what is read is kept for a while
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _BYTE)
                self._lock(self._file)
            now, changed = _read(self._file)
            if now and (now != owner or changed != seen):
                self._refuse(now, changed)
            owner = now

    def _refuse(self, owner: dict[str, Any], seen: float) -> None:
        age = max(0.0, time.time() - seen)
        remedy = f"; if that machine is dead, remove {self.path}" if age > SILENT_SECONDS else ""
        raise RunInUseError(
            f"{self._called} = {self.path.parent} is in use by {_name(owner)}, whose last sign of life was {age:.0f} s ago. Stop it, or "
            f"choose another {self._called}{remedy}"
        )

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self._file)

    def _write(self, text: bytes) -> None:
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))

    def _is_ours(self) -> bool:
        try:
            return self._is_in_place(self._file) and os.pread(self._file, len(self._text) + 1, 0) == self._text
        except OSError:
            return False

    def _is_in_place(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False


def _read(file: int) -> tuple[dict[str, Any], float]:
    """Who wrote the text, {} if nobody; and when the file was last touched. A text that is just being written is read again."""
    for _ in range(20):
        text, changed = os.pread(file, 1 << 16, 0), os.fstat(file).st_mtime
        try:
            owner = json.loads(text) if text.strip() else {}
            return (owner if isinstance(owner, dict) else {}), changed
        except ValueError:
            time.sleep(0.05)
    return {"host": "a machine", "process": "?", "since": "?"}, changed


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "a process that is just starting"
    return f"process {owner.get('process')} on {owner.get('host')}, since {owner.get('since')}"


def _machine() -> str:
    """This start of this machine, its containers included."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _why(folder: Path, error: OSError) -> str:
    if os.path.islink(folder) and not os.path.exists(folder):
        return f"it is a symbolic link to {os.readlink(folder)}, which is not there"
    return str(error)
