"""A run, set up: engine, data, model, optimizer, and the checkpoint it goes on from."""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers import PretrainedConfig

from anon_dist.agreement import agree, first_does, is_first
from anon_dist.checkpoint import CheckpointError, Checkpoints
from anon_dist.checkpoint.errors import DamagedCheckpoint
from anon_dist.checkpoint.keeping.folder import read_progress
from anon_dist.checkpoint.keeping.names import PROGRESS, step_of
from anon_dist.data import BatchLoader, Index
from anon_dist.engines.base import Engine
from anon_dist.engines.check import StateBytes
from anon_dist.engines.context import ContextParallel
from anon_dist.engines.start import Name, Wanted, limit_waits, sharing_ranks, splitting_ranks, wrap
from anon_dist.files import unused, write_text
from anon_dist.optim.host_copy import HostCopy
from anon_dist.train.config.changes import changes, check_positions
from anon_dist.train.config.errors import RunError
from anon_dist.train.config.parsing import Config, ConfigError, accumulation, to_yaml
from anon_dist.train.config.phases import phase_at, phases_of
from anon_dist.train.health.hangs import patience
from anon_dist.train.health.pulse import Pulse
from anon_dist.train.health.spikes import SpikeDetector, detector
from anon_dist.train.health.stragglers import Stragglers
from anon_dist.train.health.waiting import Waiting
from anon_dist.train.inputs import randomness
from anon_dist.train.inputs.corpora import Corpus, ValidationSet, open_corpora
from anon_dist.train.inputs.samples import check_repetition, enter, open_loader
from anon_dist.train.inputs.vocabulary import tokenizer_problem
from anon_dist.train.model.flops import flops_per_token
from anon_dist.train.model.trainable import check_causal, set_modes, shared_sequences, trainable
from anon_dist.train.optimizer.build import (
    MakeOptimizer,
    apply_hyperparameters,
    build_optimizer,
    hyperparameters,
    optimizer_of,
)
from anon_dist.train.optimizer.gamma import GammaRules
from anon_dist.train.optimizer.watch import OptimizerWatch
from anon_dist.train.reports.report import RESULT
from anon_dist.train.saves.lock import RunLock
from anon_dist.train.saves.remote import checkpoints_of, fetch_again, fetch_newest, set_later_aside
from anon_dist.train.tasks.during import wanted_tasks
from anon_dist.train.tasks.harness import Tasks


@dataclass
class Run:
    """What a run has once it is set up."""

    config: Config
    accelerator: Accelerator
    folder: Path
    index: Index
    """Of the first source: all have its vocabulary."""
    corpora: list[Corpus]
    sets: list[ValidationSet]
    engine: Engine
    model_config: PretrainedConfig
    loader: BatchLoader
    checkpoints: Checkpoints
    context: ContextParallel | None
    """With the ranks that share this one's sequences."""
    reader: int
    """Which of the `readers` shares of a batch this rank reads; with tensor or context parallelism, several ranks read the same."""
    readers: int
    flops_at: Mapping[int, float]
    """Per token, by the length of samples."""
    parameters: int
    state: StateBytes
    watch: OptimizerWatch
    gammas: GammaRules
    tasks: Tasks | None
    """Of lm-eval, on which the model is evaluated."""
    spikes: SpikeDetector
    wanted: list[dict[str, Any]]
    """The hyperparameters that the configuration asks for, by param group."""
    plan: list[str] = field(default_factory=list)
    """What the steps that are left read, in lines."""
    step: int = 0
    """Steps taken."""
    skipped: int = 0
    """Steps in a row whose gradient was not finite, as far as the host knows."""
    skip_is_news: bool = False
    """Whether one of them is not in the metrics yet."""
    predicted: int = 0
    """Tokens that steps since the last record predicted, over all ranks."""
    places: int = 0
    """Tokens that they could have predicted, were no places left free."""
    waited: float = 0.0
    """Seconds since then that the host waited for the device or for other ranks' losses."""
    norm: HostCopy | None = None
    """Of the last step's gradient, until the host has looked at it."""
    compared: int = -1
    """The step after which the replicas were last compared."""
    rewinds: int = 0
    """How often it has gone back from a spike."""
    stragglers: Stragglers = field(default_factory=Stragglers)
    lock: RunLock | None = None
    """On the folder; of rank 0."""
    pulse: Pulse = field(default_factory=Pulse)
    """Watched by `hangs`, while a run trains."""

    @property
    def phase(self) -> Config:
        """The configuration with what holds in the phase of the last step taken."""
        return phase_at(self.config, max(0, self.step - 1))

    @property
    def flops(self) -> float:
        """Per token, at present."""
        return self.flops_at[self.loader.stream.seq_len]

    @property
    def sharing(self) -> int:
        """Ranks that share each sequence."""
        return 1 if self.context is None else self.context.ranks

    def own(self, tokens: Tensor) -> Tensor:
        """What this rank computes of sequences (B, L + 1): all, or with context parallelism its pieces."""
        return tokens if self.context is None else self.context.pieces(tokens)

    @property
    def mask_eod(self) -> int | None:
        """The token that ends a document, if attention is to stop there."""
        return self.index.eod_id if self.config.data.mask_documents else None


