"""When a cell is hopeless.

At each validation a run is stopped if its loss

- is not a number, or infinite;
- has risen above 1.2 times the lowest that it had (it diverges, whatever the others do);
- or, at this validation and the one before, both between a quarter and three quarters of its steps (after that a result costs little
  more), was more than 10% above the median of at least four other cells at the same step: running, finished or ended early. One that
  diverged or was stopped before that step counts as infinitely bad there, so that the rule does not grow stricter as the others thin out:
  it never stops the better half of a grid.

Only cells that differ in `optim` settings or the seed are compared: a loss at the same step says nothing across batch sizes or models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

Curve = dict[int, float]
"""Step → validation loss."""

MARGIN, PEERS, FROM, UNTIL, RISE = 1.1, 4, 0.25, 0.75, 1.2


@dataclass(frozen=True)
class Peer:
    """Another cell's validation losses."""

    curve: Curve
    ended_badly: bool

    def at(self, step: int) -> float | None:
        """None: it has not come there yet."""
        if step in self.curve:
            loss = self.curve[step]
            return loss if math.isfinite(loss) else math.inf
        return math.inf if self.ended_badly and step > max(self.curve, default=0) else None


def hopeless(curve: Curve, peers: Sequence[Peer], steps: int) -> str | None:
    """Why the run should be stopped now; None if it should go on.

    Args:
        steps: how many the run is to take.
    """
    if not curve:
        return None
    *_, last = sorted(curve)
    if not math.isfinite(curve[last]):
        return f"the validation loss at step {last} is {curve[last]}"
    lowest = min(curve.values())
    if curve[last] > RISE * lowest:
        return f"the validation loss rose from {lowest:.4g} to {curve[last]:.4g} at step {last}"
    recent = [step for step in sorted(curve) if step >= FROM * steps][-2:]
    medians = [_median([loss for peer in peers if (loss := peer.at(step)) is not None]) for step in recent]
    if (
        last <= UNTIL * steps
        and len(recent) == 2
        and all(m is not None and curve[s] > MARGIN * m for s, m in zip(recent, medians, strict=True))
    ):
        return f"the validation loss at step {last}, {curve[last]:.4g}, is over {MARGIN} times the median of the others, {medians[-1]:.4g}"
    return None


def _median(losses: list[float]) -> float | None:
    return median(losses) if len(losses) >= PEERS else None
