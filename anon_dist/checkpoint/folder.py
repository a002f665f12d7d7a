"""The checkpoints of a run: which are complete, which is the latest, which may go, which were set aside."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from anon_dist.agreement import agree, failures, is_first
from anon_dist.checkpoint import checksums
from anon_dist.checkpoint.checksums import PROGRESS
from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
from anon_dist.files import sync, sync_tree, unused, write_json

UNFINISHED = ".unfinished"
"""Folder, beside the checkpoints, of what is being written or deleted; all in it is ours. Gone between writes."""
_NAME = re.compile(r"step-(\d{8,})")
_DELETING = ".deleting"
log = logging.getLogger(__name__)


class Checkpoints:
    """Folders `step-00000500`, each complete or absent, of which the last `keep` stay.

    A checkpoint is written in the folder `.unfinished` and gets its place when every rank's files are on the disk. All ranks must see
    the same file system, and call `writing` together. Whatever else lies in the folder, symbolic links among it, is left alone.

    Args:
        folder: where they lie; made when the first is written.
        keep: how many stay, at least 1.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return [p for p in self.present() if _is_complete(p)]

    def present(self) -> list[Path]:
        """The complete ones, and those that have lost what makes them complete; oldest first."""
        try:
            entries = list(self.folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted((p for p in entries if _NAME.fullmatch(p.name) and (_is_complete(p) or _was_one(p))), key=step_of)

    def latest(self) -> Path | None:
        """The one to resume from."""
        return next(reversed(self.complete()), None)

    def clean(self) -> None:
        """Finish or remove what interrupted writing or deleting left behind. For one process, while no other writes."""
        partial = self.folder / UNFINISHED
        if partial.is_symlink() or not partial.is_dir():
            return
        for path in list(partial.iterdir()):
            if _NAME.fullmatch(path.name) and _is_complete(path) and not _is_complete(self.folder / path.name):
                self._put_in_place(path)  # only that was missing
            else:
                _delete(path)
        self._close()

    def set_aside(self, checkpoint: Path, ending: str) -> Path:
        """Rename a checkpoint to `NAME.ending`, so that it counts no more; its new name."""
        target = unused(checkpoint.with_name(f"{checkpoint.name}.{ending}"))
        checkpoint.rename(target)
        sync(checkpoint.parent)
        return target

    @contextmanager
    def writing(self, step: int, progress: dict[str, Any]) -> Iterator[Path]:
        """A folder into which every rank writes its part of the checkpoint of `step`; complete when the block is left.

        Args:
            progress: what the training loop needs to go on, as JSON; rank 0's is written.

        Raises:
            CheckpointError: a rank could not write its part; on every rank. Nothing of it is left, and the earlier ones are there.
        """
        temporary = self.folder / UNFINISHED / f"step-{step:08d}"
        self._agreed(temporary, _first(lambda: _make_anew(temporary)))
        failed = None
        try:
            yield temporary
        except Exception as error:  # torch's own for a full disk is a RuntimeError
            failed = error
        self._agreed(temporary, failed)
        sums: dict[str, dict[str, Any]] = {}
        try:
            sums = checksums.take(temporary)
        except Exception as error:
            failed = error
        self._agreed(temporary, failed)
        self._agreed(temporary, _first(lambda: self._finish(temporary, sums, progress)))

    def _agreed(self, temporary: Path, error: Exception | None) -> None:
        """Go on if no rank has an error; else remove what was written, and raise on all."""
        if not (what := failures(error)):
            return
        if "[Errno" not in what:  # torch's own files do not say what is wrong with the disk
            what = f"{what} ({agree(_room(self.folder))})"
        if is_first():
            _delete(temporary)
            self._close()
        latest = agree(
            self.latest()
        )  # no rank ends before that: launchers soon kill the others, rank 0 perhaps while it deletes
        if error is not None and not (isinstance(error, OSError | CheckpointError) or type(error) is RuntimeError):
            raise error  # no matter of files
        raise CheckpointError(
            f"{self.folder / temporary.name} could not be written: {what}. Nothing of it is left; "
            + (f"the run goes on from {latest}, by the same command" if latest else "there is no earlier checkpoint")
        ) from error

    def _finish(self, temporary: Path, sums: dict[str, dict[str, Any]], progress: dict[str, Any]) -> None:
        sealed = checksums.seal(temporary, sums, progress)
        sync_tree(temporary)
        write_json(temporary / PROGRESS, sealed)  # what has it is complete
        placed = self._put_in_place(temporary)
        for old in [p for p in self.complete()[: -self.keep] if p != placed and not p.is_symlink()]:
            self._remove(old)
        self._close()

    def _put_in_place(self, temporary: Path) -> Path:
        """Give a complete checkpoint its name. An older one of that name goes; what is none is set aside."""
        target = self.folder / temporary.name
        if _is_complete(target) and not target.is_symlink():
            old = temporary.with_name(temporary.name + _DELETING)
            _delete(old)
            target.rename(old)
            temporary.rename(target)
            _delete(old)
        else:
            if os.path.lexists(target):
                log.warning("%s is no complete checkpoint: it is now %s", target, self.set_aside(target, "aside").name)
            temporary.rename(target)
        sync(self.folder)
        return target

    def _remove(self, checkpoint: Path) -> None:
        """Delete a checkpoint; interrupted, it is not there under its name any more."""
        try:
            doomed = self.folder / UNFINISHED / (checkpoint.name + _DELETING)
            _delete(doomed)
            _delete(checkpoint.rename(doomed))
        except OSError as error:
            log.warning("%s cannot be removed, and takes up room: %s", checkpoint, error)

    def _close(self) -> None:
        with suppress(OSError):
            (self.folder / UNFINISHED).rmdir()


def step_of(checkpoint: Path) -> int:
    """The step that the name of a checkpoint says."""
    match = _NAME.match(checkpoint.name)
    return int(match[1]) if match else -1


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """What `Checkpoints.writing` was given.

    Raises:
        CheckpointError: the folder is no complete checkpoint.
        DamagedCheckpoint: it was one, and cannot be read.
    """
    path = checkpoint / PROGRESS
    try:
        return checksums.unsealed(path)[0]
    except (FileNotFoundError, NotADirectoryError) as error:
        if _was_one(checkpoint):
            raise DamagedCheckpoint(f"{path} is missing") from None
        why = error if checkpoint.exists() else "there is no such folder"
        raise CheckpointError(f"{checkpoint} is no complete checkpoint of a training run: {why}") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from None


def _is_complete(checkpoint: Path) -> bool:
    try:
        return (checkpoint / PROGRESS).is_file()
    except OSError:
        return False


def _was_one(checkpoint: Path) -> bool:
    """Whether a folder without `PROGRESS` is a checkpoint all the same: folders get their names when they are complete."""
    try:
        return any((checkpoint / name).exists() for name in (checksums.NAME, ".metadata", "deepspeed"))
    except OSError:
        return False


def _make_anew(folder: Path) -> None:
    _delete(folder)
    folder.mkdir(parents=True)


def _delete(path: Path) -> None:
    """A folder of ours, and what is in it, as far as that goes; no symbolic link is followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _first(action: Callable[[], object]) -> Exception | None:
    """Done by rank 0; its error."""
    try:
        if is_first():
            action()
    except Exception as error:
        return error
    return None


def _room(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there"
    except OSError as error:
        return str(error)
