"""Model: what each engine keeps on a rank, and what an optimizer keeps and moves for each element."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from anon_dist.bench.options import ENGINES, EngineName, OptimizerName
from anon_dist.bench.shapes import Parameter, Shape
from anon_dist.optim.rounding import BLOCK
from anon_dist.optim.schedule import Phase, Schedule, Window
from anon_dist.train.config.parsing import OptimConfig
from anon_dist.train.loss.cross_entropy import piece_rows

LIVE = 1_000_000_000
"""Elements that DeepSpeed's stage 3 leaves gathered (stage3_max_live_parameters, stage3_max_reuse_distance)."""
BUCKET = 500_000_000
"""Elements of DeepSpeed's reduction buckets (reduce_bucket_size)."""


@dataclass(frozen=True)
class Job:
    """A model on ranks."""

    shape: Shape
    ranks: int
    shard: int = 8
    """hsdp: ranks that share one copy."""
    tensor: int = 8
    """fsdp2+tp: ranks that split matrices."""
    micro_batch: int = 1
    """Sequences that a rank, or tensor-parallel group, takes at once."""
    accumulation: int = 1
    """Micro-batches a step."""
    seq_len: int = 4096
    bf16: bool = True
    """Compute in bfloat16, with float32 masters; else in float32."""
    pure: bool = False
    """Parameters and gradients are bfloat16 too, without masters (train.precision bf16-true)."""
    checkpointing: str = "full"
    """What of a block's activations is computed again in the backward pass: none, full, selective."""
    whole_gradients: bool = False
    """FSDP: micro-batches' gradients are summed in full and reduced once a step (train.accumulate whole)."""

    whole_logits: bool = False
    """The loss is taken of all logits at once (train.loss whole)."""
    context: int = 1
    """fsdp2 and hsdp: ranks that share each sequence."""
    device: str = "cuda"
    """Or "cpu": how large the pieces are in which the loss is computed."""
    compiled: bool = True
    """Blocks are compiled (train.compile); else each operation saves what its own backward pass wants."""

    @property
    def width(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.bf16 else 4

    @property
    def stored(self) -> int:
        """Bytes of a number of the parameters that are stepped, and of their gradients."""
        return 2 if self.pure else 4

    @property
    def tokens(self) -> int:
        """Of a rank in a micro-batch."""
        return self.micro_batch * self.seq_len // self.context

    @property
    def keys_and_values(self) -> float:
        """Bytes of one layer's, of whole sequences."""
        return 2.0 * self.shape.kv_width * self.width * self.micro_batch * self.seq_len


# -- elements ---------------------------------------------------------------------------------------------------------


def is_deepspeed(engine: EngineName) -> bool:
    """Whether the engine is DeepSpeed's."""
    return engine in ENGINES[ENGINES.index("zero0") :]


def sharding(engine: EngineName, job: Job) -> tuple[int, int]:
    """(ranks among which a row of parameters is cut, ranks that split matrices) of the engines that cut by rows."""
    if engine == "fsdp2+tp":
        return job.ranks // job.tensor, job.tensor
    return (job.shard if engine == "hsdp" else job.ranks), 1


def owned_elements(engine: EngineName, job: Job) -> int:
    """Elements whose state a rank keeps, padding included; of the rank that keeps most."""
    parameters, n = job.shape.parameters(), job.ranks
    whole = sum(p.numel for p in parameters)
    if engine in ("ddp", "zero0"):
        return whole
    if engine == "zero1":
        return max(handed_out(parameters, n))
    if engine == "fsdp1":  # a block is one flat vector
        return sum(-(-size // n) for size in units(parameters).values())
    if engine in ("zero1-deepspeed", "zero2", "zero2-offload"):  # a param group is one flat vector
        groups = (sum(p.numel for p in parameters if (len(p.shape) >= 2) == matrix) for matrix in (True, False))
        return sum(2 * -(-size // (2 * n)) for size in groups)
    if is_deepspeed(engine):  # each parameter flat
        return sum(-(-p.numel // n) for p in parameters)
    return sum(p.local(*sharding(engine, job)) for p in parameters)


def handed_out(parameters: list[Parameter], ranks: int) -> list[int]:
    """Elements on each rank where whole parameters are handed out, group by group, largest first, to whoever has least (torch's
    ZeroRedundancyOptimizer)."""
    return [sum(p.numel for p in own) for own in assigned(parameters, ranks)]


def assigned(parameters: list[Parameter], ranks: int) -> list[list[Parameter]]:
    """Those on each rank, then."""
    heap, found = [(0, rank) for rank in range(ranks)], [list[Parameter]() for _ in range(ranks)]
    for matrix in (True, False):
        for p in sorted((p for p in parameters if (len(p.shape) >= 2) == matrix), key=lambda p: -p.numel):
            size, rank = heap[0]
            heapq.heapreplace(heap, (size + p.numel, rank))
            found[rank].append(p)
    return found


def units(parameters: Iterable[Parameter], ranks: int = 1, tensor: int = 1, fsdp2: bool = False) -> dict[str, int]:
    """Elements of what is gathered at once, after `tensor` ranks have split it, rows padded to a multiple of `ranks`: blocks, and the rest;
    under accelerate's FSDP2 the rest is an untied embedding, the norm with the output, and what is left."""
    sizes: dict[str, int] = defaultdict(int)
    for p in parameters:
        name = f"block {p.block}" if p.where == "block" else p.where if fsdp2 else "root"
        sizes[name] += ranks * p.local(ranks, tensor)
    return dict(sizes)


# -- bytes on a rank --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank: of the accelerator, but for `host`."""

    parameters: float
    """What the model computes with; under torch's engines float32 (or `Job.pure`), and the masters at once."""
    masters: float
    """DeepSpeed's separate float32 copies."""
    gradients: float
    """With the float32 ones that DeepSpeed makes for its step."""
    state: float
    """The optimizer's."""
    working: float
    """Gathered parameters, buckets, autocast's copies."""
    activations: float
    """What is allocated beside the gradients when most is: what blocks save, the loss, a block's backward pass."""
    host: float = 0.0
    """Offloaded: on the CPU."""

    @property
    def device(self) -> float:
        """All of the accelerator's."""
        return self.parameters + self.masters + self.gradients + self.state + self.working + self.activations


def memory(engine: EngineName, job: Job, optimizer: Optimizer) -> Memory:
    """What a rank keeps at the peak of a step, but for bases."""
    owned = owned_elements(engine, job)
    state = optimizer.state_bytes * owned
    if not is_deepspeed(engine):
        parameters = gradients = float(job.stored) * (
            sum(p.numel for p in job.shape.parameters()) if engine == "zero1" else owned
        )
        activations = activation_bytes(engine, job, gradients)
        return Memory(parameters, 0.0, gradients, state, working_bytes(engine, job), activations)
    activations = activation_bytes(engine, job)
    whole, n = sum(p.numel for p in job.shape.parameters()), job.ranks
    parameters = job.width * (owned if engine.startswith("zero3") else whole)
    gradients = job.width * (whole if engine in ("zero0", "zero1-deepspeed") else whole / n)
    has_masters = job.bf16 or engine != "zero0"
    masters = step_gradients = 4.0 * owned if has_masters else 0.0
    working = working_bytes(engine, job)
    if "offload" not in engine:
        return Memory(parameters, masters, gradients + step_gradients, state, working, activations)
    host = masters + step_gradients + state
    if engine == "zero3-offload-params":
        parameters, host = 0.0, host + parameters
    return Memory(parameters, 0.0, gradients, 0.0, working, activations, host)


def working_bytes(engine: EngineName, job: Job) -> float:
    """Beyond what lasts from step to step, without activations."""
    whole, w = sum(p.numel for p in job.shape.parameters()), job.width
    if engine in ("ddp", "zero1"):  # DDP's buckets, which one process has not; autocast's bfloat16 copies
        copies = 2.0 * whole if job.bf16 and not job.pure else 0.0
        return (job.stored * whole if job.ranks > 1 else 0.0) + copies
    if not is_deepspeed(engine):  # two units gathered, one's gradient before and in its float32 reduction
        sizes = sorted(
            units(job.shape.parameters(), *sharding(engine, job), fsdp2=engine in ("fsdp2", "hsdp")).values()
        )
        kept = sum(sizes) if job.whole_gradients and job.accumulation > 1 else 0
        return w * sum(sizes[-2:]) + (w + 4.0) * sizes[-1] + 4.0 * kept
    if engine == "zero0":
        return float(w * min(BUCKET, whole))
    gathered = min(LIVE, whole) if engine.startswith("zero3") else 0
    return float(w * (gathered + 2 * min(BUCKET, whole)))


def activation_bytes(engine: EngineName, job: Job, gradients: float = 0.0) -> float:
    """What a micro-batch saves for its backward pass, and what that and its loss take: an estimate, of an attention that keeps no scores.

    The most of three moments: the loss, when there are no gradients yet if the step has one micro-batch; the backward pass of the last
    block; and of the first block, when only its own is left.

    Args:
        gradients: bytes that are not allocated before the backward pass; what is found is beside them.
    """
    shape, tensor = job.shape, job.tensor if engine == "fsdp2+tp" else 1
    block = job.tokens * _block_bytes(job, tensor)
    if job.checkpointing == "none":
        saved, again = block * shape.layers, 0.0
    else:  # each block's input, and one block's all
        kept_whole, kept_split = shape.selected_per_token() if job.checkpointing == "selective" else (0.0, 0.0)
        kept = shape.width * _stream_width(engine, job) + (kept_whole + kept_split / tensor) * job.width
        saved, again = job.tokens * kept * shape.layers, block
    if job.context > 1:
        saved += job.keys_and_values * (shape.layers if job.checkpointing == "none" else 0)
        again += job.keys_and_values * (job.checkpointing != "none")
    loss = loss_bytes(job, tensor)
    later = gradients if job.accumulation == 1 else 0.0  # not there at the loss
    passing = job.tokens * job.width * 2 * shape.hidden / tensor  # gradients inside of a block
    head = 4.0 * shape.vocab * shape.width / (1 if shape.tied else tensor)  # the output matrix's
    moments = saved + loss - later, saved + again + passing + head - later, again + passing
    return max(moments)


def _block_bytes(job: Job, tensor: int) -> float:
    """That a block saves for a token."""
    parts = [job.shape.saved_per_token()]
    if not job.compiled:
        parts.append(job.shape.eager_per_token(job.bf16, job.pure))
    return job.width * sum(whole + split / tensor for whole, split in parts)


def _stream_width(engine: EngineName, job: Job) -> int:
    """Bytes of a number between blocks: autocast leaves them in float32, FSDP and DeepSpeed have none there."""
    return 4 if engine in ("ddp", "zero1") and not job.pure else job.width


def loss_bytes(job: Job, tensor: int = 1) -> float:
    """What the loss takes.

    Of pieces: logits of a piece of the tokens, their probabilities and the gradient of both in the dtype computed with; the gradients of
    hidden states and, in float32, of the output matrix. Of whole logits: in the dtype computed with, and in float32 themselves, their
    log-probabilities and their gradient.

    Args:
        tensor: ranks that split the output matrix, as tensor parallelism does where it is not tied.
    """
    shape = job.shape
    if job.whole_logits:
        return job.tokens * shape.vocab * (12.0 + (job.width if job.bf16 else 0.0))
    vocabulary = -(-shape.vocab // (1 if shape.tied else tensor))
    piece = piece_rows(job.tokens, vocabulary, job.device) * vocabulary * (8.0 + (job.width if job.bf16 else 0.0))
    return piece + job.tokens * shape.width * job.width + 4.0 * vocabulary * shape.width


# -- optimizers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bases:
    """Which sides of matrices are turned, in blocks of how many."""

    sides: Literal["columns", "both"]
    block: int = OptimConfig.basis_block


@dataclass(frozen=True)
class Optimizer:
    """Bytes for each element."""

    exp_avg: float
    exp_avg_sq: float
    precond: float = 0.0
    """0: there is none (AdamW)."""
    bases: Bases | None = None
    """What they keep is in `bases.py`."""

    @property
    def state_bytes(self) -> float:
        """All of the state."""
        return self.exp_avg + self.exp_avg_sq + self.precond

    def moved(self, accumulating: float, refreshing: float, stored: int = 4) -> float:
        """Read and written by a step, parameters and gradients among it.

        Args:
            stored: bytes of a parameter, and of its gradient.
            accumulating, refreshing: shares of the steps in which Anon's second moment is read and written, its preconditioner written.
        """
        fixed = 3.0 * stored + 2.0 * self.exp_avg  # θ twice, g once; m twice
        if not self.precond:
            return fixed + 2.0 * self.exp_avg_sq
        return fixed + self.precond * (1.0 + refreshing) + 2.0 * self.exp_avg_sq * accumulating


NAMED: dict[OptimizerName, Optimizer] = {
    "anon": Optimizer(4.0, 4.0, 4.0),
    "anon-bf16": Optimizer(4.0, 2.0, 2.0),
    "anon-bf16-m": Optimizer(2.0, 2.0, 2.0),
    "anon-8bit-m": Optimizer(1.0 + 1.0 / BLOCK, 2.0, 2.0),
    "anon-columns": Optimizer(4.0, 2.0, 2.0, Bases("columns")),
    "anon-both": Optimizer(4.0, 2.0, 2.0, Bases("both")),
    "adamw": Optimizer(4.0, 4.0),
}
"""anon: float32 states; -bf16: exp_avg_sq and precond in bfloat16; -m: exp_avg too, or in blocks of 8 bits; -columns: as anon-bf16,
and columns of matrices in bases of their own, with a refresh every `MAX_INTERVAL` steps at least (the presets); -both: rows too."""

MAX_INTERVAL = 4
"""optim.max_interval of the presets. A basis gains from refreshes that are near each other."""


@lru_cache
def shares(
    steps: int,
    refresh_ratio: float = OptimConfig.refresh_ratio,
    beta2: float = 0.95,
    window: Window = OptimConfig.window,
    max_interval: int | None = None,
) -> tuple[float, float]:
    """Shares of the first `steps` in which Anon accumulates and refreshes. Without further arguments: as in the presets, but for what these
    set because of their basis (`MAX_INTERVAL`)."""
    schedule = Schedule((Phase(0, refresh_ratio, beta2, window, max_interval),))
    plans = [schedule.at(t) for t in range(1, steps + 1)]
    return sum(p.accumulate for p in plans) / steps, sum(p.refresh for p in plans) / steps
