"""Where the metrics go: metrics.jsonl always, a line of a table and of progress, and accelerate's trackers."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from anon_dist.train.reports.pace import Pace

Record = dict[str, Any]
"""Of numbers, but for `WORDS`."""
NOT_FINITE = "not_finite"
"""In a file, the metrics that are no finite numbers, by what they are; their own values are null, as JSON has none for them."""
WORDS = frozenset({"slowest_host"})
"""Metrics that are text."""
TASK = "task/"
"""Begins the name of a task's metric: task/NAME/METRIC."""
PARTS = ("data", "forward", "backward", "optimizer", "logging")
"""Of a step, by whose names the loop tells its `Stopwatch`; "other" is what is left."""


def to_json(record: Record) -> Record:
    """A record with nothing in it that strict JSON lacks; `from_json` takes that back."""
    odd = {k: v for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    told = "; ".join(f"{key} {value}" for key, value in odd.items())
    return {**record, **dict.fromkeys(odd), NOT_FINITE: told} if odd else record


def from_json(record: Record) -> Record:
    """A record as it was before `to_json`. Earlier versions wrote NaN and Infinity, as Python reads and writes them."""
    told = record.get(NOT_FINITE)
    if not isinstance(told, str):
        return record
    odd = {key: value for key, _, value in (each.rpartition(" ") for each in told.split("; "))}
    return {k: float(odd[k]) if v is None and k in odd else v for k, v in record.items() if k != NOT_FINITE}


class MetricsFile:
    """`metrics.jsonl`: a JSON object a line, by step. A resumed run first takes out the lines of steps it will repeat.

    In place: that takes no room on a full disk. What `anon-dist eval` added of earlier checkpoints stays, though it stands behind them, and
    so does a damaged line that others follow: readers pass it over.

    Raises:
        OSError: of any method.
    """

    def __init__(self, path: Path, resumed_at: int) -> None:
        lines = _lines(path)
        while lines and lines[-1][1] is None:  # torn by a kill
            lines.pop()
        self.damaged = [number for number, (_, record) in enumerate(lines, 1) if record is None]
        """Numbers of the lines that are no records."""
        stays = [r is None or (r["step"] <= resumed_at and "final_loss" not in r) for _, r in lines]
        first = stays.index(False) if False in stays else len(lines)
        later = b"".join(line for (line, _), kept in zip(lines[first:], stays[first:], strict=True) if kept)
        with path.open("r+b" if path.exists() else "wb") as file:
            file.seek(sum(len(line) for line, _ in lines[:first]))
            file.write(later)
            file.truncate()
        self._path, self._torn = path, False
        self._file = path.open("a+b", buffering=0)
        self._whole = self._file.seek(0, os.SEEK_END)

    def write(self, record: Record) -> None:
        """Append a record, as a line. If that fails nothing of it stays: not now, or not once the next one is written."""
        line = _line(record)
        if self._torn:
            self._cut()
        self._torn, left = True, memoryview(line)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            with suppress(OSError):
                self._cut()
            raise
        self._torn, self._whole = False, self._whole + len(line)

    def confirm(self) -> str | None:
        """See that the file still has its name. If somebody took it away, or made it empty, it is written anew.

        Returns:
            What was mended.

        Raises:
            OSError: it cannot be written, or something else has the name.
        """
        own = os.fstat(self._file.fileno())
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            there = None
        if there is not None and (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino):
            if own.st_size >= self._whole:
                return None
            lost, self._whole = self._whole - own.st_size, own.st_size
            return f"another process has cut {lost:,} bytes off {self._path}; they are lost"
        if there is not None and not (stat.S_ISREG(there.st_mode) and there.st_size == 0):
            raise FileExistsError(errno.EEXIST, "it was moved, and something else has its name", str(self._path))
        records = os.pread(self._file.fileno(), self._whole, 0)
        new = self._path.open("a+b", buffering=0)
        new.write(records)
        self._file.close()
        self._file, self._torn = new, False
        return f"{self._path} was taken away while the run was at work, and is written anew with all its records"

    def _cut(self) -> None:
        """Take out what there is of a line that could not be written."""
        self._file.truncate(self._whole)
        self._torn = False

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(record: Record) -> bytes:
    return (json.dumps(to_json(record), allow_nan=False) + "\n").encode()


def add_metrics(path: Path, record: Record) -> None:
    """Append a record to the metrics of a run that is not at work.

    Raises:
        OSError: it cannot be written.
    """
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(data.rfind(b"\n") + 1)  # a line torn by a kill goes
        file.truncate()
        file.write(_line(record))


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics file; a line torn by a kill, or damaged, is left out."""
    return [record for _, record in _lines(path) if record is not None]


def _lines(path: Path) -> list[tuple[bytes, Record | None]]:
    """All lines, and what they say; None: it is no record."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [(line, _record(line)) for line in lines]


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
        whole = line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("step"), int)
        return from_json(record) if whole else None
    except ValueError:
        return None


class _Bar(tqdm):  # type: ignore[type-arg]
    """Whose time left is told: tqdm's own takes a validation for a slow step."""

    left: float | None = None

    @property
    def format_dict(self) -> dict[str, Any]:
        """See tqdm."""
        return {**super().format_dict, "left": "?" if self.left is None else tqdm.format_interval(self.left)}


