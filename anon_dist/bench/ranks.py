"""What `anon-dist bench --scaling` runs on each rank: every engine with Anon and AdamW in turn, timed, and its bytes counted."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from anon_dist.bench.memory import Job, is_deepspeed
from anon_dist.bench.shapes import Shape, config_of
from anon_dist.bench.traffic import Traffic, bytes_written
from anon_dist.engines.base import Engine
from anon_dist.engines.start import FSDP, Accumulate, Wanted, start, wrap
from anon_dist.optim import Anon, param_groups
from anon_dist.train.config.parsing import shipped_configs
from anon_dist.train.loss.attach import attach
from anon_dist.train.loss.batch import mean_loss
from anon_dist.train.model.build import blocks, build_model
from anon_dist.train.model.recompute import recompute

WARM_UP = 3
STREAM_ELEMENTS = 1 << 23


@dataclass
class Contender:
    """An engine with an optimizer, and the seconds of its steps."""

    engine: Engine
    step_s: list[float]
    optimizer_s: list[float]


def measure(name: str, job: Job, steps: int) -> dict[str, Any]:
    """Of an engine on this rank, by optimizer: median seconds of a step, least of the optimizer's part, bytes of state and bytes sent."""
    optimizers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "anon": lambda groups: Anon(groups, betas=(0.9, 0.95), window="auto"),
        "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True),
    }
    if "offload" in name:
        del optimizers["adamw"]  # accelerate would put DeepSpeedCPUAdam in its place
    contenders = {key: Contender(bring_up(name, job, make), [], []) for key, make in optimizers.items()}
    reader = dist.get_rank() // (job.tensor if name == "fsdp2+tp" else 1)
    random = torch.Generator().manual_seed(reader)
    size = (job.accumulation, job.micro_batch, job.seq_len + 1)
    batches = list(torch.randint(0, job.shape.vocab, size, generator=random))
    for contender in contenders.values():
        time_optimizer(contender)
    for _ in range(WARM_UP + steps):
        for contender in contenders.values():
            dist.barrier()
            begun = time.perf_counter()
            take_step(contender.engine, batches)
            contender.step_s.append(time.perf_counter() - begun)
    return {key: report(contender, batches) for key, contender in contenders.items()}


def bring_up(name: str, job: Job, make: Callable[[Any], torch.optim.Optimizer]) -> Engine:
    """The engine, as the training loop has it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for key in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "ACCELERATE_USE_DEEPSPEED"):  # left by the engine before
        os.environ.pop(key, None)
    deepspeed = is_deepspeed(name)  # type: ignore[arg-type]
    file = shipped_configs() / "deepspeed" / f"{name.removesuffix('-deepspeed')}.json"
    wanted = Wanted(
        "deepspeed" if deepspeed else name.removesuffix("+tp"),  # type: ignore[arg-type]
        "bf16" if job.bf16 else "fp32",
        timedelta(minutes=1),
        job.micro_batch,
        lambda ranks: job.accumulation,
        clip=None,
        shard_ranks=job.shard if name == "hsdp" else None,
        tensor_parallel=job.tensor if name == "fsdp2+tp" else None,
        deepspeed_config=str(file) if deepspeed else None,
    )
    torch.manual_seed(0)
    model = build_model(config_of(job.shape), job.shape.vocab, 0, job.seq_len)
    attach(model)
    recompute(blocks(model), job.checkpointing)  # type: ignore[arg-type]
    accelerator, resolved = start(wanted)
    accumulate: Accumulate | None = ("whole" if job.whole_gradients else "sharded") if resolved in FSDP else None
    optimizer = make(param_groups(model, 0.1))
    return wrap(resolved, accelerator, model, optimizer, wanted.tensor_parallel or 1, accumulate=accumulate)


def take_step(engine: Engine, batches: list[Tensor]) -> None:
    """One step, over all micro-batches."""
    for i, batch in enumerate(batches):
        last = i + 1 == len(batches)
        with engine.micro_batch(last):
            engine.backward(mean_loss(engine.model, batch) / len(batches), last)
    engine.step(1e-4, None)


def time_optimizer(contender: Contender) -> None:
    """Have the optimizer's own part of each step timed."""
    step = contender.engine.optimizer.step

    def timed(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        done = step(*args, **kwargs)
        contender.optimizer_s.append(time.perf_counter() - begun)
        return done

    contender.engine.optimizer.step = timed  # type: ignore[method-assign]


def report(contender: Contender, batches: list[Tensor]) -> dict[str, Any]:
    """What was measured, and a further step's traffic."""
    calls = len(contender.optimizer_s) // len(contender.step_s)  # DeepSpeed steps one group after the other
    optimizer_s = [sum(contender.optimizer_s[i : i + calls]) for i in range(0, len(contender.optimizer_s), calls)]
    before = bytes_written()
    with Traffic() as traffic:
        take_step(contender.engine, batches)
    after = bytes_written()
    return {
        "step_s": statistics.median(contender.step_s[WARM_UP:]),
        "optimizer_s": min(optimizer_s[WARM_UP:]),
        "state_bytes": contender.engine.state_bytes().local,
        "sent": dict(traffic.sent),
        "written": None if before is None or after is None else after - before,
    }


def stream_bandwidth() -> float:
    """Bytes per second that this rank reads and writes while the others do too: two arrays read, one written."""
    a, b = torch.zeros(STREAM_ELEMENTS), torch.ones(STREAM_ELEMENTS)
    seconds = []
    for _ in range(20):
        dist.barrier()
        begun = time.perf_counter()
        a.add_(b)
        seconds.append(time.perf_counter() - begun)
    return 12.0 * STREAM_ELEMENTS / min(seconds)


def main() -> None:
    """Arguments: a JSON object of the job, and the file for rank 0 to write to."""
    asked = json.loads(sys.argv[1])
    job = Job(**{**asked["job"], "shape": Shape(**asked["job"]["shape"])})
    dist.init_process_group("gloo", timeout=timedelta(minutes=1))
    mine: dict[str, Any] = {"engines": {}, "stream": stream_bandwidth()}
    for name in asked["engines"]:
        mine["engines"][name] = measure(name, job, asked["steps"])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(everyone))
    dist.barrier()


if __name__ == "__main__":
    from anon_dist.launcher import leave

    main()
    leave()
