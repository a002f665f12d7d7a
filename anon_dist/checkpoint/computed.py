"""A checkpoint some of whose tensors are computed, range by range, as they are read; and the arithmetic of Anon's and AdamW's states.

Arithmetic is float64, results float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from anon_dist.checkpoint.schema import Checkpoint, Key, Manifest, TensorInfo
from anon_dist.optim.regime import HISTORY, Regime
from anon_dist.optim.update import D_MAX, D_MIN

BLOCK = 1 << 20
"""Elements read at once where all of a tensor has to be looked at."""

Read = Callable[[int, int], Tensor]
"""Elements [start, stop) of a tensor, row-major, as a float64 tensor of its own."""


class Converted(Checkpoint):
    """A checkpoint with tensors computed from those of another.

    Args:
        computed: float32 tensors, in place of the source's of that key or beside them.
        dropped: the source's that are left out.
        shapes: of those computed; of the others the shape is their parameter's.
    """

    def __init__(
        self,
        source: Checkpoint,
        manifest: Manifest,
        computed: Mapping[Key, Read],
        dropped: set[Key],
        shapes: Mapping[Key, tuple[int, ...]] | None = None,
    ) -> None:
        self._source, self._computed, self.manifest = source, computed, manifest
        kept = {key: info for key, info in source.tensors.items() if key not in dropped}
        own = {key.parameter: info.shape for key, info in source.tensors.items() if key.state == "exp_avg"}
        known = {key: own[key.parameter] for key in computed} | dict(shapes or {})
        self.tensors = kept | {key: TensorInfo(known[key], torch.float32) for key in computed}

    def read(self, key: Key, start: int, stop: int) -> Tensor:
        """See `Checkpoint`."""
        if key in self._computed:
            return self._computed[key](start, stop).to(torch.float32)
        return self._source.read(key, start, stop)

    def close(self) -> None:
        """See `Checkpoint`."""
        self._source.close()


def reader(checkpoint: Checkpoint, key: Key) -> Read:
    """A tensor as it is."""
    return lambda start, stop: checkpoint.read(key, start, stop).to(torch.float64, copy=True)


def scaled(read: Read, factor: float) -> Read:
    """Times a number."""
    return lambda start, stop: read(start, stop) * factor


def debiased(checkpoint: Checkpoint, name: str, state: str, beta2: float, step: int) -> Read:
    """v̂ of AdamW's second moment; 0 before the first step."""
    return scaled(reader(checkpoint, Key(name, state)), 1.0 / (1.0 - beta2**step) if step else 0.0)


def preconditioner(moment: Read, eps: float, gamma: float) -> Read:
    """v = d^(−1/2), d = (v̂ + ε)^γ."""

    def read(start: int, stop: int) -> Tensor:
        d = moment(start, stop).add_(eps).log_().mul_(gamma).exp_().clamp_(D_MIN, D_MAX)
        return d.rsqrt_()

    return read


def power(read: Read, exponent: float) -> Read:
    """Of positive numbers."""
    return lambda start, stop: read(start, stop).log_().mul_(exponent).exp_()


def present_moment(checkpoint: Checkpoint, name: str, gamma: float, eps: float, remaining: float) -> Read:
    """s + β2^age σ, with σ = d^(1/γ) − ε ≥ 0 and d = v^(−2)."""
    sigma, s = (
        power(reader(checkpoint, Key(name, "precond")), -2.0 / gamma),
        reader(checkpoint, Key(name, "exp_avg_sq")),
    )

    def read(start: int, stop: int) -> Tensor:
        return sigma(start, stop).sub_(eps).clamp_(min=0.0).mul_(remaining).add_(s(start, stop))

    return read


def accumulated(group: Mapping[str, Any], step: int) -> tuple[float, float]:
    """Summed weight of what s holds at a step, 1 − β2^age, and the rest, β2^age; age counts the accumulating steps since the refresh."""
    age, beta2 = _age(group[HISTORY], step), float(group["betas"][1])
    if age == 0:
        return 0.0, 1.0
    return (-math.expm1(age * math.log(beta2)), beta2**age) if beta2 else (1.0, 0.0)


@lru_cache(maxsize=256)
def _age(history: str, step: int) -> int:
    """Accumulating steps up to `step` since the refresh before or at it."""
    schedule = Regime({HISTORY: history}).schedule
    for age in range(step):
        due = schedule.at(step - age)
        if due.refresh or not due.accumulate:
            return age
    return step


def blocks(numel: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `BLOCK` elements."""
    for start in range(0, numel, BLOCK):
        yield start, min(numel, start + BLOCK)
