"""Bring up the processes with accelerate, and wrap model and optimizer for the engine."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.optim import Optimizer

from anon_dist.checkpoint.schema import Checkpoint
from anon_dist.engines import cpu, peers
from anon_dist.engines.base import Engine
from anon_dist.engines.bases import refuse_flattened
from anon_dist.engines.builds import spare_inference_operator, warn_of_waiting
from anon_dist.engines.check import check_launcher, check_same_start, check_world
from anon_dist.engines.comparison import check_alike, surroundings
from anon_dist.engines.errors import EngineError
from anon_dist.engines.fsdp1 import Fsdp1Engine, fsdp1_plugin
from anon_dist.engines.materialize import is_meta, materialize
from anon_dist.engines.precision import Precision, mixed_precision, recipes
from anon_dist.engines.register import register
from anon_dist.engines.tensor_parallel import TensorParallelEngine
from anon_dist.engines.torch_native import TorchEngine
from anon_dist.engines.zero_redundancy import ZeroRedundancyEngine
from anon_dist.optim import Anon

Name = Literal["single", "ddp", "zero1", "fsdp2", "hsdp", "fsdp1", "deepspeed"]
Offload = Literal["off", "serial", "overlap"]
Accumulate = Literal["sharded", "whole"]
FSDP: tuple[Name, ...] = ("fsdp2", "hsdp", "fsdp1")
DATA_PARALLEL: tuple[Name, ...] = ("single", "ddp", "zero1")
"""What accelerate calls multi-GPU or multi-CPU; zero1 is ddp with another optimizer."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """The engine that a run asks for."""

    engine: Name | Literal["auto"]
    """"auto" takes what accelerate's configuration asks for; under torchrun, which asks for nothing, fsdp2."""
    precision: Precision
    """Dtype of the computation. In bf16 parameters and state stay float32, and gradients are reduced in float32. fp16, with a loss scale,
    is DeepSpeed's, on GPUs. fp8: see `precision`. bf16-true: the model is bfloat16 itself; its optimizer must round stochastically."""
    timeout: timedelta
    """How long a rank waits for its peers."""
    micro_batch: int
    accumulation: Callable[[int], int]
    """Micro-batches per step, for a number of ranks."""
    clip: float | None
    shard_ranks: int | None = None
    """hsdp: ranks among which one copy of the model is sharded; the copies are replicas. None: as accelerate was configured, else all."""
    tensor_parallel: int | None = None
    """fsdp2: ranks that split the matrices of a block between them. None: as accelerate was configured, else 1."""
    context_parallel: int | None = None
    """fsdp2 and hsdp: ranks that share each sequence. None: as accelerate was configured, else 1."""
    offload: Offload | None = None
    """fsdp2 and hsdp: parameters, gradients and optimizer state on the host, and whether Anon steps in the background there (see
    `overlap`). None: offloaded as accelerate was configured, else "off"; where offloaded, "overlap"."""
    deepspeed_config: str | None = None
    """deepspeed: JSON file; None: the one accelerate was configured with, else ZeRO stage 2."""


def start(wanted: Wanted, alike: Mapping[str, Any] | None = None, **accelerator_args: Any) -> tuple[Accelerator, Name]:
    """An `Accelerator` for the engine, its ranks compared and counted.

    Works under `accelerate launch`, `torchrun` and plain `python`, on accelerators and on CPUs. What `accelerate launch` was configured
    with holds; a contradiction between it and what is wanted is an error.

    Args:
        alike: settings that must be the same on all ranks, besides the configurations of accelerate and DeepSpeed and the versions.
        accelerator_args: further arguments of `Accelerator`.

    Returns:
        The accelerator, and the engine that "auto" came to.

    Raises:
        EngineError: accelerate's configuration asks for something else, ranks are missing, or they were not started alike.
    """
    _without_deprecations_of_libraries()
    check_launcher()
    register()
    alike = {**(alike or {}), **surroundings(_deepspeed_file(wanted))}
    compared = check_alike(alike, wanted.timeout.total_seconds())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    name = _resolve(wanted, launched)
    on_cpu = _on_cpu()
    mixed = mixed_precision(wanted.precision, name, on_cpu, splitting_ranks(wanted) > 1)
    if name == "deepspeed" and os.environ.get("LOCAL_RANK", "0") == "0":
        warn_of_waiting()
    if name in ("fsdp2", "deepspeed") and "RANK" not in os.environ:
        _as_one_rank()
    as_device = name in ("fsdp2", "hsdp", "fsdp1", "deepspeed")
    if on_cpu:  # DeepSpeed, which others import, asks no further and warns no more
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if name == "deepspeed":
            spare_inference_operator()
    with peers.connecting(), peers.new_keys():
        if on_cpu and as_device and "LOCAL_RANK" in os.environ:
            cpu.bring_up_processes(wanted.timeout)
        accelerator = Accelerator(
            mixed_precision=mixed,
            cpu=on_cpu and not as_device,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=wanted.timeout), *recipes(wanted.precision)],
            **_plugins(name, wanted, launched),
            **accelerator_args,
        )
        peers.sign_in()
        if not compared:
            check_alike(alike, wanted.timeout.total_seconds())
        check_world(accelerator.device)
    if name == "deepspeed":
        # Else transformers would partition models as it builds them (zero.Init), with other random weights than under the other engines.
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    return accelerator, name


