"""Model, not measurement: memory, traffic and time of a step, for each engine and optimizer, on hardware given by a few numbers.

What a rank keeps is in `memory.py`, what it sends in `messages.py`, what bases add in `bases.py`. Bytes of parameters and state, and bytes
sent, are exact for this package's engines (`anon-dist bench --scaling --check` compares them with runs); activations and working memory are
estimates. Times are bytes over bandwidth, floating-point operations over the peak times MFU: no latencies, no kernels' overhead.

Sources of `Hardware`: NVIDIA H100 Tensor Core GPU data sheet (SXM: 80 GB at 3.35 TB/s, 989 TFLOP/s dense bfloat16, 67 float32, NVLink 900
GB/s for both directions together, PCIe 5.0 64 GB/s each way); DGX H100 user guide (8 GPUs, one 400 Gb/s ConnectX-7 each for the compute
network, 2 TB and two Xeon 8480C, whose 8 channels of DDR5-4800 give 307 GB/s each). How a collective's time follows from what it sends:
NCCL tests, PERFORMANCE.md.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from anon_dist.bench.bases import MOVED, bases_table, cost, why_not
from anon_dist.bench.memory import (
    MAX_INTERVAL,
    NAMED,
    Job,
    Memory,
    is_deepspeed,
    memory,
    owned_elements,
    sharding,
    shares,
)
from anon_dist.bench.messages import traffic
from anon_dist.bench.options import EngineName, Hardware, OptimizerName, PlanOptions
from anon_dist.bench.shapes import find_shape
from anon_dist.bench.traffic import COLLECTIVES
from anon_dist.engines.tensor_parallel import SPLIT
from anon_dist.train.config.parsing import ConfigError, OptimConfig
from anon_dist.usage import ending

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
    """Of a step's forward and backward passes, and of what is computed again: at the pace at which `mfu` is reached without that."""
    split = job.tensor if engine == "fsdp2+tp" else 1
    flops = job.shape.flops_per_token(job.seq_len) + job.shape.recomputed_per_token(job.seq_len, job.checkpointing)
    return flops * job.tokens * job.accumulation / split / (peak * mfu)


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
    if job.pure and engine not in ("ddp", "fsdp2", "hsdp"):
        return "no bf16-true"
    if engine == "fsdp2+tp":
        sizes = job.shape.heads, job.shape.kv_heads, job.shape.hidden
        if (
            job.shape.family not in {kind.removesuffix("_text") for kind in SPLIT}
            or any(size % job.tensor for size in sizes)
            or job.ranks % job.tensor
        ):
            return f"cannot split this model in {job.tensor}"
    if job.context > 1 and (engine not in ("fsdp2", "hsdp") or job.ranks % job.context or job.shape.window):
        return f"cannot share sequences among {job.context}"
    if engine == "hsdp" and job.ranks % job.shard:
        return f"{job.ranks} ranks are no multiple of {job.shard}"
    if (over := needed.device - (hardware.memory - hardware.reserve)) > 0:
        return f"{over / 1e9:,.1f} GB too much"
    if (over := needed.host - hardware.host_memory) > 0:
        return f"{over / 1e9:,.1f} GB too much on the host"
    return None


def link_of(ranks: int, hardware: Hardware) -> float:
    """Bytes per second that a rank sends to its neighbour among so many."""
    inside = ranks <= hardware.per_node
    return hardware.nvlink if inside else min(hardware.nvlink, hardware.per_node * hardware.network)


