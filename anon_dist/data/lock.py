"""Holding a folder for one process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anon_dist.data.errors import PreparationError


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
