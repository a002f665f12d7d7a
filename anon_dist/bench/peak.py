"""Memory that a step needs beside parameters, gradients and state. On the CPU, in a fresh process, by the growth of its peak.

    python -m anon_dist.bench.peak NAME THREADS < SHAPES

prints bytes. Large blocks go back to the system at once there (MALLOC_MMAP_THRESHOLD_), so that what an earlier step has freed does not
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

SECONDS = 600


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


def in_fresh_process(name: str, shapes: Shapes) -> int | None:
    """`working_bytes` of an optimizer's steps on the CPU; None if the process failed, for want of memory, say."""
    command = [sys.executable, "-m", "anon_dist.bench.peak", name, str(torch.get_num_threads())]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    try:
        done = subprocess.run(
            command, input=json.dumps(shapes), capture_output=True, text=True, timeout=SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return None
    return int(done.stdout.splitlines()[-1]) if done.returncode == 0 and done.stdout else None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Of the optimizer and the shapes that the parent names."""
    name, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    (contestant,) = (c for c in contestants() if c.name == name)
    _, steps = make(contestant, parameters(json.load(sys.stdin), torch.device("cpu")))
    print(working_bytes(steps.values(), torch.device("cpu")))


if __name__ == "__main__":
    main()
