"""Model: what ranks of each engine send each other in a step, and how long it takes on hardware that is given by a few numbers."""

from __future__ import annotations

from dataclasses import dataclass

from anon_dist.bench.memory import LIVE, Job, is_deepspeed, owned_elements, sharding, units
from anon_dist.bench.options import EngineName, Hardware
from anon_dist.bench.traffic import Collective, bytes_sent


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


def traffic(engine: EngineName, job: Job) -> list[Message]:
    """The collectives of a step; without those of a few bytes (the gradient's norm, and DDP's buffers)."""
    parameters, n, w = job.shape.parameters(), job.ranks, job.width
    whole, rounds = sum(p.numel for p in parameters), job.accumulation
    if is_deepspeed(engine):
        return _deepspeed_traffic(engine, job)
    if engine in ("ddp", "zero1"):
        reduced = [Message("all-reduce", float(job.stored * whole), n)]
        return reduced + ([Message("broadcast", float(job.stored * whole), n)] if engine == "zero1" else [])
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
    return found + (_tensor_parallel_traffic(job) if tensor > 1 else []) + _context_parallel_traffic(job)


def gathers(unit: str) -> int:
    """How often a unit is gathered in a micro-batch: what is used last in the forward pass and first in the backward pass stays."""
    return 2 if unit.startswith("block") or unit == "embedding" else 1


def _tensor_parallel_traffic(job: Job) -> list[Message]:
    """Activations, summed over a group. Forward: after attention, after the MLP. Backward: before q, k, v, gate and up, each by itself."""
    shape, rounds = job.shape, job.accumulation
    activations = float(job.tokens * shape.width * job.width)
    sums = 7 * shape.layers
    if job.checkpointing != "none":  # attention's again; the recomputation ends before the MLP's
        sums += shape.layers
    if shape.tied:
        return [Message("all-reduce", activations * sums * rounds, job.tensor)]
    sums += 2  # embedding, and before the output matrix
    if job.whole_logits:
        logits = float(job.tokens * shape.vocab * job.width)
        found = Message("all-reduce", activations * sums * rounds, job.tensor)
        return [found, Message("all-gather", logits * rounds, job.tensor)]
    numbers = 3 * 4.0 * job.tokens  # a token's largest logit, its sum, and its target's
    return [Message("all-reduce", (activations * sums + numbers) * rounds, job.tensor)]


def _context_parallel_traffic(job: Job) -> list[Message]:
    """Keys and values, gathered in each forward pass and in its repetition, and their gradients."""
    if job.context == 1:
        return []
    size = job.keys_and_values * job.shape.layers * job.accumulation
    times = 1 if job.checkpointing == "none" else 2
    return [Message("all-gather", size * times, job.context), Message("reduce-scatter", size, job.context)]


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
