"""Anon's arithmetic (arXiv 2605.02317), elementwise, over lists of local tensors.

The symbols, for one element of a parameter:

    θ, g    the element, and its gradient
    m       mean of the gradient                                        state `exp_avg`
    s       mean of the squared gradient since the last refresh         state `exp_avg_sq`
    v       preconditioner, constant between refreshes; d = v^(−2)      state `precond`
    γ       adaptivity
    γ°      the γ that v was made with; another than γ only where γ has been changed since

In step t = 1, 2, …, with learning rate η and weight decay λ:

    m ← β1 m + (1 − β1) g                            update_momentum
    s ← β2 s + (1 − β2) g²                           accumulate; with a window, in its steps alone
    if t = a_k:                                      refresh; k = 0, 1, … counts the refreshes (see `schedule.py`)
        σ = s / (1 − β2^age) + ε                     age: how many steps s holds
        d ← σ^γ  (k = 0)   or   β3 d^(γ/γ°) + (1 − β3) σ^γ
        v ← d^(−1/2);  s ← 0                         σ^γ, and d^(γ/γ°) where γ ≠ γ°, are kept in [2^−126, 2^127]
    u = clip(v · m / (1 − β1^t))                     apply_update
    θ ← (1 − η λ) θ − η u

Where m is not finite (an infinite gradient), u is NaN, clipped or not: it would otherwise be ±clip in every step to come.

With Nesterov momentum (Dozat 2016, "Incorporating Nesterov Momentum into Adam") u is made of (β1 m + (1 − β1) g) / (1 − β1^(t+1)), whose
weights sum to 1 too. Cautious decay (arXiv 2510.12402) takes λ = 0 where u θ < 0.

Each function takes lists whose i-th members belong together, all of one device; lists are what `torch._foreach_*` fuses, and a list of one
tensor is the plain case. An element's result does not depend on its position, so neither on how a parameter was cut into shards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

Tensors = list[Tensor]

D_MIN, D_MAX = 2.0**-126, 2.0**127
"""d = σ^γ is kept in float32's normal range: at ε = 1e-16, γ = 3 a silent coordinate would otherwise have v = ∞."""

MOST_RATIO = {torch.float64: 2.0**8, torch.float32: 2.0**8, torch.bfloat16: 2.0**2}
"""The largest |γ'/γ°| by which a preconditioner of this dtype is converted from γ° to γ'. The power multiplies the rounding of v: to 2^-16
in float32, to 2^-5 in bfloat16."""

V_MIN, V_MAX = D_MAX**-0.5, D_MIN**-0.5
"""The same range, of v."""

REFRESH_ELEMENTS = 1 << 22
"""A refresh works in float64; it goes through a tensor in pieces of this many elements, so that it needs no more than 100 MB."""


def decay_weights(theta: Tensors, factor: float | Tensor) -> None:
    """θ ← factor · θ, in place; factor = 1 − η λ."""
    if isinstance(factor, Tensor) or factor != 1.0:
        torch._foreach_mul_(theta, factor)


def update_momentum(m: Tensors, g: Tensors, beta1: float) -> None:
    """m ← β1 m + (1 − β1) g, in place."""
    torch._foreach_lerp_(m, g, 1.0 - beta1)


def accumulate(s: Tensors, g: Tensors, beta2: float) -> None:
    """s ← β2 s + (1 − β2) g², in place."""
    torch._foreach_mul_(s, beta2)
    torch._foreach_addcmul_(s, g, g, value=1.0 - beta2)


def refresh(
    v: Tensors,
    s: Tensors,
    *,
    gamma: float,
    gamma_ratio: float,
    keep: float,
    eps: float,
    debias: float,
    hold_silent: bool,
) -> None:
    """v ← (keep · d^(γ/γ°) + (1 − keep) σ^γ)^(−1/2) with d = v^(−2) and σ = s / debias + ε; then s ← 0. In place, computed in float64.

    float32 would not do: for σ = 1e-16 and γ = 2 its rounding of ln σ alone moves σ^γ by 40 units. σ^γ is exp(γ ln σ) because torch's
    vectorised `exp` and `log` treat the end of a tensor as they do its middle; its `pow` and `exp2` do not.

    Args:
        v: preconditioners; 1 before the first refresh.
        s: second moments since the last refresh.
        gamma_ratio: γ/γ°. 1: v is taken as it is.
        keep: β3; or 0 where there is no older preconditioner, k = 0.
        debias: summed weight of what s holds, 1 − β2^age.
        hold_silent: elements with s = 0 keep what their v says of σ, at the new γ: v ← v^(γ/γ°).
    """
    for whole_v, whole_s in zip(v, s, strict=True):
        for v_i, s_i in pieces(whole_v, whole_s):
            silent = s_i == 0 if hold_silent else None
            sigma = s_i.double().div_(debias).add_(eps)  # in float64 this is s itself
            d = sigma.log_().mul_(gamma).exp_().clamp_(D_MIN, D_MAX) if gamma else torch.ones_like(sigma)
            old = v_i.double() if gamma_ratio == 1.0 else _power(v_i, gamma_ratio)
            if keep:
                d.mul_(1.0 - keep).add_(old.square().reciprocal_(), alpha=keep)
            fresh = d.rsqrt_()
            if silent is not None:
                fresh = torch.where(silent, old, fresh)
            v_i.copy_(fresh)
        whole_s.zero_()


