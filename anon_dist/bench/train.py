"""Measures pretraining end to end: this package's loop with Anon and with AdamW, and a plain Hugging Face Trainer, in turns.

Each contender is a process of its own, with the same model, samples, batches, clipping and precision. They take turns of a few steps, so
that other work on the machine meets all alike; what is compared are the ratios of turns next to each other.
"""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from anon_dist.bench.options import TrainOptions
from anon_dist.data import DataError, Index
from anon_dist.train.config.parsing import Config, ConfigError, accumulation, check, find_config, load_config, to_yaml
from anon_dist.usage import ending

Kind = Literal["anon", "adamw", "trainer"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NAMES = {"anon": "this loop, Anon", "adamw": "this loop, AdamW fused", "trainer": "HF Trainer, adamw_torch_fused"}


class BenchError(RuntimeError):
    """A contender failed, or took too long."""


class Process:
    """A contender, started. Leaving it ends the process."""

    def __init__(self, kind: Kind, config: Path, deadline: float) -> None:
        self._kind, self._deadline = kind, deadline
        self._log = config.with_name(f"{kind}.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "anon_dist.bench.contender", kind, str(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, words: str) -> dict[str, float]:
        """Its answer.

        Raises:
            BenchError: it ended instead, or the time is over; with the end of its output.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(words + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("ended") from None
        ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, self._deadline - time.monotonic()))
        line = self._process.stdout.readline() if ready else ""
        if not line:
            raise self._failed("ended" if ready else "took longer than --minutes allows")
        answer: dict[str, float] = json.loads(line)
        return answer

    def _failed(self, what: str) -> BenchError:
        self._log.seek(0)
        return BenchError(f"{NAMES[self._kind]} {what}:\n{self._log.read()[-2000:]}")


@dataclass(frozen=True)
class Result:
    """What was measured of a contender."""

    tokens_per_s: list[float]
    """Of each turn."""
    peak_bytes: int
    """Resident, or allocated on the GPU."""

    def ratios(self, other: Result) -> list[float]:
        """Lower quartile, median and upper quartile of its speed over another's, turn by turn."""
        both = zip(self.tokens_per_s, other.tokens_per_s, strict=True)
        return [float(q) for q in np.quantile([a / b for a, b in both], [0.25, 0.5, 0.75])]


def config_of(options: TrainOptions, folder: Path) -> Config:
    """The contenders' configuration.

    Raises:
        ConfigError: it does not exist, or its numbers do not go together.
        DataError: nothing was prepared there.
    """
    if options.turn < 1 or options.repeats < 1:
        raise ConfigError(f"--turn {options.turn} and --repeats {options.repeats} must be at least 1")
    config = load_config(find_config(options.config))
    config.data.path, config.run_dir, config.resume = str(options.data), str(folder), "never"
    config.data.sources, config.data.phases, config.eval.sets = {}, (), {}
    config.data.mask_documents = False  # which the Trainer does not do
    config.train.engine, config.log.trackers = "single", ()
    config.train.micro_batch = options.micro_batch or config.train.micro_batch
    config.train.global_batch = options.global_batch or config.train.global_batch
    config.train.steps = max(config.train.steps, (options.repeats + 1) * options.turn + 1)
    check(config)
    accumulation(config, 1)
    Index.load(config.data.path)
    return config


def measure(config: Config, options: TrainOptions, folder: Path) -> dict[Kind, Result]:
    """All contenders, in turns; who goes first changes from one repeat to the next.

    Raises:
        BenchError: see there.
    """
    path, deadline = folder / "config.yaml", time.monotonic() + 60 * options.minutes
    path.write_text(to_yaml(config))
    seconds: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        processes = {kind: stack.enter_context(Process(kind, path, deadline)) for kind in KINDS}
        for repeat in range(options.repeats + 1):
            for i in range(len(KINDS)):
                kind = KINDS[(i + repeat) % len(KINDS)]
                seconds[kind].append(processes[kind].ask(str(options.turn))["seconds"])
        peaks = {kind: int(process.ask("end")["peak_bytes"]) for kind, process in processes.items()}
    tokens = options.turn * config.train.global_batch * config.data.seq_len
    return {kind: Result([tokens / s for s in seconds[kind][1:]], peaks[kind]) for kind in KINDS}


def main(options: TrainOptions) -> None:
    """`anon-dist bench train`"""
    with ending(BenchError, ConfigError, DataError, OSError), tempfile.TemporaryDirectory() as name:
        config = config_of(options, Path(name))
        results = measure(config, options, Path(name))
    show(options, config, results)
    if options.json:
        options.json.write_text(json.dumps(as_json(options, config, results), indent=1) + "\n")


def as_json(options: TrainOptions, config: Config, results: dict[Kind, Result]) -> dict[str, Any]:
    """All that was measured, and under which conditions."""
    return {
        "kind": "measured",
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        "config": asdict(config),
        "device": device(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "contenders": {
            kind: asdict(result) | {"speed_over_trainer": result.ratios(results["trainer"])}
            for kind, result in results.items()
        },
    }


def device() -> str:
    """What it ran on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"


def show(options: TrainOptions, config: Config, results: dict[Kind, Result]) -> None:
    """As a table."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(
        f"Measured here: {options.config}, {config.train.global_batch} x {config.data.seq_len} tokens a step in micro-batches of "
        f"{config.train.micro_batch}, {config.train.precision}; {options.repeats} turns of {options.turn} steps each; {device()}, "
        f"torch {torch.__version__}, load average {os.getloadavg()[0]:.1f}",
        highlight=False,
    )
    memory = "GB allocated at the peak" if torch.cuda.is_available() else "GB resident at the peak"
    table = Table("contender", "tokens/s", "speed over the Trainer's", "quartiles", memory)
    for kind, result in results.items():
        low, middle, high = result.ratios(results["trainer"])
        speed = statistics.median(result.tokens_per_s)
        table.add_row(
            NAMES[kind], f"{speed:,.0f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{result.peak_bytes / 1e9:.2f}"
        )
    console.print(table)
