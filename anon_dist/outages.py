"""What a process says of a store that fails: the first failure, then at growing intervals, and how long it took when it answers again."""

from __future__ import annotations

import logging
import re
import threading
import time
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

FIRST, MOST = 15.0, 300.0
"""Seconds between two lines on a store: from the first failure on, and at most. Twice as long each time."""
APART = 0.5
"""Seconds after a failure in which what another thread was given says nothing of the store."""
QUIET = 600.0
"""Seconds without a failure after which the next one is the first again."""


@dataclass
class _Outage:
    begun: float
    """Of the failures since the store last answered."""
    last: float
    said: float
    interval: float = FIRST
    failing: int = 1
    """Attempts since it last answered; 0: it answers."""
    unsaid: int = 0
    open: bool = True
    """Whether a line said that it fails, and none since that it answers."""
    kinds: set[str] = field(default_factory=set)
    """Of errors that were said: each is, once."""


class Outages:
    """Of the stores that a process uses, by any of its threads."""

    def __init__(self) -> None:
        self._of: dict[str, _Outage] = {}
        self._lock = threading.Lock()

    def failed(self, what: str, error: Exception, pause: float) -> None:
        """An attempt failed, and is made again after so many seconds. `what` names the address."""
        now, store, kind = time.monotonic(), store_of(what), type(error).__name__
        with self._lock:
            found = self._of.get(store)
            if found is None or now - found.last > QUIET:
                found = self._of[store] = _Outage(now, now, now)
            else:
                found.begun = found.begun if found.failing else now
                found.failing, found.last, found.unsaid = found.failing + 1, now, found.unsaid + 1
            if kind not in found.kinds:
                found.kinds.add(kind)
                log.warning("%s: %s: %s; trying again in %.0f s", what, kind, error, pause)
            elif now - found.said >= found.interval:
                log.warning(
                    "%s: %s: %s; trying again. %d attempts at %s failed in the last %.0f s",
                    *(what, kind, error, found.unsaid, store, now - found.said),
                )
                found.interval = min(2 * found.interval, MOST)
            else:
                return
            found.said, found.unsaid, found.open = now, 0, True

    def answered(self, what: str) -> None:
        """An attempt succeeded."""
        if not self._of:
            return
        now, store = time.monotonic(), store_of(what)
        with self._lock:
            found = self._of.get(store)
            if found is None or not found.failing or now - found.begun < APART:
                return
            if found.open:
                log.warning("%s answers again, after %.0f s and %d attempts", store, now - found.begun, found.failing)
            found.failing, found.open = 0, False

    def forget(self) -> None:
        """Begin anew."""
        with self._lock:
            self._of.clear()


def store_of(what: str) -> str:
    """The first address in some words, without what lies in the store."""
    found = re.search(r"[\w+.-]+://[^/\s]*", what)
    return found[0] if found else what


OUTAGES = Outages()
