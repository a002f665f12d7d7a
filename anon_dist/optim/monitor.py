"""What an Anon optimizer is doing, for the training log. Reads the state; no part of a step.

It goes through the tensors in pieces, adds up on their device, and is read with one transfer, so that neither memory nor the host's waiting
grows with the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from anon_dist.optim.anon import Anon
from anon_dist.optim.regime import Regime
from anon_dist.optim.rounding import BLOCK, decode_blocks
from anon_dist.optim.state import EXPONENTS, local
from anon_dist.optim.update import pieces

PIECE = {"cpu": 1 << 17, "cuda": 1 << 21}
"""Elements taken at once: on a CPU they stay in its caches; on a GPU four float32 temporaries need 32 MiB."""

Found = tuple[Tensor, Tensor]
"""Of each param group (rows), what is added up over ranks and what is compared; see `measure`."""


@dataclass
class GroupUpdate:
    """The last update of a param group, v · m̂ before the learning rate, and its preconditioner v, as far as the present state tells:
    exactly, unless a parameter had no gradient in the last step. Of a matrix in a basis of its own it is the update in that basis, where it
    is clipped, and which has the same root mean square outside; right after a refresh, in the basis that comes next.

    With Nesterov momentum θ moved by a mean that has the last gradient in it once more, which the state does not tell. Sizes and the share
    that is clipped are those of v · m̂ all the same: less than the update's where gradients are mostly noise, at β1 = 0.9 by 14% of the root
    mean square.

    Sums are over this rank's elements, each divided by the number of ranks that hold it; add them up over ranks before dividing.
    """

    elements: float = 0.0
    square_sum: float = 0.0
    """Σ (clip(v · m̂))²"""
    size_sum: float = 0.0
    """Σ |v · m̂|, before the clip."""
    clipped: float = 0.0
    """Elements that the clip cut off."""
    moving: float = 0.0
    """Elements with m ≠ 0: of the others v says nothing."""
    log_sum: float = 0.0
    """Σ log2 v over the moving."""
    log_square_sum: float = 0.0
    """Σ (log2 v)²"""
    largest: float = 0.0
    """max |v · m̂|, before the clip."""
    age: int = 0
    """Steps since v was last refreshed."""
    gamma: float | None = None
    """The γ in force; None where this rank has none of the group's parameters."""


NAMES = tuple(f.name for f in fields(GroupUpdate))
SUMS = 7
"""How many of `NAMES`, from the first on, are sums."""


@torch.no_grad()
def measure(optimizer: Anon, device: torch.device) -> Found:
    """Read exp_avg and precond once.

    Args:
        device: where the result is to be; that of the state, or nothing is gained.

    Returns:
        float64 [groups, 7]: elements … log_square_sum of `GroupUpdate`, to be added up over ranks; and [groups, 3]: largest, age and γ, of
        which the largest over ranks holds (−∞ for a γ that is not known).
    """
    optimizer.settle()
    sums, most = [], []
    for group in optimizer.param_groups:
        found, newest = [torch.zeros(SUMS + 1, dtype=torch.float64, device=device)], 0
        for p in group["params"]:
            state = optimizer.state.get(p)
            if not state or (step := int(state["step"])) == 0:
                continue
            newest = max(newest, step)
            debias, copies = 1.0 - group["betas"][0] ** step, _copies(p)
            if rows := [_row(v, m, debias, group["update_clip"], copies) for v, m in _parts(state)]:
                found.append(_together(torch.stack(rows)).to(device))
        total, regime = _together(torch.stack(found)), Regime(group)
        last = max(regime.schedule.refreshes(newest), default=0)
        own = torch.tensor([newest - last, regime.gamma_in_force if newest else -torch.inf], dtype=torch.float64)
        sums.append(total[:SUMS])
        most.append(torch.cat([total[SUMS:], own.to(device, non_blocking=True)]))
    return torch.stack(sums), torch.stack(most)


def read(found: Found) -> list[GroupUpdate]:
    """What was measured, of each group. This waits for the device, once."""
    table = torch.cat(found, dim=1).tolist()
    groups = [GroupUpdate(**dict(zip(NAMES, row, strict=True))) for row in table]
    for group in groups:
        group.age = int(group.age)
        group.gamma = None if group.gamma == -torch.inf else group.gamma
    return groups


def refreshes(optimizer: Anon) -> int:
    """How often the preconditioner was refreshed, in the group where it was most often."""
    optimizer.settle()
    most = 0
    for group in optimizer.param_groups:
        steps = [int(optimizer.state[p]["step"]) for p in group["params"] if p in optimizer.state]
        if steps and max(steps) > 0:
            most = max(most, len(Regime(group).schedule.refreshes(max(steps))))
    return most


def _parts(state: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """v and m of a parameter, piece by piece, in float32."""
    v, m = local(state["precond"]), local(state["exp_avg"])
    if v.numel() == 0:
        return
    elements = PIECE["cpu" if v.device.type == "cpu" else "cuda"]
    if EXPONENTS not in state:
        yield from ((a.float(), b.float()) for a, b in pieces(v, m, elements=elements))
        return
    blocks = state[EXPONENTS].split(elements // BLOCK)
    for a, codes, exponents in zip(v.reshape(-1).split(elements), m.reshape(-1).split(elements), blocks, strict=True):
        yield a.float(), decode_blocks(codes, exponents)


def _row(v: Tensor, m: Tensor, debias: float, clip: float | None, copies: int) -> Tensor:
    """The sums of `GroupUpdate` and `largest` of some elements; float64 [8]."""
    size = (v * m).mul_(1.0 / debias).abs_()
    largest, size_sum, clipped = size.amax(), size.sum(), size.new_zeros(())
    if clip is not None:
        clipped = (size > clip).sum()
        size.clamp_(max=clip)
    flat, still = size.reshape(-1), m == 0
    logs = v.log2().masked_fill_(still, 0.0).reshape(-1)
    elements = torch.full_like(largest, size.numel())
    values = (elements, flat.dot(flat), size_sum, clipped, elements - still.sum(), logs.sum(), logs.dot(logs))
    sums = torch.stack([value.double() for value in values]) / copies
    return torch.cat([sums, largest.double().reshape(1)])


def _together(rows: Tensor) -> Tensor:
    """One row of several."""
    return torch.cat([rows[:, :SUMS].sum(0), rows[:, SUMS:].amax(0)])


def _copies(p: Tensor) -> int:
    """The number of ranks that hold the same part of a DTensor. Plain tensors are all held by as many, and count as once."""
    if not isinstance(p, DTensor):
        return 1
    shards = 1
    for size, placement in zip(p.device_mesh.shape, p.placements, strict=True):
        shards *= 1 if placement.is_replicate() else size
    return dist.get_world_size() // shards