class Console:
    """The run as a person sees it: a line of a table for each record, and on a terminal a line of progress below."""

    def __init__(self, steps: int, start: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._bar = (
            _Bar(total=steps, initial=start, unit="step", dynamic_ncols=True, bar_format=_PROGRESS)
            if sys.stderr.isatty()
            else None
        )
        self._logged = ExitStack()
        if self._bar is not None:
            self._logged.enter_context(logging_redirect_tqdm())  # a warning stands above the bar, not in it
        self._steps, self._pace = steps, Pace(steps, start, clock)
        self._shown: dict[str, str] = {}

    def step(self, step: int) -> None:
        """Move the bar to what is taken now."""
        self._pace.step(step)
        if self._bar is not None:
            self._bar.left = self._pace.left()
            self._bar.update(step - self._bar.n)

    def pause(self) -> None:
        """A validation, or a save, is over, if there was one."""
        self._pace.pause()

    def record(self, record: Record) -> None:
        """Show a record of metrics."""
        if any(key.startswith(TASK) for key in record):
            for line in task_lines(record, self._steps):
                self.say(line)
            return
        if not any(key in record for key, *_ in _COLUMNS):  # what came of the last saves
            return
        self.say(table_line(record, self._steps, self._pace.left()))
        if self._bar is not None:
            words = (("loss", "loss"), ("val_loss", "val"), ("tokens_per_s", "tok/s"), ("mfu", "mfu"))
            self._shown |= {word: _spelled(key, record[key]) for key, word in words if key in record}
            self._bar.set_postfix(self._shown)

    def say(self, text: str) -> None:
        """A line for the person watching, above the progress if there is one. The run goes on if nobody can read it."""
        if self._bar is None:
            with suppress(OSError):  # whoever read it is gone, or its disk is full
                print(text, flush=True)
        else:
            self._bar.write(text)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
        self._logged.close()


_PROGRESS = "{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{left}{postfix}]"
LINE = 100
"""Most columns of a line of the table."""
_COLUMNS = (
    ("loss", "loss", 7),
    ("lr", "lr", 9),
    ("grad_norm", "norm", 7),
    ("skipped", "skipped", 2),
    ("val_loss", "val_loss", 7),
    ("val_perplexity", "perplexity", 7),
    ("val_bits_per_byte", "bits/byte", 7),
    ("tokens_per_s", "tok/s", 9),
    ("mfu", "mfu", 5),
    ("memory_gb", "mem", 7),
)
"""Key of a record, its word, the width of its value. The other metrics are for the file and the trackers."""


def table_line(record: Record, steps: int, left: float | None) -> str:
    """A record in a line of at most `LINE` columns, each number under that of the line before.

    Args:
        steps: of the whole run.
        left: seconds to its end, if they can be told.
    """
    cells = [f"step={record['step']:<{len(str(steps))}}"]
    cells += [f"{word}={_spelled(key, record[key]):<{width}}" for key, word, width in _COLUMNS if key in record]
    if left is not None and "loss" in record:
        cells.append(f"eta={tqdm.format_interval(left)}")
    while len(line := " ".join(cells).rstrip()) > LINE and len(cells) > 2:
        cells.pop(-2)
    return line


def task_lines(record: Record, steps: int) -> list[str]:
    """The scores of each task in a line of at most `LINE` columns."""
    by_task: dict[str, str] = {}
    for key, value in record.items():
        if key.startswith(TASK) and "_stderr" not in key:
            name, _, metric = key.removeprefix(TASK).partition("/")
            by_task[name] = f"{by_task.get(name, name)} {metric}={value:.4g}"
    return [f"step={record['step']:<{len(str(steps))}} {line}"[:LINE] for line in by_task.values()]


def _spelled(key: str, value: float | int) -> str:
    if key == "lr":
        return f"{value:.3e}"
    if key == "tokens_per_s":
        return f"{value:,.0f}"
    if key == "mfu":
        return f"{value:.1%}"
    if key == "memory_gb":
        return f"{value:.4g}GB"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


class Stopwatch:
    """Seconds spent in parts of the loop since the last reading.

    On a GPU by its own clock, through events in its stream: what counts is when the GPU came to an end of a part, not the host. Nothing
    waits before `read`.
    """

    def __init__(self, device: torch.device, told: Callable[[str], None] = lambda part: None) -> None:
        """`told`: what is to know of each lap at once."""
        self._device, self._told = device, told
        self._marks: list[tuple[str | None, Any]] = [(None, self._now())]

    def lap(self, part: str) -> None:
        """Count the time since the last lap as `part`'s."""
        self._marks.append((part, self._now()))
        self._told(f"after {part}")

    def skip(self) -> None:
        """Do not count the time since the last lap."""
        self._marks.append((None, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by part; the watch starts anew."""
        seconds: dict[str, float] = {}
        if self._device.type == "cuda":
            self._marks[-1][1].synchronize()
        for (_, start), (part, end) in pairwise(self._marks):
            if part is not None:
                took = start.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - start
                seconds[part] = seconds.get(part, 0.0) + took
        self._marks = [(None, self._marks[-1][1])]
        return seconds

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
