"""The samples of a run: which tokens lie in which, and the loader that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from anon_dist.agreement import first_does
from anon_dist.data import BatchLoader, Packing, Source, Stream, TokenShards, is_packed, make_source, pack
from anon_dist.train.config import Config, ConfigError
from anon_dist.train.corpora import Corpus, called
from anon_dist.train.errors import RunError


def open_loader(
    config: Config, corpora: Sequence[Corpus], folder: Path, reader: int, readers: int, rounds: int
) -> BatchLoader:
    """The loader of a rank. Every rank calls it.

    Args:
        folder: of the run.
        reader, readers: which share of a batch this rank reads.
        rounds: micro-batches of a step.

    Raises:
        ConfigError: a weight is too small beside the others.
        DataError: the packing cannot be made or read.
        RunError: it cannot be written.
    """
    stream = open_stream(config, corpora, folder)
    return BatchLoader(stream, config.train.micro_batch, reader, readers, rounds)


def open_stream(config: Config, corpora: Sequence[Corpus], folder: Path) -> Stream:
    """The samples of these sources, from the beginning of each. Arguments and errors as of `open_loader`."""
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
        which = f"packing-{seq_len}" if alone else f"packing-{seq_len}-{corpus.index.fingerprint[:16]}"
        packing = _packing(corpus.train, folder / which, seq_len)
    share = Fraction(str(corpus.source.weight))
    return make_source(
        corpus.train, seq_len, config.data.seed, packing=packing, share=share, name=corpus.name, alone=alone
    )


def check_repetition(config: Config, corpora: Sequence[Corpus], stream: Stream, cursor: int, step: int) -> None:
    """Refuse a run that would read a source more often than its max_epochs.

    Args:
        cursor, step: where the run stands.

    Raises:
        ConfigError: naming the source, and what would keep within the limit.
    """
    batch, steps = config.train.global_batch, config.train.steps
    end = cursor + (steps - step) * batch
    epochs, now, samples = stream.epochs(end), stream.read(cursor), stream.samples_of()
    for corpus in corpora:
        name, most = corpus.name, corpus.source.max_epochs
        if most is None or epochs[name] <= most:
            continue
        per_step = (epochs[name] * samples[name] - now[name]) / max(1, steps - step)
        room = max(0.0, most * samples[name] - now[name])
        fitting = step + int(room / per_step)
        others = sum(c.source.weight for c in corpora) - corpus.source.weight
        share = room / max(1, end - cursor)  # of the positions, which is near enough to that of the tokens
        weight = f"its weight to {share / (1.0 - share) * others:.3g}, or " if others and share < 1.0 else ""
        raise ConfigError(
            f"{called(name)}: train.steps = {steps} would read it {epochs[name]:.2f} times, more than max_epochs = {most:g}; lower {weight}"
            f"train.steps to {fitting}, prepare more text, or raise max_epochs"
        )


def _packing(shards: TokenShards, folder: Path, seq_len: int) -> Packing:
    """What lies in which sample: decided by the first run in this folder, and read by all ranks."""

    def decide() -> None:
        if not is_packed(folder):
            pack(folder, shards, seq_len)

    _, error = first_does(decide)
    if error:
        raise RunError(f"data.packing: {folder} cannot be written: {error}")
    return Packing(folder, shards, seq_len)
