"""What FSDP2 adds to tensors whose first dimension its ranks do not divide: each rank's part is padded to the longest."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class Padding:
    """Of a model's parameters."""

    share: float
    """Of what an all-gather of all of them moves."""
    name: str
    """Of the parameter that is padded by most elements."""
    shape: tuple[int, ...]
    ranks: int
    """That divide its first dimension."""


def padding_of(model: nn.Module) -> Padding | None:
    """What is added to a model that FSDP2 has wrapped; None where it is nothing."""
    moved, added, most = 0, 0, Padding(0.0, "", (), 1)
    largest = 0
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        ranks = math.prod(
            parameter.device_mesh.size(i)
            for i, placed in enumerate(parameter.placements)
            if isinstance(placed, Shard) and placed.dim == 0
        )
        rows = parameter.shape[0] if parameter.dim() else 1
        row = parameter.numel() // max(1, rows)
        padded = -(-rows // ranks) * ranks
        moved, added = moved + padded * row, added + (padded - rows) * row
        if (padded - rows) * row > largest:
            largest, most = (padded - rows) * row, Padding(0.0, name, tuple(parameter.shape), ranks)
    return Padding(added / moved, most.name, most.shape, most.ranks) if added else None
