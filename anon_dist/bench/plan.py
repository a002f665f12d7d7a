"""Model, not measurement: memory, traffic and time of a step, for each engine and optimizer, on hardware given by a few numbers.

What a rank keeps is in `memory.py`. Bytes of parameters and state, and bytes sent, are exact for this package's engines
(`anon-dist bench --scaling --check` compares them with runs); activations and working memory are estimates. Times are bytes over
bandwidth, floating-point operations over the peak times MFU: no latencies, no kernels' overhead.

Sources of `Hardware`: NVIDIA H100 Tensor Core GPU data sheet (SXM: 80 GB at 3.35 TB/s, 989 TFLOP/s dense bfloat16, NVLink 900 GB/s for both
directions together, PCIe 5.0 64 GB/s each way); DGX H100 user guide (8 GPUs, one 400 Gb/s ConnectX-7 each for the compute network, 2 TB
and two Xeon 8480C, whose 8 channels of DDR5-4800 give 307 GB/s each). How a collective's time follows from what it sends: NCCL tests,
PERFORMANCE.md.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from anon_dist.bench.memory import (
    LIVE,
    NAMED,
    Job,
    Memory,
    is_deepspeed,
    memory,
    owned_elements,
    sharding,
    shares,
    units,
)
from anon_dist.bench.options import EngineName, Hardware, OptimizerName, PlanOptions
from anon_dist.bench.shapes import find_shape
from anon_dist.bench.traffic import COLLECTIVES, Collective, bytes_sent
from anon_dist.train.config import ConfigError


@dataclass(frozen=True)
class Message:
    """All of a step's collectives of one kind in one sort of process group."""

    collective: Collective
    size: float
    """Bytes of the whole tensors together."""
    ranks: int
    """Of a group."""
    stride: int = 1
    """Distance between neighbours of a group, in ranks."""

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        return bytes_sent(self.collective, self.size, self.ranks)

    def seconds(self, hardware: Hardware) -> float:
        """At the bandwidth of the narrowest link. Rings that span nodes leave each once, through the cards of all their members there."""
        if self.ranks * self.stride <= hardware.per_node:
            return self.sent / hardware.nvlink
        members = max(1, hardware.per_node // self.stride)
        return self.sent / min(hardware.nvlink, members * hardware.network)


# -- traffic ----------------------------------------------------------------------------------------------------------


def traffic(engine: EngineName, job: Job) -> list[Message]:
    """The collectives of a step; without those of a few bytes (the gradient's norm, and DDP's buffers)."""
    parameters, n, w = job.shape.parameters(), job.ranks, job.width
    whole, rounds = sum(p.numel for p in parameters), job.accumulation
    if is_deepspeed(engine):
        return _deepspeed_traffic(engine, job)
    if engine in ("ddp", "zero1"):
        reduced = [Message("all-reduce", 4.0 * whole, n)]
        return reduced + ([Message("broadcast", 4.0 * whole, n)] if engine == "zero1" else [])
    ranks, tensor = sharding(engine, job)
    padded = units(parameters, 1 if engine == "fsdp1" else ranks, tensor, fsdp2=engine in ("fsdp2", "hsdp"))
    gathered = sum(size * gathers(unit) for unit, size in padded.items())
    reduced_size = 4.0 * sum(padded.values())
    reductions = 1 if job.whole_gradients else rounds
    found = [
        Message("all-gather", float(w * gathered * rounds), ranks, tensor),
        Message("reduce-scatter", reduced_size * reductions, ranks, tensor),
    ]
    if engine == "hsdp":
        found.append(Message("all-reduce", reduced_size / ranks, n // ranks, ranks))
    return found + (_tensor_parallel_traffic(job) if tensor > 1 else [])


def gathers(unit: str) -> int:
    """How often a unit is gathered in a micro-batch: what is used last in the forward pass and first in the backward pass stays."""
    return 2 if unit.startswith("block") or unit == "embedding" else 1


def _tensor_parallel_traffic(job: Job) -> list[Message]:
    """Activations, summed over a group. Forward: after attention, after the MLP. Backward: before q, k, v, gate and up, each by itself."""
    shape, rounds = job.shape, job.accumulation
    activations = float(job.tokens * shape.width * job.width)
    sums = 7 * shape.layers
    if job.checkpointing:  # attention's again; the recomputation ends before the MLP's
        sums += shape.layers
    if shape.tied:
        return [Message("all-reduce", activations * sums * rounds, job.tensor)]
    sums += 2  # embedding, and before the output matrix
    logits = float(job.tokens * shape.vocab * job.width)
    found = Message("all-reduce", activations * sums * rounds, job.tensor)
    return [found, Message("all-gather", logits * rounds, job.tensor)]


def _deepspeed_traffic(engine: EngineName, job: Job) -> list[Message]:
    """All in the dtype of the computation. Stages 1 and 2 sum whole buckets on every rank (use_multi_rank_bucket_allreduce)."""
    n, w, rounds = job.ranks, job.width, job.accumulation
    whole = sum(p.numel for p in job.shape.parameters())
    padded = float(w * owned_elements(engine, job) * n)
    if engine == "zero0":
        return [Message("all-reduce", float(w * whole), n)]
    if engine == "zero1-deepspeed":
        return [Message("all-reduce", float(w * whole), n), Message("all-gather", padded, n)]
    if engine.startswith("zero2"):
        return [Message("all-reduce", float(w * whole * rounds), n), Message("all-gather", padded, n)]
    passes = 1 if whole <= LIVE else 2 * rounds  # a model that may stay gathered is gathered once a step
    return [Message("reduce-scatter", padded * rounds, n), Message("all-gather", padded * passes, n)]


# -- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What is predicted for an engine and an optimizer."""

    engine: EngineName
    optimizer: OptimizerName
    memory: Memory
    tokens: float
    """A rank's share of a step's."""
    sent: dict[str, float]
    """Bytes that a rank sends in a step, by collective; the mean over ranks."""
    compute_s: float
    communication_s: float
    optimizer_s: float
    offload_s: float
    """Between accelerator and host."""
    trouble: str | None
    """Why it cannot run."""

    @property
    def overlapped_s(self) -> float:
        """Seconds of a step whose communication hides behind its computation as far as it can."""
        return max(self.compute_s, self.communication_s) + self.optimizer_s + self.offload_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second and rank, then."""
        return self.tokens / self.overlapped_s


def compute_seconds(engine: EngineName, job: Job, peak: float, mfu: float) -> float:
    """Of a step's forward and backward passes; MFU counts no recomputation, so it must be one that was reached with it."""
    split = job.tensor if engine == "fsdp2+tp" else 1
    return job.shape.flops_per_token(job.seq_len) * job.tokens * job.accumulation / split / (peak * mfu)


def optimizer_seconds(engine: EngineName, job: Job, moved: float, hardware: Hardware) -> float:
    """Of the optimizer's step; DeepSpeed in bfloat16 also writes the masters to the weights (4 bytes read, 2 written)."""
    copies = 6.0 if is_deepspeed(engine) and job.bf16 else 0.0
    bandwidth = hardware.host if "offload" in engine else hardware.hbm
    return owned_elements(engine, job) * (moved + copies) / bandwidth


def offload_seconds(engine: EngineName, job: Job, pcie: float) -> float:
    """Gradients down, weights up; offloaded weights up twice more in each micro-batch."""
    if "offload" not in engine:
        return 0.0
    trips = 2 + (2 * job.accumulation if engine == "zero3-offload-params" else 0)
    return trips * job.width * owned_elements(engine, job) / pcie


def trouble_of(engine: EngineName, job: Job, needed: Memory, hardware: Hardware) -> str | None:
    """Why the engine cannot run the job."""
    if engine == "fsdp2+tp":
        sizes = job.shape.heads, job.shape.kv_heads, job.shape.hidden
        if job.shape.family != "llama" or any(size % job.tensor for size in sizes) or job.ranks % job.tensor:
            return f"cannot split this model in {job.tensor}"
    if engine == "hsdp" and job.ranks % job.shard:
        return f"{job.ranks} ranks are no multiple of {job.shard}"
    if (over := needed.device - (hardware.memory - hardware.reserve)) > 0:
        return f"{over / 1e9:,.1f} GB too much"
    if (over := needed.host - hardware.host_memory) > 0:
        return f"{over / 1e9:,.1f} GB too much on the host"
    return None


def predict(engine: EngineName, name: OptimizerName, job: Job, hardware: Hardware, mfu: float, steps: int) -> Row:
    """A row of the table."""
    needed, messages = memory(engine, job, NAMED[name]), traffic(engine, job)
    sent = {c: sum(m.sent for m in messages if m.collective == c) for c in COLLECTIVES}
    return Row(
        engine,
        name,
        needed,
        job.tokens * job.accumulation / (job.tensor if engine == "fsdp2+tp" else 1),
        {c: size for c, size in sent.items() if size},
        compute_seconds(engine, job, hardware.flops, mfu),
        sum(m.seconds(hardware) for m in messages),
        optimizer_seconds(engine, job, NAMED[name].moved(*shares(steps)), hardware),
        offload_seconds(engine, job, hardware.pcie),
        trouble_of(engine, job, needed, hardware),
    )


# -- command ----------------------------------------------------------------------------------------------------------


def job_of(options: PlanOptions) -> Job:
    """What the options ask about.

    Raises:
        ConfigError: the model is unknown, or a number makes no sense.
    """
    for name in ("ranks", "micro_batch", "accumulation", "shard_ranks", "tensor_parallel", "steps", "vocab"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")
    if not 0.0 < options.mfu <= 1.0:
        raise ConfigError(f"--mfu is a share of the peak, in (0, 1], not {options.mfu}")
    if options.precision not in ("bf16", "fp32"):
        raise ConfigError(f"--precision is bf16 or fp32, not {options.precision}")
    if options.accumulate not in ("sharded", "whole"):
        raise ConfigError(f"--accumulate is sharded or whole, not {options.accumulate}")
    shape = find_shape(options.model, options.vocab)
    return Job(
        shape,
        options.ranks,
        min(options.shard_ranks, options.ranks),
        min(options.tensor_parallel, options.ranks),
        options.micro_batch,
        options.accumulation,
        options.seq_len or shape.context,
        options.precision == "bf16",
        options.checkpointing,
        options.accumulate == "whole",
    )


def main(options: PlanOptions) -> None:
    """`anon-dist bench plan`"""
    try:
        job = job_of(options)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    rows = [
        predict(engine, optimizer, job, options.hardware, options.mfu, options.steps)
        for engine in options.engines
        for optimizer in options.optimizers
        if optimizer != "anon-8bit-m" or not is_deepspeed(engine) or engine == "zero0"  # ZeRO takes no 8-bit states
    ]
    show(options, job, rows)
    if options.json:
        options.json.write_text(json.dumps(as_json(options, job, rows), indent=1) + "\n")


def as_json(options: PlanOptions, job: Job, rows: list[Row]) -> dict[str, Any]:
    """All that was predicted, and from what. Bytes, seconds."""
    derived = [
        {
            "device_bytes": r.memory.device,
            "overlapped_s": r.overlapped_s,
            "tokens_per_s": r.tokens_per_s,
            "fits": r.trouble is None,
        }
        for r in rows
    ]
    return {
        "kind": "predicted",
        "model": options.model,
        "parameters": sum(p.numel for p in job.shape.parameters()),
        "job": asdict(job),
        "hardware": asdict(options.hardware),
        "mfu": options.mfu,
        "steps": options.steps,
        "rows": [asdict(row) | more for row, more in zip(rows, derived, strict=True)],
    }


def show(options: PlanOptions, job: Job, rows: list[Row]) -> None:
    """As a table."""
    count = sum(p.numel for p in job.shape.parameters())
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(
        f"Predicted, not measured: {options.model}, {count / 1e9:.2f}B parameters, on {job.ranks:,} ranks in {options.precision}; "
        f"{job.accumulation} x {job.micro_batch} x {job.seq_len} tokens a step, for each rank or tensor-parallel group; MFU {options.mfu} "
        "assumed. State and GB sent follow the engines' layouts; working memory and activations are estimates; ms are bytes over "
        "bandwidth, without latency.",
        highlight=False,
    )
    table = Table(title="GB per rank; GB that a rank sends in a step; ms of a step")
    columns = (
        "weights",
        "gradients",
        "state",
        "working",
        "activ.",
        "total",
        "host",
        "sent",
        "compute",
        "comm.",
        "optim.",
        "offload",
    )
    for name in ("engine", "optimizer"):
        table.add_column(name)
    for name in (*columns, "step", "tokens/s"):
        table.add_column(name, justify="right")
    table.add_column("fits")
    for i, row in enumerate(rows):
        m = row.memory
        kept = (m.parameters + m.masters, m.gradients, m.state, m.working, m.activations, m.device, m.host)
        seconds = (row.compute_s, row.communication_s, row.optimizer_s, row.offload_s, row.overlapped_s)
        table.add_row(
            row.engine if i == 0 or rows[i - 1].engine != row.engine else "",
            row.optimizer,
            *(f"{size / 1e9:,.2f}" for size in (*kept, sum(row.sent.values()))),
            *(f"{1e3 * s:,.1f}" for s in seconds),
            f"{row.tokens_per_s:,.0f}",
            row.trouble or "yes",
            end_section=i + 1 == len(rows) or rows[i + 1].engine != row.engine,
        )
    console.print(table)
    console.print(
        "step: max(compute, comm.) + optim. + offload, if communication hides behind computation; tokens/s: of a rank, then.",
        highlight=False,
    )
