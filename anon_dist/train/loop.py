"""Pretraining from start to end: `train` brings the ranks up, sets the run up (`run.py`), takes its steps, and finishes it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor

from anon_dist.agreement import agree
from anon_dist.engines.errors import EngineError
from anon_dist.engines.replicas import ReplicasDifferError, check_replicas
from anon_dist.engines.start import Name, start
from anon_dist.exits import at_work, may_pass
from anon_dist.launcher import LAUNCHER, end_launcher
from anon_dist.optim.host_copy import HostCopy, known_to_the_host
from anon_dist.train import records
from anon_dist.train.config.alike import shared_settings
from anon_dist.train.config.errors import ConfigError, HarnessError, Interrupted, RunError
from anon_dist.train.config.lr import lr_factor
from anon_dist.train.config.parsing import Config, check
from anon_dist.train.config.phases import phases_of, resolved
from anon_dist.train.finishing import finish, finish_again
from anon_dist.train.health import hangs
from anon_dist.train.health.pulse import Pulse
from anon_dist.train.health.signals import StopSignal
from anon_dist.train.health.stragglers import time_collectives
from anon_dist.train.health.whereabouts import record_collectives
from anon_dist.train.inputs.corpora import use_cache
from anon_dist.train.inputs.samples import enter
from anon_dist.train.introduction import introduce
from anon_dist.train.learning import back, learn
from anon_dist.train.loss.attach import SUMS
from anon_dist.train.loss.batch import Batch
from anon_dist.train.optimizer.build import MakeOptimizer, build_optimizer
from anon_dist.train.recording import Records, recording, trackers
from anon_dist.train.records import Step
from anon_dist.train.reports.metrics import Console, Record, Stopwatch
from anon_dist.train.reports.profiling import Profiler
from anon_dist.train.reports.report import finished, refuse_other
from anon_dist.train.resuming import forget_return, settled
from anon_dist.train.rewind import pass_over_again
from anon_dist.train.run import set_up, wanted_engine
from anon_dist.train.running import Run
from anon_dist.train.saves.lock import RunLock, held
from anon_dist.train.saves.remote import check_address, checkpoints_of
from anon_dist.train.saving import Saver
from anon_dist.train.tasks.during import score_tasks
from anon_dist.train.validation import validate


def train(config: Config, make_optimizer: MakeOptimizer = build_optimizer) -> Path:
    """Pretrain, or go on with, the run that `config` describes. Every process calls it.

    Args:
        make_optimizer: of `config.optim` and the unsharded model, in place of `optim.name`'s; nobody checks that it is right in shards.

    Returns:
        The run's folder. It holds `config.yaml`, `metrics.jsonl`, `checkpoints/`; after the last step also
        `model/` (Hugging Face), `loss.png` and `result.json`.

    Raises:
        ConfigError, EngineError, CheckpointError, DataError, RunError: see there; nothing of an earlier run is lost.
        Interrupted: a SIGINT stopped it, and no launcher, which would take that for a failure, waits for this process.
    """
    config = resolved(config)
    check(config)
    use_cache(config.data)
    time_collectives()
    record_collectives(Path(config.run_dir) / hangs.FOLDER)
    accelerator, name = start(
        wanted_engine(config),
        shared_settings(config),
        log_with=trackers(config),
        project_config=ProjectConfiguration(project_dir=config.run_dir, logging_dir=f"{config.run_dir}/tensorboard"),
    )
    given, config = config, settled(config)
    folder = Path(config.run_dir)
    if agree(config.resume == "auto" and finished(folder, config)):
        if other := agree(refuse_other(folder, config) if accelerator.is_main_process else None):
            raise ConfigError(other)
        forget_return(given)
        received = finish_again(config, folder)
    else:
        with held(folder) as lock, hangs.watched(config, folder) as pulse:
            forget_return(given)
            received = _train(config, accelerator, name, folder, lock, pulse, make_optimizer)
    if received == signal.SIGINT and LAUNCHER is None and accelerator.num_processes == 1:
        raise Interrupted
    return folder


def _train(
    config: Config,
    accelerator: Accelerator,
    name: Name,
    folder: Path,
    lock: RunLock | None,
    pulse: Pulse,
    make_optimizer: MakeOptimizer,
) -> signal.Signals | None:
    """
    Returns:
        A signal that this rank got.
    """
    check_address(config, checkpoints_of(folder, config.checkpoint))
    run = set_up(config, accelerator, name, folder, make_optimizer)
    run.lock, run.pulse = lock, pulse
    pass_over_again(run)
    _compare_replicas(run)
    console = Console(config.train.steps, run.step) if accelerator.is_main_process else None
    if console:
        introduce(run, console)
    with StopSignal(hangs.patience(config)) as stop:
        with at_work(), run.loader, recording(run, console, stop) as write:
            profiler = Profiler(config.log.profile_steps, folder, accelerator.device, accelerator.process_index)
            counting = run.stragglers.watching(run.engine.model, accelerator.device)
            saver = Saver(run, stop, partial(_before_saving, run, write))
            with contextlib.closing(profiler), profiler.watching_memory(), counting, saver:
                stopped = _steps(run, stop, write, console, profiler, saver)
                saver.recover()
                if saves := saver.finished():
                    write({"step": run.step, **saves})
                if stopped:
                    saver.finish()
        if console:
            console.close()
        if not stopped:
            finish(run, stop, saver)
        elif console:
            console.say(
                f"Stopped by {stopped} after step {run.step}; the checkpoint is written, and the same command goes on from it."
            )
        if console and stop.received == signal.SIGINT:
            end_launcher()
    return stop.received


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
    config, steps, logged = run.config, run.config.train.steps, run.step
    watch = Stopwatch(run.accelerator.device, run.pulse.beat)
    batches = iter(run.loader)
    borders = {until for until, _ in phases_of(config)}
    while run.step < steps:
        if run.step in borders:
            _begin_phase(run, console)
        profiler.before(run.step + 1)
        with run.pulse.phase("step", run.step):
            done = take_step(run, batches, watch)
        profiler.after(run.step)
        save_due = _is_due(run, config.checkpoint.every) or run.checkpoints.stays(run.step)
        if save_due:
            learn(run)  # nothing is saved of which the host does not know that it is good
        if run.spikes.pending is not None:
            saver.recover()
        if (went_back := back(run)) is not None:
            write(went_back)
            watch.read()
            logged = run.step
            continue
        if console:
            console.step(run.step)
        if run.step % config.log.every == 0 or run.step == steps or run.skip_is_news:
            write(record_of(run, done, run.step - logged, watch.read()) | saver.finished())
            watch.lap("logging")
            logged = run.step
        counted = run.stragglers.waited
        _evaluate_if_due(run, write, watch, saver)
        if saved := save_due:
            saver.save()
            watch.skip()
        run.stragglers.waited = counted  # as the watch does: what is no step counts for nothing
        if console:
            console.pause()
        ending = stop.requested(saver.failed)
        if stop.unsaved:
            saved |= saver.recover()
        if ending and run.step < steps:
            if not saved:
                saver.save()
            return stop.reason
    return None


def _evaluate_if_due(run: Run, write: Callable[[Record], None], watch: Stopwatch, saver: Saver) -> None:
    """Validation, and tasks, after the steps that have them; their time is no step's."""
    if run.sets and _is_due(run, run.config.eval.every):
        _compare_replicas(run)
        write({"step": run.step, **validate(run, run.config.eval.sequences, "val")})
        watch.skip()
    if run.tasks is not None and _is_due(run, run.config.eval.tasks_every):
        write(_score(run, saver))
        watch.skip()