def _without_deprecations_of_libraries() -> None:
    """DeepSpeed and accelerate call collectives by names that torch 2.13 deprecates, and it says so in every step."""
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def splitting_ranks(wanted: Wanted) -> int:
    """Ranks that split matrices between them and read the same samples, 1 without tensor parallelism."""
    return _agreed("tensor_parallel", wanted.tensor_parallel, "tp_size")


def sharing_ranks(wanted: Wanted) -> int:
    """Ranks that share each sequence, 1 without context parallelism.

    Raises:
        EngineError: accelerate's configuration says another number, or asks for DeepSpeed's sequence parallelism.
    """
    if (sequence := int(os.environ.get("PARALLELISM_CONFIG_SP_SIZE", "1"))) > 1:
        raise EngineError(
            f"accelerate's configuration says parallelism_config_sp_size: {sequence}, and DeepSpeed's sequence parallelism is not "
            "supported; take parallelism_config_cp_size (train.context_parallel) with fsdp2"
        )
    return _agreed("context_parallel", wanted.context_parallel, "cp_size")


def _agreed(field: str, asked: int | None, size: str) -> int:
    """What `train.FIELD` and accelerate's `parallelism_config_SIZE` (a variable in the environment) say together; 1 if neither does."""
    configured = int(os.environ.get(f"PARALLELISM_CONFIG_{size.upper()}", "1"))
    asked = asked or configured
    if configured not in (1, asked):
        raise EngineError(
            f"train.{field} is {asked}, and accelerate's configuration says parallelism_config_{size}: {configured}; make them agree"
        )
    return asked


@peers.connecting()
def wrap(
    name: Name,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    tensor_parallel: int = 1,
    overlap: bool = True,
    accumulate: Accumulate | None = None,
    weights: Checkpoint | None = None,
) -> Engine:
    """Model and optimizer under the engine; the optimizer with its state allocated for the wrapped parameters.

    Args:
        tensor_parallel: what `splitting_ranks` said.
        overlap: step an Anon in the background where FSDP2 keeps the parameters on the host.
        accumulate: fsdp1, fsdp2 and hsdp: the gradients' sum over micro-batches. "sharded": ranks reduce each micro-batch's and keep their
            share; "whole": all of it on every rank, reduced once a step. None: sharded, but for parameters of bfloat16, whose shares are
            summed in bfloat16, where whole gradients are summed in float32.
        weights: of a model that is on the meta device. Engines that shard it read what the rank keeps.

    Raises:
        EngineError: the ranks' weights differ, what came back is not what was asked for, or another engine is to `accumulate`.
    """
    if accumulate is not None and name not in FSDP:
        raise EngineError(
            f"train.accumulate is a choice under {', '.join(FSDP)} only, and the engine is {name}; leave it out"
        )
    rounded = any(p.dtype == torch.bfloat16 for p in model.parameters())
    sharded_sums = name in FSDP and (accumulate or ("whole" if rounded else "sharded")) == "sharded"
    if name == "fsdp1":
        refuse_flattened(f"engine {name}", optimizer)
    if is_meta(model):
        assert weights is not None
        if name not in ("fsdp2", "hsdp", "fsdp1", "deepspeed"):
            materialize(model, weights, torch.device("cpu"))
    if not is_meta(model):
        weights = None  # they are in it
        check_same_start(model, accelerator.device)
    _check_not_stepped(optimizer)
    if name == "deepspeed":
        from anon_dist.engines.zero import ZeroEngine

        return ZeroEngine(name, accelerator, model, optimizer, weights=weights)
    if name == "zero1":
        return ZeroRedundancyEngine(name, accelerator, model, optimizer)
    if tensor_parallel > 1:
        return TensorParallelEngine(
            name, accelerator, model, optimizer, tensor_parallel, sharded_sums=sharded_sums, weights=weights
        )
    if name == "fsdp1":
        return Fsdp1Engine(name, accelerator, model, optimizer, sharded_sums=sharded_sums, weights=weights)
    plugin = accelerator.state.fsdp_plugin if name in ("fsdp2", "hsdp") else None
    offloaded = plugin is not None and isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    overlap = overlap and offloaded and isinstance(optimizer, Anon)
    return TorchEngine(name, accelerator, model, optimizer, overlap=overlap, sharded_sums=sharded_sums, weights=weights)


