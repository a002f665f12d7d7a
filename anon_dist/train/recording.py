"""Records of a run's metrics, from the first rank to wherever they go."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from importlib.util import find_spec

from anon_dist.agreement import describe, first_does
from anon_dist.train.config.errors import ConfigError, RunError
from anon_dist.train.config.parsing import Config
from anon_dist.train.health.signals import StopSignal
from anon_dist.train.reports.metrics import Console, MetricsFile, Record, read_metrics
from anon_dist.train.rewind import steps_repeated, unrecorded
from anon_dist.train.running import Run

log = logging.getLogger(__name__)

KEPT = 1000
"""Most records that are kept while they cannot be written."""


def trackers(config: Config) -> list[str] | None:
    """What accelerate is to log with.

    Raises:
        ConfigError: one is not installed; accelerate would leave it out.
    """
    for name in config.log.trackers:
        if (spec := find_spec(name)) is None or spec.origin is None:  # a folder of that name is none
            raise ConfigError(f"log.trackers: {name} is not installed: pip install {name}, or leave it out")
    return list(config.log.trackers) or None


class Records:
    """Takes records of metrics; on the first rank they go to the file, the console and the trackers.

    A record that cannot be written is kept, and written before the next one. The run goes on meanwhile, but for a checkpoint, which must
    not be ahead of the metrics, and for more than `KEPT` records.

    Trackers drop what is not of a later step than the last (W&B), or show both (TensorBoard): theirs counts on where a run goes back. The
    run's own step is among the values. They come before the file, and once: what a killed run has not written there is told anew by the
    next.
    """

    def __init__(self, run: Run, console: Console | None, stop: StopSignal, file: MetricsFile | None) -> None:
        self._run, self._console, self._stop, self._file = run, console, stop, file
        self._path = run.folder / "metrics.jsonl"
        self._repeated = steps_repeated(run, run.rewinds) if file is not None else 0
        self._unwritten: list[Record] = []

    def __call__(self, record: Record) -> None:
        """To all of them."""
        if self._console is None or self._file is None:
            return
        self._console.record(record)
        if back := record.get("rewound_from", 0):
            self._repeated += int(back) - int(record["step"])
        _tell(self._run, record, self._repeated)
        self._unwritten.append(record)
        error = self._write()
        if error and len(self._unwritten) > KEPT:
            self._end(error)
        elif error and len(self._unwritten) == 1:
            log.warning(
                "%s could not be written: %s. The run goes on; its records are kept, and written before the next checkpoint",
                *(self._path, describe(error)),
            )

    def settle(self) -> None:
        """Write what is kept, and see that the file is there; if that fails all ranks are to end. Before a checkpoint."""
        if error := self._write() or self._confirm():
            self._end(error)

    def _confirm(self) -> OSError | None:
        try:
            if self._file is not None and (mended := self._file.confirm()):
                log.warning("%s", mended)
        except OSError as error:
            return error
        return None

    def _write(self) -> OSError | None:
        """What could not be written yet, in its order; the error, if that goes on."""
        kept = len(self._unwritten)
        try:
            while self._unwritten:
                self._put(self._unwritten[0])
                del self._unwritten[0]
        except OSError as error:
            return error
        if kept > 1:
            log.warning("%s is written again, with the %d records that were kept", self._path, kept)
        return None

    def _put(self, record: Record) -> None:
        """Into the file. A run that has gone back repeats steps: what there was of them is taken out."""
        assert self._file is not None
        if record.get("rewound_from", 0):
            self._file.close()
            self._file = MetricsFile(self._path, int(record["step"]))
        self._file.write(record)

    def _end(self, error: OSError) -> None:
        self._stop.fail(
            RunError(
                f"{self._path} could not be written: {describe(error)}. Once it can be, the same command goes on from the last checkpoint"
            )
        )

    def close(self) -> None:
        """Write what is kept, if that can be done; finish the file and the trackers."""
        if self._file is None:
            return
        if error := self._write():
            log.error(
                "%s lacks %d records: %s. They are of steps after the last checkpoint, or of its saves",
                *(self._path, len(self._unwritten), describe(error)),
            )
            self._end(error)  # no results of a run that is not recorded
        elif error := self._confirm():
            log.error("%s: %s", self._path, describe(error))
        self._file.close()
        for tracker in self._run.accelerator.trackers:
            with contextlib.suppress(OSError):  # of a full disk, which has been said
                tracker.finish()


@contextlib.contextmanager
def recording(run: Run, console: Console | None, stop: StopSignal) -> Iterator[Records]:
    """What takes records of metrics, on every rank.

    Raises:
        RunError: the run's folder cannot be written at the start; on every rank.
    """
    path, settings = run.folder / "metrics.jsonl", {"wandb": {"dir": str(run.folder), "name": run.folder.name}}

    def begin() -> None:
        """Open the file, and begin with the trackers."""
        file = MetricsFile(path, run.step)
        if file.damaged:
            some = ", ".join(map(str, file.damaged[:8]))
            log.warning("%s: %d damaged lines are passed over: %s", path, len(file.damaged), some)
        try:
            run.accelerator.init_trackers(run.config.log.project, init_kwargs=settings)
            for record in unrecorded(run, read_metrics(path)):
                _tell(run, record, steps_repeated(run, record["rewinds"]))
                file.write(record)
        except BaseException:
            file.close()
            raise
        open_files.append(file)

    open_files: list[MetricsFile] = []
    _, error = first_does(begin)
    if error:
        raise RunError(f"run_dir = {run.folder} cannot be written: {error}")
    records = Records(run, console, stop, open_files[0] if open_files else None)
    with _no_tracebacks_of_writers():
        try:
            yield records
        finally:
            records.close()


@contextlib.contextmanager
def _no_tracebacks_of_writers() -> Iterator[None]:
    """TensorBoard's thread, when it cannot write, keeps the error for the next `log` or `finish`, and prints a traceback besides."""
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not (type(failure.thread).__module__.startswith("tensorboard.") and isinstance(failure.exc_value, OSError)):
            before(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _tell(run: Run, record: Record, repeated: int) -> None:
    """To the trackers, by the run's step and the steps that it has repeated. One that cannot write is left out from then on."""
    values = {k: v for k, v in record.items() if not isinstance(v, str)}
    trackers = run.accelerator.trackers
    for tracker in list(trackers):
        try:
            tracker.log(values, step=int(record["step"]) + repeated)
        except OSError as error:
            trackers.remove(tracker)
            log.warning(
                "%s could not be written: %s. It gets no more records of this start; metrics.jsonl has all",
                *(tracker.name, describe(error)),
            )
