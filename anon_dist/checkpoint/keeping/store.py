"""Files at an address of fsspec's: read, written whole, tried again where the store fails.

Object stores show a file when all of it has arrived. Elsewhere it is written under another name, and renamed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from fsspec.callbacks import Callback

from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.files import sync
from anon_dist.stores import BUCKETS, open_store, scheme_of, tried

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between attempts, of which there is one more."""
_LOCAL = frozenset({"file", "local"})
_RENAMING = frozenset({"sftp", "ssh", "hdfs", "arrow_hdfs", "webhdfs", "smb"})
"""File systems whose move is a rename, of which some replace nothing."""
_PART = ".part"
"""Ends the name of a file that is being written."""
_T = TypeVar("_T")


class _Counting(Callback):
    """Told by fsspec of each piece of a file that has been sent."""

    def __init__(self, count: Callable[[int], None]) -> None:
        super().__init__()
        self._count = count

    def relative_update(self, inc: int = 1) -> None:
        """See `fsspec.callbacks.Callback`."""
        self._count(inc)


class Store:
    """The files at an address. Paths are those of `path`; but for `tried` itself, methods try once and raise fsspec's errors.

    Args:
        pauses: seconds between attempts, of which there is one more.

    Raises:
        CheckpointError: fsspec does not know the address, or the package for it is not installed.
    """

    def __init__(self, address: str, pauses: Sequence[float] | None = None) -> None:
        self.address, self._pauses = address.rstrip("/"), PAUSES if pauses is None else pauses
        self.fs, self.root = open_store(address, CheckpointError)
        self._scheme = scheme_of(address)
        self.sent = 0
        """Bytes that have been sent there, and files: it grows while a copy makes progress."""
        self.patient = True
        """Whether what fails is tried again."""
        self._leaving = threading.Event()

    def path(self, *parts: str) -> str:
        """Of a file or folder below the address."""
        return "/".join((self.root, *parts))

    def tried(self, what: str, action: Callable[[], _T]) -> _T:
        """Do it, again after a while where the store fails.

        Args:
            what: failed, in words, if it does.

        Raises:
            CheckpointError: all attempts failed; naming the last error. One of our own is raised at once.
        """
        pauses = self._pauses if self.patient else ()
        return tried(what, action, CheckpointError, pauses, self._leaving.wait)

    @property
    def left(self) -> bool:
        """Whether nothing more is sent there: `leave` was called."""
        return self._leaving.is_set()

    def leave(self) -> None:
        """End what is being sent after the piece that is under way: it raises CheckpointError, and so does each later one."""
        self._leaving.set()

    def go_on(self) -> None:
        """Raise CheckpointError if it was left."""
        if self.left:
            raise CheckpointError(f"what is not at {self.address} yet is left")

    def names(self) -> list[str]:
        """Of what lies in the address's folder, as it is now; none if there is no such folder."""
        self.fs.invalidate_cache()
        with suppress(FileNotFoundError):
            return sorted({str(name).rstrip("/").rpartition("/")[2] for name in self.fs.ls(self.root, detail=False)})
        return []

    def files(self, folder: str = "") -> list[str]:
        """All that lies below a folder of the address, by their names from there."""
        self.fs.invalidate_cache()
        top = self.path(folder) if folder else self.root
        return [str(path).removeprefix(top).lstrip("/") for path in self.fs.find(top)]

    def read(self, path: str) -> bytes | None:
        """A small file; None if there is none."""
        with suppress(FileNotFoundError):
            return bytes(self.fs.cat_file(path))
        return None

    def remove(self, path: str) -> None:
        """A file, if it is there."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(path)

    def make_root(self) -> None:
        """The address's folder, where a store has folders. Only here: one that vanishes later is not to be made anew, but missed."""
        if self._scheme not in BUCKETS:
            self.fs.makedirs(self.root, exist_ok=True)

    def write(self, path: str, data: bytes) -> None:
        """A small file, whole."""
        self._make_parent(path)
        self._whole(path, lambda there: self.fs.pipe_file(there, data), len(data))

    def send(self, source: Path, path: str) -> None:
        """A file from here, whole, counted in `sent`."""
        self._make_parent(path)
        count = _Counting(self._count)
        self._whole(path, lambda there: self.fs.put_file(str(source), there, callback=count), source.stat().st_size)
        self._count(1)

    def copy(self, twin: str, path: str, size: int) -> bool:
        """A file from there, whole. Whether that could be done: it may be gone, and not every store copies."""
        self._make_parent(path)
        with suppress(Exception):
            self._whole(path, lambda there: self.fs.cp_file(twin, there), size)
            return True
        return False

    def settle(self) -> None:
        """Have what was written on the disk, where that is ours."""
        if self._scheme in _LOCAL:
            sync(Path(self.root))

    def clear(self, folder: str, stays: set[str]) -> None:
        """Take away what lies below a folder but for some files, and what was begun to be sent there."""
        for name in self.files(folder):
            if name not in stays:
                self.fs.rm_file(self.path(folder, name))
        if self._scheme in ("s3", "s3a"):
            with suppress(Exception):  # who may write there may not always list these, for whose bytes one pays
                self._abort_uploads(self.path(folder))

    def _abort_uploads(self, folder: str) -> None:
        bucket, _, key = folder.partition("/")
        found = self.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/").get("Uploads") or []
        for each in found:
            self.fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=each["Key"], UploadId=each["UploadId"])

    def _count(self, sent: int) -> None:
        self.sent += sent
        self.go_on()

    def _make_parent(self, path: str) -> None:
        if self._scheme in _LOCAL:
            folder = Path(path).parent
            for each in reversed((folder, *folder.parents)):
                if each.is_relative_to(self.root) and each != Path(self.root):
                    each.mkdir(exist_ok=True)
        elif self._scheme not in BUCKETS:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _whole(self, target: str, write: Callable[[str], object], size: int) -> None:
        """Have a file of this many bytes there under its name when it is complete, and on the disk where that is ours.

        Args:
            write: it, under a name that it is given.
        """
        path = target + _PART if self._scheme in _LOCAL | _RENAMING else target
        write(path)
        self.fs.invalidate_cache()
        if (there := int(self.fs.info(path)["size"])) != size:
            raise OSError(f"{path} has {there} bytes there, and {size} here")
        if self._scheme in _LOCAL:
            sync(Path(path))
            os.replace(path, target)
            sync(Path(target).parent)
        elif path != target:
            self.remove(target)
            self.fs.mv(path, target)
