"""That this rank makes progress, and with what: told by the loop, watched by `hangs`, read by other processes if this one is stopped."""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

PAGE = 4096
"""Bytes of the file in memory in front of the stacks that `faulthandler` writes into it."""
_FORM = struct.Struct("<qd64s")
T = TypeVar("T")


@dataclass(frozen=True)
class Beat:
    """The last sign of progress of a rank."""

    step: int
    """The last one taken."""
    at: float
    """By the host's monotonic clock, which its processes share; seconds."""
    doing: str


class Pulse:
    """Signs of progress. `limit` is how many seconds may pass between two.

    Within `shared` they lie in a file in memory too, which other processes of the host find under /proc: a process that is stopped
    cannot answer.

    Args:
        usual: seconds, in a step or a validation.
        longest: seconds, in the first of each kind, and in what takes long.
    """

    def __init__(self, usual: float = float("inf"), longest: float = float("inf")) -> None:
        self.usual, self.longest = usual, longest
        self.limit = longest
        self._page: mmap.mmap | None = None
        self._known: set[str] = set()
        self._inside = 0
        self.step, self.doing, self.at = 0, "", 0.0
        self.beat("the start")

    @contextmanager
    def shared(self) -> Iterator[int]:
        """A block in which other processes can read it; the file's descriptor, behind whose first page stacks may be written."""
        descriptor = os.memfd_create("pulse")
        os.truncate(descriptor, PAGE)
        os.lseek(descriptor, PAGE, os.SEEK_SET)
        self._page = mmap.mmap(descriptor, PAGE)
        self.beat(self.doing)
        try:
            yield descriptor
        finally:
            self._page = None
            os.close(descriptor)

    def beat(self, doing: str) -> None:
        """Something has been done; `doing` is what comes next, or what was last."""
        self.at = time.monotonic()
        self.say(doing)

    def say(self, doing: str) -> None:
        """What is waited for, without a sign of progress."""
        self.doing = doing
        if self._page is not None:
            _FORM.pack_into(self._page, 0, self.step, self.at, doing.encode()[:64])

    def pardon(self, seconds: float) -> None:
        """Time in which this process was not running at all counts for nothing. It may have made progress since."""
        self.at = min(self.at + seconds, time.monotonic())

    @property
    def age(self) -> float:
        """Seconds since the last sign."""
        return time.monotonic() - self.at

    @contextmanager
    def phase(self, kind: str, step: int, long: bool = False) -> Iterator[None]:
        """A block in which the rank is at work on something; the first of its kind, and one that takes `long`, may take the longest time.

        `step`: the last one taken.
        """
        outer = self.limit if self._inside else self.usual  # before the first of them the run was being set up
        self.limit = self.longest if long or kind not in self._known else self.usual
        self.step, self._inside = step, self._inside + 1
        self.beat(kind)
        yield
        self._known.add(kind)
        self.limit, self._inside = outer, self._inside - 1
        self.beat(f"after {kind}")

    def through(self, action: Callable[[T], T], doing: str) -> Callable[[T], T]:
        """The action, each call of which is a sign of progress."""

        def told(argument: T) -> T:
            self.beat(doing)
            return action(argument)

        return told


def read_pulse(process: Path, descriptor: int) -> tuple[Beat, str]:
    """The last beat of another process of this host, and the stacks that it has written behind.

    Args:
        process: its folder, /proc/PID.

    Raises:
        OSError, ValueError: it is gone, or not ours to read.
    """
    data = (process / "fd" / str(descriptor)).read_bytes()
    if len(data) < PAGE:
        raise ValueError("no pulse")
    step, at, doing = _FORM.unpack_from(data)
    return Beat(step, at, doing.rstrip(b"\0").decode(errors="replace")), data[PAGE:].decode(errors="replace")
