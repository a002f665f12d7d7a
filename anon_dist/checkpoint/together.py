"""What one rank finds, all ranks are told, before any of them goes on to wait for the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint


@contextmanager
def on_every_rank() -> Iterator[None]:
    """A block without communication, that succeeds on every rank or raises on every rank. Every rank must enter it.

    Raises:
        CheckpointError: it raised on another rank; `DamagedCheckpoint` if it did so there. Where several failed, each raises its own error.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    if dist.is_initialized():
        mine = None if failed is None else (isinstance(failed, DamagedCheckpoint), str(failed) or type(failed).__name__)
        found: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        if failed is None:
            for rank, theirs in enumerate(found):
                if theirs is not None:
                    raise (DamagedCheckpoint if theirs[0] else CheckpointError)(f"rank {rank}: {theirs[1]}")
    if failed is not None:
        raise failed
