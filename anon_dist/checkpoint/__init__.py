"""Checkpoints: complete or absent, sharded, and checked against what is to be restored."""

from anon_dist.checkpoint.dcp import load_sharded, save_sharded
from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.folder import Checkpoints

__all__ = ["CheckpointError", "Checkpoints", "DamagedCheckpoint", "load_sharded", "save_sharded"]
