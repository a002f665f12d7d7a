"""Memory that a step needs beside parameters, gradients and state. On the CPU, in a fresh process, by the growth of its peak.

    python -m anon_dist.bench.peak THREADS NAME … < SHAPES

Large blocks go back to the system at once in it (MALLOC_MMAP_THRESHOLD_), so that what an earlier step has freed does not
hide what a later one takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

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
