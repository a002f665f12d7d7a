"""What an Anon optimizer is doing, for the training log. Reads the state; no part of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from anon_dist.optim.anon import Anon
from anon_dist.optim.hyper import schedule_of


@dataclass(frozen=True)
class UpdateStatistics:
    """Sums over this rank's elements, each divided by the number of ranks that hold it; add them up over ranks before dividing."""

    square_sum: float
    """Σ (clip(v · m̂))², of the update before the learning rate."""
    elements: float


@torch.no_grad()
def update_statistics(optimizer: Anon) -> UpdateStatistics:
    """The size of the last update, as far as the present state tells: exactly, unless a parameter had no gradient in it."""
    total = elements = 0.0
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p)
            step = int(state["step"]) if state else 0
            if not state or step == 0:
                continue
            update = (
                _local(state["precond"]).float() * _local(state["exp_avg"]).float() / (1.0 - group["betas"][0] ** step)
            )
            if group["update_clip"] is not None:
                update = update.clamp_(-group["update_clip"], group["update_clip"])
            copies = _copies(p)
            total += float(update.square_().sum(dtype=torch.float64)) / copies
            elements += update.numel() / copies
    return UpdateStatistics(total, elements)


def refreshes(optimizer: Anon) -> int:
    """How often the preconditioner was refreshed, in the group where it was most often."""
    most = 0
    for group in optimizer.param_groups:
        steps = [int(optimizer.state[p]["step"]) for p in group["params"] if p in optimizer.state]
        if steps and max(steps) > 0:
            most = max(most, len(schedule_of(group).refreshes(max(steps))))
    return most


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copies(p: Tensor) -> int:
    """The number of ranks that hold the same part of a DTensor. Plain tensors are all held by as many, and count as once."""
    if not isinstance(p, DTensor):
        return 1
    shards = 1
    for size, placement in zip(p.device_mesh.shape, p.placements, strict=True):
        shards *= 1 if placement.is_replicate() else size
    return dist.get_world_size() // shards
