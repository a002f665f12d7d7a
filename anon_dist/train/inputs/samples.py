"""The samples of a run: which tokens lie in which, and the loader that reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from anon_dist.agreement import first_does_slowly
from anon_dist.data import BatchLoader, Packing, Source, Stream, TokenShards, is_packed, make_source, pack
from anon_dist.train.config.errors import RunError
from anon_dist.train.config.parsing import Config, ConfigError, accumulation
from anon_dist.train.config.phases import phase_at, phases_from, phases_of
from anon_dist.train.config.sources import called, sources_of
from anon_dist.train.inputs.corpora import Corpus


def open_loader(
    config: Config, corpora: Sequence[Corpus], folder: Path, reader: int, readers: int, step: int = 0
) -> BatchLoader:
    """The loader of a rank, of the phase in which the step after `step` lies. Every rank calls it.

    Args:
        folder: of the run.
        reader, readers: which share of a batch this rank reads.

    Raises:
        ConfigError: a weight is too small beside the others, or a phase's batch does not divide among the ranks.
        DataError: the packing cannot be made or read.
        RunError: it cannot be written.
    """
    for _, phase in phases_of(config):
        accumulation(phase, readers)
    phase = phase_at(config, step)
    stream = open_stream(phase, corpora, folder)
    return BatchLoader(stream, phase.train.micro_batch, reader, readers, accumulation(phase, readers))


def enter(
    loader: BatchLoader,
    config: Config,
    corpora: Sequence[Corpus],
    folder: Path,
    step: int,
    state: dict[str, Any] | None = None,
) -> list[str]:
    """Have the loader go on with the phase in which the step after `step` lies, which may be the one that it is in. Every rank calls it.

    Args:
        state: of a checkpoint. None: from where the loader is.

    Returns:
        What is other than before, in sentences.
    """
    phase = phase_at(config, step)
    stream, rounds = open_stream(phase, corpora, folder), accumulation(phase, loader.world_size)
    return loader.enter(stream, phase.train.micro_batch, rounds, state, intended=bool(config.data.phases))


def open_stream(config: Config, corpora: Sequence[Corpus], folder: Path) -> Stream:
    """The samples of a phase's sources, from the beginning of each. Arguments and errors as of `open_loader`."""
    named = sources_of(config.data)
    corpora = [replace(corpus, source=named[corpus.name]) for corpus in corpora if corpus.name in named]
    sources = [_source(config, corpus, folder, alone=len(corpora) == 1) for corpus in corpora]
    try:
        return Stream(sources, config.data.seq_len)
    except ValueError as error:
        least = min(corpora, key=lambda corpus: corpus.source.weight)
        raise ConfigError(
            f"{called(least.name)}.weight = {least.source.weight:g} is too small beside the others ({error}); raise it, or leave it out"
        ) from None


def _source(config: Config, corpus: Corpus, folder: Path, *, alone: bool) -> Source:
    seq_len, packing = config.data.seq_len, None
    if config.data.packing == "best_fit":
        if corpus.train.by_ranges:
            size = sum(shard.bytes for shard in corpus.train.info.shards)
            raise ConfigError(
                f"{called(corpus.name)} = {corpus.source.path}: data.packing best_fit reads all of it at first, {size:,} bytes, and "
                "data.cache_bytes does not leave as many; raise it, or copy the folder to this machine"
            )
        which = f"packing-{seq_len}" if alone else f"packing-{seq_len}-{corpus.index.fingerprint[:16]}"
        packing = _packing(corpus.train, folder / which, seq_len)
    share = Fraction(str(corpus.source.weight))
    return make_source(
        corpus.train, seq_len, config.data.seed, packing=packing, share=share, name=corpus.name, alone=alone
    )


def check_repetition(
    config: Config, corpora: Sequence[Corpus], folder: Path, state: dict[str, Any], step: int
) -> list[str]:
    """Refuse a run that would read a source more often than its max_epochs.

    Args:
        state, step: where the run stands, as of its loader.

    Returns:
        What each phase that is left reads, in lines.

    Raises:
        ConfigError: naming the source, and what would keep within the limit.
    """
    lines = []
    for steps, phase in phases_from(config, step):
        stream, cursor, _ = open_stream(phase, corpora, folder).after(state, intended=True)
        end = cursor + steps * phase.train.global_batch
        _check_limits(phase, stream, cursor, end, step, steps)
        if config.data.phases:
            length, batch = phase.data.seq_len, phase.train.global_batch
            lines.append(f"Steps {step + 1:,} to {step + steps:,}: {batch:,} samples of {length:,} tokens a step")
        lines += stream.introduced(end)
        state, step = stream.state(end), step + steps
    return lines


def _check_limits(phase: Config, stream: Stream, cursor: int, end: int, step: int, steps: int) -> None:
    epochs, now, samples = stream.epochs(end), stream.read(cursor), stream.samples_of()
    sources = sources_of(phase.data)
    for name, source in sources.items():
        most = source.max_epochs
        if most is None or epochs[name] <= most:
            continue
        per_step = (epochs[name] * samples[name] - now[name]) / steps
        room = max(0, math.floor(most * samples[name]) - now[name])
        fits = int(room / per_step)
        while fits and stream.epochs(cursor + fits * phase.train.global_batch)[name] > most:
            fits -= 1
        what = "train.steps" if step + steps == phase.train.steps else "the phase's until"
        fitting = f"{what} to {step + fits}"
        if phase.train.tokens is not None and what == "train.steps":  # which it sets
            tokens = phase.train.tokens - (steps - fits) * phase.train.global_batch * phase.data.seq_len
            fitting = f"train.tokens to {tokens}"
        others = sum(s.weight for s in sources.values()) - source.weight
        share = room / (end - cursor)  # of the positions, which is near enough to that of the tokens
        weight = f"its weight to {_below(share / (1.0 - share) * others)}, or " if others and 0 < share < 1 else ""
        raise ConfigError(
            f"{called(name)}: {what} = {step + steps} would read it {epochs[name]:.2f} times, more than max_epochs = {most:g}; lower "
            f"{weight}{fitting}, prepare more text, or raise max_epochs"
        )


def _below(weight: float) -> str:
    """Three digits of a weight > 0, and not more than it."""
    unit = 10.0 ** (math.floor(math.log10(weight)) - 2)
    return f"{math.floor(weight / unit) * unit:.3g}"


@lru_cache(maxsize=64)
def _packing(shards: TokenShards, folder: Path, seq_len: int) -> Packing:
    """What lies in which sample: decided by the first run in this folder, and read by all ranks. Checked once, not for each phase."""

    def decide() -> None:
        if not is_packed(folder):
            pack(folder, shards, seq_len)

    _, error = first_does_slowly(decide)
    if error:
        raise RunError(f"data.packing: {folder} cannot be written: {error}")
    return Packing(folder, shards, seq_len)
