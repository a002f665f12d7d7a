"""Files that are there whole or not at all, even after a power cut."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anon_dist.data.errors import PreparationError


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader, or a restart after a crash, finds the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: renames and new files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until a folder of files, written by someone else, is on the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder against other preparations; the kernel lets go when the process ends, however it ends.

    Some network file systems cannot lock a folder; there it is not held.

    Raises:
        PreparationError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PreparationError(
                f"--out {folder}: another process is preparing it. Wait for it, or name another folder."
            ) from None
        except OSError:
            pass  # no such locks on this file system
        yield
    finally:
        os.close(descriptor)
