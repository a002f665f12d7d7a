"""Where and when something was measured."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import UTC, datetime

import torch

from anon_dist.machine import processor


@dataclass
class Machine:
    """What a time depends on besides the code."""

    device: str
    """Name of the CPU or GPU."""
    cores: int
    """CPU cores that this process may use."""
    threads: int
    """Of torch."""
    torch: str
    """Its version."""
    load_before: float
    """Processes that wanted to run, mean of the minute before."""
    load_after: float | None = None
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def line(self) -> str:
        """All of it."""
        after = "" if self.load_after is None else f" to {self.load_after:.1f}"
        return (
            f"{self.device}, {self.cores} cores, {self.threads} threads, torch {self.torch}, load average {self.load_before:.1f}"
            f"{after}, {self.date}"
        )


def machine(device: torch.device) -> Machine:
    """This one, now."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return Machine(name, len(os.sched_getaffinity(0)), torch.get_num_threads(), torch.__version__, os.getloadavg()[0])
