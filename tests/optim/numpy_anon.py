"""Anon's step in NumPy's float64, written from its definition, with a bound for the rounding of each element.

It shares nothing with the optimizer or with `ReferenceAnon`. A step starts from tensors that it is given, so that rounding does not add up.
What is counted is counted here: which steps accumulate and refresh, and how old the second moment is.

A *unit* is the rounding of what is computed with: 2^-24, or 2^-53 where a tensor is float64. Errors are absolute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

STORED_UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float64: 0.0, torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 2.0**-25}
V_MIN, V_MAX = 2.0**-63.5, 2.0**63


def array(tensor):
    return tensor.detach().to(torch.float64).numpy().copy()


@dataclass
class Due:
    """What a step does."""

    t: int
    accumulates: bool
    refreshes: bool
    first: bool
    beta2: float
    weight: float
    """Of what the second moment holds after it."""


@dataclass
class Clock:
    """A parameter's steps, counted one by one."""

    t: int = 0
    last: int = 0
    target: int = 1
    fed: int = 0
    decay: float = 1.0

    def tick(self, phases):
        """The next step. `phases`: pairs of a step and the values of ρ, β2, window and max_interval that hold after it."""
        rule = [values for since, values in phases if since <= self.t][-1]
        if self.t and any(since == self.t for since, _ in phases):
            self.target = max(self.t + 1, _following(self.last, rule))
            if self.fed < self.t - self.last:  # a window has left some out: the new one is filled before
                self.target = max(self.target, self.t + _window(rule, unlimited="auto") - self.fed)
        self.t += 1
        accumulates, first = self.target - self.t < _window(rule, unlimited=math.inf), self.last == 0
        if accumulates:
            self.fed, self.decay = self.fed + 1, self.decay * rule["beta2"]
        due = Due(self.t, accumulates, self.t == self.target, first, rule["beta2"], 1.0 - self.decay)
        if due.refreshes:
            self.last, self.target, self.fed, self.decay = self.t, _following(self.t, rule), 0, 1.0
        return due


def _following(a, rule):
    following = max(a + 1, math.ceil(Fraction(str(rule["refresh_ratio"])) * a))
    return min(following, a + (rule["max_interval"] or following))


def _window(rule, unlimited):
    window, beta2 = unlimited if rule["window"] is None else rule["window"], rule["beta2"]
    return window if window != "auto" else math.ceil(24 * math.log(2) / -math.log(beta2)) if beta2 else 1


def power(v, ratio):
    """A preconditioner at another γ, `ratio` times its own."""
    return np.clip(v**ratio, V_MIN, V_MAX)


def rounding(x, dtype, stochastic):
    """How far from x it may be stored."""
    if dtype == torch.int8:  # a unit of its block of 32, in row-major order
        blocks = np.pad(np.abs(x).reshape(-1), (0, -x.size % 32)).reshape(-1, 32)
        units = np.broadcast_to(blocks.max(1, keepdims=True, initial=0.0) * (2.001 / 127), blocks.shape)
        return units.reshape(-1)[: x.size].reshape(x.shape)
    units = 2 if stochastic and dtype == torch.bfloat16 else 1
    return np.abs(x) * STORED_UNIT[dtype] * units + SMALLEST[dtype]


def dense(q):
    """A basis, (n, block), as the (n, n) that it stands for."""
    n, block = q.shape
    full = np.zeros((n, n))
    for i in range(0, n, block):
        full[i : i + block, i : i + block] = q[i : i + block, : min(block, n - i)]
    return full


class Frame:
    """Q_L and Q_R of a parameter's state; I on a side that is not turned. A parameter none of whose sides is turned keeps its shape.

    What is turned is so in the parameter's dtype, or in float32 if that is wider; whatever the state's is.
    """

    def __init__(self, shape, dtype, state):
        self.unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
        bases = state.get("basis_rows"), state.get("basis_columns")
        self.turns = any(q is not None for q in bases)
        self.shape = (shape[0], -1) if self.turns else tuple(shape)
        lengths = (shape[0], math.prod(shape[1:])) if self.turns else (0, 0)
        self.left, self.right = (
            np.eye(n) if q is None else dense(array(q)) for n, q in zip(lengths, bases, strict=True)
        )
        self.blocks = [1 if q is None else q.shape[1] for q in bases]

    def turned(self, x, back=False):
        if not self.turns:
            return x
        return self.left @ x @ self.right.T if back else self.left.T @ x @ self.right

    def error(self, error, x):
        """Of the turned x: that of x, and 40 units of the norm of what is summed (noise of 16 is made 0)."""
        if not self.turns:
            return error
        return np.abs(self.left) @ error @ np.abs(self.right).T + 40 * self.unit * self.norms(x)

    def norms(self, x):
        """At each element the norm of the tile that it is turned within."""
        found = np.zeros_like(x)
        for i in range(0, x.shape[0], self.blocks[0]):
            for j in range(0, x.shape[1], self.blocks[1]):
                tile = slice(i, i + self.blocks[0]), slice(j, j + self.blocks[1])
                found[tile] = np.linalg.norm(x[tile])
        return found


