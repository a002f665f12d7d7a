"""Checkpoints copied to another place while the run goes on; local ones go only when they are complete there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.keeping.folder import Checkpoints
from anon_dist.checkpoint.keeping.names import PROGRESS
from anon_dist.checkpoint.keeping.remote import Remote

log = logging.getLogger(__name__)
PATIENCE_SECONDS = 3.0
"""Of the end of a run, before it says what it waits for."""


class TakenError(CheckpointError):
    """An address is another run's, or another start's, now.

    Args:
        what: is the matter.
        remedy: said after it, and kept for those who show remedies apart.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what}. {remedy[:1].upper()}{remedy[1:]}" if remedy else what)
        self.what, self.remedy = what, remedy


class GoneError(CheckpointError):
    """What made an address this run's is not there any more."""


class Uploads:
    """Copies, in a thread, each complete checkpoint of a run that is not at an address yet, the oldest first. For one process.

    What could not be copied stays here, and is tried again when `look` is called.

    Args:
        confirm: called before anything is written there or removed here; raises `TakenError` if the address is not this run's any more,
            `GoneError` if it is gone.

    Attributes:
        lost: that `TakenError`, once there was one: the run is to end.
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
        self._gone = False
        self._confirmed = False
        """A moment ago: what is there may be removed here."""
        self._error: Exception | None = None
        checkpoints.removable = lambda checkpoint: self._confirmed and self._is_there(checkpoint)
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

    def finish(self, waiting: Callable[[int], None] = lambda count: None) -> None:
        """Wait until all is there. What could not be copied is tried once more.

        Args:
            waiting: called once, with the number of checkpoints that are not there, if it takes longer than `PATIENCE_SECONDS`.

        Raises:
            CheckpointError: something is not, and could not be copied; it stays here.
        """
        say = lambda: waiting(count) if (count := len(self._missing())) else None  # noqa: E731
        timer = threading.Timer(PATIENCE_SECONDS, say)
        timer.daemon = True
        timer.start()
        try:
            self._pass()
            if self._error is not None and self.lost is None and not self._remote.left:
                self._pass()
        finally:
            timer.cancel()
        if self._error is not None:
            raise self._error

    def leave(self) -> None:
        """Copy nothing more. A checkpoint that is being copied stays incomplete there; the next `Uploads` copies it."""
        self._remote.leave()

    def _pass(self) -> None:
        """Wait until the thread has gone through all, from now on."""
        self.look()
        with self._news:
            self._news.wait_for(lambda: not self._wanted and not self._busy)

    def _run(self) -> None:
        while True:
            with self._news:
                self._busy = False
                self._news.notify_all()
                self._news.wait_for(lambda: self._wanted)
                self._wanted, self._busy = False, True
            self._error = self._copy_all()  # at once: `finish` may read it while another pass is under way

    def _copy_all(self) -> Exception | None:
        """What is to be said at the end, if it stays so."""
        found: Exception | None = None
        later = 0
        self._remote.be_patient(True)
        try:
            self._ask()
            self._prune()
            for checkpoint in self._checkpoints.complete():
                try:
                    self._copy(checkpoint)
                except (TakenError, GoneError):
                    raise
                except Exception as error:
                    if self._remote.left:
                        return None
                    damaged = isinstance(error, DamagedCheckpoint)
                    if found is None or damaged:
                        log.error("%s%s", error, _stays(checkpoint))
                    else:
                        later += 1
                    if not damaged:
                        self._remote.be_patient(False)  # a store that is full would take as long for each of the others
                    found = error
            if later:
                log.error("later checkpoints that stay in %s too: %d", self._checkpoints.folder, later)
        except OSError as error:  # the folder cannot be listed
            log.error("%s", error)
            return CheckpointError(f"{self._checkpoints.folder} cannot be read: {error}")
        except CheckpointError as error:
            if self._remote.left:
                return None
            if not self._gone:
                log.error("%s", error)
            self._gone = isinstance(error, GoneError)
            if not self._gone and not self._missing():
                return self.lost
            found = error
        return found and self._told(found)

    def _told(self, error: Exception) -> CheckpointError:
        """The last error, and how many checkpoints are not there."""
        missing = self._missing()
        if isinstance(error, TakenError) or not missing:
            return error if isinstance(error, CheckpointError) else CheckpointError(str(error))
        if len(missing) == 1 and not isinstance(error, GoneError):
            return CheckpointError(f"{error}{_stays(missing[0])}")
        number = f"{len(missing)} checkpoint{'s are' if len(missing) > 1 else ' is'}"
        again = "" if isinstance(error, GoneError) else ". The same command tries again"
        return CheckpointError(
            f"{number} not at {self._remote.address}, and stay{'s' * (len(missing) == 1)} in {self._checkpoints.folder} "
            f"(the newest: {missing[-1].name}): {error}{again}"
        )

    def _ask(self) -> None:
        """Whether the address is this run's still."""
        try:
            self._confirm(self._remote)
        except TakenError as error:
            self.lost = error
            raise
        except GoneError:
            self._there.clear()  # what comes back is looked at anew
            raise
        if self._gone:
            log.warning("%s is there again: copying goes on", self._remote.address)
            self._gone = False

    def _copy(self, checkpoint: Path) -> None:
        if self._is_there(checkpoint):
            return
        marker = (checkpoint / PROGRESS).read_bytes()
        self._remote.upload(checkpoint, self._ask)
        self._there[checkpoint.name] = marker
        self._prune()

    def _prune(self) -> None:
        """Remove here what need not stay. Only just after `_ask`: otherwise what was copied may be gone there."""
        self._confirmed = True
        try:
            self._checkpoints.prune()
        finally:
            self._confirmed = False

    def _missing(self) -> list[Path]:
        with suppress(OSError):
            return [checkpoint for checkpoint in self._checkpoints.complete() if not self._is_there(checkpoint)]
        return []

    def _is_there(self, checkpoint: Path) -> bool:
        with suppress(OSError):
            return self._there.get(checkpoint.name) == (checkpoint / PROGRESS).read_bytes()
        return False


def _stays(checkpoint: Path) -> str:
    return f". {checkpoint} stays where it is; the same command tries again"
