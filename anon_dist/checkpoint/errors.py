"""The one error of this package."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read, or used here; the message names the file, the key and the remedy."""
