"""Spikes of the loss and of the gradient norm: found on the device, by the last steps that were none, before the step is taken.

A step is a spike whose loss or gradient norm lies `sigma` standard deviations above the mean of the last `SPAN` steps that were none, or
is not finite. Nothing is judged before there were `WARM` of them, but what is not finite. Spikes do not enter the window. What came before
anything was judged may be in it: a step of the window counts for nothing if it stands out by 2 · `sigma` from all but the largest, one in
`TRIMMED`. Every rank has the same numbers, and comes to the same.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from anon_dist.optim.host_copy import HostCopy
from anon_dist.train.config.parsing import Config

SPAN = 128
"""Steps that a new one is compared with."""
WARM = 64
"""Of which so many must be there."""
TRIMMED = 16
"""One in so many of the window may be an outlier."""
FLOOR = 1e-6
"""The least standard deviation, as a share of the mean: where nothing moves, rounding is no spike."""
LEVEL = 32
"""So many spikes in a row, each of which was taken, are no spikes but another level: the window begins anew."""
DOUBLED, BEFORE = 2.0, 8
"""The update's root mean square is alarming at so many times the median of the records before; from so many of these on."""
Action = Literal["record", "skip", "rewind"]


@dataclass(frozen=True)
class Judged:
    """What came of a step, as far as spikes go."""

    loss: float
    norm: float
    loss_mean: float
    loss_sigma: float
    norm_mean: float
    norm_sigma: float
    by_loss: float
    """1: it stands out; 0: not."""
    by_norm: float
    finite: float

    @property
    def spike(self) -> bool:
        """Whether loss or norm stand out."""
        return bool(self.by_loss or self.by_norm)

    def __str__(self) -> str:
        parts = []
        for name, value, mean, sigma, out in (
            ("the loss", self.loss, self.loss_mean, self.loss_sigma, self.by_loss),
            ("the gradient norm", self.norm, self.norm_mean, self.norm_sigma, self.by_norm),
        ):
            if out and value - mean == value - mean and sigma > 0 and abs(value) != float("inf"):
                parts.append(f"{name} is {value:.4g}, {(value - mean) / sigma:.1f} σ above {mean:.4g} ± {sigma:.2g}")
            elif out:
                parts.append(f"{name} is {value}")
        return " and ".join(parts)


