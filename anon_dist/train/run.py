"""A run, set up: engine, data, model, optimizer, and the checkpoint it goes on from."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PretrainedConfig

from anon_dist.checkpoint import CheckpointError, Checkpoints
from anon_dist.checkpoint.folder import read_progress
from anon_dist.data import BatchLoader, Index, SampleOrder, TokenShards, verify_checksums
from anon_dist.data.index import INDEX_FILE
from anon_dist.engines.base import Engine
from anon_dist.engines.check import StateBytes
from anon_dist.engines.start import Name, Wanted, limit_waits, splitting_ranks, wrap
from anon_dist.optim.matching import Spectra
from anon_dist.train import randomness
from anon_dist.train.changes import changes
from anon_dist.train.config import Config, ConfigError, accumulation, to_yaml
from anon_dist.train.gamma import GammaRules
from anon_dist.train.model import blocks, build_model, flops_per_token
from anon_dist.train.optimizer import apply_hyperparameters, build_optimizer, hyperparameters
from anon_dist.train.spectrum import load_spectra
from anon_dist.train.vocabulary import tokenizer_problem
from anon_dist.train.watch import OptimizerWatch


@dataclass
class Run:
    """What a run has once it is set up."""

    config: Config
    accelerator: Accelerator
    folder: Path
    index: Index
    train_shards: TokenShards
    val_shards: TokenShards | None
    engine: Engine
    model_config: PretrainedConfig
    loader: BatchLoader
    checkpoints: Checkpoints
    reader: int
    """Which of the `readers` shares of a batch this rank reads; with tensor parallelism, several ranks read the same."""
    readers: int
    flops: float
    """Per token."""
    parameters: int
    state: StateBytes
    watch: OptimizerWatch
    gammas: GammaRules
    step: int = 0
    """Steps taken."""
    skipped: int = 0
    """Steps in a row whose gradient was not finite."""

    @property
    def mask_eod(self) -> int | None:
        """The token that ends a document, if attention is to stop there."""
        return self.index.eod_id if self.config.data.mask_documents else None


def wanted_engine(config: Config) -> Wanted:
    """What the configuration asks of the engine."""
    train = config.train
    return Wanted(
        engine=train.engine,
        precision=train.precision,
        timeout=timedelta(minutes=train.timeout_minutes),
        micro_batch=train.micro_batch,
        accumulation=partial(accumulation, config),
        clip=train.grad_clip,
        shard_ranks=train.shard_ranks,
        tensor_parallel=train.tensor_parallel,
        offload=train.offload,
        deepspeed_config=train.deepspeed_config,
    )


def set_up(config: Config, accelerator: Accelerator, name: Name, folder: Path) -> Run:
    """Data, model, optimizer; and in them the checkpoint to go on from, if there is one. Every rank calls it.

    Raises:
        ConfigError, EngineError, CheckpointError, DataError: see there.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    split = splitting_ranks(wanted_engine(config))
    readers, reader = accelerator.num_processes // split, accelerator.process_index // split
    rounds = accumulation(config, readers)

    index, train_shards, val_shards = _open_data(config, accelerator)
    torch.manual_seed(config.train.seed)
    built = build_model(config.model, index.vocab_size, index.eod_id, config.data.seq_len)
    if config.train.precision == "bf16-true":
        built.to(torch.bfloat16)
    flops, parameters = flops_per_token(built, config.data.seq_len), sum(p.numel() for p in built.parameters())
    if config.train.activation_checkpointing:
        built.activation_checkpointing_enable({"use_reentrant": False})
    if config.train.compile:
        for block in blocks(built):
            block.forward = torch.compile(block.forward)
    context = getattr(built.config, "max_position_embeddings", config.data.seq_len + 1)
    if problem := agree(tokenizer_problem(config, context) if accelerator.is_main_process else None, accelerator):
        raise ConfigError(problem)
    spectra = _spectra(config, accelerator)
    try:
        optimizer = build_optimizer(config.optim, built)
        gammas = GammaRules(config.optim, optimizer, built, spectra)
    except ValueError as error:
        raise ConfigError(f"optim: {str(error).removeprefix('Anon: ')}") from None
    wanted = hyperparameters(optimizer)
    overlap, accumulate = config.train.offload != "serial", config.train.accumulate
    engine = wrap(name, accelerator, built, optimizer, split, overlap, accumulate)
    limit_waits(timedelta(minutes=config.train.timeout_minutes))
    randomness.seed(config.train.seed, reader, 0)

    loader = BatchLoader(
        train_shards,
        SampleOrder(train_shards.num_samples(config.data.seq_len), config.data.seed),
        seq_len=config.data.seq_len,
        micro_batch=config.train.micro_batch,
        rank=reader,
        world_size=readers,
        accumulation=rounds,
    )
    run = Run(
        config=config,
        accelerator=accelerator,
        folder=folder,
        index=index,
        train_shards=train_shards,
        val_shards=val_shards,
        engine=engine,
        model_config=built.config,
        loader=loader,
        checkpoints=Checkpoints(folder / "checkpoints", config.checkpoint.keep),
        reader=reader,
        readers=readers,
        flops=flops,
        parameters=parameters,
        state=engine.state_bytes(),
        watch=OptimizerWatch(engine, accelerator.device),
        gammas=gammas,
    )
    if accelerator.is_main_process:
        run.checkpoints.clean()
    accelerator.wait_for_everyone()
    _resume(run, wanted)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config))
    return run


