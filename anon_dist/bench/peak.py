"""Memory that a step needs beside parameters, gradients and state. On the CPU, in a fresh process, by the growth of its peak.

    python -m anon_dist.bench.peak THREADS NAME … < SHAPES

Large blocks go back to the system at once in it (MALLOC_MMAP_THRESHOLD_), so that what an earlier step has freed does not
hide what a later one takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from anon_dist.bench.clock import Step
from anon_dist.bench.optimizers import contestants, make
from anon_dist.bench.shape_lists import Shapes, parameters

MARK = "working bytes"
"""Begins the lines that the parent reads; packages print others."""


def working_bytes(steps: Iterable[Step], device: torch.device) -> int:
    """The most that one of the steps takes for the time that it runs.

    Raises:
        OSError: the system does not let a process reset its peak (/proc/self/clear_refs).
    """
    most = 0
    for step in steps:
        step.prepare()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            step.run()
            most = max(most, torch.cuda.max_memory_allocated(device) - before)
            continue
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        step.run()
        most = max(most, _status("VmHWM") - before)
    return most


@contextlib.contextmanager
def growth(device: torch.device) -> Iterator[Callable[[], int]]:
    """A block whose most bytes of tensors at once, beyond those before it, are told by what it is given, afterwards.

    By torch's allocator; on the CPU by its events, which torch's profiler records.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield lambda: _most_at_once(recorded)


def _most_at_once(recorded: profile) -> int:
    results = getattr(recorded.profiler, "kineto_results", None)
    assert results is not None  # once the block has ended
    events = [event for event in results.events() if event.name() == "[memory]"]
    changes: list[int] = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0))


def lasting_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """Of parameters, buffers and the optimizer's state on this rank; what shares memory counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local if t.numel()}.values())


def in_fresh_process(names: list[str], shapes: Shapes) -> dict[str, int]:
    """`working_bytes` of these optimizers' steps on the CPU. One at which the process failed, for want of memory, say, is missing."""
    found, left = dict[str, int](), list(names)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    while left:
        command = [sys.executable, "-m", "anon_dist.bench.peak", str(torch.get_num_threads()), *left]
        done = subprocess.run(command, input=json.dumps(shapes), stdout=subprocess.PIPE, text=True, env=environment)
        marked = [line.split("\t")[1:] for line in done.stdout.splitlines() if line.startswith(MARK)]
        found |= {name: int(taken) for name, taken in marked}
        left = left[len(marked) + 1 :]  # the process ended at the next one, or with the last
    return found


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Of the optimizers and the shapes that the parent names, one after the other."""
    threads, *names = sys.argv[1:]
    torch.set_num_threads(int(threads))
    tensors, known = parameters(json.load(sys.stdin), torch.device("cpu")), {c.name: c for c in contestants()}
    for name in names:
        _, steps = make(known[name], tensors)
        print(MARK, name, working_bytes(steps.values(), torch.device("cpu")), sep="\t", flush=True)


if __name__ == "__main__":
    main()
