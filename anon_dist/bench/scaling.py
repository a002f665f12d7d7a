"""Measures steps of a small model on several processes of this machine, over gloo, and holds the plan's predictions against them."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anon_dist.bench.memory import NAMED, Job, owned_elements
from anon_dist.bench.messages import traffic
from anon_dist.bench.options import EngineName, OptimizerName, ScalingOptions
from anon_dist.bench.shapes import find_shape
from anon_dist.train.config.parsing import ConfigError
from anon_dist.usage import ending

SENT_TOLERANCE = 0.03
"""Bytes sent may differ by this share: DDP's buffers, the gradient's norm, and what else is small."""
ALONE = ("ddp", "zero1", "hsdp", "fsdp1")
"""Engines that are none on one rank."""


class BenchError(RuntimeError):
    """The ranks did not come to an end, or what they measured is not what was predicted."""


@dataclass(frozen=True)
class Row:
    """What was measured of an engine and an optimizer, and what the plan says of it. Bytes per rank, seconds."""

    engine: str
    optimizer: OptimizerName
    ranks: int
    step_s: float
    optimizer_s: float
    """Of the slowest rank's fastest step: other work on the machine disturbs that least."""
    optimizer_predicted_s: float
    """From the stream's bandwidth."""
    state: int
    """Of the rank that has most."""
    state_predicted: int
    sent: float
    """By the collectives, the mean over ranks."""
    sent_predicted: float
    written: float | None
    """To sockets, as the kernel counts. gloo's reduce-scatter sends as much as an all-reduce."""
    sent_by_gloo: float
    """What the collectives come to with that."""

    @property
    def differences(self) -> list[str]:
        """What was not predicted rightly."""
        where, found = f"{self.engine}, {self.optimizer}, {self.ranks} ranks", []
        if self.state != self.state_predicted:
            found.append(f"{where}: {self.state:,} bytes of state, predicted {self.state_predicted:,}")
        if abs(self.sent - self.sent_predicted) > SENT_TOLERANCE * self.sent_predicted:
            found.append(f"{where}: {self.sent:,.0f} bytes sent, predicted {self.sent_predicted:,.0f}")
        return found


def job_of(options: ScalingOptions, ranks: int) -> Job:
    """The plan's view of it."""
    shape, pair = find_shape(options.model, options.vocab), min(2, ranks)
    bf16 = options.precision == "bf16"
    sizes = (options.micro_batch, options.accumulation, options.seq_len)
    return Job(shape, ranks, pair, pair, *sizes, bf16, False, options.checkpointing, options.accumulate == "whole")


def engines_on(ranks: int, engines: tuple[EngineName, ...]) -> list[EngineName]:
    """Those that differ from each other on so many ranks."""
    if ranks > 1:
        return [e for e in engines if ranks % 2 == 0 or e not in ("hsdp", "fsdp2+tp")]
    several = [e for e in engines if e not in (*ALONE, "fsdp2+tp")]
    return [*[e for e in engines if e in ALONE][:1], *several]


def launch(ranks: int, job: Job, options: ScalingOptions) -> list[dict[str, Any]]:
    """What each rank measured.

    Raises:
        BenchError: they failed, or took too long; with the end of their output.
    """
    asked = {"job": asdict(job), "engines": engines_on(ranks, options.engines), "steps": options.steps}
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "measured.json", Path(folder) / "log"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "anon_dist.bench.ranks"]
        command += [json.dumps(asked), str(out)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "ACCELERATE_TORCH_DEVICE": "cpu"}
        with log.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            try:
                code: int | None = process.wait(60 * options.minutes)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end(process)
        if code != 0 or not out.exists():
            why = f"took longer than {options.minutes:g} minutes" if code is None else f"ended with code {code}"
            raise BenchError(f"{ranks} ranks {why}:\n{log.read_text()[-3000:]}")
        measured: list[dict[str, Any]] = json.loads(out.read_text())
        return measured


