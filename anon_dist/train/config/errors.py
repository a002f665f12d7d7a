"""The errors of a configuration, of a run's folder, of an evaluation."""

from anon_dist.exits import IN_USE, USAGE


class ConfigError(ValueError):
    """The configuration is wrong; the message says which file or flag, which key, and the remedy."""

    exit_code = USAGE


class RunError(RuntimeError):
    """The run's folder is in use, or cannot be written; raised on every rank alike, naming the folder and the remedy."""


class SkippedError(RunError):
    """Too many steps in a row were skipped; on every rank."""


class RunInUseError(RunError):
    """Another process is at work in the folder."""

    exit_code = IN_USE


class HarnessError(ValueError):
    """lm-eval, a task or its data is missing, or a task does not go with the model; the message names it, and the remedy."""


class Interrupted(KeyboardInterrupt):
    """A Ctrl-C stopped a run of one process; its checkpoint is written, and that is said."""


DIVERGED = "steps in a row had a non-finite gradient"
"""What a `SkippedError` says of them; a sweep looks for it."""
