"""Paths that a file names must stay in its folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from anon_dist.checkpoint.errors import CheckpointError


def inside(folder: Path, name: str, where: str, also: Path | None = None) -> Path:
    """`folder / name`, for a name that was read from a file of the folder.

    Args:
        where: the file that has it, for messages.
        also: another folder that symbolic links may lead into.

    Raises:
        CheckpointError: it leads out of the folder, by its parts or by a symbolic link.
    """
    if not is_inside(name):
        raise CheckpointError(
            f"{folder / where} names {name!r}, which is not in its folder; such a checkpoint is not read"
        )
    path = folder / name
    target = path.resolve()
    if not any(target.is_relative_to(allowed.resolve()) for allowed in (folder, also) if allowed is not None):
        raise CheckpointError(
            f"{path}, which {where} names, is a link that leads out of its folder, to {target}; copy the file there instead"
        )
    return path


def is_inside(name: str) -> bool:
    """Whether a relative path stays where it begins."""
    return (
        isinstance(name, str)
        and "\0" not in name
        and not name.startswith("/")
        and ".." not in PurePosixPath(name).parts
    )