def looked_ahead(m: Tensors, g: Tensors, beta1: float) -> Tensors:
    """β1 m + (1 − β1) g, Nesterov's in place of m."""
    return list(torch._foreach_lerp(m, g, 1.0 - beta1))


def apply_update(
    theta: Tensors,
    v: Tensors,
    m: Tensors,
    *,
    lr: float | Tensor,
    debias: float,
    clip: float | None,
    decay: float | Tensor = 1.0,
    cautious: bool = False,
) -> None:
    """θ ← decay · θ − lr · u with u = clip(v · m / debias), in place. Where m is not finite, u is NaN.

    Args:
        m: the mean that θ moves by.
        debias: the summed weight of what it holds.
        clip: limits the magnitude of each element of u.
        decay: 1 − η λ.
        cautious: decay only where u θ ≥ 0.
    """
    scale = lr / debias
    if clip is None and isinstance(scale, float) and not cautious:
        decay_weights(theta, decay)
        torch._foreach_addcmul_(theta, v, torch._foreach_add(m, m, alpha=0.0), value=-scale)
        return
    update = list(torch._foreach_mul(v, m))
    torch._foreach_add_(update, m, alpha=0.0)  # v > 0, so the sign of a zero stays
    if clip is not None:
        torch._foreach_clamp_max_(update, clip * debias)
        torch._foreach_clamp_min_(update, -clip * debias)
    move(theta, update, scale=scale, decay=decay, cautious=cautious)


def move(theta: Tensors, update: Tensors, *, scale: float | Tensor, decay: float | Tensor, cautious: bool) -> None:
    """θ ← decay · θ − scale · u, in place; cautious: decay only where u θ ≥ 0. The updates u are overwritten."""
    if cautious:
        for theta_i, u_i in zip(theta, update, strict=True):
            theta_i.copy_(torch.where(u_i * theta_i < 0.0, theta_i, theta_i * decay))
    else:
        decay_weights(theta, decay)
    if isinstance(scale, float):
        torch._foreach_add_(theta, update, alpha=-scale)
    else:  # a learning rate that lives on the device stays there
        torch._foreach_mul_(update, scale)
        torch._foreach_sub_(theta, update)


def conversion_power(old: float, new: float, dtype: torch.dtype) -> float | None:
    """γ'/γ°, the power that converts a preconditioner made with γ° = `old` and stored in `dtype` to γ' = `new`.

    None where the old preconditioner says too little: γ° is 0, so that v = 1 says nothing about σ, or |γ'/γ°| is beyond `MOST_RATIO`.
    """
    if old == new:
        return 1.0
    return new / old if old != 0.0 and abs(new) <= MOST_RATIO[dtype] * abs(old) else None


def power_of_held(old: float, new: float) -> float:
    """γ'/γ° for an element that `hold_silent` holds where `conversion_power` is None. Nothing else is known of its σ than what v says, so
    v^(γ'/γ°) with its multiplied rounding is taken; v itself would be of another unit. From γ° = 0 it is 1: v stays 1, neutral.
    """
    return max(-sys.float_info.max, min(sys.float_info.max, new / old)) if old != 0.0 else 1.0


def convert_exponent(v: Tensors, ratio: float) -> None:
    """v ← v^ratio in place, in float64, with ratio = γ'/γ°: of d = v^(−2), d ← d^(γ'/γ°), kept in [`D_MIN`, `D_MAX`]."""
    for whole in v:
        for (v_i,) in pieces(whole):
            v_i.copy_(_power(v_i, ratio))


def _power(v: Tensor, ratio: float) -> Tensor:
    """v^ratio, in float64."""
    return v.double().log_().mul_(ratio).exp_().clamp_(V_MIN, V_MAX)


def pieces(*tensors: Tensor, elements: int = REFRESH_ELEMENTS) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same rows of each tensor, of at most about so many elements; whatever the strides."""
    first = tensors[0]
    if first.numel() <= elements or first.dim() == 0:
        yield tensors
        return
    if all(t.is_contiguous() for t in tensors):
        tensors = tuple(t.view(-1) for t in tensors)
        first = tensors[0]
    rows = max(1, elements // (first.numel() // first.shape[0]))
    yield from zip(*(t.split(rows) for t in tensors), strict=True)
