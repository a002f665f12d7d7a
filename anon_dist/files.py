"""Files and folders that are complete or absent, also after a power cut; folders held for one process."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any


class InUseError(Exception):
    """Another process holds the folder."""


def sync(path: Path) -> None:
    """Have the contents of a file, or the entries of a folder, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` every file and folder below, and the folder itself."""
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(Path(parent) / name)
        sync(Path(parent))


def write_text(path: Path, text: str) -> None:
    """Write or replace a file in one step; if there is no room for it, nothing is left of it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """The same with a JSON value; bytes of names that are not UTF-8 stand in it as escapes of lone surrogates."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_text(path, text.encode(errors="backslashreplace").decode())


def publish(temporary: Path, target: Path) -> None:
    """Give a finished folder its name: its contents are on the disk before, and an older folder of that name is gone after.

    Between the two renames neither is there under its name; the temporary one is complete, and `target + ".deleting"` too.
    """
    sync_tree(temporary)
    old = target.with_name(target.name + ".deleting")
    if old.exists():
        shutil.rmtree(old)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def unused(path: Path) -> Path:
    """The path, or `path-2`, `path-3`, … if something has that name."""
    others = (path.with_name(f"{path.name}-{i}") for i in count(2))
    return next(p for p in chain((path,), others) if not os.path.lexists(p))


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes that would hold it; the kernel lets go when the process ends, however it ends.

    Some network file systems cannot lock a folder; there it is not held.

    Raises:
        InUseError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUseError(folder) from None
        except OSError:
            pass  # no such locks on this file system
        yield
    finally:
        os.close(descriptor)
