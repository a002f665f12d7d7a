"""Stop on SIGTERM, SIGINT or SIGUSR1, or when a launcher is gone: every rank after the same step, with a checkpoint."""

from __future__ import annotations

import signal
import time
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from anon_dist.agreement import failures
from anon_dist.engines import peers
from anon_dist.launcher import LAUNCHER
from anon_dist.train.config.errors import RunError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Job schedulers send SIGTERM, or SIGUSR1 some time before (Slurm's --signal); a terminal sends SIGINT to every process."""

GRACE_SECONDS = 5.0
"""A launcher passes on a signal that the processes got too. Only a SIGINT later than this is a second Ctrl-C, and ends at once."""

GO_ON, SIGNALLED, ORPHANED, FAILED = range(4)
"""What a rank says after a step; the largest that any says is what all do."""


class StopSignal:
    """Whether the run should stop, agreed on by all ranks.

    A signal may reach one rank only, or the ranks between different steps; a launcher that is killed has told nobody, and its ranks would
    train on with nobody to stop or restart them. Each step starts an all-reduce of three numbers between the hosts, and reads the one of
    the step before, so that nobody waits. While the block is active the signals' old handlers are replaced.

    Args:
        timeout: how long to wait for the other hosts, where they do not compute with gloo; None: torch's half an hour.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self.received: signal.Signals | None = None
        self._since = 0.0
        self._old: dict[signal.Signals, Any] = {}
        self.failure: Exception | None = None
        self.unsaved = False
        """Whether, as all ranks know, a save in the background has failed."""
        self._agreed = GO_ON
        self._elsewhere = 0
        """A rank · 128 + the signal that it got; the largest, as all ranks know. 0: none."""
        self._group = None
        if dist.is_initialized() and dist.get_backend() != "gloo":
            with peers.connecting():
                # Accelerators keep computing while hosts talk.
                self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._pending: tuple[Any, torch.Tensor] | None = None

    def __enter__(self) -> StopSignal:
        for number in SIGNALS:
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if kind is None:  # after an error the peers may be gone
            self._finish()

    def fail(self, error: Exception) -> None:
        """This rank cannot go on, and all are to end without a checkpoint; the first such error is the one that is told."""
        self.failure = self.failure or error

    def requested(self, unsaved: bool = False) -> bool:
        """Whether to stop now. Every rank must ask once a step; all get the same answer, one step after the signal.

        Args:
            unsaved: whether this rank's part of a save in the background has failed.

        Raises:
            RunError: a rank cannot go on; on every rank.
        """
        own = self._own()
        if not dist.is_initialized():
            self._agreed, self.unsaved = own, unsaved
        else:
            self._agreed, self.unsaved = self._finish()
            got = 0 if self.received is None else dist.get_rank() * 128 + self.received
            flags = torch.tensor([own, unsaved, got], dtype=torch.float64)
            work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._pending = (work, flags)
        if self._agreed == FAILED:
            self._finish()
            raise RunError(failures(self.failure)) from self.failure
        return self._agreed != GO_ON

    def now(self) -> bool:
        """As `requested`, but of signals until now: the ranks wait for each other."""
        asked = self.requested()
        self._agreed = max(self._agreed, self._finish()[0])
        if self._agreed == FAILED:
            raise RunError(failures(self.failure)) from self.failure
        return asked or self._agreed != GO_ON

    @property
    def reason(self) -> str:
        """Why to stop, once `requested`."""
        if self.received is not None:
            return self.received.name
        if LAUNCHER is not None and LAUNCHER.gone:
            return f"the end of its launcher ({LAUNCHER.name}, process {LAUNCHER.pid})"
        if self._elsewhere:
            rank, number = divmod(self._elsewhere, 128)
            return f"{signal.Signals(number).name} on rank {rank}"
        return "the end of another node's launcher"

    def _own(self) -> int:
        if self.failure is not None:
            return FAILED
        if LAUNCHER is not None and LAUNCHER.gone:
            return ORPHANED
        return SIGNALLED if self.received is not None else GO_ON

    def _finish(self) -> tuple[int, bool]:
        if self._pending is None:
            return GO_ON, False
        work, flags = self._pending
        self._pending = None
        work.wait()
        self._elsewhere = max(self._elsewhere, int(flags[2]))
        return int(flags[0]), bool(flags[1])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > GRACE_SECONDS:
            raise KeyboardInterrupt
