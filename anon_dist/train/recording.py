"""Records of a run's metrics, from the first rank to wherever they go."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec

from anon_dist.agreement import describe, first_does
from anon_dist.train.config.errors import ConfigError, RunError
from anon_dist.train.config.parsing import Config
from anon_dist.train.health.signals import StopSignal
from anon_dist.train.reports.metrics import Console, MetricsFile, Record, read_metrics
from anon_dist.train.rewind import steps_repeated, unrecorded
from anon_dist.train.running import Run


def trackers(config: Config) -> list[str] | None:
    """What accelerate is to log with.

    Raises:
        ConfigError: one is not installed; accelerate would leave it out.
    """
    for name in config.log.trackers:
        if (spec := find_spec(name)) is None or spec.origin is None:  # a folder of that name is none
            raise ConfigError(f"log.trackers: {name} is not installed: pip install {name}, or leave it out")
    return list(config.log.trackers) or None


@contextlib.contextmanager
def recording(run: Run, console: Console | None, stop: StopSignal) -> Iterator[Callable[[Record], None]]:
    """A function that takes records of metrics, on every rank; the first one's go to the file, the console and the trackers.

    Where they cannot be written, all ranks end: a checkpoint must not be ahead of the metrics.

    Trackers drop what is not of a later step than the last (W&B), or show both (TensorBoard): theirs counts on where a run goes back. The
    run's own step is among the values. They come before the file: what a killed run has not written there is told anew by the next.
    """
    path, settings = run.folder / "metrics.jsonl", {"wandb": {"dir": str(run.folder), "name": run.folder.name}}

    def begin() -> None:
        """Open the file, and begin with the trackers."""
        file = MetricsFile(path, run.step)
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
    if console is None:
        yield lambda record: None
        return
    (file,) = open_files
    repeated = steps_repeated(run, run.rewinds)

    def write(record: Record) -> None:
        """To all of them; what goes wrong with the files ends the run after this step. A run that has gone back repeats steps: what there
        was of them is taken out."""
        nonlocal file, repeated
        step = int(record["step"])
        console.record(record)
        try:
            if record.get("rewound_from", 0):
                file.close()
                file = MetricsFile(path, step)
                repeated += int(record["rewound_from"]) - step
            _tell(run, record, repeated)
            file.write(record)
        except OSError as error:
            stop.fail(
                RunError(
                    f"{path} could not be written: {describe(error)}. The run goes on from the last checkpoint, by the same command"
                )
            )

    try:
        yield write
    finally:
        with contextlib.suppress(OSError):  # of a full disk, which then has ended the run, or does not matter any more
            file.close()
            for tracker in run.accelerator.trackers:
                tracker.finish()


def _tell(run: Run, record: Record, repeated: int) -> None:
    """To the trackers, by the run's step and the steps that it has repeated."""
    values = {k: v for k, v in record.items() if not isinstance(v, str)}
    run.accelerator.log(values, step=int(record["step"]) + repeated)
