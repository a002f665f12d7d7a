"""The backend of torch's own operations. It takes every device and dtype, and needs several passes over memory.

The arithmetic is in `update.py`. Here tensors are converted to the dtype in which a step is computed, and rounded to the stored one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from anon_dist.optim import update
from anon_dist.optim.backends.layout import Addresses, Lists, by_plan
from anon_dist.optim.plan import StepPlan, Variant
from anon_dist.optim.rounding import (
    EXP_AVG,
    EXP_AVG_SQ,
    PRECOND,
    THETA,
    decode_blocks,
    encode_blocks,
    salt_of,
    to_bfloat16_stochastically,
)

MOST_ELEMENTS = 1 << 26
"""Tensors are stepped together until they have this many elements; the temporaries are as large as all these tensors."""


def run(
    lists: Lists,
    plans: list[StepPlan],
    exponents: list[Tensor] | None = None,
    addresses: Addresses | None = None,
    *,
    together: bool | None = None,
) -> None:
    """One step of each parameter, in place.

    Args:
        lists: see `layout.Lists`; with any dtypes and strides.
        plans: one for each parameter; equal plans are the same object.
        exponents: of each parameter's blocks, if m is int8 (see `rounding.encode_blocks`).
        addresses: not used.
        together: True: step all tensors with one call of each of torch's operations. False: one tensor after the other. None: together on
            accelerators; one after the other on the CPU, whose caches then serve better. The bits of the results are the same.
    """
    at_once = lists[0][0].device.type != "cpu" if together is None else together
    for indices in by_plan(plans).values():
        for some in _portions(indices, lists[0], at_once):
            chosen = tuple([members[i] for i in some] for members in lists)
            _step(chosen, plans[some[0]], [] if exponents is None else [exponents[i] for i in some])


def _portions(indices: list[int], theta: list[Tensor], together: bool) -> Iterator[list[int]]:
    """Indices of the tensors that are stepped together: one, or as many as come to about `MOST_ELEMENTS`."""
    portion: list[int] = []
    elements = 0
    for i in indices:
        portion.append(i)
        elements += theta[i].numel()
        if not together or elements >= MOST_ELEMENTS or i == indices[-1]:
            yield portion
            portion, elements = [], 0


def _step(lists: Lists, plan: StepPlan, exponents: list[Tensor]) -> None:
    """One step of tensors that have the same plan. The letters are those of `plan.ROLES`; the tensors `stored_…` are the lists' own, those
    without it are in the dtype in which the step is computed."""
    # This waits for a GPU: torch's operations cannot be switched off from there.
    if plan.found_inf is not None and bool(plan.found_inf):
        return
    compute = torch.float32
    for stored in lists:
        compute = torch.promote_types(compute, stored[0].dtype)
    stored_theta, stored_grad, stored_m, stored_s, stored_v = lists
    lr = plan.lr.reshape(()) if isinstance(plan.lr, Tensor) else plan.lr

    grad = _in(compute, stored_grad)
    if plan.grad_scale is not None:
        grad = list(torch._foreach_div(grad, plan.grad_scale.to(compute).reshape(())))
    if plan.maximize:
        grad = list(torch._foreach_neg(grad))
    theta, s, v = (_in(compute, x) for x in (stored_theta, stored_s, stored_v))
    m = _in(compute, _decoded(stored_m, exponents))
    update.update_momentum(m, grad, plan.beta1)
    if plan.variant >= Variant.ACCUMULATE:
        update.accumulate(s, grad, plan.beta2)
    if plan.variant == Variant.REFRESH:
        update.refresh(
            v,
            s,
            gamma=plan.gamma,
            gamma_ratio=plan.gamma_ratio,
            keep=plan.keep_d,
            eps=plan.eps,
            debias=plan.debias_s,
            hold_silent=plan.hold_silent,
        )
        _round(v, stored_v, _salt(plan, "v", PRECOND))
    update.apply_update(
        theta,
        v,
        update.looked_ahead(m, grad, plan.beta1) if plan.nesterov else m,
        lr=lr,
        debias=plan.debias_m,
        clip=plan.clip,
        decay=1.0 - lr * plan.weight_decay,
        cautious=plan.cautious,
    )
    _round(theta, stored_theta, _salt(plan, "theta", THETA))
    if exponents:
        _encode(stored_m, exponents, m, _salt(plan, "m", EXP_AVG))
    else:
        _round(m, stored_m, _salt(plan, "m", EXP_AVG))
    if plan.variant >= Variant.ACCUMULATE:
        _round(s, stored_s, _salt(plan, "s", EXP_AVG_SQ))


def _in(dtype: torch.dtype, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors themselves if they have this dtype, converted copies if not."""
    return tensors if tensors[0].dtype == dtype else [t.to(dtype) for t in tensors]


def _salt(plan: StepPlan, role: str, salted: int) -> int | None:
    """The salt of a role's stochastic rounding (`salted`: its number in `rounding`); None: the role is rounded to the nearest."""
    return salt_of(plan.step, salted) if role in plan.stochastic else None


def _round(computed: list[Tensor], stored: list[Tensor], salt: int | None) -> None:
    """Copy to the stored tensors; stochastically rounded if there is a salt and they are bfloat16."""
    if stored is computed:
        return
    if salt is not None and stored[0].dtype == torch.bfloat16:
        computed = [to_bfloat16_stochastically(x.float(), salt) for x in computed]
    torch._foreach_copy_(stored, computed)


def _decoded(m: list[Tensor], exponents: list[Tensor]) -> list[Tensor]:
    """m as numbers, if it is int8; else m itself."""
    return [decode_blocks(codes, e) for codes, e in zip(m, exponents, strict=True)] if exponents else m


def _encode(m: list[Tensor], exponents: list[Tensor], computed: list[Tensor], salt: int | None) -> None:
    """Store what was computed in an int8 m and its exponents."""
    for codes, stored, x in zip(m, exponents, computed, strict=True):
        for target, value in zip((codes, stored), encode_blocks(x.float(), salt), strict=True):
            target.copy_(value)
