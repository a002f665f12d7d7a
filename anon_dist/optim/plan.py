"""What one step does to the elements of a tensor: the plan that a backend carries out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

from torch import Tensor

ROLES = ("theta", "grad", "m", "s", "v")
"""The tensors of a step, in the order in which a backend takes them (`layout.Lists`). Code and formulas call each by one letter:

| name | letter | what it is | where it is kept |
|---|---|---|---|
| `theta` | θ | the parameter; of a turned matrix, a tensor that its update is written to | the parameter |
| `grad` | g | the gradient; of a turned matrix, the turned gradient | `p.grad` |
| `m` | m | the mean of g | the state `exp_avg` |
| `s` | s | the mean of g² since the last refresh: the second moment | the state `exp_avg_sq` |
| `v` | v | the preconditioner | the state `precond` |
"""
STORED = ("theta", "m", "s", "v")
"""The roles that a step writes to."""


class Variant(IntEnum):
    """What a step does beyond m and θ."""

    PLAIN = 0
    """Nothing."""
    ACCUMULATE = 1
    """g² enters s."""
    REFRESH = 2
    """g² enters s; then v is made anew from s, and s starts from 0."""


@dataclass(slots=True, kw_only=True)
class StepPlan:
    """Everything that the elements of a tensor share in one step; not to be changed once it is made."""

    step: int
    """t ≥ 1, the step that is taken."""
    variant: Variant
    lr: float | Tensor
    """η; a tensor of one element where it lives on the tensors' GPU."""
    weight_decay: float
    beta1: float
    beta2: float
    clip: float | None
    """Each element of v · m̂ is kept in [−clip, clip]."""
    maximize: bool = False
    debias_s: float = 1.0
    """At a refresh: the summed weight of what s holds, 1 − β2^age."""
    keep_d: float = 0.0
    """At a refresh: β3, the weight of the old d; 0 where there is none."""
    gamma: float = 1.0
    """At a refresh: the γ of the new preconditioner."""
    gamma_ratio: float = 1.0
    """At a refresh: γ/γ°, the power to which the old preconditioner is raised; γ° is the γ that it was made with."""
    eps: float = 1e-16
    hold_silent: bool = False
    """At a refresh: elements with s = 0 keep their v, raised to `gamma_ratio`."""
    nesterov: bool = False
    """θ moves by β1 m + (1 − β1) g in place of m."""
    cautious: bool = False
    """θ is decayed only where decay and update have the same direction, u θ ≥ 0."""
    stochastic: frozenset[str] = frozenset()
    """Which of θ, m, s and v (as `ROLES`) are rounded stochastically where they are stored in bfloat16 or int8 (see `rounding`)."""
    grad_scale: Tensor | None = None
    """Gradients are divided by it; of one element, on the tensors' device. None: 1."""
    found_inf: Tensor | None = None
    """Nothing is written where this is not 0; of one element, on the tensors' device. None: 0."""

    @property
    def debias_m(self) -> float:
        """The summed weight of the gradients in what θ moves by: 1 − β1^t; with Nesterov 1 − β1^(t+1)."""
        return float(1.0 - self.beta1 ** (self.step + self.nesterov))

    def handing_back(self) -> StepPlan:
        """The plan that writes the update u = clip(v · m̂) itself to θ, in place of moving θ by it.

        It has η = λ = −1: then (1 − η λ) θ − η u is u, for any finite θ.
        """
        return replace(self, lr=-1.0, weight_decay=-1.0, cautious=False)
