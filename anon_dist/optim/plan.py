"""What one step does to the elements of a tensor: the plan that a backend carries out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

from torch import Tensor

ROLES = ("theta", "grad", "m", "s", "v")
"""What an element consists of, in the order of a backend's lists: θ, g, m, s, v."""
STORED = ("theta", "m", "s", "v")
"""What a step writes."""


class Variant(IntEnum):
    """What a step does beyond m and θ."""

    PLAIN = 0
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
    """|v · m̂| is kept below it."""
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
    """θ moves by the mean that the same gradient would make of m once more: β1 m + (1 − β1) g in place of m."""
    cautious: bool = False
    """θ is decayed only where that and the update go the same way, u θ ≥ 0."""
    stochastic: frozenset[str] = frozenset()
    """Which of θ, m, s and v (as `ROLES`) are rounded stochastically where they are stored in bfloat16 or int8 (see `rounding`)."""
    grad_scale: Tensor | None = None
    """Gradients are divided by it; of one element, on the tensors' device. None: 1."""
    found_inf: Tensor | None = None
    """Nothing is written where this is not 0; of one element, on the tensors' device. None: 0."""

    @property
    def debias_m(self) -> float:
        """The summed weight of what θ moves by: of m 1 − β1^t, one step more with Nesterov."""
        return float(1.0 - self.beta1 ** (self.step + self.nesterov))

    def handing_back(self) -> StepPlan:
        """The plan under which θ becomes the update clip(v · m̂) itself, whatever (finite) it was: (1 − η λ) θ − η u with η = λ = −1."""
        return replace(self, lr=-1.0, weight_decay=-1.0, cautious=False)