@dataclass
class Refresh:
    """γ of a refresh, its ratio to the γ before, and the weight of the old preconditioner."""

    gamma: float
    ratio: float
    keep: float

    def preconditioner(self, s, v, weight, hyper):
        with np.errstate(over="ignore"):
            d = np.clip((s / weight + hyper["eps"]) ** self.gamma, 2.0**-126, 2.0**127)
        old = v if self.ratio == 1.0 else power(v, self.ratio)
        if self.keep:
            d = self.keep * old**-2 + (1 - self.keep) * d
        return np.where((s == 0) & hyper["hold_silent"] & (self.gamma < 0), old, d**-0.5)


def step(frame, theta, g, m, s, v, ev, hyper, due, refresh, unit):
    """θ, m, s and v after a step: a pair of value and error by key. `ev`: the error of the v that is given."""
    theta, g, m, s, v, ev = (x.reshape(frame.shape) for x in (theta, g, m, s, v, ev))
    beta1 = hyper["betas"][0]
    eg, g = frame.error(3 * unit * np.abs(g), g), frame.turned(g)
    em = 4 * unit * (np.abs(m) + np.abs(g)) + (1 - beta1) * eg
    m = beta1 * m + (1 - beta1) * g
    es = np.zeros_like(m)
    if due.accumulates:
        s = due.beta2 * s + (1 - due.beta2) * g * g
        es = 6 * unit * s + (1 - due.beta2) * (2 * np.abs(g) + eg) * eg
    if due.refreshes:
        low, wanted, high = (
            refresh.preconditioner(x, v, due.weight, hyper) for x in (np.maximum(s - es, 0), s, s + es)
        )
        logarithm = 2.0**-39 if unit == 2.0**-24 else 2.0**-46  # and exponential; the kernels' are good to 2^-41
        own = 2 * unit + (2 + abs(refresh.gamma) + abs(refresh.ratio)) * logarithm
        v, ev = wanted, np.maximum(np.abs(low - wanted), np.abs(high - wanted)) + wanted * own
        s, es = np.zeros_like(s), np.zeros_like(s)
    mean, emean, t = m, em, due.t
    if hyper["nesterov"]:
        mean, t = beta1 * m + (1 - beta1) * g, t + 1
        emean = em + (1 - beta1) * eg + 4 * unit * (np.abs(m) + np.abs(g))
    theta, etheta = _moved(frame, theta, v * mean, v * emean + ev * (np.abs(mean) + emean), 1 - beta1**t, hyper, unit)
    return {"theta": (theta, etheta), "exp_avg": (m, em), "exp_avg_sq": (s, es), "precond": (v, ev)}


def _moved(frame, theta, u, eu, weight, hyper, unit):
    """θ moved by u over its weight, which is in the frame; and its error."""
    unit = frame.unit if frame.turns else unit
    u = u / weight
    eu, clip, lr = eu / weight + 6 * unit * np.abs(u), hyper["update_clip"], hyper["lr"]
    if clip is not None:
        u = np.clip(u, -clip, clip)
        eu = np.minimum(eu + 4 * unit * np.abs(u), 2 * clip)
    eu, u = frame.error(eu, u), frame.turned(u, back=True)
    decay = lr * hyper["weight_decay"] * theta
    error = 4 * unit * (np.abs(theta) + lr * np.abs(u)) + lr * eu
    if hyper["cautious_decay"]:
        error = error + (np.abs(u) <= eu) * np.abs(decay)  # the sign is open
        decay = decay * (u * theta >= 0)
    return theta - decay - lr * u, error
