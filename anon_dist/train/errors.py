"""The error of a run's folder."""


class RunError(RuntimeError):
    """The run's folder is in use, or cannot be written; raised on every rank alike, naming the folder and the remedy."""
