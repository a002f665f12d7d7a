"""Checkpoints copied to another place while the run goes on; local ones go only when they are complete there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.keeping.folder import Checkpoints
from anon_dist.checkpoint.keeping.names import PROGRESS
from anon_dist.checkpoint.keeping.remote import Remote

log = logging.getLogger(__name__)


class TakenError(CheckpointError):
    """An address is another run's, or another start's, now.

    Args:
        what: is the matter.
        remedy: said after it, and kept for those who show remedies apart.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what}. {remedy[:1].upper()}{remedy[1:]}" if remedy else what)
        self.what, self.remedy = what, remedy


class Uploads:
    """Copies, in a thread, each complete checkpoint of a run that is not at an address yet, the oldest first. For one process.

    What could not be copied stays here, and is tried again when `look` is called.

    Args:
        confirm: called before each copy; raises `TakenError` if the address is not this run's any more.

    Attributes:
        lost: that error, once there was one: the run is to end.
    """

    def __init__(
        self, remote: Remote, checkpoints: Checkpoints, confirm: Callable[[Remote], None] = lambda remote: None
    ) -> None:
        self._remote, self._checkpoints, self._confirm = remote, checkpoints, confirm
        self.lost: TakenError | None = None
        self._there: dict[str, bytes] = {}
        self._news, self._thread = (
            threading.Condition(),
            threading.Thread(target=self._run, name="uploads", daemon=True),
        )
        self._wanted = False
        self._busy = False
        self._error: Exception | None = None
        checkpoints.removable = self._is_there
        self._thread.start()

    @property
    def sent(self) -> int:
        """Bytes that have been sent there."""
        return self._remote.sent

    def look(self) -> None:
        """There may be something new to copy."""
        with self._news:
            self._wanted = True
            self._news.notify_all()

    def finish(self) -> None:
        """Wait until all is there.

        Raises:
            CheckpointError: something is not, and could not be copied; it stays here.
        """
        self.look()
        with self._news:
            self._news.wait_for(lambda: not self._wanted and not self._busy)
        if self._error is not None:
            raise self._error

    def leave(self) -> None:
        """Copy nothing more. A checkpoint that is being copied stays incomplete there; the next `Uploads` copies it."""
        self._remote.leave()

    def _run(self) -> None:
        while True:
            with self._news:
                self._busy = False
                self._news.notify_all()
                self._news.wait_for(lambda: self._wanted)
                self._wanted, self._busy = False, True
            self._error = self._copy_all()  # at once: `finish` may read it while another pass is under way

    def _copy_all(self) -> Exception | None:
        """The first error."""
        found: Exception | None = None
        try:
            for checkpoint in self._checkpoints.complete():
                try:
                    self._copy(checkpoint)
                except Exception as error:
                    if self._remote.left:
                        return None
                    log.error("%s", error)
                    found = found or error
        except OSError as error:  # the folder cannot be listed
            log.error("%s", error)
            found = found or CheckpointError(f"{self._checkpoints.folder} cannot be read: {error}")
        return found

    def _copy(self, checkpoint: Path) -> None:
        if self._is_there(checkpoint):
            return
        marker = (checkpoint / PROGRESS).read_bytes()
        try:
            self._confirm(self._remote)
            self._remote.upload(checkpoint)
        except TakenError as error:
            self.lost = error
            raise
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {checkpoint} stays where it is; the same command tries again") from error
        self._there[checkpoint.name] = marker
        self._checkpoints.prune()

    def _is_there(self, checkpoint: Path) -> bool:
        with suppress(OSError):
            return self._there.get(checkpoint.name) == (checkpoint / PROGRESS).read_bytes()
        return False