def wanted_engine(config: Config) -> Wanted:
    """What the configuration asks of the engine."""
    train = config.train
    first = phase_at(config, 0)
    return Wanted(
        engine=train.engine,
        precision=train.precision,
        timeout=timedelta(minutes=train.timeout_minutes),
        micro_batch=first.train.micro_batch,
        accumulation=partial(accumulation, first),
        clip=train.grad_clip,
        shard_ranks=train.shard_ranks,
        tensor_parallel=train.tensor_parallel,
        context_parallel=train.context_parallel,
        offload=train.offload,
        deepspeed_config=train.deepspeed_config,
    )


def set_up(
    config: Config, accelerator: Accelerator, name: Name, folder: Path, make_optimizer: MakeOptimizer = build_optimizer
) -> Run:
    """Data, model, optimizer; and in them the checkpoint to go on from, if there is one. Every rank calls it.

    Raises:
        ConfigError, EngineError, CheckpointError, DataError, RunError: see there.
    """
    set_modes(config, accelerator)
    split, sharing = splitting_ranks(wanted_engine(config)), sharing_ranks(wanted_engine(config))
    readers, reader = accelerator.num_processes // (split * sharing), accelerator.process_index // (split * sharing)
    corpora, sets = open_corpora(config, accelerator)
    index = corpora[0].index
    share = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / accelerator.num_processes if name == "fsdp2" else 1.0
    longest = max((phase for _, phase in phases_of(config)), key=lambda phase: phase.data.seq_len)
    planned = trainable(longest, index, share)
    built = planned.model
    shared = shared_sequences(config, accelerator, built, sharing)
    flops = {phase.data.seq_len: flops_per_token(built, phase.data.seq_len) for _, phase in phases_of(config)}
    parameters = sum(p.numel() for p in built.parameters())
    context = getattr(built.config, "max_position_embeddings", longest.data.seq_len + 1)
    if problem := agree(tokenizer_problem(config, context) if accelerator.is_main_process else None):
        raise ConfigError(problem)
    tasks = wanted_tasks(config)
    optimizer, gammas = optimizer_of(config, built, make_optimizer)
    wanted = hyperparameters(optimizer)
    overlap, accumulate = config.train.offload != "serial", config.train.accumulate
    engine = wrap(name, accelerator, built, optimizer, split, overlap, accumulate, planned.weights)
    limit_waits(patience(config))
    if shared is None:  # only models that are known to be causal share sequences
        check_causal(config, engine.model, accelerator.device)
    randomness.seed(config.train.seed, reader, 0)

    run = Run(
        config=config,
        accelerator=accelerator,
        folder=folder,
        index=index,
        corpora=corpora,
        sets=sets,
        engine=engine,
        model_config=built.config,
        loader=open_loader(config, corpora, folder, reader, readers),
        checkpoints=checkpoints_of(folder, config.checkpoint),
        context=shared,
        reader=reader,
        readers=readers,
        flops_at=flops,
        parameters=parameters,
        state=engine.state_bytes(),
        watch=OptimizerWatch(engine, accelerator.device),
        gammas=gammas,
        tasks=tasks,
        spikes=detector(config, accelerator.device),
        wanted=wanted,
    )
    run.loader.on_wait = Waiting(lambda: run.pulse)
    _take_up(run, wanted)
    return run


