"""What computes here."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def free_memory() -> float:
    """Bytes that the machine can give (page cache included), or that are left of a control group's limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, float(limit - used))
    return free