def end(process: subprocess.Popen[Any]) -> None:
    """The launcher and the ranks, whatever state they are in."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def rows_of(job: Job, measured: list[dict[str, Any]]) -> list[Row]:
    """Measured, beside predicted."""
    found = []
    for engine, by_optimizer in measured[0]["engines"].items():
        messages, owned = traffic(engine, job), owned_elements(engine, job)
        for optimizer in by_optimizer:
            ranks = [rank["engines"][engine][optimizer] for rank in measured]
            stream = statistics.mean(rank["stream"] for rank in measured)
            sent = statistics.mean(sum(r["sent"].values()) for r in ranks)
            scattered = statistics.mean(r["sent"].get("reduce-scatter", 0) for r in ranks)
            written = [r["written"] for r in ranks]
            found.append(
                Row(
                    engine if job.ranks > 1 or engine not in ALONE else "single",
                    optimizer,
                    job.ranks,
                    step_s=statistics.mean(r["step_s"] for r in ranks),
                    optimizer_s=max(r["optimizer_s"] for r in ranks),
                    # the steps between early refreshes, which all accumulate
                    optimizer_predicted_s=owned * NAMED[optimizer].moved(1.0, 0.0) / stream,
                    state=max(r["state_bytes"] for r in ranks),
                    state_predicted=round(owned * NAMED[optimizer].state_bytes),
                    sent=sent,
                    sent_predicted=sum(m.sent for m in messages),
                    written=None if None in written else statistics.mean(written),
                    sent_by_gloo=sent + scattered,
                )
            )
    return found


def run(options: ScalingOptions) -> list[Row]:
    """All rows.

    Raises:
        BenchError, ConfigError: see there.
    """
    rows = []
    for ranks in options.ranks:
        job = job_of(options, ranks)
        rows += rows_of(replace(job, ranks=ranks), launch(ranks, job, options))
    return rows


def main(options: ScalingOptions) -> None:
    """`anon-dist bench scaling`"""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the ranks are ended too
    with ending(BenchError, ConfigError):
        rows = run(options)
    show(options, rows)
    if options.json:
        options.json.write_text(json.dumps(as_json(options, rows), indent=1) + "\n")
    differences = [line for row in rows for line in row.differences]
    if options.check and differences:
        sys.exit("error: not as predicted: " + "; ".join(differences))


def as_json(options: ScalingOptions, rows: list[Row]) -> dict[str, Any]:
    """All that was measured, and under which conditions. Bytes per rank, seconds."""
    return {
        "kind": "measured",
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "rows": [asdict(row) | {"differences": row.differences} for row in rows],
    }


def show(options: ScalingOptions, rows: list[Row]) -> None:
    """As a table."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(
        f"Measured here: {options.model}, {options.accumulation} x {options.micro_batch} x {options.seq_len} tokens a rank and step, "
        f"{options.precision}, {options.steps} steps of each optimizer in turn; {os.cpu_count()} CPUs, load average "
        f"{os.getloadavg()[0]:.1f}. With more ranks than CPUs, and loopback for a network, times say little of real ones; bytes do.",
        highlight=False,
    )
    table = Table(title="MB and ms per rank; predictions by anon-dist bench --plan")
    for name in ("engine", "optimizer"):
        table.add_column(name)
    columns = (
        "ranks",
        "step",
        "optimizer",
        "predicted",
        "state",
        "predicted",
        "sent",
        "predicted",
        "by gloo",
        "on sockets",
    )
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        times = (row.step_s, row.optimizer_s, row.optimizer_predicted_s)
        sizes = (row.state, row.state_predicted, row.sent, row.sent_predicted, row.sent_by_gloo)
        table.add_row(
            row.engine,
            row.optimizer,
            str(row.ranks),
            *(f"{1e3 * t:.1f}" for t in times),
            *(f"{size / 1e6:.3f}" for size in sizes),
            "" if row.written is None else f"{row.written / 1e6:.3f}",
        )
    console.print(table)
    ratios = [row.optimizer_predicted_s / row.optimizer_s for row in rows]
    console.print(
        f"The optimizer's predicted time is the bytes it moves over the bandwidth of a stream on all ranks at once: {min(ratios):.2f} to "
        f'{max(ratios):.2f} of what was measured. "by gloo" counts its reduce-scatter as the all-reduce that it is.',
        highlight=False,
    )
    for line in (line for row in rows for line in row.differences):
        console.print(f"not as predicted: {line}", highlight=False)
