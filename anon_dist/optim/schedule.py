"""When the preconditioner is refreshed and which steps feed it: integers only.

The paper refreshes at a_k = 2^k. Here a_0 = 1 and a_{k+1} = max(a_k + 1, ⌈ρ a_k⌉), which is the paper's for ρ = 2, or
a_k + `max_interval` if that comes before. Everything follows from a parameter's own step count and its group's hyperparameters; there is
no counter that a checkpoint could lose.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Literal

KNOWN_STEPS = 1024
"""So many steps are remembered: each parameter of a group asks for one, and most for the same."""

NEVER = 1 << 62
"""A step that no run comes to."""

Window = int | Literal["auto"] | None

WINDOW_BITS = 24
"""What an automatic window leaves out of the second moment weighs at most 2^-24, a float32's half unit of rounding."""


def refresh_after(step: int, ratio: float, max_interval: int | None = None) -> int:
    """The refresh that follows one at `step`: max(step + 1, ⌈ratio · step⌉), but no more than `max_interval` steps later.

    The ratio is taken at its decimal face value. As a binary float 1.1 lies above 11/10, and ⌈1.1 · 170⌉ would be 188, not 187.
    """
    following = max(step + 1, math.ceil(Fraction(str(ratio)) * step))
    return following if max_interval is None else min(following, step + max_interval)


def window_length(window: Window, beta2: float) -> int | None:
    """Steps before a refresh in which the second moment is accumulated; None for all of them."""
    if window != "auto":
        return window
    if beta2 == 0.0:
        return 1
    return max(1, math.ceil(WINDOW_BITS * math.log(2.0) / -math.log(beta2)))


@dataclass(frozen=True)
class Phase:
    """Schedule hyperparameters in force after step `since`, until the next phase's `since`."""

    since: int
    refresh_ratio: float
    beta2: float
    window: Window
    max_interval: int | None = None

    def refresh_after(self, step: int) -> int:
        """The refresh that follows one at `step` in this phase."""
        return refresh_after(step, self.refresh_ratio, self.max_interval)


@dataclass(frozen=True)
class ScheduledStep:
    """What the schedule asks of one step, beyond the momentum and the parameter update."""

    accumulate: bool
    """Whether the squared gradient enters the second moment."""
    refresh: bool
    """Whether the preconditioner is refreshed, after that."""
    first: bool
    """Whether it is the first refresh, which has no old preconditioner to keep a part of."""
    beta2: float
    """Decay of the second moment at this step."""
    debias: float
    """At a refresh, the summed weight of the accumulated gradients, 1 − β2^age; 1.0 at any other step."""


@dataclass(frozen=True)
class _Stretch:
    """Steps `first` to `last` on the way from the refresh at `previous` to the one at `target`, under one phase.

    `last < target` only where a change of phase moved the target.
    """

    first: int
    last: int
    previous: int
    target: int
    phase: Phase
    log_decay: float
    """Σ ln β2 over the accumulating steps since `previous` that came before this stretch."""
    accumulated: int
    """How many those are."""

    @property
    def window_start(self) -> int:
        """The first step of the stretch that accumulates (it may lie past `last`)."""
        length = window_length(self.phase.window, self.phase.beta2)
        return self.first if length is None else max(self.first, self.target - length + 1)

    @property
    def log_decay_after(self) -> float:
        count = self.accumulated_after - self.accumulated
        if count == 0:
            return self.log_decay
        return self.log_decay + count * (math.log(self.phase.beta2) if self.phase.beta2 > 0.0 else -math.inf)

    @property
    def accumulated_after(self) -> int:
        return self.accumulated + max(0, self.last - self.window_start + 1)


@dataclass(frozen=True)
class _Run:
    """Stretches of one length under one phase, each from a refresh to the next: `max_interval` has set in."""

    start: int
    """The refresh that the first one begins after."""
    interval: int
    last: int
    """The last refresh: `start` and a multiple of `interval`."""
    phase: Phase

    def ending(self, target: int) -> _Stretch:
        """The stretch that ends at a refresh of the run."""
        previous = target - self.interval
        return _Stretch(previous + 1, target, previous, target, self.phase, 0.0, 0)

    def around(self, step: int) -> _Stretch:
        """The stretch with this step."""
        return self.ending(step + (self.start - step) % self.interval)

    def refreshes(self, until: int) -> range:
        """Those up to a step."""
        return range(self.start + self.interval, min(self.last, until) + 1, self.interval)


