"""A run is set up: engine, data, model, optimizer, and the checkpoint it goes on from."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from anon_dist.agreement import agree
from anon_dist.engines.start import Name, Wanted, limit_waits, sharing_ranks, splitting_ranks, wrap
from anon_dist.train.config.parsing import Config, ConfigError, accumulation
from anon_dist.train.config.phases import phase_at, phases_of
from anon_dist.train.health.hangs import patience
from anon_dist.train.health.spikes import detector
from anon_dist.train.health.waiting import Waiting
from anon_dist.train.inputs import randomness
from anon_dist.train.inputs.corpora import open_corpora
from anon_dist.train.inputs.samples import open_loader
from anon_dist.train.inputs.vocabulary import tokenizer_problem
from anon_dist.train.model.flops import flops_per_token
from anon_dist.train.model.trainable import check_causal, set_modes, shared_sequences, trainable
from anon_dist.train.optimizer.build import MakeOptimizer, build_optimizer, hyperparameters, optimizer_of
from anon_dist.train.optimizer.watch import OptimizerWatch
from anon_dist.train.resuming import take_up
from anon_dist.train.running import Run
from anon_dist.train.saves.remote import checkpoints_of
from anon_dist.train.tasks.during import wanted_tasks


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
    take_up(run)
    return run