def _begin_phase(run: Run, console: Console | None) -> None:
    """Have the loader go on with what the next step reads."""
    for line in enter(run.loader, run.config, run.corpora, run.folder, run.step):
        if console:
            console.say(line)


def _is_due(run: Run, every: int) -> bool:
    """Whether what is done every so many steps, and after the last one, is done now."""
    return run.step == run.config.train.steps or bool(every and run.step % every == 0)


def take_step(run: Run, batches: Iterator[Tensor], watch: Stopwatch) -> Step:
    """Gradients of one global batch, clipped; one optimizer step.

    Raises:
        SkippedError: the gradient was not finite in too many steps in a row.
    """
    config = run.config
    losses = _gradients(run, batches, watch)
    learn(run)  # of the step before: the device has long been past it
    lr = config.optim.lr * lr_factor(run.step + 1, config.train.steps, config.schedule)
    factors = run.gammas.factors(run.engine, run.step + 1)
    run.spikes.begin(losses[SUMS.index("cross_entropy")], run.accelerator.num_processes)
    norm = run.engine.step([lr * factor for factor in factors], config.train.grad_clip, run.spikes.veto)
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
    run.places += run.loader.global_batch * run.loader.stream.seq_len
    total = torch.zeros(len(SUMS), device=device)
    for i in range(rounds):
        batch = Batch.of(run.own(next(batches)), run.mask_eod)
        watch.lap("data")
        last = i + 1 == rounds
        with run.engine.micro_batch(last):
            sums = batch.losses(run.engine.model, device) * share
            watch.lap("forward")
            run.engine.backward(sums[0], last)
            if last:
                run.stragglers.backward_is_over()
        total += sums.detach()
        watch.lap("backward")
    return total


def record_of(run: Run, done: Step, steps: int, seconds: dict[str, float]) -> Record:
    """See `records.record_of`; what the host does not know yet is waited for."""
    learn(run)
    run.skip_is_news = False
    return records.record_of(run, done, steps, seconds)


def _score(run: Run, saver: Saver) -> Record:
    """Of the tasks; if one fails, the run ends with a checkpoint."""
    assert run.tasks is not None
    _compare_replicas(run)
    device, reader, readers = run.accelerator.device, run.reader, run.readers
    try:
        with run.pulse.phase("tasks", run.step, long=True):
            found = score_tasks(run.tasks, run.engine, run.model_config, device, run.config, reader, readers)
    except HarnessError as error:
        saver.save()
        saver.recover()
        again = f"the checkpoint of step {run.step} is written; the same command goes on with other tasks, or none"
        raise RunError(f"eval.tasks: {error}; {again}") from error
    return {"step": run.step, **found}


# -- finishing --------------------------------------------------------------------------------------------------------


def _before_saving(run: Run, write: Records) -> None:
    learn(run)
    write.settle()
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
        raise may_pass(
            EngineError(
                f"replicas have drifted apart by step {run.step}: {error}. A step has gone wrong on one of these ranks (memory, device, or "
                f"hardware or libraries that compute differently), and nothing was saved of it. {remedy} (the same command does so); if it "
                "happens again, without that rank's machine"
            )
        ) from None
    run.compared = run.step
