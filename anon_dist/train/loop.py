"""Pretraining from start to end: `train` brings the ranks up, sets the run up (`run.py`), takes its steps, and finishes it."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
from anon_dist.train import randomness
from anon_dist.train.alike import shared_settings
from anon_dist.train.card import model_card
from anon_dist.train.changes import recorded, versions
from anon_dist.train.config import Config, check
from anon_dist.train.errors import RunError
from anon_dist.train.evaluate import Evaluation, evaluate, token_loss
from anon_dist.train.export import export_model
from anon_dist.train.lock import RunLock, held
from anon_dist.train.lr import lr_factor
from anon_dist.train.metrics import Console, MetricsFile, Record, Stopwatch
from anon_dist.train.model import peak_flops
from anon_dist.train.recording import recording
from anon_dist.train.report import RESULT, finished, report
from anon_dist.train.run import Run, set_up, wanted_engine
from anon_dist.train.signals import StopSignal
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
        stopped = _steps(run, stop, write, console)
    if console:
        console.close()
        if stopped:
            again = "the same command goes on" if config.resume == "auto" else "--resume auto goes on"
            console.say(f"Stopped by {stopped} after step {run.step}; the checkpoint is written, and {again} from it.")
            if stopped == signal.SIGINT.name:
                end_interrupted_launcher()
    if not stopped:
        _finish(run)


def _introduce(run: Run, console: Console) -> None:
    """Say what is about to run."""
    config, ranks = run.config, run.accelerator.num_processes
    mib, tokens = 1 << 20, config.train.global_batch * config.data.seq_len
    epochs = config.train.steps * config.train.global_batch / run.train_shards.num_samples(config.data.seq_len)
    precision = config.train.precision + " (products in TF32)" * uses_tf32(config, run.accelerator)
    console.say(
        f"{run.parameters / 1e6:.2f}M parameters, {precision}, {run.engine.name} on {ranks} "
        f"{run.accelerator.device.type} rank{'s' * (ranks > 1)}; {type(run.engine.optimizer).__name__} holds "
        f"{run.state.local / mib:.1f} of {run.state.whole / mib:.1f} MiB state per rank; {tokens:,} tokens a step, "
        f"{config.train.steps} steps, {epochs:.2f} epochs"
    )


# -- steps ------------------------------------------------------------------------------------------------------------


def _steps(run: Run, stop: StopSignal, write: Callable[[Record], None], console: Console | None) -> str | None:
    """All steps that are left, with what is due after each: metrics, validation, checkpoint.

    Returns:
        What ended them early, a signal's name, say; None after the last.
    """
    config, steps, checkpoint_every = run.config, run.config.train.steps, run.config.checkpoint.every
    watch = Stopwatch(run.accelerator.device)
    batches = iter(run.loader)
    logged = run.step
    while run.step < steps:
        done = take_step(run, batches, watch)
        if run.step % config.log.every == 0 or run.step == steps or run.skip_is_news:
            write(record_of(run, done, run.step - logged, watch.read()))
            watch.lap("logging")
            logged = run.step
        if run.val_shards is not None and (
            run.step == steps or (config.eval.every and run.step % config.eval.every == 0)
        ):
            _compare_replicas(run)
            write(_evaluation_record(run, _validate(run, config.eval.sequences), "val"))
            watch.skip()
        saved = run.step == steps or bool(checkpoint_every and run.step % checkpoint_every == 0)
        if saved:
            _save(run, stop)
            watch.skip()
        if console:
            console.step()
        if stop.requested() and run.step < steps:
            if not saved:
                _save(run, stop)
            return stop.reason
    return None


@dataclass(frozen=True)
class Step:
    """What came of one step."""

    loss: Tensor
    """This rank's mean loss, 0-dim, on the device."""
    grad_norm: HostCopy
    """Global gradient norm, before clipping."""
    lr: float
    lr_factors: list[float]
    """What each param group's is multiplied by."""


def take_step(run: Run, batches: Iterator[Tensor], watch: Stopwatch) -> Step:
    """Gradients of one global batch, clipped; one optimizer step.

    Raises:
        FloatingPointError: the gradient was not finite in too many steps in a row.
    """
    config = run.config
    loss = _gradients(run, batches, watch)
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
    return Step(loss, on_its_way, lr, factors)


def _gradients(run: Run, batches: Iterator[Tensor], watch: Stopwatch) -> Tensor:
    """Accumulate the gradients of one step.

    Returns:
        This rank's mean loss, a 0-dim tensor on the device; the host does not wait for it.
    """
    rounds = run.loader.accumulation
    total = torch.zeros((), device=run.accelerator.device)
    for i in range(rounds):
        batch = next(batches)
        watch.lap("data")
        batch = batch.to(run.accelerator.device, non_blocking=True)
        last = i + 1 == rounds
        with run.engine.micro_batch(last):
            loss = token_loss(run.engine.model, run.own(batch), run.mask_eod).mean() / rounds
            run.engine.backward(loss, last)
        total += loss.detach()
        watch.lap("gradients")
    return total


