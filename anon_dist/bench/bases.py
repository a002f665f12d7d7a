"""Model: what a rank keeps, computes and sends where matrices are in bases of their own (`Anon(basis=…)`).

A basis and a covariance of a side of n elements are (n, b) float32 each; ranks that hold other rows of a matrix have the same ones of its
columns. Per parameter and turned side a step computes 4 b floating-point operations (the gradient into the basis, the update out of it); a
refresh 2 b for the covariance, 4 b for what moves along, and some 13 b² for each element of the side, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from rich.table import Table

from anon_dist.bench.memory import Bases, Job, assigned, owned_elements, sharding
from anon_dist.bench.options import EngineName
from anon_dist.bench.shapes import Parameter
from anon_dist.bench.traffic import bytes_sent
from anon_dist.optim.basis import Side
from anon_dist.optim.frame import Cut

WHOLE = ("ddp", "zero1", "zero0")
"""Engines whose optimizer steps whole matrices."""
RANKS = (8, 64, 512)
MOVED = 32.0
"""Bytes for each turned element and step beyond a plain step's: the turned gradient and the update, written and read in either frame."""
RENEWAL = 12.7
"""b³ for each block: QR 2.7, the covariance turned 4, the basis 2, its orthogonality 4."""


@dataclass(frozen=True)
class Cost:
    """Of a rank, of that which has most."""

    bytes: float
    """Bases and covariances."""
    step_flops: float
    """Of the turns, float32, in each step."""
    refresh_flops: float
    """Float32 products and float64 factorisations of a refresh."""
    refresh_bytes: float
    """That a rank sends at a refresh."""
    turned: float
    """Elements of this rank that are turned."""


def cost(engine: EngineName, job: Job, bases: Bases) -> Cost:
    """What bases cost under an engine that can have them (`why_not`)."""
    parameters = job.shape.parameters()
    if engine == "zero1":
        by_rank = [_cost(engine, job, bases, own) for own in assigned(parameters, job.ranks)]
        return max(by_rank, key=lambda found: found.bytes)
    return _cost(engine, job, bases, parameters)


def why_not(engine: EngineName, job: Job, bases: Bases) -> str | None:
    """Why matrices cannot be turned so under an engine that shows the optimizer shards of them."""
    if engine in WHOLE:
        return None
    turned = [p for p in job.shape.parameters() if _is_turned(p, bases)]
    if engine == "zero3" and (odd := sum(p.shape[0] % job.ranks > 0 for p in turned)):
        return f"rows of {odd} matrices do not divide"
    ranks, tensor = sharding(engine, job)
    across = 0
    for p in turned:
        over: dict[Side, tuple[int, ...]] = {"columns": (tensor,) if p.split == 1 else (1,)}
        if bases.sides == "both":
            over["rows"] = (ranks, tensor) if p.split == 0 and tensor > 1 else (ranks,)
        across += not all(Cut(p.shape, side, among).fits(bases.block) for side, among in over.items())
    return f"blocks of {across} matrices lie across shards" if across else None


def _is_turned(p: Parameter, bases: Bases) -> bool:
    """Under "both" embeddings and the output matrix have no basis."""
    return len(p.shape) > 1 and (bases.sides != "both" or p.where == "block")


def _cost(engine: EngineName, job: Job, bases: Bases, parameters: list[Parameter]) -> Cost:
    ranks, tensor = (1, 1) if engine in WHOLE else sharding(engine, job)
    kept = flops = refresh = sent = turned = 0.0
    for p in parameters:
        if not _is_turned(p, bases):
            continue
        local = p.local(ranks, tensor)
        rows = math.ceil(p.shape[0] / (tensor if p.split == 0 else 1) / ranks)
        columns = math.prod(p.shape[1:]) // (tensor if p.split == 1 else 1)
        sides: dict[Side, int] = {"columns": columns}
        if bases.sides == "both":
            sides["rows"] = rows
        for side, n in sides.items():
            block = min(bases.block, n)
            kept += 8.0 * n * block
            flops += 4.0 * block * local
            refresh += 6.0 * block * local + RENEWAL * block**2 * n
            cut = (ranks, tensor if p.split == 0 else 1) if side == "columns" else (1, tensor if p.split == 1 else 1)
            sent += sum(bytes_sent("all-reduce", 4.0 * n * block, among) for among in cut if among > 1)
        turned += local
    return Cost(kept, flops, refresh, sent, turned)


def bases_table(job: Job, bases: Bases, flops: float, link: Callable[[int], float]) -> Table:
    """Under FSDP2, at several numbers of ranks, beside the state that is sharded.

    Args:
        flops: float32 operations per second.
        link: bytes per second that a rank of so many sends.
    """
    turned = "both sides" if bases.sides == "both" else bases.sides
    made = Table(
        title=f"fsdp2 (zero3 is alike) with {turned} of matrices in bases of their own, blocks of {bases.block}; per rank"
    )
    whole = sum(p.numel for p in job.shape.parameters())
    for name in (
        "ranks",
        "sharded state, GB",
        "bases, GB",
        "bytes a parameter",
        "turns, GFLOP a step",
        "ms",
        "refresh, GFLOP",
    ):
        made.add_column(name, justify="right")
    for name in ("sent a refresh, MB", "ms "):
        made.add_column(name, justify="right")
    for ranks in RANKS:
        there = replace(job, ranks=ranks)
        if why_not("fsdp2", there, bases) is not None:
            made.add_row(f"{ranks:,}", *"–" * 8)
            made.caption = "–: blocks of rows would lie across shards"
            continue
        found = cost("fsdp2", there, bases)
        made.add_row(
            f"{ranks:,}",
            f"{12.0 * owned_elements('fsdp2', there) / 1e9:,.3f}",
            f"{found.bytes / 1e9:,.3f}",
            f"{found.bytes / whole:.3f}",
            f"{found.step_flops / 1e9:,.1f}",
            f"{1e3 * found.step_flops / flops:,.2f}",
            f"{found.refresh_flops / 1e9:,.1f}",
            f"{found.refresh_bytes / 1e6:,.1f}",
            f"{1e3 * found.refresh_bytes / link(ranks):,.2f}",
        )
    return made
