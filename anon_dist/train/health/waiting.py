"""A step that waits for its data: what comes from a store meanwhile is a sign of progress, the waiting itself is none."""

from __future__ import annotations

from collections.abc import Callable

from anon_dist.data.stored.remote import TRAFFIC
from anon_dist.train.health.pulse import Pulse


class Waiting:
    """Called every second while a rank waits for its next batch.

    Args:
        pulse: of this rank, at the time.
    """

    def __init__(self, pulse: Callable[[], Pulse]) -> None:
        self._pulse, self._received = pulse, TRAFFIC.received

    def __call__(self) -> None:
        """Tell the watch what is waited for; and that there is progress, if there was any."""
        if not TRAFFIC.last:
            return
        pulse, doing = self._pulse(), f"waiting for {TRAFFIC.last}"
        if TRAFFIC.received > self._received:
            self._received = TRAFFIC.received
            pulse.beat(doing)
        else:
            pulse.say(doing)