class Schedule:
    """What is due in every step t = 1, 2, … under a sequence of phases.

    A change of phase at step T keeps the age of the second moment: what was accumulated until T counts with the weight it has. The
    next refresh is then at max(T + 1, ⌈ρ' a⌉), a being the last one; but if a window had left steps out, not before the new
    window could be filled, since an average over fewer steps would be worse than the old preconditioner.
    """

    def __init__(self, phases: tuple[Phase, ...]) -> None:
        if not phases or phases[0].since != 0 or any(a.since >= b.since for a, b in pairwise(phases)):
            raise ValueError(f"phases must start at step 0 and follow each other, not {phases}")
        self._phases = phases
        first = self._stretch(1, 0, 1, 0, 0.0, 0)
        self._stretches: list[_Stretch | _Run] = [first]
        self._lasts = [first.last]
        self._known: dict[int, ScheduledStep] = {}

    def at(self, step: int) -> ScheduledStep:
        """What is due in `step` ≥ 1. Amortised O(log t): stretches are made as far as asked, and those of one length at once."""
        if known := self._known.get(step):
            return known
        if len(self._known) >= KNOWN_STEPS:
            self._known.clear()
        return self._known.setdefault(step, self._find(step))

    def _find(self, step: int) -> ScheduledStep:
        if step < 1:
            raise ValueError(f"steps count from 1, not {step}")
        while self._lasts[-1] < step:
            self._extend()
        found = self._stretches[bisect_left(self._lasts, step)]
        stretch = found.around(step) if isinstance(found, _Run) else found
        refresh = step == stretch.target
        return ScheduledStep(
            accumulate=step >= stretch.window_start,
            refresh=refresh,
            first=refresh and stretch.previous == 0,
            beta2=stretch.phase.beta2,
            debias=-math.expm1(stretch.log_decay_after) if refresh else 1.0,
        )

    def refreshes(self, until: int) -> list[int]:
        """All refresh steps a_k ≤ until."""
        while self._lasts[-1] < until:
            self._extend()
        found: list[int] = []
        for s in self._stretches:
            if isinstance(s, _Run):
                found += s.refreshes(until)
            elif s.last == s.target <= until:
                found.append(s.target)
        return found

    def _extend(self) -> None:
        """Make the stretch that follows the last one: on to the next refresh, or, if a new phase has cut the last one short, on to the
        target that the new phase gives the same refresh."""
        last = self._stretches[-1]
        done = last.ending(last.last) if isinstance(last, _Run) else last
        index = self._phases.index(done.phase)
        if index + 1 < len(self._phases) and self._phases[index + 1].since == done.last:
            index += 1
        phase = self._phases[index]
        if done.last == done.target:
            target = phase.refresh_after(done.target)
            if target - done.target == phase.max_interval and (run := self._run(done.target, target, index)):
                self._stretches.append(run)
                self._lasts.append(run.last)
                return
            stretch = self._stretch(done.last + 1, done.target, target, index, 0.0, 0)
        else:
            target = max(done.last + 1, phase.refresh_after(done.previous) if done.previous else 1)
            accumulated = done.accumulated_after
            if accumulated < done.last - done.previous:  # a window has left steps out: the new one is to be filled
                length = window_length(phase.window, phase.beta2) or window_length("auto", phase.beta2) or 1
                target = max(target, done.last + length - accumulated)
            stretch = self._stretch(done.last + 1, done.previous, target, index, done.log_decay_after, accumulated)
        self._stretches.append(stretch)
        self._lasts.append(stretch.last)

    def _run(self, start: int, target: int, index: int) -> _Run | None:
        """All whole stretches from a refresh on under the phase of this index, the first of which ends at `target`; None if there is none.

        The following ones are as long: ⌈ρ a⌉ − a does not become smaller with a.
        """
        end, interval = self._phases[index + 1].since if index + 1 < len(self._phases) else NEVER, target - start
        last = end - (end - start) % interval
        return _Run(start, interval, last, self._phases[index]) if last > start else None

    def _stretch(
        self, first: int, previous: int, target: int, index: int, log_decay: float, accumulated: int
    ) -> _Stretch:
        """A stretch from `first` on under the phase of this index, which ends at the target or where the next phase begins."""
        changes = self._phases[index + 1].since if index + 1 < len(self._phases) else target
        return _Stretch(first, min(target, changes), previous, target, self._phases[index], log_decay, accumulated)


@lru_cache(maxsize=256)
def schedule(*phases: Phase) -> Schedule:
    """The schedule of these phases, shared by all groups that have them."""
    return Schedule(phases)
