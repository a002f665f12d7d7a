"""Where a process is: its Python stacks, the collectives it has begun, and what the kernel says of it. Works while it hangs."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

COLLECTIVES = 20
"""Of each group, how many of the last are told."""
RECORDED = "2000"
"""Collectives that torch's flight recorder keeps."""
LOOKS = 8
"""At the threads of a process that does not answer."""
_STATES = {
    "T": "stopped (by SIGSTOP, a terminal or a job scheduler)",
    "t": "stopped by a debugger",
    "D": "waiting in the kernel for a disk or a file system that does not answer",
    "Z": "dead, and nobody has fetched its exit code",
    "X": "dead",
}
_WAITS = ("threading.py", "queue.py", "selectors.py", "concurrent/futures/_base.py", "concurrent/futures/thread.py")


def record_collectives(folder: Path) -> None:
    """Have torch's flight recorder on, before process groups are made; what the environment says already stays.

    NCCL's own watchdog dumps into `folder`, if it comes first. (The NCCL part has not been run.)
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDED)
    if torch.cuda.is_available():
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "nccl_trace_rank_"))


def collectives() -> list[dict[str, Any]]:
    """Of each process group the last collectives, oldest first: group, ranks, name, number, sizes, and whether it is still running.

    Empty where torch records none.
    """
    found = []
    for dump in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        if (function := getattr(torch._C._distributed_c10d, dump, None)) is not None:
            with suppress(Exception):  # one that this build or backend has not
                found += json.loads(function(True, False)).get("entries", [])
    ranks = _ranks_of_groups()
    by_group: dict[str, list[dict[str, Any]]] = {}
    for entry in sorted(found, key=lambda e: e["record_id"]):
        name, description = (*entry["process_group"], "")[:2]
        told = {
            "group": name,
            "ranks": ranks.get(name),
            "name": entry["profiling_name"],
            "number": entry["op_id"],
            "sizes": entry["input_sizes"],
            "running": not entry["retired"] and entry["state"] != "completed",
            "description": description,
        }
        by_group.setdefault(name, []).append(told)
    return [told for entries in by_group.values() for told in entries[-COLLECTIVES:]]


def _ranks_of_groups() -> dict[str, list[int]]:
    """Group's name → its ranks."""
    with suppress(Exception):
        world = distributed_c10d._world
        return {world.pg_names[group]: sorted(ranks) for group, ranks in world.pg_group_ranks.items()}
    return {}


def stacks(without: Iterable[int] = ()) -> tuple[str, str]:
    """The Python stacks of all threads but those of these idents, and in a line where the main thread is.

    Another thread that is at work is named where the main thread waits for one.
    """
    frames, texts = sys._current_frames(), []
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    busy = []
    for ident, frame in sorted(frames.items(), key=lambda item: item[0] != main):
        if ident in without:
            continue
        name = names.get(ident, str(ident))
        texts.append(f"thread {name}:\n" + "".join(traceback.format_stack(frame)))
        if ident != main and not _waits(frame):
            busy.append(f"thread {name} in {place(frame)}")
    where = "its main thread is gone"
    if main in frames:
        where = place(frames[main])
        if _waits(frames[main]) and busy:
            where += f", which waits for {'; '.join(busy[:2])}"
    return "\n".join(texts), where


def _waits(frame: FrameType) -> bool:
    return frame.f_code.co_filename.endswith(_WAITS)


def place(frame: FrameType) -> str:
    """The innermost line of this package's or a user's code, and what it has called of libraries."""
    inner, ours = _line(frame), None
    at: FrameType | None = frame
    while at is not None and ours is None:
        if not any(part in at.f_code.co_filename for part in ("/site-packages/", "/lib/python", "<frozen")):
            ours = _line(at)
        at = at.f_back
    return inner if ours in (None, inner) else f"{ours}, in {inner}"


def _line(frame: FrameType) -> str:
    path = "/".join(Path(frame.f_code.co_filename).parts[-3:])
    return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"


def own() -> dict[str, Any]:
    """By what the processes of a host find each other: host, pid, when it began, and the namespace in which the pid means something."""
    import socket

    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": _stat(Path("/proc/self/stat"))[1],
        "space": space,
    }


def of_process(pid: int, began: int) -> str:
    """What the kernel says of a process of this host, in words; "gone" if it has ended."""
    folder = Path(f"/proc/{pid}")
    state, since = _stat(folder / "stat")
    if not state or since != began:
        return "gone: the process has ended"
    if state in _STATES and state != "D":
        return _STATES[state]
    looks = []
    for _ in range(LOOKS):
        looks.append({task.name: _stat(task / "stat")[0] for task in folder.glob("task/*")})
        time.sleep(0.05)
    if any(all(look.get(task) == "D" for look in looks) for task in looks[0]):  # for a moment anything may be
        return _STATES["D"]
    if any("R" in look.values() for look in looks):
        return "computing, in code that does not let Python's other threads run"
    return "waiting in code that does not let Python's other threads run"


def _stat(path: Path) -> tuple[str, int]:
    """State and beginning of a process or thread; "" if there is none."""
    try:
        fields = path.read_bytes().rpartition(b")")[2].split()
    except OSError:
        return "", 0
    return fields[0].decode(), int(fields[19])


def world() -> tuple[int, int]:
    """This rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def of_faulthandler(text: str) -> str:
    """Where the current thread was, by the stacks that `faulthandler` writes; "" if it has not."""
    threads = [part for part in text.split("\n\n") if part.strip()]
    current = [part for part in threads if part.startswith(("Current thread", "Thread")) and "Current" in part]
    lines = (
        [line.strip().removeprefix("File ") for line in (current or threads)[-1].splitlines()[1:]] if threads else []
    )
    return f"in {lines[0]}" if lines else ""
