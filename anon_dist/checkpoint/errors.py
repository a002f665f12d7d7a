"""The errors of this package."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read, or used here; the message names the file, the key and the remedy."""


class DamagedCheckpoint(CheckpointError):  # noqa: N818 - names the thing, as FileNotFound names one
    """Files of a checkpoint are damaged or missing; raised on every rank alike. An earlier one may be whole."""