def _take_up(run: Run, wanted: list[dict[str, Any]]) -> None:
    """Go on from a checkpoint, if there is one, and put the configuration into the run's folder."""
    config, folder = run.config, run.folder
    _in_folder(folder, run.checkpoints.clean)
    fetch_newest(config, run.checkpoints)
    _resume(run, wanted)
    run.plan = check_repetition(config, run.corpora, folder, run.loader.state_dict(), run.step)
    _in_folder(folder, lambda: folder.mkdir(parents=True, exist_ok=True))
    _in_folder(folder, lambda: write_text(folder / "config.yaml", to_yaml(config)))


def _in_folder(folder: Path, action: Callable[[], object]) -> None:
    """Have rank 0 change something in the run's folder.

    Raises:
        RunError: it cannot; on every rank.
    """
    _, error = first_does(action)
    if error:
        raise RunError(f"run_dir = {folder} cannot be written: {error}")


# -- going on from a checkpoint ---------------------------------------------------------------------------------------


def _resume(run: Run, wanted: list[dict[str, Any]]) -> None:
    """Load the checkpoint that `resume` asks for; with the hyperparameters of the present configuration."""
    present, error = first_does(run.checkpoints.present)
    if error:
        raise RunError(f"run_dir = {run.folder} cannot be read: {error}")
    if run.config.resume == "auto":
        resume_latest(run, present, wanted)
    elif run.config.resume != "never":
        _resume_from(run, Path(run.config.resume), present, wanted)
    elif present:
        raise ConfigError(
            f"resume is never, but run_dir = {run.folder} has checkpoints; choose another run_dir, or remove it"
        )


def resume_latest(run: Run, present: list[Path], wanted: list[dict[str, Any]]) -> None:
    """The last one that is not damaged; the later ones are set aside when it is loaded."""
    with run.engine.whole_optimizer() as optimizer:
        stateless, groups = not optimizer.state, copy.deepcopy(hyperparameters(optimizer, without=()))
    damaged: list[tuple[Path, DamagedCheckpoint]] = []
    for source in reversed(present):
        try:
            _load(run, source, wanted)
        except DamagedCheckpoint as error:
            _forget(run, stateless, groups)
            if not fetch_again(run.config, run.checkpoints, source, error):
                damaged.append((source, error))
                continue
            _load(run, source, wanted)
        _in_folder(run.folder, lambda source=source: _set_damaged_aside(run, damaged, source))  # type: ignore[misc]
        return
    if damaged:
        reasons = "; ".join(f"{source.name}: {error}" for source, error in damaged)
        raise DamagedCheckpoint(
            f"run_dir = {run.folder} has no checkpoint that can be loaded ({reasons}). They stay as they are; choose another run_dir to "
            "begin anew"
        ) from damaged[0][1]


def _forget(run: Run, stateless: bool, groups: list[dict[str, Any]]) -> None:
    """What a load that failed may have left where the next one does not write: weights and states it will overwrite."""
    with run.engine.whole_optimizer() as optimizer:
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(copy.deepcopy(values))
        if stateless:
            optimizer.state.clear()


def _set_damaged_aside(run: Run, damaged: list[tuple[Path, DamagedCheckpoint]], source: Path) -> None:
    for checkpoint, error in damaged:
        kept = run.checkpoints.set_aside(checkpoint, "damaged")
        _warn(f"{checkpoint} is damaged, and set aside as {kept.name}: {error}")
    if damaged:
        last = step_of(damaged[0][0])
        _warn(f"steps {run.step + 1} to {last} are lost, and taken again from {source}")


def _resume_from(run: Run, source: Path, present: list[Path], wanted: list[dict[str, Any]]) -> None:
    """One that was named: later ones of this run are set aside, with what came of them."""
    ours = agree(source.parent.resolve() == run.checkpoints.folder.resolve())
    if present and not ours and agree((source / PROGRESS).is_file()):
        raise ConfigError(
            f"resume = {source} is not of run_dir = {run.folder}, which has checkpoints of its own ({present[-1].name}); "
            "--resume auto goes on from those, or choose another run_dir"
        )
    _load(run, source, wanted)
    later = [p for p in present if p.name != source.name and step_of(p) >= run.step]
    if ours and later:
        _in_folder(run.folder, lambda: _set_later_aside(run, later, source))


