"""Engines: how ranks share a model and its optimizer. Each wraps, checks what was wrapped, and says what went wrong."""

from anon_dist.engines.check import EngineError, StateBytes, check_optimizer, check_world, state_bytes
from anon_dist.engines.start import start, wrap

__all__ = ["EngineError", "StateBytes", "check_optimizer", "check_world", "start", "state_bytes", "wrap"]
