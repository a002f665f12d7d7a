"""Anon as one writes it down from the paper: a loop over parameters, torch's operations one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class PaperLoop(Optimizer):
    """The recurrence of arXiv 2605.02317 (written out in `anon_dist.optim.update`) with a_k = 2^k and β3 = 1/2, in float32.

    What the kernels are to be compared with, not one to train with.
    """

    def __init__(
        self,
        params: list[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        gamma: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "gamma": gamma, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state.update(step=0, last=0, target=1)
            state.update({key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq", "precond")})
        state["step"] += 1
        m, s, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
        p.mul_(1 - group["lr"] * group["weight_decay"])
        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        s.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if step == state["target"]:
            d = (s / (1 - beta2 ** (step - state["last"])) + group["eps"]) ** group["gamma"]
            if state["last"]:
                d = 0.5 * state["precond"] ** -2 + 0.5 * d
            state["precond"] = d**-0.5
            state["exp_avg_sq"] = torch.zeros_like(s)
            state["last"], state["target"] = step, 2 * step
        update = state["precond"] * m / (1 - beta1**step)
        p.sub_(group["lr"] * update)