def _check_not_stepped(optimizer: Optimizer) -> None:
    states = (state for state in optimizer.state.values() if isinstance(state, dict) and "step" in state)
    if any(int(state["step"]) for state in states):
        raise EngineError(
            "the optimizer has been stepped or loaded before it was wrapped; load checkpoints after wrapping"
        )


def limit_waits(timeout: timedelta) -> None:
    """Give all process groups the timeout. Those that DeepSpeed and device meshes made have torch's, up to half an hour."""
    if dist.is_initialized():
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timeout, group)


def _resolve(wanted: Wanted, launched: int) -> Name:
    """The engine that both the argument and accelerate's configuration allow."""
    engine = wanted.engine
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    configured: str | None = None  # by accelerate, for more than plain data parallelism
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        configured = "fsdp" + os.environ.get("FSDP_VERSION", "1")
        if configured == "fsdp2" and int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1")) > 1:
            configured = "hsdp"
    elif os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        configured = "deepspeed"
    if engine == "auto":
        several = "ddp" if by_accelerate else "fsdp2"
        engine = configured or (several if launched > 1 else "single")  # type: ignore[assignment]
    if engine not in get_args(Name):
        raise EngineError(
            f"accelerate's configuration asks for {engine}, which train.engine does not offer; ready ones are in configs/accelerate"
        )
    if configured is not None and configured != engine and (configured, engine) != ("fsdp2", "hsdp"):
        raise EngineError(
            f"train.engine is {engine}, but accelerate's configuration asks for {configured}; use the one that fits, or engine: auto"
        )
    if configured is None and by_accelerate and launched > 1 and engine not in DATA_PARALLEL:
        raise EngineError(
            f"train.engine is {engine}, but accelerate was started for plain data parallelism (ddp); give accelerate launch the "
            f"--config_file that fits, such as configs/accelerate/{engine}.yaml, or choose --train.engine auto, ddp or zero1"
        )
    _check_options(wanted, engine)
    if engine == "single" and launched > 1:
        raise EngineError(f"train.engine is single, but {launched} processes were launched; use fsdp2 or ddp")
    if (split := splitting_ranks(wanted)) > 1 and (engine != "fsdp2" or launched % split):
        need = f"engine fsdp2, here {engine}" if engine != "fsdp2" else f"a multiple of {split} ranks, here {launched}"
        raise EngineError(f"train.tensor_parallel is {split}: it needs {need}")
    if (sharing := sharing_ranks(wanted)) > 1 and (engine not in ("fsdp2", "hsdp") or launched % sharing or split > 1):
        raise EngineError(
            f"train.context_parallel is {sharing}: it needs engine fsdp2 or hsdp, here {engine}, without tensor parallelism, here {split}, "
            f"and a multiple of {sharing} ranks, here {launched}"
        )
    if configured == "hsdp" and launched == 1:
        raise EngineError(
            "accelerate's configuration asks for replicas of shards (hsdp), and one process was launched; launch more"
        )
    alone = launched == 1 and wanted.offload in (None, "off") and "RANK" not in os.environ and configured is None
    if launched == 1 and (engine in ("ddp", "zero1", "hsdp", "fsdp1") or (engine == "fsdp2" and alone)):
        log.warning(
            "engine %s was asked for, and this is one process: it trains as engine single. For several put accelerate launch --config_file "
            "configs/accelerate/FILE.yaml, or torchrun --nproc-per-node N, in front of the script",
            engine,
        )
        engine = "single"
    if wanted.offload not in (None, "off") and (engine not in ("fsdp2", "hsdp") or split > 1):
        raise EngineError(
            f"train.offload is {wanted.offload}: it needs engine fsdp2 or hsdp without tensor parallelism, here {engine}; DeepSpeed's "
            "offload is asked for in its own configuration"
        )
    return engine  # type: ignore[return-value]