def _spectra(config: Config, accelerator: Accelerator) -> Spectra | None:
    """What `optim.match` names, read by one process."""
    if config.optim.match is None or config.optim.name != "anon":
        return None
    found: Any = None
    if accelerator.is_main_process:
        try:
            found = load_spectra(Path(config.optim.match)).to_json()
        except (CheckpointError, OSError) as error:
            found = str(error)
    found = agree(found, accelerator)
    if isinstance(found, str):
        raise ConfigError(f"optim.match: {found}")
    return Spectra.from_json(found)


def _open_data(config: Config, accelerator: Accelerator) -> tuple[Index, TokenShards, TokenShards | None]:
    """The index, the training shards, and the validation shards if there are any long enough; their contents checked on each node."""
    path, seq_len = config.data.path, config.data.seq_len
    if config.data.prepare and not os.path.isfile(os.path.join(path, INDEX_FILE)):
        raise ConfigError(
            f"data.path = {path} is not there, or not finished. This makes it, or goes on with it: anon-dist data prepare "
            f"{config.data.prepare} --out {shlex.quote(path)}"
        )
    index = Index.load(path)
    if config.data.verify == "checksum":
        if accelerator.is_local_main_process:
            verify_checksums(path)
        accelerator.wait_for_everyone()
    train_shards = TokenShards(path, "train")
    if train_shards.num_samples(seq_len) < 1:
        raise ConfigError(
            f"data.path = {path} has {len(train_shards)} training tokens, too few for data.seq_len = {seq_len}"
        )
    val_shards = TokenShards(path, "val") if "val" in index.splits else None
    if val_shards is not None and val_shards.num_samples(seq_len) < 1:
        val_shards = None
    return index, train_shards, val_shards


def _resume(run: Run, wanted: list[dict[str, Any]]) -> None:
    """Load the checkpoint that `resume` asks for; with the hyperparameters of the present configuration."""
    config, rank = run.config, run.accelerator.process_index
    latest = run.checkpoints.latest()
    if config.resume == "never":
        if latest is not None:
            raise ConfigError(
                f"resume is never, but run_dir = {run.folder} has checkpoints; choose another run_dir, or remove it"
            )
        return
    source = latest if config.resume == "auto" else Path(config.resume)
    source = agree(source, run.accelerator)
    if source is None:
        return
    later = [p.name for p in run.checkpoints.complete() if p.parent == source.parent and p.name > source.name]
    if later:
        raise ConfigError(
            f"resume = {source}, but run_dir = {run.folder} has later checkpoints ({', '.join(later)}); choose another run_dir"
        )
    progress = read_progress(source)
    if progress["step"] > config.train.steps:
        raise CheckpointError(
            f"{source} is past train.steps = {config.train.steps}; raise it, or choose another run_dir"
        )
    run.loader.load_state_dict(progress["data"])
    run.engine.load(source)
    say = print if run.accelerator.is_main_process else (lambda _: None)
    with run.engine.whole_optimizer() as optimizer:
        try:
            apply_hyperparameters(optimizer, wanted, [rule.sets for rule in run.gammas.groups], say)
        except ValueError as error:
            raise ConfigError(f"resuming {source}: {str(error).removeprefix('Anon: ')}") from None
    run.step, run.skipped = progress["step"], progress["skipped"]
    if not randomness.load(source, rank):
        randomness.seed(config.train.seed, run.reader, run.step)
    for line in changes(config, run.engine.name, source, progress):
        say(line)
    say(f"Resuming {source} after step {run.step}, written by {progress['world_size']} ranks.")


def agree(value: Any, accelerator: Accelerator) -> Any:
    """Rank 0's value, on every rank: others may see a shared folder a little later."""
    if accelerator.num_processes == 1:
        return value
    return broadcast_object_list([value])[0]
