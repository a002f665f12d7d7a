"""Anon in float64, one parameter at a time, slowly and without tricks: what every faster path is tested against.

It shares no code with the optimizer: the refresh schedule is stepped with counters, the window is counted forward, and powers are powers.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


class ReferenceAnon:
    """The recurrence of arXiv 2605.02317 with the extensions, for one parameter.

    Attributes:
        theta, m, s, v: float64 tensors of the parameter's shape.
        gamma: to be set between steps; the next refresh takes it up.
        v_gamma: the γ that v is of.
        t: steps taken.
        k: refreshes made.
    """

    def __init__(
        self,
        theta: Tensor,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        gamma: float = 1.0,
        weight_decay: float = 0.0,
        *,
        refresh_ratio: float = 2.0,
        beta3: float = 0.5,
        update_clip: float | None = None,
        window: int | str | None = None,
        hold_silent: bool = False,
        maximize: bool = False,
    ) -> None:
        self.theta = theta.detach().to(torch.float64, copy=True)
        self.m = torch.zeros_like(self.theta)
        self.s = torch.zeros_like(self.theta)
        self.v = torch.ones_like(self.theta)
        self.lr, (self.beta1, self.beta2), self.eps, self.gamma = lr, betas, eps, gamma
        self.v_gamma = gamma
        self.weight_decay, self.beta3, self.update_clip = weight_decay, beta3, update_clip
        self.hold_silent, self.maximize = hold_silent, maximize
        self.ratio = Fraction(str(refresh_ratio))
        if window == "auto":
            window = math.ceil(24 * math.log(2) / -math.log(self.beta2)) if self.beta2 > 0 else 1
        self.window = math.inf if window is None else int(window)
        self.t = 0
        self.k = 0
        self.last_refresh = 0
        self.next_refresh = 1

    def step(self, grad: Tensor) -> None:
        """One step with gradient `grad`."""
        g = grad.detach().to(torch.float64)
        if self.maximize:
            g = -g
        self.t += 1
        self.theta = (1 - self.lr * self.weight_decay) * self.theta
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        if self.next_refresh - self.t < self.window:
            self.s = self.beta2 * self.s + (1 - self.beta2) * g * g
        if self.t == self.next_refresh:
            self._refresh()
        update = self.v * self.m / (1 - self.beta1**self.t)
        if self.update_clip is not None:
            update = update.clamp(-self.update_clip, self.update_clip)
        self.theta = self.theta - self.lr * update

    def skip_to(self, t: int) -> None:
        """Move the counters (not the tensors) to where they stand after `t` steps."""
        self.t, self.k, self.last_refresh, self.next_refresh = 0, 0, 0, 1
        while self.next_refresh <= t:
            self._advance()
        self.t = t

    def _refresh(self) -> None:
        age = min(self.window, self.next_refresh - self.last_refresh)
        sigma = self.s / (1 - self.beta2**age) + self.eps
        fresh = (sigma**self.gamma).clamp(2.0**-126, 2.0**127)
        old_says_something = self.k > 0
        if self.gamma != self.v_gamma:
            if self.v_gamma == 0 or abs(self.gamma / self.v_gamma) > 256:
                old_says_something = False
            elif self.k > 0:
                self.v = (self.v ** (self.gamma / self.v_gamma)).clamp(2.0**-63.5, 2.0**63)
            self.v_gamma = self.gamma
        d = self.beta3 * self.v**-2 + (1 - self.beta3) * fresh if old_says_something else fresh
        v = d**-0.5
        self.v = torch.where(self.s == 0, self.v, v) if self.hold_silent and self.gamma < 0 else v
        self.s = torch.zeros_like(self.s)
        self._advance()

    def _advance(self) -> None:
        self.last_refresh = self.next_refresh
        self.next_refresh = max(self.last_refresh + 1, math.ceil(self.ratio * self.last_refresh))
        self.k += 1
