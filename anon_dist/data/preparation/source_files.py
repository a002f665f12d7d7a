"""The files of a source on this machine: which there are, in which order, and which version of each."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any, NamedTuple

from anon_dist.data.errors import SourceError


class Version(NamedTuple):
    """Which of its versions a file is."""

    name: str
    """As it is called among what was left out."""
    stamp: str
    """Nanoseconds of its last change, or what a store says of its content. Empty: not known."""


def stamp(stat: Any) -> str:
    """What tells a version of a file from others, of what `os.stat` or a store says."""
    return str(stat.stamp if hasattr(stat, "stamp") else stat.st_mtime_ns)


def unread(hidden: int, special: int = 0) -> dict[str, int]:
    """How many files are not opened, by kind, as `describe` says it."""
    return {"hidden_files": hidden} | ({"special_files": special} if special else {})


def find_files(spec: str) -> tuple[Path, list[Path], dict[str, int]]:
    """Root, sorted files and how many were left out by kind, for a file, a folder or a glob.

    Raises:
        SourceError: there are none.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return path.parent, [path], unread(0)
    if path.is_dir():
        root, found = path, _walk(path)
    else:
        pattern = str(path)
        if not glob.has_magic(pattern):
            raise SourceError(f"--source {spec}: no such file or folder. Give a path, a glob, hf:NAME or stdlib.")
        found = sorted(Path(p) for p in glob.glob(pattern, recursive=True, include_hidden=True) if not os.path.isdir(p))
        root = Path(os.path.commonpath([p.parent for p in found])) if found else Path(".")
    shown = [p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    files = [p for p in shown if p.is_file()]
    left = unread(len(found) - len(shown), len(shown) - len(files))
    if not files:
        raise SourceError(
            f"--source {spec}: no files there ({len(found) - len(shown)} hidden ones left out). Give another path."
        )
    return root, files, left


def _walk(root: Path) -> list[Path]:
    """What is below a folder and no folder; links to folders are followed, and no folder is entered twice."""
    found, entered = [], set()
    for folder, inner, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in entered:
            inner.clear()
            continue
        entered.add(real)
        inner.sort(key=lambda name, folder=folder: (os.path.islink(os.path.join(folder, name)), name))  # type: ignore[misc]
        found += [Path(folder, name) for name in names]
    return sorted(found)