def _set_later_aside(run: Run, later: list[Path], source: Path) -> None:
    moved = []
    result, records = run.folder / RESULT, run.folder / "metrics.jsonl"
    if result.exists():  # or the run would count as finished
        moved.append(result.rename(unused(result.with_name(result.name + ".aside"))).name)
    if records.exists():  # of which what is after this step is going to be cut
        kept = unused(records.with_name(records.name + ".aside"))
        shutil.copy(records, kept)
        moved.append(kept.name)
    set_later_aside(run.config, run.step)
    moved += [run.checkpoints.set_aside(checkpoint, "aside").name for checkpoint in reversed(later)]
    _warn(
        f"going back to {source}: what came after is set aside as {', '.join(moved)}; metrics.jsonl ends at step {run.step}"
    )


def _warn(text: str) -> None:
    print(f"WARNING: {text}", flush=True)


def _load(run: Run, source: Path, wanted: list[dict[str, Any]]) -> None:
    """Weights, optimizer, data cursor, random state, step count.

    Raises:
        DamagedCheckpoint: on every rank. Everything may have been changed in part.
        CheckpointError, ConfigError, DataError: it is of another model, optimizer or corpus, or no checkpoint.
    """
    config, rank = run.config, run.accelerator.process_index
    progress = _agreed_progress(source)
    if progress["step"] > config.train.steps:
        other = "run_dir and checkpoint.remote" if config.checkpoint.remote else "run_dir"
        raise CheckpointError(
            f"{source} is past train.steps = {config.train.steps}; raise it, or choose another {other}"
        )
    check_positions(config, source, progress)
    news = enter(run.loader, config, run.corpora, run.folder, progress["step"], progress["data"])
    with warnings.catch_warnings():  # what this run changes is said below
        warnings.filterwarnings("ignore", "Anon: the loaded state brings its own hyperparameters")
        run.engine.load(source)
    if not randomness.load(source, rank):
        randomness.seed(config.train.seed, run.reader, progress["step"])
    say = print if run.accelerator.is_main_process else (lambda _: None)
    with run.engine.whole_optimizer() as optimizer:
        try:
            apply_hyperparameters(optimizer, wanted, [rule.sets for rule in run.gammas.groups], say)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"resuming {source}: {str(error).removeprefix('Anon: ')}") from None
    run.step, run.skipped = progress["step"], progress["skipped"]
    run.rewinds = progress.get("rewinds", 0)
    try:
        run.spikes.load_state_dict(progress.get("spikes"))
    except ValueError as error:
        raise DamagedCheckpoint(f"{source / PROGRESS} is damaged: {error}") from None
    for line in (*changes(config, run.engine.name, source, progress), *news):
        say(line)
    say(f"Resuming {source} after step {run.step}, written by {progress['world_size']} ranks.")


def _agreed_progress(source: Path) -> dict[str, Any]:
    """What rank 0 reads of a checkpoint's progress, with the keys that the loop has written."""
    outcome: Any = None
    if is_first():
        try:
            outcome = read_progress(source)
            data = outcome.get("data")
            numbers = {key: outcome.get(key) for key in ("step", "skipped", "world_size")}
            numbers["data.cursor"] = data.get("cursor") if isinstance(data, dict) else None
            if wrong := [key for key, value in numbers.items() if type(value) is not int or value < 0]:
                raise DamagedCheckpoint(f"{source / PROGRESS} is damaged: {', '.join(wrong)} missing, or no count")
            if step_of(source) not in (-1, numbers["step"]):
                raise DamagedCheckpoint(
                    f"{source} is not what its name says: {PROGRESS} in it is of step {numbers['step']}"
                )
        except CheckpointError as error:
            outcome = error
    outcome = agree(outcome)
    if isinstance(outcome, CheckpointError):
        raise outcome
    return dict(outcome)
