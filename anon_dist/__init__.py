"""Distributed pretraining with Anon, an optimizer whose adaptivity is a dial (arXiv 2605.02317).

Importing this package, or any of its modules, changes nothing elsewhere. `register()` makes Anon known to DeepSpeed and accelerate, and is
called by whoever takes `Anon` from here: `from anon_dist import Anon`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anon_dist import launcher as _launcher  # noqa: F401 - before anything that takes time: see there

if TYPE_CHECKING:
    from anon_dist.engines.register import register
    from anon_dist.optim import Anon

__version__ = "0.1.0"
__all__ = ["Anon", "__version__", "register"]


def __getattr__(name: str) -> Any:
    if name not in ("Anon", "register"):
        raise AttributeError(f"module 'anon_dist' has no attribute '{name}'")
    from anon_dist.engines.register import register
    from anon_dist.optim import Anon

    if name == "register":
        return register
    register()
    return Anon
