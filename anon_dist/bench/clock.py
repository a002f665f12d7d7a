"""Times of steps, in alternating pairs, and what memory gives."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from anon_dist.optim.backends.build import load


def nothing() -> None:
    """Nothing has to be done before a step."""


@dataclass(frozen=True)
class Step:
    """What is timed."""

    run: Callable[[], object]
    moved: float
    """Bytes that it must read and write for each element."""
    prepare: Callable[[], None] = nothing
    """Called before each, untimed."""


def timed(step: Step, device: torch.device) -> float:
    """Seconds of one; on CUDA, of the device between two events."""
    step.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step.run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    begun = time.perf_counter()
    step.run()
    return time.perf_counter() - begun


def measure(base: Step, other: Step, pairs: int, device: torch.device) -> tuple[float, float, float]:
    """Medians over `pairs` of one and then the other: of other / base, and the seconds of each."""
    both = np.array([(timed(base, device), timed(other, device)) for _ in range(pairs)])
    ratio, (first, second) = np.median(both[:, 1] / both[:, 0]), np.median(both, axis=0)
    return float(ratio), float(first), float(second)


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return [float(q) for q in np.quantile(values, [0.25, 0.5, 0.75])]


def stream(elements: int, device: torch.device) -> Step:
    """One pass over memory: on the CPU four arrays are read and two of them written (`stream.c`), on CUDA torch copies one.

    Raises:
        BuildError: there is no C compiler.
    """
    if device.type == "cuda":
        source, target = torch.zeros(2, elements, device=device)
        return Step(lambda: target.copy_(source), 8)
    library = load(Path(__file__).with_name("stream.c"))
    arrays = [torch.zeros(elements) for _ in range(4)]

    def run() -> None:
        pointers = [ctypes.c_void_p(a.data_ptr()) for a in arrays]
        library.stream(*pointers, ctypes.c_int64(elements), ctypes.c_int32(torch.get_num_threads()))

    return Step(run, 24)
