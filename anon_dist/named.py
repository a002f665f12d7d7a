"""The files and folders that a command line names: whether they are there and may be what is asked for, before torch is imported.

A look at names: what is in them is found out by whoever reads them.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from anon_dist.stores import is_address
from anon_dist.usage import UsageError

_WEIGHTS = (".safetensors", ".distcp", ".pt", ".pth", ".bin", ".ckpt")
_MARKS = ("config.yaml", "config.json", "manifest.json", ".metadata", "latest", "trainer.json", "run.lock")
"""Files that a run, a checkpoint or a model has, besides those of weights."""
_DEPTH = 2
_MOST = 5000
"""Entries of a folder, and of those in it, that are looked at."""


def need(path: Path, what: str, option: str = "") -> None:
    """Raises `UsageError` if there is nothing; `what` says what to name instead."""
    if not os.path.exists(path):
        raise UsageError(f"{option}{' ' * bool(option)}{path} does not exist; name {what}")


def need_folder(path: Path, what: str) -> None:
    """Raises `UsageError` if it is no folder."""
    need(path, what)
    if not path.is_dir():
        raise UsageError(f"{path} is no folder; name {what}")


def need_file(path: Path | None, what: str, option: str) -> None:
    """Raises `UsageError` if it is no file, and is given."""
    if path is not None:
        need(path, what, option)
        if path.is_dir():
            raise UsageError(f"{option} {path} is a folder; name {what}")


def need_no(path: Path, overwrite: bool) -> None:
    """Raises `UsageError` if there is something where a command is to write, and it is not to be replaced."""
    if os.path.lexists(path) and not overwrite:
        raise UsageError(f"{path} exists; choose another target, or replace it with --overwrite")


def need_checkpoint(path: str | Path, what: str) -> None:
    """Raises `UsageError` if nothing is there, or what is there cannot be a run, a model or a checkpoint of any format.

    Args:
        what: to be named instead.
    """
    if is_address(path):
        return
    path = Path(path)
    need(path, what)
    if path.is_dir():
        if not any(name.endswith(_WEIGHTS) or name in _MARKS for name in _names(path)):
            raise UsageError(
                f"{path} holds no weights ({', '.join(f'*{s}' for s in _WEIGHTS)}) and no run; name {what}"
            )
    elif path.is_file() and path.suffix not in _WEIGHTS and not zipfile.is_zipfile(path) and not _is_pickle(path):
        raise UsageError(f"{path} is no file of weights ({', '.join(f'*{s}' for s in _WEIGHTS)}); name {what}")


def _names(folder: Path, depth: int = _DEPTH) -> Iterator[str]:
    """Of the files in a folder, and of those in its folders; of a large one, a mark too, which says that it is not known."""
    left = _MOST
    ahead = [(folder, depth)]
    while ahead:
        here, levels = ahead.pop()
        try:
            entries = list(os.scandir(here))
        except OSError:
            yield _MARKS[0]
            return
        left -= len(entries)
        if left < 0:
            yield _MARKS[0]
            return
        for entry in entries:
            if entry.is_dir():
                ahead += [(Path(entry.path), levels - 1)] if levels else []
            else:
                yield entry.name


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80"
