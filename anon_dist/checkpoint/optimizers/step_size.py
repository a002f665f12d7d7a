"""The factor between the learning rates of two optimizers that keeps the size of a step, element-wise clip included.

As in `anon_dist.optim.matching`, whose histogram is used: with R(c) the root mean square of updates clipped to c, the learning rate is
multiplied by f, the clip divided by it, and f · R(c / f) is the R(c) of the other optimizer's updates. Here the two have second
moments of their own, so each has a histogram of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from anon_dist.optim.matching import Spectrum

_HALVINGS = 60


def step_factor(updates: Iterable[tuple[Tensor, Tensor]], clip: float | None) -> float:
    """f; 1.0 if nothing moves.

    Args:
        updates: of the optimizer whose rate is wanted, and of the one whose rate is known: the same elements, block by block.
        clip: of whichever has one, in the unit of the second.
    """
    ours, theirs = Spectrum(), Spectrum()
    for one, two in updates:
        for spectrum, update in ((ours, one), (theirs, two)):
            spectrum.add(torch.ones_like(update), update)  # γ does not matter then
    target, free = theirs.rms(0.0, clip), ours.rms(0.0)
    if target == 0.0 or free == 0.0:
        return 1.0
    if clip is None:
        return target / free
    low, high = math.log2(target / free), 512.0  # clipped, a step is no larger
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        f = math.exp2(middle)
        low, high = (middle, high) if f * ours.rms(0.0, clip / f) < target * (1 - 1e-9) else (low, middle)
    return math.exp2(low)