def learn(run: Run) -> None:
    """Know whether the last step was taken; a step whose gradient was not finite is none. Waits for the device, if that is not past it.

    Every rank has the same norm, so a step is skipped on all ranks or none, and the optimizer's step count stays.

    Raises:
        FloatingPointError: too many steps in a row were none.
    """
    if run.norm is None:
        return
    norm, run.norm = run.norm.value(), None
    run.skipped = 0 if math.isfinite(norm) else run.skipped + 1
    run.skip_is_news |= run.skipped > 0
    if run.skipped and run.accelerator.is_main_process:
        log.warning("step %d skipped: the gradient norm is %s", run.step, norm)
    if run.skipped > run.config.train.max_skipped:
        raise FloatingPointError(
            f"{run.skipped} steps in a row had a non-finite gradient; the last checkpoint is {run.checkpoints.latest()}. Lower optim.lr, "
            "lengthen the warm-up, or set optim.update_clip and train.grad_clip"
        )


def record_of(run: Run, done: Step, steps: int, seconds: dict[str, float]) -> Record:
    """The metrics of the step just taken; loss and norm are its own, rates are means over the `steps` since the last record."""
    learn(run)
    run.skip_is_news = False
    accelerator, wall = run.accelerator, max(sum(seconds.values()), 1e-9)
    tokens = steps * run.config.train.global_batch * run.config.data.seq_len
    loss = done.loss.double()
    if dist.is_initialized():
        dist.all_reduce(loss)
    record: Record = {
        "step": run.step,
        "samples": run.loader.cursor,
        "epoch": run.loader.cursor / run.train_shards.num_samples(run.config.data.seq_len),
        "loss": float(loss) / accelerator.num_processes,
        "lr": done.lr,
        "grad_norm": done.grad_norm.value(),
        "tokens_per_s": tokens / wall,
    }
    if run.gammas.multiplied:
        record |= {f"lr_factor/{i}": factor for i, factor in enumerate(done.lr_factors)}
    record |= run.watch.read()
    if peak := peak_flops(accelerator.device):
        record["mfu"] = run.flops * tokens / wall / (peak * accelerator.num_processes)
    for part in ("data", "optimizer", "logging"):
        record[f"{part}_share"] = seconds.get(part, 0.0) / wall
    record["memory_gb"] = _memory_gb(accelerator.device)
    if run.skipped:
        record["skipped"] = run.skipped
    return record


def _memory_gb(device: torch.device) -> float:
    """Peak memory of this process: allocated on the accelerator, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


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


def _evaluation_record(run: Run, result: Evaluation, prefix: str) -> Record:
    return {
        "step": run.step,
        f"{prefix}_loss": result.loss,
        f"{prefix}_perplexity": result.perplexity,
        f"{prefix}_bits_per_byte": result.bits_per_byte,
    }


# -- saving and finishing ---------------------------------------------------------------------------------------------


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
        last = run.checkpoints.latest()
        remedy = f"Resume from {last}" if last else "Start again"
        raise EngineError(
            f"replicas have drifted apart by step {run.step}: {error}. A step has gone wrong on one of these ranks (memory, device, or "
            f"hardware or libraries that compute differently), and nothing was saved of it. {remedy} (the same command does so); if it "
            "happens again, without that rank's machine"
        ) from None
    run.compared = run.step


def _save(run: Run, stop: StopSignal) -> None:
    learn(run)
    _compare_replicas(run)
    failed = stop.failure
    try:
        if run.lock is not None:
            run.lock.confirm()
    except (RunError, OSError) as error:
        failed = failed or error
    if what := failures(failed):
        raise RunError(what) from failed
    with run.checkpoints.writing(run.step, _progress(run)) as folder:
        run.engine.save(folder)
        randomness.save(folder, run.accelerator.process_index)


def _progress(run: Run) -> dict[str, Any]:
    """What a checkpoint says of its run."""
    return {
        "format": 1,
        "step": run.step,
        "skipped": run.skipped,
        "data": run.loader.state_dict(),
        "world_size": run.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "optimizer": type(run.engine.optimizer).__name__,
        "engine": run.engine.name,
        "model": run.model_config.to_dict(),
        "tokenizer": str(Path(run.config.data.path) / "tokenizer"),
        "config": recorded(run.config),
        "versions": versions(),
    }


def _finish(run: Run) -> None:
    """Validate on the whole split, export, report."""
    config, main = run.config, run.accelerator.is_main_process
    record: Record = {"step": run.step}
    if run.val_shards is not None:
        record = _evaluation_record(run, _validate(run, config.eval.final_sequences), "final")
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
    card = model_card(run.folder.name, run.model_config.to_dict(), _progress(run), record)
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
