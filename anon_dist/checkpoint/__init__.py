"""Checkpoints: complete or absent, sharded, and checked against what is to be restored.

Importing this package does not import torch: its modules are imported when something of theirs is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anon_dist.checkpoint.dcp.sharded import load_sharded, save_sharded
    from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
    from anon_dist.checkpoint.keeping.folder import Checkpoints

__all__ = ["CheckpointError", "Checkpoints", "DamagedCheckpoint", "load_sharded", "save_sharded"]
_HOMES = {
    "CheckpointError": "errors",
    "Checkpoints": "keeping.folder",
    "DamagedCheckpoint": "errors",
    "load_sharded": "dcp.sharded",
    "save_sharded": "dcp.sharded",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
