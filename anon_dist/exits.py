"""The exit codes of all commands, and with which of them an error ends one.

Each class of errors says its own code, `exit_code`: of what the command line, the configuration or what these name is to blame for, it is
`USAGE`. Any other error is `FAILED`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

FAILED = 1
"""Something failed at work."""
USAGE = 2
"""The command line, the configuration or what these name is wrong: nothing was done, and nor would it be the next time."""
IN_USE = 75
"""The run is at work in another process (EX_TEMPFAIL of sysexits.h): it may be started again later."""
INTERRUPTED = 130
"""A Ctrl-C: 128 and the signal's number, as shells say it, which end a loop or a list of commands for it."""

_Error = TypeVar("_Error", bound=BaseException)


def code_of(error: BaseException) -> int:
    """The exit code of a command that the error ends."""
    misnamed = isinstance(error, NotADirectoryError | IsADirectoryError)  # through a file, or a folder in place of one
    return int(getattr(error, "exit_code", USAGE if misnamed else FAILED))


def may_pass(error: _Error) -> _Error:
    """The error, of a class whose others are refusals: the same command may succeed the next time."""
    error.__dict__["exit_code"] = FAILED
    return error


def refused(error: _Error) -> _Error:
    """The error, of a class whose others may pass: the same command would end so again."""
    error.__dict__["exit_code"] = USAGE
    return error


@contextmanager
def at_work() -> Iterator[None]:
    """A block that does what was asked for: an error in it is no refusal, of whatever class."""
    try:
        yield
    except Exception as error:
        if code_of(error) == USAGE:
            may_pass(error)
        raise
