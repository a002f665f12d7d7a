"""Files at an address as a source reads them: found by folder, name or glob, read in pieces, each of which is tried again if it fails."""

from __future__ import annotations

import glob
import io
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from anon_dist.data.errors import SourceError
from anon_dist.data.stored.remote import AT_START, BLOCK, RemoteFolder
from anon_dist.stores import tried

STAMPS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "blob_id",
    "checksum",
    "LastModified",
    "last_modified",
    "mtime",
    "created",
)
"""What stores say of the version of a file, the best first."""
REMEDY = ". The same command goes on when the store answers again"


@dataclass(frozen=True)
class Size:
    """As of `os.stat_result`."""

    st_size: int
    stamp: str = ""
    """What the store says of its version."""


class RemotePath:
    """A file at an address, with what sources use of `pathlib.Path`."""

    def __init__(self, folder: RemoteFolder, inside: str, size: Size = Size(0)) -> None:
        self._folder, self._inside, self._size = folder, PurePosixPath(inside), size

    def __str__(self) -> str:
        return f"{self._folder.address}/{self._inside}" if self._inside.parts else self._folder.address

    @property
    def name(self) -> str:
        """The last part of the address."""
        return str(self).rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """Of the name, with its dot."""
        return self._inside.suffix

    def with_suffix(self, suffix: str) -> RemotePath:
        """The same with another."""
        return RemotePath(self._folder, str(self._inside.with_suffix(suffix)), self._size)

    def relative_to(self, other: object) -> PurePosixPath:
        """The path below the folder that it was found in."""
        return self._inside

    def stat(self) -> Size:
        """Its size and version when it was found."""
        return self._size

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Its content, to be closed."""
        return io.BufferedReader(_Pieces(self._folder, str(self._inside), self._size.st_size), BLOCK)


class _Pieces(io.RawIOBase):
    def __init__(self, folder: RemoteFolder, file: str, size: int) -> None:
        self._folder, self._file, self._size, self._at = folder, file, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._folder.piece(self._file, self._at, end, self._size)
        buffer[: len(data)] = data
        self._at = end
        return len(data)


def find_at(spec: str) -> tuple[Path, list[Path], dict[str, int]]:
    """Root, sorted files and how many were left out, for the address of a file, a folder or a glob. They are `RemotePath`s.

    Raises:
        SourceError: there is nothing, or the store does not answer.
    """
    before = spec.rstrip("/")
    while glob.has_magic(before):
        before = before.rpartition("/")[0]
    folder = RemoteFolder(before, SourceError, REMEDY)
    found = tried(
        f"--source {spec} cannot be listed", lambda: _sizes(folder, spec), SourceError, AT_START, remedy=REMEDY
    )
    if before in found:  # a single file
        folder = RemoteFolder(before.rpartition("/")[0], SourceError, REMEDY)
        found = {before: found[before]}
    inside = {path.removeprefix(folder.address + "/"): size for path, size in found.items()}
    files = [name for name in sorted(inside) if not any(part.startswith(".") for part in name.split("/"))]
    if not files:
        raise SourceError(f"--source {spec}: no files there ({len(found)} hidden ones left out). Give another address.")
    paths = [cast(Path, RemotePath(folder, name, inside[name])) for name in files]
    return cast(Path, RemotePath(folder, "")), paths, {"hidden_files": len(found) - len(files)}


def _sizes(folder: RemoteFolder, spec: str) -> dict[str, Size]:
    """Address → size of each file that the address means."""
    store = folder.store
    store.invalidate_cache()
    path = folder.root + spec.rstrip("/").removeprefix(folder.address)
    found = store.glob(path, detail=True) if glob.has_magic(spec) else store.find(path, detail=True)
    files = {str(name): entry for name, entry in found.items() if entry["type"] == "file"}
    return {
        folder.address + name.removeprefix(folder.root): Size(
            int(entry["size"] or 0), next((str(entry[key]) for key in STAMPS if entry.get(key)), "")
        )
        for name, entry in files.items()
        if not name.endswith("/")
    }
