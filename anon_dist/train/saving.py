"""Checkpoints of a run: captured between two steps, written in the background, and what is done about one that could not be written."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from anon_dist.agreement import Group, describe, failures, is_first
from anon_dist.checkpoint import CheckpointError
from anon_dist.checkpoint.dcp.linking import Links
from anon_dist.checkpoint.errors import UnwrittenCheckpoint
from anon_dist.checkpoint.keeping.folder import IN_PLACE_OF
from anon_dist.data.stored.remote import joined
from anon_dist.engines import peers
from anon_dist.train.config.changes import recorded, versions
from anon_dist.train.config.errors import RunError
from anon_dist.train.health.hangs import limits
from anon_dist.train.health.signals import StopSignal
from anon_dist.train.inputs import randomness
from anon_dist.train.inputs.corpora import first_path
from anon_dist.train.reports.metrics import Record
from anon_dist.train.running import Run
from anon_dist.train.saves.remote import finish_uploads, uploads_of

log = logging.getLogger(__name__)

LEAVING_SECONDS = 10.0
"""How long a rank that ends by an error waits for its save, where other ranks have a part in it: they may be gone."""


class Saver:
    """Writes a run's checkpoints. Every rank makes one, and calls the same methods after the same steps.

    A save captures weights, optimizer, place in the data and random state of one step. Then a thread of each rank writes, and the ranks
    agree, through a process group of their own, that all is written and checksummed, before the checkpoint gets its name. One is written
    at a time: the next save waits for it, and so does the end of the block, however it ends.

    Args:
        prepare: done at the start of each save; it raises on all ranks, or on none.
    """

    def __init__(self, run: Run, stop: StopSignal, prepare: Callable[[], None]) -> None:
        self._run, self._stop, self._prepare = run, stop, prepare
        self._background = run.config.checkpoint.async_save
        kept = run.config.checkpoint
        self._links = Links(1 if kept.keep == 1 and not kept.keep_every and not kept.keep_steps else 2)
        self._group: Group = None
        self._job: _Job | None = None
        self._record: Record = {}
        self._seconds = limits(run.config)[1]
        run.checkpoints.settle = self._wait_a_while
        self._uploads = uploads_of(run.config, run.checkpoints)
        self._meet()

    def _meet(self) -> None:
        """Give the saves a process group; in place of one that a failed save may have broken. Every rank must call it."""
        if self._background and dist.is_initialized():
            with peers.connecting():
                if self._group is not None:
                    dist.destroy_process_group(self._group)
                self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._seconds))

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._job is not None and not isinstance(error, KeyboardInterrupt):
            self._wait_a_while()
            if self._job.is_alive():
                log.error(
                    "what was being written is no checkpoint: other ranks did not answer within %.0f s", LEAVING_SECONDS
                )
            elif self._job.error is not None:
                reason = self._reason(self._job.error)
                log.error("the checkpoint of step %d could not be written (%s)", self._job.step, describe(reason))

    def _wait_a_while(self) -> None:
        if self._job is not None:
            self._job.join(None if self._group is None else LEAVING_SECONDS)

    @property
    def failed(self) -> bool:
        """Whether this rank's thread has ended by an error, of which the run does not know yet."""
        return self._job is not None and not self._job.is_alive() and self._job.error is not None

    def save(self) -> None:
        """Checkpoint the present step. Returns when it is captured, if there is no save before that is still being written.

        Raises:
            RunError: the run's folder is another's now, or a rank cannot go on.
            CheckpointError: it could not be written; the one before neither.
        """
        begun = time.perf_counter()
        with self._run.pulse.phase("a save", self._run.step, long=True):
            if not self.recover():
                self._check()
                self._save(self._background, begun)

    def _check(self) -> None:
        """Whether the run may go on, and its folder is still its own; on every rank."""
        self._prepare()
        failed = self._stop.failure or (self._uploads.lost if self._uploads is not None else None)
        try:
            if self._run.lock is not None:
                self._run.lock.confirm()
        except (RunError, OSError) as error:
            failed = failed or error
        if what := failures(failed):
            raise RunError(what) from failed

    def recover(self) -> bool:
        """Wait for the save in the background. If it failed, say so, and write the present step in its place, without going on meanwhile.

        Returns:
            Whether it failed, and the present step is saved.

        Raises:
            CheckpointError: that could not be written either.
        """
        if self._job is None:
            return False
        begun = time.perf_counter()
        job, self._job = self._job, None
        with self._run.pulse.phase("a save", self._run.step, long=True):
            job.join()
            self._note(job.record)
            if not failures(job.error):
                return False
            failed = f"the checkpoint of step {job.step} could not be written ({failures(job.error and self._reason(job.error))})"
            if is_first():
                stays = ", and stays for ever" if self._run.checkpoints.stays(job.step) else ""
                log.error("%s; step %d is written in its place%s", failed, self._run.step, stays)
                self._run.checkpoints.discard(job.step)
            self._meet()
            self._check()
            try:
                self._save(background=False, begun=begun, instead=job.step)
            except CheckpointError as error:
                raise CheckpointError(f"{failed}, nor could one in its place: {error}") from error
        return True

    def _reason(self, error: Exception) -> Exception:
        """Why a save failed, in words for users."""
        text = str(error)
        if isinstance(error, UnwrittenCheckpoint):
            return RunError(error.reason)
        if not isinstance(error, RuntimeError) or isinstance(error, CheckpointError | RunError):
            return error
        if "timed out" in text.lower() or "timeout" in text.lower():
            minutes = f"{self._seconds / 60:.3g} minutes (train.first_timeout_minutes)"
            return RunError(f"another rank had not written its part after {minutes}")
        if any(words in text for words in ("Connection closed by peer", "Connection reset by peer", "Broken pipe")):
            return RunError("another rank gave up waiting, or is gone")
        return error

    def finish(self, leave: Callable[[], bool] = lambda: False) -> bool:
        """Wait until what is written is at `checkpoint.remote` too, if there is one; see `finish_uploads`.

        Raises:
            RunError: it could not be copied; it stays here. On every rank.
        """
        return finish_uploads(self._run.config, self._uploads, self._run.pulse, self._run.step, leave)

    def finished(self) -> Record:
        """Of the saves that have ended since the last call, their number, the longest standstill and writing in seconds, this rank's bytes.

        {} if there is none.
        """
        if self._job is not None and not self._job.is_alive():
            self._note(self._job.record)
            self._job.record = {}
        record, self._record = self._record, {}
        return record

    def _note(self, one: Record) -> None:
        """Add a save to what is to be recorded."""
        for key, value in one.items():
            if key in self._record:
                value = max(value, self._record[key]) if key.endswith("_s") else value + self._record[key]
            self._record[key] = value

    def _save(self, background: bool, begun: float, instead: int | None = None) -> None:
        """`instead`: the step whose save failed."""
        run = self._run
        progress = progress_of(run) | ({} if instead is None else {IN_PLACE_OF: instead})
        write = run.engine.capture(copied=background)
        write_random = randomness.capture(run.accelerator.process_index)
        step, group = run.step, self._group if background else None

        def write_all() -> None:
            with run.checkpoints.writing(step, progress, group) as folder:
                write(folder, group, self._links)
                write_random(folder)
                if run.lock is not None:  # it may have been long
                    run.lock.confirm()
            self._links.published(run.checkpoints.folder / folder.name)
            if self._uploads is not None:
                self._uploads.look()

        if background:
            self._job = _Job(step, write_all, time.perf_counter() - begun, self._links)
            self._job.start()
        else:
            writing = time.perf_counter()
            write_all()
            now = time.perf_counter()
            self._note(_record(now - begun, now - writing, self._links))


