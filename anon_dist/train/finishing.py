"""What follows the last step: validation on the whole split, export, results, the last copies to `checkpoint.remote`.

A signal, or the end of a launcher, stops it as it does the steps: on all ranks alike, with nothing lost. The validation is left between two
batches, the copying at any time. What one rank writes is finished, once it has begun: that is short.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from anon_dist.agreement import failures, is_first
from anon_dist.exits import at_work
from anon_dist.files import write_json
from anon_dist.train.config.errors import RunError
from anon_dist.train.config.parsing import Config
from anon_dist.train.health import hangs
from anon_dist.train.health.pulse import Pulse
from anon_dist.train.health.signals import StopSignal
from anon_dist.train.inputs.corpora import first_folder
from anon_dist.train.model.card import model_card
from anon_dist.train.model.export import export_model
from anon_dist.train.reports.metrics import MetricsFile, Record, to_json
from anon_dist.train.reports.report import RESULT, report, taken
from anon_dist.train.running import Run
from anon_dist.train.saves.remote import checkpoints_of, claim, finish_uploads, uploads_of
from anon_dist.train.saving import Saver, progress_of
from anon_dist.train.validation import validate


class _LeftError(Exception):
    """A signal ends the run before its results are made; on every rank, at the same place."""


def finish(run: Run, stop: StopSignal, saver: Saver) -> None:
    """Validate, export, report, and wait for the last copies; or say what is left to the same command. Every rank must call it.

    Raises:
        RunError: the results cannot be written, or a checkpoint not be copied; on every rank. The same command tries again.
    """
    try:
        with at_work(), run.pulse.phase("the end", run.step, long=True):
            _make_results(run, stop)
    except _LeftError:
        copied = saver.finish(lambda: True)
        _say_stopped(stop, "the last step; its checkpoint is written", "makes the results", run.config, copied)
        return
    if not saver.finish(stop.now):
        _say_stopped(stop, "its results were written", "", run.config, copied=False)
    elif stop.now():
        _say(f"The run is finished; {stop.reason} came while its results were written.")


def finish_again(config: Config, folder: Path) -> signal.Signals | None:
    """Show what a finished run has come to, and copy what is not at `checkpoint.remote` yet. Every rank must call it.

    Returns:
        A signal that this rank got meanwhile.

    Raises:
        RunError: a checkpoint cannot be copied; on every rank.
    """
    with StopSignal(hangs.patience(config)) as stop:
        if is_first():
            print(f"Nothing to do: {taken(folder, config)}. (Raise train.steps to go on.)\n")
            report(folder, config)
        claim(config, checkpoints := checkpoints_of(folder, config.checkpoint))
        if not finish_uploads(config, uploads_of(config, checkpoints), Pulse(), config.train.steps, stop.now):
            _say_stopped(stop, "its results were written", "", config, copied=False)
    return stop.received


def _make_results(run: Run, stop: StopSignal) -> None:
    """
    Raises:
        _LeftError: see there.
        RunError: they cannot be written; on every rank.
    """

    def look(asked: Callable[[], bool] = stop.requested) -> None:
        if asked():
            raise _LeftError

    look(stop.now)
    record: Record = {"step": run.step}
    if run.sets:
        record |= validate(run, run.config.eval.final_sequences, "final", look)
        look(stop.now)
    weights = run.engine.full_weights()
    failed: Exception | None = None
    if is_first():
        try:
            _write_results(run, record, weights)
            report(run.folder, run.config)
        except (OSError, SafetensorError) as error:
            failed = error
    if what := failures(failed):
        raise RunError(
            f"run_dir = {run.folder}: the last step is taken and its checkpoint written, but not the results: {what}. The same command "
            "writes them"
        ) from failed


def _write_results(run: Run, record: Record, weights: dict[str, Tensor]) -> None:
    """What one rank writes when all steps are taken. The weights are taken out of their dictionary."""
    config = run.config
    card = model_card(run.folder.name, run.model_config.to_dict(), progress_of(run), record)
    export_model(run.folder / "model", weights, run.model_config, first_folder(config) / "tokenizer", card)
    weights.clear()  # the sample loads them anew
    file = MetricsFile(run.folder / "metrics.jsonl", run.step)
    try:
        file.write(record)
    finally:
        file.close()
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_json(run.folder / RESULT, {**to_json(record), "finished": when, "config": asdict(config)})


def _say(text: str) -> None:
    if is_first():
        print(text, flush=True)


def _say_stopped(stop: StopSignal, after: str, rest: str, config: Config, copied: bool) -> None:
    """`rest`: what the same command does besides copying what is not `copied`."""
    copies = "" if copied else f"copies to {config.checkpoint.remote} what is not there yet"
    _say(f"Stopped by {stop.reason} after {after}. The same command {' and '.join(filter(None, (rest, copies)))}.")
