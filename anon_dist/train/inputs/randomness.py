"""The random state of each rank: dropout's, and whatever else draws."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anon_dist.checkpoint import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.checksums import checksums
from anon_dist.checkpoint.together import on_every_rank
from anon_dist.checkpoint.torchfiles.torchfile import open_torch


def seed(base: int, rank: int, step: int) -> None:
    """Seed all generators of this process, differently on each rank and after each step one may resume from."""
    value = int(np.random.SeedSequence([base, rank, step]).generate_state(1)[0])
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def capture(rank: int) -> Callable[[Path], None]:
    """What writes this rank's random state, as it is now, into a checkpoint."""
    data = io.BytesIO()
    torch.save(_state(), data)

    def write(folder: Path) -> None:
        # Not by torch, which would not say what is wrong with the disk.
        (folder / f"random-{rank:05d}.pt").write_bytes(data.getbuffer())

    return write


def save(folder: Path, rank: int) -> None:
    """Write this rank's random state into a checkpoint."""
    capture(rank)(folder)


def load(folder: Path, rank: int) -> bool:
    """Restore what `save` wrote; False if there was no such rank. Every rank must call it.

    Raises:
        DamagedCheckpoint: the file of some rank is missing or not as it was written; on every rank.
    """
    path = folder / f"random-{rank:05d}.pt"
    with on_every_rank():
        found = checksums(folder)
        if not path.exists() and (found is None or path.name not in found.files):
            return False
        try:
            _set(open_torch(path))
        except CheckpointError:
            raise
        except Exception as error:  # a damaged state is refused by whichever generator takes it
            raise DamagedCheckpoint(
                f"{path} is damaged: it holds no random state: {error!r}. Take an earlier checkpoint"
            ) from None
    return True


@contextmanager
def kept() -> Iterator[None]:
    """Whatever the block draws or seeds, all generators of this process go on as if it had not been."""
    before = _state()
    try:
        yield
    finally:
        _set(before)


def _state() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "accelerator": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]),
    }


def _set(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].clone())
    if state["accelerator"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["accelerator"].clone())
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
