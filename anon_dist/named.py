"""The files and folders that a command line names: whether they are there and may be what is asked for, before torch is imported.

A look at names: what is in them is found out by whoever reads them.
"""

from __future__ import annotations

import json
import os
import shlex
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from anon_dist.stores import is_address
from anon_dist.usage import UsageError

PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")
"""Kinds that matplotlib writes."""
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


def need_data(path: str | Path, option: str = "") -> None:
    """Raises `UsageError` if it is no folder, and no address."""
    if is_address(path):
        return
    need(Path(path), "a folder that `anon-dist data prepare` made", option)
    if not Path(path).is_dir():
        raise UsageError(f"{option}{' ' * bool(option)}{path} is a file; {named_instead(path)}")


def named_instead(file: str | Path) -> str:
    """What to name instead of a file, where data are wanted."""
    folder = Path(file).parent
    if (folder / "index.json").is_file():
        return f"name the prepared folder, {folder}"
    made = f"anon-dist data prepare --source {shlex.quote(str(file))} --tokenizer … --out DIR"
    return f"name a folder that `anon-dist data prepare` made (`{made}` makes one of it)"


def need_picture(path: Path, option: str) -> None:
    """Raises `UsageError` if no picture can be written there."""
    need_place(path, option, "picture.png")
    if path.suffix.lower() not in PICTURES:
        raise UsageError(f"{option} {path} must end with one of {', '.join(PICTURES)}")


def need_place(path: Path, option: str, such_as: str) -> None:
    """Raises `UsageError` if no file can be written there; `such_as`: a name of one."""
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; name a file in it, such as {path / such_as}")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}; make it, or name another")


def need_bare(args: Sequence[str], option: str, command: str) -> None:
    """Raises `UsageError` if `option` is given, a guess at what stands without one; with the command that is meant."""
    meant = [arg.removeprefix(f"{option}=") for arg in args if arg != option]
    if meant != list(args):
        raise UsageError(f"{option} is no option of `{command}`; leave the word out: {command} {shlex.join(meant)}")


def config_problem(folder: Path) -> str | None:
    """What is wrong with the config.json of a model's folder, and the remedy; None: nothing, or there is none."""
    path = folder / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if text.strip() else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        what = f"is damaged ({error})"
    else:
        if isinstance(content, dict) and content:
            return None
        what = "is empty" if not content else "is no JSON object"
    return (
        f"{path} {what}; put the model's own in its place, or name the run, or a checkpoint of it, that the model is of"
    )


def need_no(path: Path, overwrite: bool) -> None:
    """Raises `UsageError` if there is something where a command is to write, and it is not to be replaced; or no room for it."""
    if os.path.lexists(path) and not overwrite:
        raise UsageError(f"{path} exists; choose another target, or replace it with --overwrite")
    need_room(path.parent)


def need_room(folder: str | Path, option: str = "") -> None:
    """Raises `UsageError` if a file is where a command is to make a folder, or above it."""
    if is_address(folder):
        return
    for place in (Path(folder), *Path(folder).parents):
        if os.path.lexists(place):
            if not place.is_dir():
                where = f"{folder}: {place}" if Path(folder) != place else f"{folder}"
                raise UsageError(f"{option}{' ' * bool(option)}{where} is a file; name a folder")
            return


def need_checkpoint(path: str | Path, what: str) -> None:
    """Raises `UsageError` if nothing is there, or what is there cannot be a run, a model or a checkpoint of any format.

    Args:
        what: to be named instead.
    """
    if is_address(path):
        return
    path = Path(path)
    need(path, what)
    weights = ", ".join(f"*{suffix}" for suffix in _WEIGHTS)
    if path.is_dir():
        if not any(name.endswith(_WEIGHTS) or name in _MARKS for name in _names(path)):
            raise UsageError(f"{path} holds no weights ({weights}) and no run; name {what}")
        if problem := config_problem(path):
            raise UsageError(problem)
    elif path.is_file() and path.suffix not in _WEIGHTS and not zipfile.is_zipfile(path) and not _is_pickle(path):
        raise UsageError(f"{path} is no file of weights ({weights}); name {what}")


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
