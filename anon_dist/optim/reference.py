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
        left, right: the bases of rows and of columns, if they are turned; m, s and v are of the turned matrix then.
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
        nesterov: bool = False,
        cautious_decay: bool = False,
        max_interval: int | None = None,
        basis: str | None = None,
        basis_block: int = 128,
    ) -> None:
        self.theta = theta.detach().to(torch.float64, copy=True)
        self.m = torch.zeros_like(self.theta)
        self.s = torch.zeros_like(self.theta)
        self.v = torch.ones_like(self.theta)
        self.lr, (self.beta1, self.beta2), self.eps, self.gamma = lr, betas, eps, gamma
        self.v_gamma = gamma
        self.weight_decay, self.beta3, self.update_clip = weight_decay, beta3, update_clip
        self.hold_silent, self.maximize, self.nesterov, self.cautious = hold_silent, maximize, nesterov, cautious_decay
        self.max_interval: float = math.inf if max_interval is None else max_interval
        self.ratio = Fraction(str(refresh_ratio))
        if window == "auto":
            window = math.ceil(24 * math.log(2) / -math.log(self.beta2)) if self.beta2 > 0 else 1
        self.window = math.inf if window is None else int(window)
        rows, columns = basis in ("rows", "both"), basis in ("columns", "both")
        self.left = _Side(self.theta.shape[0], basis_block) if rows else None
        self.right = _Side(self.theta.shape[1], basis_block) if columns else None
        self.t = 0
        self.k = 0
        self.last_refresh = 0
        self.next_refresh = 1

    def step(self, grad: Tensor) -> None:
        """One step with gradient `grad`."""
        g = grad.detach().to(torch.float64)
        if self.maximize:
            g = -g
        g = self._turned(g)
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        if self.next_refresh - self.t < self.window:
            self.s = self.beta2 * self.s + (1 - self.beta2) * g * g
        refreshes, keep = self.t == self.next_refresh, self.beta3
        if refreshes:
            keep = self._refresh()
        mean, weight = self.m, 1 - self.beta1**self.t
        if self.nesterov:
            mean, weight = self.beta1 * self.m + (1 - self.beta1) * g, self.beta1 * weight + 1 - self.beta1
        update = self.v * mean / weight
        if self.update_clip is not None:
            update = update.clamp(-self.update_clip, self.update_clip)
        update = torch.where(self.m.isfinite(), update, torch.nan)
        update = self._turned(update, back=True)
        decayed = self.theta * (update * self.theta >= 0) if self.cautious else self.theta
        self.theta = self.theta - self.lr * (self.weight_decay * decayed + update)
        if refreshes:
            self._renew(min(keep, 0.8))

    def _turned(self, x: Tensor, back: bool = False) -> Tensor:
        """Q_Lᵀ x Q_R, or Q_L x Q_Rᵀ."""
        if self.left is not None:
            x = (self.left.q if back else self.left.q.T) @ x
        if self.right is not None:
            x = x @ (self.right.q.T if back else self.right.q)
        return x

    def _renew(self, keep: float) -> None:
        """The bases after a refresh; m is turned with them, and d = σ^γ as the diagonal of a turned matrix whose diagonal was σ."""
        m = self._turned(self.m, back=True)
        power = self.gamma if abs(self.gamma) >= 0.25 else 1.0  # below, d itself is turned
        sigma = self.v ** (-2 / power)
        left, right = self.left, self.right
        by_left, by_right = (
            None if side is None else side.inverse() for side in (left, right)
        )  # before either is renewed
        if left is not None:
            sigma = (left.renew(m @ m.T if by_right is None else m @ by_right @ m.T, keep) ** 2).T @ sigma
        if right is not None:
            sigma = sigma @ right.renew(m.T @ m if by_left is None else m.T @ by_left @ m, keep) ** 2
        if self.gamma:
            self.v = sigma ** (-power / 2)
        self.m = self._turned(m)

    def skip_to(self, t: int) -> None:
        """Move the counters (not the tensors) to where they stand after `t` steps."""
        self.t, self.k, self.last_refresh, self.next_refresh = 0, 0, 0, 1
        while self.next_refresh <= t:
            self._advance()
        self.t = t

    def _refresh(self) -> float:
        """Returns the weight of the old preconditioner."""
        age = min(self.window, self.next_refresh - self.last_refresh)
        sigma = self.s / (1 - self.beta2**age) + self.eps
        fresh = (sigma**self.gamma).clamp(2.0**-126, 2.0**127)
        old_says_something = self.k > 0
        if self.gamma != self.v_gamma:
            if self.v_gamma == 0 or abs(self.gamma / self.v_gamma) > 256:
                old_says_something = False
            if self.v_gamma != 0 and self.k > 0:  # beyond 256 only what is held goes on from it
                self.v = (self.v ** (self.gamma / self.v_gamma)).clamp(2.0**-63.5, 2.0**63)
            self.v_gamma = self.gamma
        d = self.beta3 * self.v**-2 + (1 - self.beta3) * fresh if old_says_something else fresh
        v = d**-0.5
        self.v = torch.where(self.s == 0, self.v, v) if self.hold_silent and self.gamma < 0 else v
        self.s = torch.zeros_like(self.s)
        self._advance()
        return self.beta3 if old_says_something else 0.0

    def _advance(self) -> None:
        self.last_refresh = self.next_refresh
        following = max(self.last_refresh + 1, math.ceil(self.ratio * self.last_refresh))
        self.next_refresh = int(min(following, self.last_refresh + self.max_interval))
        self.k += 1


class _Side:
    """An orthogonal basis of one side of a matrix, with zeros outside of its blocks, and the covariance that it is made of."""

    def __init__(self, n: int, block: int) -> None:
        self.q = torch.eye(n, dtype=torch.float64)
        self.c = torch.zeros(n, n, dtype=torch.float64)
        self.blocks = [slice(i, min(i + block, n)) for i in range(0, n, block)]

    def inverse(self) -> Tensor:
        """About C⁻¹: Q diag(1 / (λ / mean λ + δ)) Qᵀ with λ = diag(Qᵀ C Q), and the identity where C is 0."""
        found = torch.zeros_like(self.c)
        for b in self.blocks:
            q = self.q[b, b]
            eigenvalues = (q.T @ self.c[b, b] @ q).diagonal()
            ratios = eigenvalues / eigenvalues.mean() if eigenvalues.mean() > 0 else torch.ones_like(eigenvalues)
            found[b, b] = q @ torch.diag(1 / (ratios + 1e-3)) @ q.T
        return found

    def renew(self, outer: Tensor, keep: float) -> Tensor:
        """Mix in a covariance, of whatever scale; step to the basis that iterates orthogonally towards its eigenvectors.

        Returns:
            The old basis' transpose times the new one.
        """
        old = self.q.clone()
        for b in self.blocks:
            n = b.stop - b.start
            if outer[b, b].trace() == 0:
                continue
            self.c[b, b] = keep * self.c[b, b] + (1 - keep) * n * outer[b, b] / outer[b, b].trace()
            ridge = 1e-3 * self.c[b, b].trace() / n * torch.eye(n, dtype=torch.float64)
            q, r = torch.linalg.qr((self.c[b, b] + ridge) @ old[b, b])
            self.q[b, b] = q * r.diagonal().sign()
        return old.T @ self.q
