"""Checks after wrapping: that the ranks see each other, and that the optimizer that will step is the one asked for.

The traps are real ones: ranks that train alone, replaced optimizers, lost param groups, state left unsharded (accelerate and DeepSpeed,
all without an error).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from anon_dist.engines.errors import EngineError
from anon_dist.engines.replicas import ReplicasDifferError, check_replicas, copies_of


def check_launcher() -> None:
    """Refuse to be one of several processes that do not know of each other.

    Raises:
        EngineError: as the environment has it, a launcher started several, or was to, without telling them.
    """
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        raise EngineError(
            "accelerate was to start several processes and started one: its launcher for CPUs (distributed_type: MULTI_CPU) does so unless "
            "given an MPI host file. Use configs/accelerate/ddp-cpu.yaml or fsdp2-cpu.yaml, or torchrun"
        )
    if "WORLD_SIZE" not in os.environ:
        for variable in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if int(os.environ.get(variable, "1")) > 1:
                raise EngineError(
                    f"{variable} = {os.environ[variable]}, but WORLD_SIZE is not set: every task would train alone. Have srun or mpirun "
                    "start one `accelerate launch` or `torchrun` per node"
                )


def check_world(device: torch.device) -> int:
    """The number of ranks, counted by adding up a one from each.

    Raises:
        EngineError: fewer or more came up than the launcher started.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    counted = 1
    if dist.is_available() and dist.is_initialized():
        ones = torch.ones((), device=device)
        dist.all_reduce(ones)
        counted = int(ones)
    if counted != launched:
        raise EngineError(
            f"the launcher started {launched} processes, and this one sees {counted}: each would train alone. "
            "Start with `accelerate launch`, `torchrun` or plain `python`, and see that use_cpu and distributed_type of accelerate's "
            "configuration fit the machine (configs/accelerate has ready ones)"
        )
    return counted


def check_same_start(model: nn.Module, device: torch.device) -> None:
    """Every rank must have built the same weights, since each keeps its own part of its own copy.

    Raises:
        EngineError: they differ; naming a parameter and the ranks.
    """
    try:
        check_replicas(copies_of(model), device)
    except ReplicasDifferError as error:
        raise EngineError(
            f"the ranks built models with different weights: {error}. Seed them alike, or load the same file everywhere"
        ) from None


def check_optimizer(
    optimizer: Optimizer, model: nn.Module | None, wanted: type[Optimizer], groups: list[dict[str, Any]]
) -> None:
    """The optimizer that will step must be `wanted`, over this model's float32 parameters, with the groups asked for.

    Args:
        optimizer: as the engine gave it back; wrappers with an `optimizer` attribute are looked through.
        model: as the engine gave it back; None where the optimizer holds other tensors than the model (DeepSpeed's flat partitions).
        groups: the param groups that were asked for; every hyperparameter in them must have arrived.

    Raises:
        EngineError: naming the difference.
    """
    inner = optimizer
    while not isinstance(inner, wanted) and isinstance(getattr(inner, "optimizer", None), Optimizer):
        inner = inner.optimizer  # type: ignore[attr-defined]
    if not isinstance(inner, wanted):
        raise EngineError(f"the engine replaced {wanted.__name__} by {type(inner).__name__}")
    if len(inner.param_groups) != len(groups):
        raise EngineError(
            f"{len(groups)} param groups were asked for, and the engine made {len(inner.param_groups)} of them"
        )
    for index, (found, asked) in enumerate(zip(inner.param_groups, groups, strict=True)):
        for key, value in asked.items():
            if key != "params" and found.get(key) != value:
                raise EngineError(
                    f"{key} of param group {index} is {found.get(key)!r} after wrapping, {value!r} was asked for"
                )
    held = {id(p): group for group in inner.param_groups for p in group["params"]}
    for name, p in model.named_parameters() if model is not None else ():
        if p.requires_grad and id(p) not in held:
            raise EngineError(f"the engine left parameter {name} out of the optimizer: it would never be updated")
        if p.requires_grad and p.dtype != torch.float32 and not held[id(p)].get("stochastic_rounding"):
            raise EngineError(
                f"parameter {name} is {p.dtype}; the optimizer must see float32 master weights, or round stochastically "
                "(Anon(stochastic_rounding=True), train.precision bf16-true)"
            )


@dataclass(frozen=True)
class StateBytes:
    """Bytes of optimizer state (exp_avg, exp_avg_sq, precond and the like; not the 0-dim step counts)."""

    local: int
    """On this rank."""
    whole: int
    """Of the unsharded parameters."""


def state_bytes(optimizer: Optimizer) -> StateBytes:
    """What the optimizer's state takes on this rank, and would take unsharded."""
    local = whole = 0
    for tensor in _state_tensors(optimizer.state.values()):
        whole += tensor.numel() * tensor.element_size()
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local += own.numel() * own.element_size()
    return StateBytes(local, whole)


def state_bytes_of_ranks(optimizer: Optimizer, device: torch.device) -> StateBytes:
    """The same where each rank has plain tensors of its own: the whole is the sum over ranks. Every rank must call it."""
    local = state_bytes(optimizer).local
    whole = torch.tensor(local, dtype=torch.int64, device=device)
    if dist.is_initialized():
        dist.all_reduce(whole)
    return StateBytes(local, int(whole))


def _state_tensors(states: Iterable[dict[str, Any]]) -> Iterable[Tensor]:
    for state in states:
        for value in state.values():
            if isinstance(value, Tensor) and value.dim() > 0:
                yield value
