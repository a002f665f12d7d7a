"""Where the metrics go: metrics.jsonl always, a progress bar or key=value lines, and accelerate's trackers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

Record = dict[str, float | int]


class MetricsFile:
    """`metrics.jsonl`: a JSON object a line, by step. A resumed run first cuts off the lines of steps it will repeat.

    Cut in place: that takes no room on a full disk.

    Raises:
        OSError: of any method.
    """

    def __init__(self, path: Path, resumed_at: int) -> None:
        kept = 0
        for line, record in _records(path):
            if record["step"] > resumed_at or "final_loss" in record:
                break
            kept += len(line)
        with path.open("ab") as file:
            file.truncate(kept)
        self._file = path.open("a", buffering=1)

    def write(self, record: Record) -> None:
        """Append a record, as a line."""
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics file; a last line torn by a kill is left out."""
    return [record for _, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[bytes, Record]]:
    """Lines that are whole, and what they say."""
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or not isinstance(record, dict) or "step" not in record:
            return
        yield line, record


class Console:
    """The run as a person sees it: a progress bar on a terminal, lines of key=value elsewhere."""

    def __init__(self, steps: int, start: int) -> None:
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        self._shown: dict[str, str] = {}

    def step(self) -> None:
        """Move the bar on by a step."""
        if self._bar is not None:
            self._bar.update()

    def record(self, record: Record) -> None:
        """Show a record of metrics."""
        if self._bar is None:
            # Those of single param groups are for the file and the trackers.
            self.say(" ".join(f"{k}={_short(v)}" for k, v in record.items() if "/" not in k))
            return
        for key in ("loss", "val_loss", "lr", "tokens_per_s"):
            if key in record:
                self._shown[key] = _short(record[key])
        self._bar.set_postfix(self._shown)

    def say(self, text: str) -> None:
        """A line for the person watching, above the bar if there is one. The run goes on if nobody can read it."""
        if self._bar is None:
            with suppress(OSError):  # whoever read it is gone, or its disk is full
                print(text, flush=True)
        else:
            self._bar.write(text)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


class Stopwatch:
    """Seconds spent in parts of the loop since the last reading.

    On a GPU by its own clock, through events in its stream: what counts is when the GPU came to an end of a part, not the host. Nothing
    waits before `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str | None, Any]] = [(None, self._now())]

    def lap(self, part: str) -> None:
        """Count the time since the last lap as `part`'s."""
        self._marks.append((part, self._now()))

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
