"""Pretraining from start to end: `train` brings the ranks up, sets the run up (`run.py`), takes its steps, and finishes it."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from safetensors import SafetensorError
from torch import Tensor

from anon_dist.agreement import agree, failures
from anon_dist.engines.errors import EngineError
from anon_dist.engines.replicas import ReplicasDifferError, check_replicas
from anon_dist.engines.start import Name, start
from anon_dist.files import write_json
from anon_dist.launcher import end_interrupted_launcher
from anon_dist.optim.host_copy import HostCopy, known_to_the_host
from anon_dist.train import records
from anon_dist.train.alike import shared_settings
from anon_dist.train.batch import Batch
from anon_dist.train.card import model_card
from anon_dist.train.config import Config, check
from anon_dist.train.errors import HarnessError, RunError
from anon_dist.train.evaluate import Evaluation, evaluate
from anon_dist.train.export import export_model
from anon_dist.train.lock import RunLock, held
from anon_dist.train.loss import SUMS
from anon_dist.train.lr import lr_factor
from anon_dist.train.metrics import Console, MetricsFile, Record, Stopwatch
from anon_dist.train.profiling import Profiler
from anon_dist.train.recording import recording
from anon_dist.train.records import Step
from anon_dist.train.remote import checkpoints_of, finish_uploads, uploads_of
from anon_dist.train.report import RESULT, finished, report
from anon_dist.train.run import Run, set_up, wanted_engine
from anon_dist.train.saving import Saver, progress_of
from anon_dist.train.signals import StopSignal
from anon_dist.train.tasks import score_tasks
from anon_dist.train.trainable import uses_tf32

log = logging.getLogger(__name__)


def train(config: Config) -> Path:
    """Pretrain, or go on with, the run that `config` describes. Every process calls it.

    Returns:
        The run's folder. It holds `config.yaml`, `metrics.jsonl`, `checkpoints/`; after the last step also
        `model/` (Hugging Face), `loss.png` and `result.json`.

    Raises:
        ConfigError, EngineError, CheckpointError, DataError, RunError: see there; nothing of an earlier run is lost.
    """
    check(config)
    accelerator, name = start(
        wanted_engine(config),
        shared_settings(config),
        log_with=list(config.log.trackers) or None,
        project_config=ProjectConfiguration(project_dir=config.run_dir, logging_dir=f"{config.run_dir}/tensorboard"),
    )
    folder = Path(config.run_dir)
    if agree(config.resume == "auto" and finished(folder, config)):
        if accelerator.is_main_process:
            print(
                f"Nothing to do: this run has taken all its {config.train.steps} steps. (Raise train.steps to go on.)\n"
            )
            report(folder, config)
        finish_uploads(config, uploads_of(config, checkpoints_of(folder, config.checkpoint)))
        return folder
    with held(folder) as lock:
        _train(config, accelerator, name, folder, lock)
    return folder


def _train(config: Config, accelerator: Accelerator, name: Name, folder: Path, lock: RunLock | None) -> None:
    run = set_up(config, accelerator, name, folder)
    run.lock = lock
    _compare_replicas(run)
    console = Console(config.train.steps, run.step) if accelerator.is_main_process else None
    if console:
        _introduce(run, console)
    timeout = timedelta(minutes=config.train.timeout_minutes)
    with StopSignal(timeout) as stop, run.loader, recording(run, console, stop) as write:
        profiler = Profiler(config.log.profile_steps, folder, accelerator.device, accelerator.process_index)
        saver = Saver(run, stop, partial(_before_saving, run))
        with contextlib.closing(profiler), profiler.watching_memory(), saver:
            stopped = _steps(run, stop, write, console, profiler, saver)
            if stopped:
                saver.finish()
    if console:
        console.close()
        if stopped:
            again = "the same command goes on" if config.resume == "auto" else "--resume auto goes on"
            console.say(f"Stopped by {stopped} after step {run.step}; the checkpoint is written, and {again} from it.")
            if stopped == signal.SIGINT.name:
                end_interrupted_launcher()
    if not stopped:
        _finish(run)
        saver.finish()


def _introduce(run: Run, console: Console) -> None:
    """Say what is about to run."""
    config, ranks = run.config, run.accelerator.num_processes
    mib, tokens = 1 << 20, config.train.global_batch * config.data.seq_len
    epochs = config.train.steps * config.train.global_batch / run.loader.order.num_samples
    if (packing := run.loader.packing) is not None:
        console.say(
            f"{packing.num_samples:,} samples of whole documents; {packing.padding:.1%} of their places are left free"
        )
    precision = config.train.precision + " (products in TF32)" * uses_tf32(config, run.accelerator)
    console.say(
        f"{run.parameters / 1e6:.2f}M parameters, {precision}, {run.engine.name} on {ranks} "
        f"{run.accelerator.device.type} rank{'s' * (ranks > 1)}; {type(run.engine.optimizer).__name__} holds "
        f"{run.state.local / mib:.1f} of {run.state.whole / mib:.1f} MiB state per rank; {tokens:,} tokens a step, "
        f"{config.train.steps} steps, {epochs:.2f} epochs"
    )


# -- steps ------------------------------------------------------------------------------------------------------------


def _steps(
    run: Run,
    stop: StopSignal,
    write: Callable[[Record], None],
    console: Console | None,
    profiler: Profiler,
    saver: Saver,
) -> str | None:
    """All steps that are left, with what is due after each: metrics, validation, checkpoint.

    Returns:
        What ended them early, a signal's name, say; None after the last.
    """
    config, steps = run.config, run.config.train.steps
    watch = Stopwatch(run.accelerator.device)
    batches = iter(run.loader)
    logged = run.step
    while run.step < steps:
        profiler.before(run.step + 1)
        done = take_step(run, batches, watch)
        profiler.after(run.step)
        if run.step % config.log.every == 0 or run.step == steps or run.skip_is_news:
            write(record_of(run, done, run.step - logged, watch.read()) | saver.finished())
            watch.lap("logging")
            logged = run.step
        if run.val_shards is not None and _is_due(run, config.eval.every):
            _compare_replicas(run)
            write({"step": run.step, **_validate(run, config.eval.sequences).record("val")})
            watch.skip()
        if run.tasks is not None and _is_due(run, config.eval.tasks_every):
            write(_score(run, saver))
            watch.skip()
        saved = _is_due(run, config.checkpoint.every) or run.checkpoints.stays(run.step)
        if saved:
            saver.save()
            watch.skip()
        if console:
            console.step()
        ending = stop.requested(saver.failed)
        if stop.unsaved:
            saved |= saver.recover()
        if ending and run.step < steps:
            if not saved:
                saver.save()
            saver.recover()
            return stop.reason
    saver.recover()
    return None


def _is_due(run: Run, every: int) -> bool:
    """Whether what is done every so many steps, and after the last one, is done now."""
    return run.step == run.config.train.steps or bool(every and run.step % every == 0)


def take_step(run: Run, batches: Iterator[Tensor], watch: Stopwatch) -> Step:
    """Gradients of one global batch, clipped; one optimizer step.

    Raises:
        FloatingPointError: the gradient was not finite in too many steps in a row.
    """
    config = run.config
    losses = _gradients(run, batches, watch)
    learn(run)  # of the step before: the device has long been past it
    lr = config.optim.lr * lr_factor(run.step + 1, config.train.steps, config.schedule)
    factors = run.gammas.factors(run.engine, run.step + 1)
    norm = run.engine.step([lr * factor for factor in factors], config.train.grad_clip)
    watch.lap("optimizer")
    run.loader.advance()
    run.step += 1
    run.norm = on_its_way = HostCopy(norm)
    if known_to_the_host(norm):
        learn(run)
    watch.lap("other")
    return Step(losses, on_its_way, lr, factors)


def _gradients(run: Run, batches: Iterator[Tensor], watch: Stopwatch) -> Tensor:
    """Accumulate the gradients of one step.

    Returns:
        This rank's `loss.SUMS`, divided so that their mean over ranks is that over the step's tokens; the host does not wait for them.
    """
    rounds, device = run.loader.accumulation, run.accelerator.device
    targets = run.loader.step_targets()
    share = run.readers * run.sharing / targets  # engines take the mean over ranks that have other tokens
    run.predicted += targets
    total = torch.zeros(len(SUMS), device=device)
    for i in range(rounds):
        batch = Batch.of(run.own(next(batches)), run.mask_eod)
        watch.lap("data")
        last = i + 1 == rounds
        with run.engine.micro_batch(last):
            sums = batch.losses(run.engine.model, device) * share
            watch.lap("forward")
            run.engine.backward(sums[0], last)
        total += sums.detach()
        watch.lap("backward")
    return total


def learn(run: Run) -> None:
    """Know whether the last step was taken; a step whose gradient was not finite is none. Waits for the device, if that is not past it.

    Every rank has the same norm, so a step is skipped on all ranks or none, and the optimizer's step count stays.

    Raises:
        FloatingPointError: too many steps in a row were none.
    """
    if run.norm is None:
        return
    begun = time.perf_counter()
    norm, run.norm = run.norm.value(), None
    run.waited += time.perf_counter() - begun
    run.skipped = 0 if math.isfinite(norm) else run.skipped + 1
    run.skip_is_news |= run.skipped > 0
    if run.skipped and run.accelerator.is_main_process:
        log.warning("step %d skipped: the gradient norm is %s", run.step, norm)
    if run.skipped > run.config.train.max_skipped:
        raise FloatingPointError(
            f"{run.skipped} steps in a row had a non-finite gradient; the last checkpoint is {run.checkpoints.last()}. Lower optim.lr, "
            "lengthen the warm-up, or set optim.update_clip and train.grad_clip"
        )


def record_of(run: Run, done: Step, steps: int, seconds: dict[str, float]) -> Record:
    """See `records.record_of`; what the host does not know yet is waited for."""
    learn(run)
    run.skip_is_news = False
    return records.record_of(run, done, steps, seconds)


def _validate(run: Run, sequences: int) -> Evaluation:
    assert run.val_shards is not None
    return evaluate(
        run.engine.model,
        run.val_shards,
        run.config.data.seq_len,
        run.config.train.micro_batch,
        run.accelerator.device,
        run.index.splits["val"].bytes_per_token,
        sequences,
        run.mask_eod,
        run.reader,
        run.readers,
        run.own,
    )


def _score(run: Run, saver: Saver) -> Record:
    """Of the tasks; if one fails, the run ends with a checkpoint."""
    assert run.tasks is not None
    _compare_replicas(run)
    device, reader, readers = run.accelerator.device, run.reader, run.readers
    try:
        found = score_tasks(run.tasks, run.engine, run.model_config, device, run.config, reader, readers)
    except HarnessError as error:
        saver.save()
        saver.recover()
        again = f"the checkpoint of step {run.step} is written; the same command goes on with other tasks, or none"
        raise RunError(f"eval.tasks: {error}; {again}") from error
    return {"step": run.step, **found}


# -- finishing --------------------------------------------------------------------------------------------------------


def _before_saving(run: Run) -> None:
    learn(run)
    _compare_replicas(run)


def _compare_replicas(run: Run) -> None:
    """End the run where ranks that must hold the same bits do not, before anything is made of them.

    Raises:
        EngineError: naming tensors, ranks, step and the remedy.
    """
    if run.compared == run.step:
        return
    try:
        check_replicas(run.engine.copies(), run.accelerator.device)
    except ReplicasDifferError as error:
        last = run.checkpoints.last()
        remedy = f"Resume from {last}" if last else "Start again"
        raise EngineError(
            f"replicas have drifted apart by step {run.step}: {error}. A step has gone wrong on one of these ranks (memory, device, or "
            f"hardware or libraries that compute differently), and nothing was saved of it. {remedy} (the same command does so); if it "
            "happens again, without that rank's machine"
        ) from None
    run.compared = run.step


def _finish(run: Run) -> None:
    """Validate on the whole split, export, report."""
    config, main = run.config, run.accelerator.is_main_process
    record: Record = {"step": run.step}
    if run.val_shards is not None:
        record |= _validate(run, config.eval.final_sequences).record("final")
    weights = run.engine.full_weights()
    failed: Exception | None = None
    if main:
        try:
            _conclude(run, record, weights)
        except (OSError, SafetensorError) as error:
            failed = error
    if what := failures(failed):
        raise RunError(
            f"run_dir = {run.folder}: the last step is taken and its checkpoint written, but not the results: {what}. The same command "
            "writes them"
        ) from failed


def _conclude(run: Run, record: Record, weights: dict[str, Tensor]) -> None:
    """What one rank writes when all steps are taken."""
    config = run.config
    card = model_card(run.folder.name, run.model_config.to_dict(), progress_of(run), record)
    export_model(run.folder / "model", weights, run.model_config, Path(config.data.path) / "tokenizer", card)
    file = MetricsFile(run.folder / "metrics.jsonl", run.step)
    try:
        file.write(record)
    finally:
        file.close()
    write_json(
        run.folder / RESULT, {**record, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "config": asdict(config)}
    )
    report(run.folder, config)
