"""Running cells side by side, each a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from anon_dist.exits import IN_USE
from anon_dist.machine import free_memory
from anon_dist.sweep.cells import CellFolder, Outcome
from anon_dist.sweep.early import Curve, Peer, hopeless
from anon_dist.train.config.parsing import Config

Command = Callable[[Path], list[str]]
"""From a cell's configuration file to what trains it."""

POLL_SECONDS = 0.2
GRACE_SECONDS = 60.0
"""A run that was told to end finishes its step and writes a checkpoint; after so long it is killed."""

PROCESS_BYTES = 0.8e9
"""torch and transformers, imported."""


def train_command(config: Path) -> list[str]:
    """`anon-dist train`, in this interpreter."""
    return [sys.executable, "-m", "anon_dist.cli", "train", "--config", str(config)]


@dataclass(frozen=True)
class Room:
    """What runs may use."""

    parallel: int
    """How many at once."""
    threads: int
    """Of each."""
    devices: list[str] = field(default_factory=list)
    """As CUDA_VISIBLE_DEVICES calls them; run i has the i-th, and they are shared if there are more runs. None: on the CPU."""

    @classmethod
    def of_this_machine(cls, base: Config, vocabulary: int, parallel: int | None) -> Room:
        """One run per GPU; without any, one per core, fewer where the memory that is free now would not do.

        Args:
            vocabulary: tokens that the model predicts.
            parallel: what the user asked for.
        """
        cores = len(os.sched_getaffinity(0))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        if not torch.cuda.is_available():
            devices = []
        if parallel is None:
            parallel = len(devices) or max(1, min(cores, int(free_memory() / run_bytes(base, vocabulary))))
        return cls(parallel, max(1, cores // parallel), devices)

    def environment(self, slot: int) -> dict[str, str]:
        """For the run in this slot."""
        own = {"OMP_NUM_THREADS": str(self.threads)}
        if self.devices:
            own["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
        return {**os.environ, **own}


def run_bytes(config: Config, vocabulary: int) -> float:
    """A rough upper estimate of a CPU run's memory: parameters, gradients and Anon's states, a micro-batch's activations and its logits."""
    m, tokens = config.model, config.train.micro_batch * config.data.seq_len
    parameters = 12 * m.layers * m.width**2 + 2 * vocabulary * m.width
    activations = tokens * (3 * vocabulary + m.layers * (34 * m.width + 5 * m.heads * config.data.seq_len))
    return PROCESS_BYTES + 4.0 * (5 * parameters + activations)


@dataclass
class _Child:
    folder: CellFolder
    process: subprocess.Popen[bytes]
    slot: int
    steps: int
    began: float
    told: float | None = None
    """When it was told to end."""
    stopped: Outcome | None = None
    """Why, if it is hopeless."""
    size: int = -1
    """Of its metrics file, when last read."""


class Scheduler:
    """Runs the cells that have not ended, `room.parallel` at a time.

    Args:
        peers: all cells of the sweep, whose losses the rule for early stopping compares with.
        early_stop: whether hopeless cells are stopped.
        keep_weights: whether finished cells keep checkpoint and exported model.
        command: what trains a cell.
        grace: seconds that children have to end.
    """

    def __init__(
        self,
        cells: Iterable[CellFolder],
        peers: Iterable[CellFolder],
        base: Config,
        room: Room,
        *,
        early_stop: bool = True,
        keep_weights: bool = False,
        command: Command = train_command,
        grace: float = GRACE_SECONDS,
        say: Callable[[str], None] = print,
    ) -> None:
        cells = list(cells)
        self._waiting = deque(cell for cell in cells if cell.outcome is None)
        self._total, self._ended = len(cells), len(cells) - len(self._waiting)
        self._base, self._room = base, room
        self._early_stop, self._keep_weights, self._command = early_stop, keep_weights, command
        self._grace, self._say = grace, say
        self._children: list[_Child] = []
        self._seconds: list[float] = []
        self._signal: signal.Signals | None = None
        self.in_use: list[CellFolder] = []
        """Cells in whose folders other processes are at work (a run that a killed sweep left behind, say). Nothing is recorded of them."""
        self._curves: dict[str, Curve] = {}
        self._bad: dict[str, bool] = {}
        self._kind: dict[str, tuple[Any, ...]] = {}
        for peer in {p.cell.name: p for p in (*peers, *cells)}.values():
            self._curves[peer.cell.name] = peer.curve()
            self._bad[peer.cell.name] = peer.state in ("failed", "stopped")
            self._kind[peer.cell.name] = comparable(peer)

    def run(self) -> bool:
        """Run them all.

        Returns:
            False if SIGINT or SIGTERM ended it early. The children have ended, and the same sweep can go on.
        """
        numbers = (signal.SIGINT, signal.SIGTERM)
        old = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            while (self._waiting or self._children) and self._signal is None:
                self._start()
                self._reap()
                if self._early_stop:
                    self._stop_hopeless()
                time.sleep(POLL_SECONDS)
        finally:
            self._end_children()
            for number, handler in old.items():
                signal.signal(number, handler)
        return self._signal is None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            self._grace = 0.0  # asked twice: at once
        self._signal = signal.Signals(number)

    def _start(self) -> None:
        free = [slot for slot in range(self._room.parallel) if slot not in {c.slot for c in self._children}]
        for slot in free[: len(self._waiting)]:
            folder = self._waiting.popleft()
            folder.plan(self._base)
            with folder.log.open("ab") as log:
                process = subprocess.Popen(
                    self._command(folder.path / "cell.yaml"),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._room.environment(slot),
                    start_new_session=True,  # a terminal's Ctrl-C is ours to pass on
                    preexec_fn=_end_with_parent,
                )
            steps = folder.cell.config(self._base).train.steps
            self._children.append(_Child(folder, process, slot, steps, time.monotonic()))

    def _reap(self) -> None:
        for child in list(self._children):
            code = self._exit_code(child)
            if code is not None:
                self._children.remove(child)
                self._conclude(child, code)

    def _exit_code(self, child: _Child) -> int | None:
        """None while it runs. One that was told to end and has not, in the time it was given, is killed."""
        code = child.process.poll()
        if code is None and child.told is not None and time.monotonic() - child.told > self._grace:
            _send(child, signal.SIGKILL)
        return code

    def _conclude(self, child: _Child, code: int) -> None:
        if code == IN_USE:
            self.in_use.append(child.folder)
            self._total -= 1
            self._say(f"{child.folder.cell.setting} seed={child.folder.cell.seed}: {child.folder.last_line()}")
            return
        outcome = child.folder.judge(code)
        if outcome.state != "finished" and child.stopped:
            outcome = child.stopped
        child.folder.end(outcome)
        self._bad[child.folder.cell.name] = outcome.state != "finished"
        self._read(child)
        if outcome.state == "finished" and not self._keep_weights:
            child.folder.drop_weights()
        self._ended += 1
        self._seconds.append(time.monotonic() - child.began)
        what = f"{outcome.loss:.4f}" if outcome.loss is not None else f"{outcome.state}: {outcome.reason}"
        self._say(
            f"[{self._ended}/{self._total}] {child.folder.cell.setting} seed={child.folder.cell.seed}: {what}{self._left()}"
        )

    def _left(self) -> str:
        mean = sum(self._seconds) / len(self._seconds)
        minutes = mean * (self._total - self._ended) / self._room.parallel / 60.0
        return f"  (about {minutes:.0f} min left)" if minutes >= 1.0 else ""

    def _read(self, child: _Child) -> bool:
        """Whether there is something new in its metrics."""
        file = child.folder.path / "metrics.jsonl"
        size = file.stat().st_size if file.exists() else -1
        if size == child.size:
            return False
        child.size = size
        self._curves[child.folder.cell.name] = child.folder.curve()
        return True

    def _stop_hopeless(self) -> None:
        for child in self._children:
            if child.told is not None or not self._read(child):
                continue
            name = child.folder.cell.name
            others = [n for n in self._curves if n != name and self._kind[n] == self._kind[name]]
            peers = [Peer(self._curves[n], self._bad[n]) for n in others]
            reason = hopeless(self._curves[name], peers, child.steps)
            if reason is not None:
                child.stopped = Outcome("stopped", max(self._curves[name]), reason)
                self._tell(child)

    def _tell(self, child: _Child) -> None:
        child.told = time.monotonic()
        _send(child, signal.SIGTERM)

    def _end_children(self) -> None:
        """Those that come to their end are recorded; the others go on from their checkpoints another time."""
        if self._children:
            self._say(f"Ending {len(self._children)} runs; the same command goes on from their checkpoints.")
        for child in self._children:
            if child.told is None:
                self._tell(child)
        while self._children:
            for child in list(self._children):
                code = self._exit_code(child)
                if code is None:
                    continue
                self._children.remove(child)
                if child.stopped or (code == 0 and child.folder.judge(0).state == "finished"):
                    self._conclude(child, code)
            time.sleep(POLL_SECONDS / 4)


def comparable(folder: CellFolder) -> tuple[Any, ...]:
    """What two cells must share for their losses at the same step to say which is better: all but the optimizer and the seed."""
    return tuple(sorted((k, str(v)) for k, v in folder.cell.settings.items() if not k.startswith("optim.")))


def _send(child: _Child, number: signal.Signals) -> None:
    """To the run and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process.pid, number)


def _end_with_parent() -> None:
    """In the child: SIGTERM when the sweep is killed (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