class SpikeDetector:
    """Judges each step, in order, and remembers.

    Args:
        device: where losses and norms are. What is computed stays there.
        sigma: see above.
        action: "record" takes a spike's step all the same; otherwise it is none.
        scaled: whether a step that is not finite is the loss scale's matter, and no spike.
    """

    def __init__(self, device: torch.device, sigma: float, action: Action, scaled: bool = False) -> None:
        self._device, self._sigma, self._action, self._scaled = device, sigma, action, scaled
        # In the order of time from `count` on, round the end: loss and norm.
        self._window = torch.zeros(2, SPAN, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._row = torch.zeros((), dtype=torch.int64, device=device)
        self._slots = torch.arange(SPAN, device=device)
        self._loss: tuple[Tensor, Any] | None = None
        self._updates: deque[float] = deque(maxlen=SPAN // 2)
        self.judged: HostCopy | None = None
        """Of the last step; see `read`."""
        self.found = 0
        """Spikes, in the whole run, as far as they were read."""
        self.pending: Judged | None = None
        """A spike from which the run is to go back."""

    def begin(self, loss: Tensor, ranks: int) -> None:
        """Have the mean of the ranks' losses on its way. Every rank calls it, before the step."""
        mean = loss.detach().double() / ranks
        work = dist.all_reduce(mean, async_op=True) if dist.is_initialized() else None
        self._loss = (mean, work)

    def veto(self, norm: Tensor) -> Tensor:
        """Judge the step with this gradient norm, 0-dim, the same on every rank; whether it is to be none: 0-dim bool, on its device.

        To be called once after each `begin`. The host waits for the device nowhere.
        """
        assert self._loss is not None
        (loss, work), self._loss = self._loss, None
        if work is not None:
            work.wait()
        values = torch.stack([loss.to(self._device), norm.detach().to(self._device, torch.float64, non_blocking=True)])
        filled = self._count.clamp(max=SPAN)
        mean, sigma = self._statistics(filled)
        finite = values.isfinite()
        above = (values > mean + self._sigma * sigma) & (filled >= WARM)
        out = above if self._scaled else above | ~finite
        spike = out.any()
        good = finite.all() & ~spike
        mask = (self._slots == self._count % SPAN) & good
        self._window = torch.where(mask, values[:, None], self._window)
        self._count += good
        self._row = torch.where(spike, self._row + 1, 0)
        if self._action == "record":
            self._count = torch.where(self._row >= LEVEL, 0, self._count)
            self._row = torch.where(self._row >= LEVEL, 0, self._row)
        told = torch.cat(
            [values, torch.stack([mean[0], sigma[0], mean[1], sigma[1]]), out.double(), finite.all()[None]]
        )
        self.judged = HostCopy(told)
        return (spike & (self._action != "record")).to(norm.device)

    def _statistics(self, filled: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (of a sample) of the window without outliers, of each row."""
        there = (self._slots < filled).expand(2, SPAN)
        largest_first = self._window.where(there, -torch.inf).sort(1, descending=True).values
        most = largest_first.gather(1, (filled // TRIMMED).expand(2, 1))
        mean, sigma = self._moments(there & (self._window <= most))
        return self._moments(there & (self._window <= (mean + 2.0 * self._sigma * sigma)[:, None]))

    def _moments(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        count = chosen.sum(1)
        mean = self._window.where(chosen, 0.0).sum(1) / count.clamp(min=1)
        square = (self._window - mean[:, None]).square().where(chosen, 0.0).sum(1)
        sigma = (square / (count - 1).clamp(min=1)).sqrt()
        return mean, torch.maximum(sigma, FLOOR * mean.abs())

    def read(self) -> Judged | None:
        """What was found of the last step; waits for the device, if that is not past it. None: it was read before, or there is none."""
        if self.judged is None:
            return None
        numbers, self.judged = self.judged.values(), None
        judged = Judged(*numbers)
        self.found += judged.spike
        self.pending = judged if judged.spike and self._action == "rewind" else self.pending
        return judged

    # -- the update's size ------------------------------------------------------------------------

    def update_doubled(self, rms: float) -> float | None:
        """Take note of the update's root mean square at a record; the median of those before, where it is alarming."""
        usual = median(self._updates) if len(self._updates) >= BEFORE else None
        alarming = usual is not None and rms > DOUBLED * usual
        if not alarming:
            self._updates.append(rms)
        return usual if alarming else None

    # -- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that decides, as JSON. Waits for the device."""
        return {
            "window": self._window.tolist(),
            "count": int(self._count),
            "row": int(self._row),
            "updates": list(self._updates),
            "found": self.found,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from what was saved; of a checkpoint without, from nothing.

        Raises:
            ValueError: it is none.
        """
        try:
            saved = state or {"window": [[0.0] * SPAN] * 2, "count": 0, "row": 0, "updates": [], "found": 0}
            window = torch.tensor(saved["window"], dtype=torch.float64)
            counts, updates = [int(saved[k]) for k in ("count", "row", "found")], [float(u) for u in saved["updates"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the state of the spikes' detector cannot be read: {error!r}") from None
        if window.shape != (2, SPAN) or min(counts) < 0:
            raise ValueError(f"the state of the spikes' detector is of shape {list(window.shape)}, not {[2, SPAN]}")
        self._window = window.to(self._device)
        self._count, self._row = (torch.tensor(n, device=self._device) for n in counts[:2])
        self.found = counts[2]
        self._updates = deque(updates, maxlen=SPAN // 2)
        self._loss = self.judged = self.pending = None


def detector(config: Config, device: torch.device) -> SpikeDetector:
    """The one that a configuration asks for."""
    train = config.train
    return SpikeDetector(device, train.spike_sigma, train.on_spike, scaled=train.precision == "fp16")
