"""What one rank finds, all ranks are told, before any of them goes on to wait for the others."""

from __future__ import annotations

from contextlib import AbstractContextManager

from anon_dist.agreement import Group, together
from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint


def on_every_rank(group: Group = None) -> AbstractContextManager[None]:
    """A block without communication, that succeeds on every rank or raises on every rank. Every rank must enter it.

    Args:
        group: see `agreement.agree`.

    Raises:
        CheckpointError: it raised on some rank, which is named; `DamagedCheckpoint` where all that failed did so by that.
    """
    return together(CheckpointError, DamagedCheckpoint, group)
