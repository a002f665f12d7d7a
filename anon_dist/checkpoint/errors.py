"""What goes wrong with checkpoints."""

import re

from anon_dist.exits import FAILED, USAGE


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read, or used here; the message names the file, the key and the remedy."""

    exit_code = USAGE


class UnwrittenCheckpoint(CheckpointError):  # noqa: N818 - it says what is the matter
    """A checkpoint could not be written; nothing of it is left.

    Args:
        what: could not be written.
        reason: kept for those who say the rest in words of their own.
        rest: what is there instead.
    """

    exit_code = FAILED

    def __init__(self, what: str, reason: str, rest: str) -> None:
        super().__init__(f"{what} could not be written: {reason}. {rest}")
        self.reason = reason


class DamagedCheckpoint(CheckpointError):  # noqa: N818 - it says what is the matter
    """A checkpoint is not as it was written: a file is missing, truncated or altered. An earlier one may be right."""

    exit_code = FAILED

    @property
    def damage(self) -> str:
        """What is damaged, without the remedy: of who has taken an earlier one already."""
        return re.sub(r"\. Take an earlier checkpoint( than [^\s;]+)?", "", str(self))


class GroupsDiffer(CheckpointError):  # noqa: N818 - the same
    """An optimizer's param groups are not those that a checkpoint was written with."""


class NamesWanted(CheckpointError):  # noqa: N818 - the same
    """An optimizer numbers its parameters, and which is which does not show."""
