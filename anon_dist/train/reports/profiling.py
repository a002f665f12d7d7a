"""What a person looks into when steps are slow or memory runs out: a trace of some steps, a snapshot of the GPU's memory.

Without `log.profile_steps` nothing is recorded; where memory runs out, what is allocated then is written all the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

FOLDER = "profile"
"""In the run's."""
MOST_EVENTS = 200_000
"""Allocations that a snapshot goes back."""
VIEWER = "https://docs.pytorch.org/memory_viz"


class Profiler:
    """Of the first rank's steps, and of every rank's memory.

    Args:
        steps: the first and the last one to trace; None: none.
        folder: of the run.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, device: torch.device, rank: int) -> None:
        self._steps, self._folder, self._device, self._rank = steps, folder / FOLDER, device, rank
        self._trace: profile | None = None
        self._first = self._last = 0
        self._recording = steps is not None and device.type == "cuda"
        if self._recording:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS, stacks="python")

    def before(self, step: int) -> None:
        """Begin to trace, if this step, which is about to be taken, is one of those."""
        if self._trace is not None or self._steps is None or not self._steps[0] <= step <= self._steps[1]:
            return
        if self._rank == 0:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
            self._trace = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._first = step
            self._trace.start()

    def after(self, step: int) -> None:
        """End tracing, if this was the last step of those, and write what there is."""
        self._last = step
        if self._steps is not None and step == self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write what has been traced."""
        trace, self._trace = self._trace, None
        if trace is not None:
            trace.stop()
            file = self._folder / f"steps-{self._first}-to-{self._last}.json.gz"
            with self._writing(file):
                trace.export_chrome_trace(str(file))
                print(
                    f"Trace of steps {self._first} to {self._last}: {file}; open it in https://ui.perfetto.dev",
                    flush=True,
                )
        if self._recording:
            self._recording = False
            self._snapshot(f"memory-rank-{self._rank}.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)

    @contextlib.contextmanager
    def watching_memory(self) -> Iterator[None]:
        """A block whose end for want of GPU memory leaves a snapshot."""
        try:
            yield
        except torch.OutOfMemoryError:
            self._snapshot(f"out-of-memory-rank-{self._rank}.pickle")
            raise

    def _snapshot(self, name: str) -> None:
        file = self._folder / name
        with self._writing(file):
            torch.cuda.memory._dump_snapshot(str(file))
            print(f"Snapshot of rank {self._rank}'s GPU memory: {file}; open it in {VIEWER}", flush=True)

    @contextlib.contextmanager
    def _writing(self, file: Path) -> Iterator[None]:
        """A block that writes a file; the run goes on if it cannot."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            yield
        except (OSError, RuntimeError) as error:
            print(f"WARNING: {file} could not be written: {error}", flush=True)
