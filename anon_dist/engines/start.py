"""Bring up the processes with accelerate, and wrap model and optimizer for the engine."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer

from anon_dist.engines import cpu
from anon_dist.engines.check import check_optimizer, check_same_start, check_world
from anon_dist.engines.errors import EngineError

Engine = Literal["single", "ddp", "fsdp2"]
Precision = Literal["fp32", "bf16"]


def start(
    engine: Engine | Literal["auto"], precision: Precision, timeout: timedelta, **accelerator_args: Any
) -> tuple[Accelerator, Engine]:
    """An `Accelerator` for the engine, its ranks counted.

    Works under `accelerate launch`, `torchrun` and plain `python`, on accelerators and on CPUs. What `accelerate launch` was configured
    with holds; a contradiction between it and the arguments is an error.

    Args:
        engine: "auto" takes what accelerate's configuration asks for; if it asks for nothing, fsdp2 on several ranks.
        precision: dtype of the computation. In bf16 parameters and state stay float32, and gradients are reduced in float32.
        timeout: how long a rank waits for its peers.
        accelerator_args: further arguments of `Accelerator`.

    Returns:
        The accelerator, and the engine that "auto" came to.

    Raises:
        EngineError: accelerate's configuration asks for something else, or ranks are missing.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    engine = _resolve(engine, launched)
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if configured not in ("no", precision.replace("fp32", "no")):
        raise EngineError(
            f"accelerate's configuration says mixed_precision: {configured}, and train.precision is {precision}; make them agree"
        )
    on_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    if on_cpu:
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # DeepSpeed, which others import, asks no further and warns no more
    if on_cpu and launched > 1 and engine == "fsdp2":
        cpu.bring_up_processes(timeout)
    if engine == "fsdp2":
        os.environ["FSDP_VERSION"] = "2"  # accelerate sets ACCELERATE_USE_FSDP, and not this
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        cpu=on_cpu and engine != "fsdp2",
        fsdp_plugin=_fsdp2_plugin(precision) if engine == "fsdp2" else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        **accelerator_args,
    )
    check_world(accelerator.device)
    return accelerator, engine


def wrap(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Prepare model and optimizer together; the optimizer comes back with its state allocated for the wrapped parameters.

    Raises:
        EngineError: the ranks' weights differ, or what came back is not what was asked for.
    """
    check_same_start(model, accelerator.device)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    model, prepared = accelerator.prepare(model, optimizer)
    check_optimizer(prepared, model, type(optimizer), groups)
    inner: Optimizer = prepared.optimizer
    if hasattr(inner, "init_state"):
        inner.init_state()
    return model, inner


def _resolve(engine: Engine | Literal["auto"], launched: int) -> Engine:
    """The engine that both the argument and accelerate's configuration allow."""
    configured: str | None = None
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        configured = "fsdp" + os.environ.get("FSDP_VERSION", "1")
    elif os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        configured = "deepspeed"
    if engine == "auto":
        engine = configured or ("fsdp2" if launched > 1 else "single")  # type: ignore[assignment]
    if engine not in ("single", "ddp", "fsdp2"):
        raise EngineError(
            f"accelerate's configuration asks for {engine}, which train.engine does not offer; ready ones are in configs/accelerate"
        )
    if configured is not None and configured != engine:
        raise EngineError(
            f"train.engine is {engine}, but accelerate's configuration asks for {configured}; use the one that fits, or engine: auto"
        )
    if engine == "single" and launched > 1:
        raise EngineError(f"train.engine is single, but {launched} processes were launched; use fsdp2 or ddp")
    if launched == 1 and engine != "fsdp2":
        return "single"
    return engine


def _fsdp2_plugin(precision: Precision) -> FullyShardedDataParallelPlugin:
    """accelerate's FSDP2 settings: from its configuration where `accelerate launch` gave one, else a group per transformer block."""
    given = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    policy = None
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=policy,
        auto_wrap_policy=None if given else "TRANSFORMER_BASED_WRAP",
        cpu_ram_efficient_loading=None if given else False,
    )