class _Job(threading.Thread):
    """A save that is being written."""

    def __init__(self, step: int, action: Callable[[], None], blocked: float, links: Links) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.step = step
        self._action, self._blocked, self._links = action, blocked, links
        self.error: Exception | None = None
        self.record: Record = {}

    def run(self) -> None:
        """See `threading.Thread`."""
        begun = time.perf_counter()
        try:
            self._action()
        except BaseException as error:
            self.error = error if isinstance(error, Exception) else RuntimeError(repr(error))
            return
        self.record = _record(self._blocked, time.perf_counter() - begun, self._links)


def _record(blocked: float, seconds: float, links: Links) -> Record:
    """What the metrics say of one save."""
    return {
        "saves": 1,
        "save_blocked_s": blocked,
        "save_s": seconds,
        "save_written_bytes": links.written,
        "save_linked_bytes": links.linked,
    }


def progress_of(run: Run) -> dict[str, Any]:
    """What a checkpoint says of its run."""
    return {
        "format": 1,
        "id": secrets.token_hex(8),
        "step": run.step,
        "skipped": run.skipped,
        "spikes": run.spikes.state_dict(),
        "rewinds": run.rewinds,
        "data": run.loader.state_dict(),
        "world_size": run.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "optimizer": type(run.engine.optimizer).__name__,
        "engine": run.engine.name,
        "model": run.model_config.to_dict(),
        "tokenizer": joined(first_path(run.config), "tokenizer"),
        "config": recorded(run.config),
        "versions": versions(),
    }
