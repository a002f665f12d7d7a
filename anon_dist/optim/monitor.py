"""What an Anon optimizer is doing, for the training log. Reads the state; no part of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from anon_dist.optim.anon import Anon
from anon_dist.optim.hyper import schedule_of


@dataclass(frozen=True)
class UpdateStatistics:
    """Sums over this rank's elements; add them up over ranks before dividing."""

    square_sum: float
    """Σ (clip(v · m̂))², of the update before the learning rate."""
    elements: int


@torch.no_grad()
def update_statistics(optimizer: Anon) -> UpdateStatistics:
    """The size of the last update, as far as the present state tells: exactly, unless a parameter had no gradient in it."""
    total, elements = 0.0, 0
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
            total += float(update.square_().sum(dtype=torch.float64))
            elements += update.numel()
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
