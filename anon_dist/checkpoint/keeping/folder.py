"""The checkpoints of a run: which are complete, which is the latest, which may go, which were set aside."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from anon_dist.agreement import Group, agree, failures, is_first
from anon_dist.checkpoint import checksums
from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint, UnwrittenCheckpoint
from anon_dist.checkpoint.keeping.names import NAME, PROGRESS, is_complete, name_of, named_in, step_of
from anon_dist.files import sync, sync_tree, unused, write_json

UNFINISHED = ".unfinished"
"""Folder, beside the checkpoints, of what is being written or deleted; all in it is ours. Gone between writes."""
IN_PLACE_OF = "in_place_of"
"""In a checkpoint's progress: the step whose checkpoint could not be written. This one stays if that one would."""
_DELETING = ".deleting"
log = logging.getLogger(__name__)


class Checkpoints:
    """Folders `step-00000500`, each complete or absent, of which the last `keep` stay, and some for ever.

    A checkpoint is written in the folder `.unfinished` and gets its place when every rank's files are on the disk. All ranks must see
    the same file system, and call `writing` together. Whatever else lies in the folder, symbolic links among it, is left alone.

    Args:
        folder: where they lie; made when the first is written.
        keep: how many of the latest stay, at least 1.
        keep_every: those of its multiples stay for ever; 0: none.
        keep_steps: so do those of these steps.

    Attributes:
        removable: whether nothing else wants a checkpoint that need not stay; asked before it is removed.
        settle: waits for a checkpoint that is being written in the background.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0, keep_steps: Collection[int] = ()) -> None:
        self.folder = folder
        self.keep, self._keep_every, self._keep_steps = keep, keep_every, frozenset(keep_steps)
        self.removable: Callable[[Path], bool] = lambda checkpoint: True
        self.settle: Callable[[], object] = lambda: None
        self._changing = threading.Lock()

    def stays(self, step: int) -> bool:
        """Whether the checkpoint of a step is one that stays for ever."""
        return step in self._keep_steps or bool(self._keep_every and step % self._keep_every == 0)

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return [p for p in self.present() if is_complete(p)]

    def present(self) -> list[Path]:
        """The complete ones, and those that have lost what makes them complete; oldest first."""
        return [p for p in named_in(self.folder) if is_complete(p) or _was_one(p)]

    def latest(self) -> Path | None:
        """The one to resume from."""
        return next(reversed(self.complete()), None)

    def last(self) -> Path | None:
        """The same, once what is being written has its place: to be named when a run ends."""
        self.settle()
        return self.latest()

    def clean(self) -> None:
        """Finish or remove what interrupted writing or deleting left behind. For one process, while no other writes."""
        partial = self.folder / UNFINISHED
        if partial.is_symlink() or not partial.is_dir():
            return
        for path in list(partial.iterdir()):
            if NAME.fullmatch(path.name) and is_complete(path) and not is_complete(self.folder / path.name):
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
    def writing(self, step: int, progress: dict[str, Any], group: Group = None) -> Iterator[Path]:
        """A folder into which every rank writes its part of the checkpoint of `step`; complete when the block is left.

        Args:
            progress: what the training loop needs to go on, as JSON; rank 0's is written.
            group: of all ranks, through which they agree; None: the one by which they compute.

        Raises:
            CheckpointError: a rank could not write its part; on every rank. Nothing of it is left, and the earlier ones are there.
        """
        temporary = self.folder / UNFINISHED / name_of(step)
        self._agreed(temporary, _first(lambda: self._make_anew(temporary)), group)
        failed = None
        try:
            yield temporary
        except Exception as error:  # torch's own for a full disk is a RuntimeError
            failed = error
        self._agreed(temporary, failed, group)
        sums: dict[str, dict[str, Any]] = {}
        try:
            sums = checksums.take(temporary, group)
        except Exception as error:
            failed = error
        self._agreed(temporary, failed, group)
        self._agreed(temporary, _first(lambda: self._finish(temporary, sums, progress)), group)

    def _agreed(self, temporary: Path, error: Exception | None, group: Group) -> None:
        """Go on if no rank has an error; else remove what was written, and raise on all."""
        if not (what := failures(error, group)):
            return
        if "[Errno" not in what:  # torch's own files do not say what is wrong with the disk
            what = f"{what} ({agree(_room(self.folder), group)})"
        if is_first():
            _delete(temporary)
            self._close()
        # No rank ends before that: launchers soon kill the others, rank 0 perhaps while it deletes.
        latest = agree(self.latest(), group)
        if error is not None and not (isinstance(error, OSError | CheckpointError) or type(error) is RuntimeError):
            raise error  # no matter of files
        rest = f"the run goes on from {latest}, by the same command" if latest else "there is no earlier checkpoint"
        raise UnwrittenCheckpoint(f"{self.folder / temporary.name}", what, f"Nothing of it is left; {rest}") from error

    def discard(self, step: int) -> None:
        """Remove what a write that failed has left, if the ranks could not agree to. For one process, while no other writes."""
        with self._changing:
            _delete(self.folder / UNFINISHED / name_of(step))
            self._close()

    def remove(self, checkpoint: Path) -> None:
        """Delete one that is there. For one process, while no other writes."""
        with self._changing:
            if checkpoint.is_dir() and not checkpoint.is_symlink():
                self._remove(checkpoint)
            self._close()

    def _make_anew(self, temporary: Path) -> None:
        with self._changing:
            _delete(temporary)
            temporary.mkdir(parents=True)

    def _finish(self, temporary: Path, sums: dict[str, dict[str, Any]], progress: dict[str, Any]) -> None:
        sealed = checksums.seal(temporary, sums, progress)
        sync_tree(temporary)
        write_json(temporary / PROGRESS, sealed)  # what has it is complete
        with self._changing:
            placed = self._put_in_place(temporary)
        self.prune(placed)

    def put_in_place(self, temporary: Path) -> Path:
        """Give a checkpoint that was completed elsewhere on this file system its name. For one process; nothing is removed for it."""
        (self.folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
        with self._changing:
            placed = self._put_in_place(temporary)
        self._close()
        return placed

    def prune(self, placed: Path | None = None) -> None:
        """Remove the complete checkpoints that need not stay, and that nothing else wants. For one process.

        Args:
            placed: one that stays in any case.
        """
        with self._changing:
            for old in self.complete()[: -self.keep]:
                if old != placed and not old.is_symlink() and not self._is_to_stay(old) and self.removable(old):
                    self._remove(old)
            self._close()

    def _is_to_stay(self, checkpoint: Path) -> bool:
        if self.stays(step_of(checkpoint)):
            return True
        if not self._keep_every and not self._keep_steps:
            return False
        try:
            instead = read_progress(checkpoint).get(IN_PLACE_OF)
        except CheckpointError:
            return True  # nobody knows
        return isinstance(instead, int) and self.stays(instead)

    def _put_in_place(self, temporary: Path) -> Path:
        """Give a complete checkpoint its name. An older one of that name goes; what is none is set aside."""
        target = self.folder / temporary.name
        if is_complete(target) and not target.is_symlink():
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
            doomed.parent.mkdir(exist_ok=True)
            _delete(doomed)
            _delete(checkpoint.rename(doomed))
        except OSError as error:
            log.warning("%s cannot be removed, and takes up room: %s", checkpoint, error)

    def _close(self) -> None:
        with suppress(OSError):
            (self.folder / UNFINISHED).rmdir()


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


def _was_one(checkpoint: Path) -> bool:
    """Whether a folder without `PROGRESS` is a checkpoint all the same: folders get their names when they are complete."""
    try:
        return any((checkpoint / name).exists() for name in (checksums.NAME, ".metadata", "deepspeed"))
    except OSError:
        return False


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
