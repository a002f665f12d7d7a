"""The one error of this package."""

from anon_dist.exits import USAGE


class EngineError(RuntimeError):
    """The engine did not do what was asked of it, or cannot."""

    exit_code = USAGE
