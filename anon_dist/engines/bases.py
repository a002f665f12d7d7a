"""Matrices in bases of their own (`Anon(basis=…)`) under an engine: which can hold them.

DeepSpeed and FSDP1 cut matrices into flat parts, which have neither rows nor columns.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from anon_dist.engines.errors import EngineError
from anon_dist.optim import Anon

FLATTENING = ("fsdp1", "deepspeed")
"""Engines that cut matrices into flat parts."""


def refuse_flattened(engine: str, optimizer: Optimizer) -> None:
    """Refuse a basis under an engine that shows the optimizer no matrices.

    Args:
        engine: its name, for the message.

    Raises:
        EngineError: a param group has a basis.
    """
    for index, group in enumerate(optimizer.param_groups):
        if isinstance(optimizer, Anon) and group["basis"] is not None:
            raise EngineError(
                f"basis is {group['basis']!r} in param group {index}, and {engine} cuts matrices into flat parts, which have neither rows "
                "nor columns: use FSDP2, DDP or ZeroRedundancyOptimizer (train.engine fsdp2, ddp, zero1), or basis None"
            )


def allocate(optimizer: Any) -> None:
    """Make the state of an optimizer's final parameters, if that can be done before its first step.

    Raises:
        EngineError: blocks of a basis would lie across shards; with the block that fits.
    """
    if hasattr(optimizer, "init_state"):
        try:
            optimizer.init_state()
        except RuntimeError as error:
            raise EngineError(str(error).removeprefix("Anon: ")) from None
