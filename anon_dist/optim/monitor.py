"""What an Anon optimizer is doing, for the training log. Reads the state; no part of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from anon_dist.optim.anon import Anon
from anon_dist.optim.hyper import gamma_in_force, schedule_of
from anon_dist.optim.state import decoded, local


@dataclass
class GroupUpdate:
    """The last update of a param group, v · m̂ before the learning rate, and its preconditioner v, as far as the present state tells:
    exactly, unless a parameter had no gradient in the last step.

    Sums are over this rank's elements, each divided by the number of ranks that hold it; add them up over ranks before dividing.
    """

    elements: float = 0.0
    square_sum: float = 0.0
    """Σ (clip(v · m̂))²"""
    size_sum: float = 0.0
    """Σ |v · m̂|, before the clip."""
    clipped: float = 0.0
    """Elements that the clip cut off."""
    largest: float = 0.0
    """max |v · m̂|, before the clip."""
    moving: float = 0.0
    """Elements with m ≠ 0: of the others v says nothing."""
    log_sum: float = 0.0
    """Σ log2 v over the moving."""
    log_square_sum: float = 0.0
    """Σ (log2 v)²"""
    age: int = 0
    """Steps since v was last refreshed."""
    gamma: float | None = None
    """The γ in force; None where this rank has none of the group's parameters."""


@torch.no_grad()
def group_updates(optimizer: Anon) -> list[GroupUpdate]:
    """One for each param group. Reads exp_avg and precond once."""
    found = []
    for group in optimizer.param_groups:
        total, newest = GroupUpdate(), 0
        for p in group["params"]:
            state = optimizer.state.get(p)
            if not state or (step := int(state["step"])) == 0:
                continue
            newest = max(newest, step)
            v, m = local(state["precond"]).float(), local(decoded(state)["exp_avg"]).float()
            _add(total, v, m / (1.0 - group["betas"][0] ** step), group["update_clip"], _copies(p))
        if newest:
            total.gamma = gamma_in_force(group)
        total.age = newest - max(schedule_of(group).refreshes(newest), default=0) if newest else 0
        found.append(total)
    return found


def refreshes(optimizer: Anon) -> int:
    """How often the preconditioner was refreshed, in the group where it was most often."""
    most = 0
    for group in optimizer.param_groups:
        steps = [int(optimizer.state[p]["step"]) for p in group["params"] if p in optimizer.state]
        if steps and max(steps) > 0:
            most = max(most, len(schedule_of(group).refreshes(max(steps))))
    return most


def _add(total: GroupUpdate, v: Tensor, m: Tensor, clip: float | None, copies: int) -> None:
    if v.numel() == 0:
        return
    update = v * m
    size = update.abs()
    total.largest = max(total.largest, float(size.max()))
    total.size_sum += float(size.sum(dtype=torch.float64)) / copies
    if clip is not None:
        total.clipped += int((size > clip).sum()) / copies
        update.clamp_(-clip, clip)
    total.elements += v.numel() / copies
    total.square_sum += float(update.square_().sum(dtype=torch.float64)) / copies
    logs = v[m != 0].log2_()
    total.moving += logs.numel() / copies
    total.log_sum += float(logs.sum(dtype=torch.float64)) / copies
    total.log_square_sum += float(logs.square_().sum(dtype=torch.float64)) / copies


def _copies(p: Tensor) -> int:
    """The number of ranks that hold the same part of a DTensor. Plain tensors are all held by as many, and count as once."""
    if not isinstance(p, DTensor):
        return 1
    shards = 1
    for size, placement in zip(p.device_mesh.shape, p.placements, strict=True):
        shards *= 1 if placement.is_replicate() else size
    return dist.get_world_size() // shards