def _check_options(wanted: Wanted, engine: str) -> None:
    """Refuse options that would do nothing under the engine."""
    for option, value, theirs in (
        ("shard_ranks", wanted.shard_ranks, "hsdp"),
        ("deepspeed_config", wanted.deepspeed_config, "deepspeed"),
    ):
        if value is not None and engine != theirs:
            raise EngineError(
                f"train.{option} is {value}, which engine {engine} does not look at; leave it out, or use {theirs}"
            )


def _plugins(name: Name, wanted: Wanted, launched: int) -> dict[str, Any]:
    """accelerate's arguments for the engine."""
    if name == "deepspeed":
        return {"deepspeed_plugin": _deepspeed_plugin(wanted, launched)}
    if name == "fsdp1":
        os.environ["FSDP_VERSION"] = "1"
        return {"fsdp_plugin": fsdp1_plugin(wanted.precision == "bf16")}
    if name == "fsdp2":
        return {"fsdp_plugin": _fsdp2_plugin(wanted)} if splitting_ranks(wanted) == 1 else {}
    if name == "hsdp":
        shard = wanted.shard_ranks or int(os.environ.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", launched))
        if launched % shard:
            raise EngineError(f"train.shard_ranks = {shard} does not divide the number of ranks, {launched}")
        parallelism = ParallelismConfig(dp_replicate_size=launched // shard, dp_shard_size=shard)
        return {"fsdp_plugin": _fsdp2_plugin(wanted), "parallelism_config": parallelism}
    return {}


def _fsdp2_plugin(wanted: Wanted) -> FullyShardedDataParallelPlugin:
    """accelerate's FSDP2 settings: from its configuration where `accelerate launch` gave one, else a group per transformer block."""
    os.environ["FSDP_VERSION"] = "2"  # accelerate sets ACCELERATE_USE_FSDP, and not this
    given = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    policy = None
    if wanted.precision in ("bf16", "fp8"):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    elif wanted.precision == "bf16-true":
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    configured = os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
    offload = configured if wanted.offload is None else wanted.offload != "off"
    if given and configured != offload:
        raise EngineError(
            f"train.offload is {wanted.offload}, and accelerate's configuration says fsdp_offload_params: {configured}; make them agree"
        )
    # accelerate reads it again, to bring up gloo beside NCCL for what is on the host.
    os.environ["FSDP_OFFLOAD_PARAMS"] = str(offload).lower()
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_offload=CPUOffloadPolicy(pin_memory=not _on_cpu()) if offload else None,
        mixed_precision_policy=policy,
        auto_wrap_policy=None if given else "TRANSFORMER_BASED_WRAP",
        cpu_ram_efficient_loading=None if given else False,
    )


def _on_cpu() -> bool:
    return not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"


def _as_one_rank() -> None:
    """What a launcher would have set for a single process: DeepSpeed wants a process group in any case, and would look for MPI."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _deepspeed_file(wanted: Wanted) -> str | None:
    source = wanted.deepspeed_config or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or None
    return None if source == "none" else source


def _deepspeed_plugin(wanted: Wanted, launched: int) -> Any:
    try:
        import deepspeed  # noqa: F401 - accelerate would say that a plugin is missing
        from accelerate.utils import DeepSpeedPlugin
    except ImportError:
        raise EngineError(
            "train.engine is deepspeed, and DeepSpeed is not installed: pip install 'anon-dist[deepspeed]'"
        ) from None
    from anon_dist.engines.zero import zero_config

    source = _deepspeed_file(wanted)
    if source is None and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise EngineError(
            "name a JSON file as deepspeed_config_file in accelerate's configuration, or as train.deepspeed_config"
        )
    config = zero_config(
        source,
        micro_batch=wanted.micro_batch,
        accumulation=wanted.accumulation(launched),
        clip=wanted.clip,
        precision=wanted.precision,
    )
    return DeepSpeedPlugin(hf_ds_config=config)
