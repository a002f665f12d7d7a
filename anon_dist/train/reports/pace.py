"""How long a run will take yet: what a step takes at present, and its share of what interrupts the steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_WINDOW = 100
"""Steps whose mean is a step's time: a change of the batch shows soon, a slow first step not for long."""
_NOTHING = 0.05
"""Of a step: as long as nothing came after it."""


class Pace:
    """Told of each step, and of each validation and save, when it is over.

    Validations are expected to go on as often as they came so far, so that what is left does not jump with one.
    """

    def __init__(self, steps: int, start: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Of a run of so many steps, after `start` of them. `clock`: seconds."""
        self._steps, self._at, self._clock = steps, start, clock
        self._taken, self._paused, self._until = 0, 0.0, 1
        self._last: deque[float] = deque(maxlen=_WINDOW)
        self._mark = clock()

    def step(self, step: int) -> None:
        """So many steps are taken now; one more than before, or fewer after going back."""
        if step > self._at:
            self._last.append(self._since())
            self._taken += 1
        self._at = step

    def pause(self) -> None:
        """What has passed since the last step was none, unless it is next to nothing."""
        seconds = self._since()
        if not self._last or seconds < _NOTHING * self._last[-1]:
            return
        self._paused, self._until = self._paused + seconds, self._taken

    def left(self) -> float | None:
        """Seconds to the last step; None before the first was taken."""
        if not self._taken:
            return None
        each = sum(self._last) / len(self._last) + self._paused / self._until
        return each * (self._steps - self._at)

    def _since(self) -> float:
        before, self._mark = self._mark, self._clock()
        return self._mark - before