def predict(
    engine: EngineName,
    name: OptimizerName,
    job: Job,
    hardware: Hardware,
    mfu: float,
    steps: int,
    block: int = OptimConfig.basis_block,
) -> Row:
    """A row of the table; `block`: of bases."""
    needed, messages = memory(engine, job, NAMED[name]), traffic(engine, job)
    bases = NAMED[name].bases
    accumulating, refreshing = shares(steps, max_interval=None if bases is None else MAX_INTERVAL)
    sent = {c: sum(m.sent for m in messages if m.collective == c) for c in COLLECTIVES}
    communication = sum(m.seconds(hardware) for m in messages)
    optimizer = optimizer_seconds(engine, job, NAMED[name].moved(accumulating, refreshing, job.stored), hardware)
    trouble = "bf16-true needs Anon" if job.pure and name == "adamw" else None
    if bases is not None:
        bases = replace(bases, block=block)
        trouble = trouble or why_not(engine, job, bases)
        found = cost(engine, job, bases)
        needed = replace(needed, state=needed.state + found.bytes)
        sent["all-reduce"] += refreshing * found.refresh_bytes
        communication += refreshing * found.refresh_bytes / link_of(sharding(engine, job)[0], hardware)
        flops = found.step_flops + refreshing * found.refresh_flops
        optimizer += found.turned * MOVED / hardware.hbm + flops / hardware.flops32
    return Row(
        engine,
        name,
        needed,
        job.tokens * job.accumulation / (job.tensor if engine == "fsdp2+tp" else 1),
        {c: size for c, size in sent.items() if size},
        compute_seconds(engine, job, hardware.flops, mfu),
        communication,
        optimizer,
        offload_seconds(engine, job, hardware.pcie),
        trouble or trouble_of(engine, job, needed, hardware),
    )


# -- command ----------------------------------------------------------------------------------------------------------


def job_of(options: PlanOptions) -> Job:
    """What the options ask about.

    Raises:
        ConfigError: the model is unknown, or a number makes no sense.
    """
    for name in (
        "ranks",
        "micro_batch",
        "accumulation",
        "shard_ranks",
        "tensor_parallel",
        "context_parallel",
        "steps",
        "vocab",
        "basis_block",
    ):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")
    if not 0.0 < options.mfu <= 1.0:
        raise ConfigError(f"--mfu is a share of the peak, in (0, 1], not {options.mfu}")
    if options.precision not in ("bf16", "bf16-true", "fp32"):
        raise ConfigError(f"--precision is bf16, bf16-true or fp32, not {options.precision}")
    if options.accumulate not in (None, "sharded", "whole"):
        raise ConfigError(f"--accumulate is sharded or whole, not {options.accumulate}")
    if options.loss not in ("chunked", "whole"):
        raise ConfigError(f"--loss is chunked or whole, not {options.loss}")
    if options.checkpointing not in ("none", "full", "selective"):
        raise ConfigError(f"--checkpointing is none, full or selective, not {options.checkpointing}")
    if options.compile not in ("none", "blocks"):
        raise ConfigError(f"--compile is none or blocks, not {options.compile}")
    shape, pure = find_shape(options.model, options.vocab), options.precision == "bf16-true"
    return Job(
        shape,
        options.ranks,
        min(options.shard_ranks, options.ranks),
        min(options.tensor_parallel, options.ranks),
        options.micro_batch,
        options.accumulation,
        options.seq_len or shape.context,
        options.precision != "fp32",
        pure,
        options.checkpointing,
        (options.accumulate or ("whole" if pure else "sharded")) == "whole",
        options.loss == "whole",
        options.context_parallel,
        compiled=options.compile == "blocks",
    )


def main(options: PlanOptions) -> None:
    """`anon-dist bench plan`"""
    with ending(ConfigError):
        job = job_of(options)
    rows = [
        predict(engine, optimizer, job, options.hardware, options.mfu, options.steps, options.basis_block)
        for engine in options.engines
        for optimizer in options.optimizers
        if is_possible(engine, optimizer)
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


def is_possible(engine: EngineName, optimizer: OptimizerName) -> bool:
    """ZeRO takes no 8-bit states, and a basis needs whole rows of matrices; what it costs on the host is not modelled."""
    if NAMED[optimizer].bases is not None:
        return engine in ("zero0", "zero3") or (not is_deepspeed(engine) and engine != "fsdp1")
    return optimizer != "anon-8bit-m" or not is_deepspeed(engine) or engine == "zero0"


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
    for bases in dict.fromkeys(bases for row in rows if (bases := NAMED[row.optimizer].bases)):
        sized = replace(bases, block=options.basis_block)
        console.print(bases_table(job, sized, options.hardware.flops32, partial(link_of, hardware=options.hardware)))
