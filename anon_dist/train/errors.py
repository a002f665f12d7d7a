"""The errors of a configuration and of a run's folder."""


class ConfigError(ValueError):
    """The configuration is wrong; the message says which file or flag, which key, and the remedy."""


class RunError(RuntimeError):
    """The run's folder is in use, or cannot be written; raised on every rank alike, naming the folder and the remedy."""


class RunInUseError(RunError):
    """Another process is at work in the folder."""


IN_USE = 75
"""Exit code of a run that is refused for that (EX_TEMPFAIL of sysexits.h): it may be started again later."""
