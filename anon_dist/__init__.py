"""Distributed pretraining with Anon, an optimizer whose adaptivity is a dial (arXiv 2605.02317)."""

from anon_dist import launcher as _launcher  # isort: split - before anything that takes time: see there
from anon_dist.engines.register import register
from anon_dist.optim import Anon

__version__ = "0.1.0"
__all__ = ["Anon", "__version__"]

register()
del register, _launcher
