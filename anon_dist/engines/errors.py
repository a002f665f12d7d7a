"""The one error of this package."""


class EngineError(RuntimeError):
    """The engine did not do what was asked of it, or cannot."""
