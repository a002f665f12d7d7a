"""The samples of a run: which tokens lie in which, and the loader that reads them."""

from __future__ import annotations

from pathlib import Path

from anon_dist.agreement import first_does
from anon_dist.data import BatchLoader, Packing, SampleOrder, TokenShards, is_packed, pack
from anon_dist.train.config import Config
from anon_dist.train.errors import RunError


def open_loader(
    config: Config, shards: TokenShards, folder: Path, reader: int, readers: int, rounds: int
) -> BatchLoader:
    """The loader of a rank. Every rank calls it.

    Args:
        folder: of the run.
        reader, readers: which share of a batch this rank reads.
        rounds: micro-batches of a step.

    Raises:
        DataError: the packing cannot be made or read.
        RunError: it cannot be written.
    """
    seq_len = config.data.seq_len
    packing = _packing(shards, folder / f"packing-{seq_len}", seq_len) if config.data.packing == "best_fit" else None
    samples = shards.num_samples(seq_len) if packing is None else packing.num_samples
    return BatchLoader(
        shards,
        SampleOrder(samples, config.data.seed),
        seq_len=seq_len,
        micro_batch=config.train.micro_batch,
        rank=reader,
        world_size=readers,
        accumulation=rounds,
        packing=packing,
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
