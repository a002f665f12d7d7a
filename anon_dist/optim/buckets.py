"""Lists of local tensors that share what an update depends on, and one Anon step of such a list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from anon_dist.optim import update
from anon_dist.optim.hyper import schedule_of
from anon_dist.optim.kernels import cpu
from anon_dist.optim.kernels.choice import kernel_for
from anon_dist.optim.rounding import (
    EXP_AVG,
    EXP_AVG_SQ,
    THETA,
    decode_blocks,
    encode_blocks,
    salt_of,
    to_bfloat16_stochastically,
)
from anon_dist.optim.schedule import Plan
from anon_dist.optim.state import local

MEANS = frozenset({"m", "s"})
"""Rounded stochastically where they are stored in fewer bits than float32."""

BUCKET_ELEMENTS = 1 << 26
"""The foreach path makes temporaries as large as the tensors it is given at once; no more than this many elements."""


@dataclass
class Bucket:
    """Local tensors that one call of each update function can take together."""

    step: int
    """The step that is taken; the counters go up to it when it has been."""
    gammas: tuple[float, float] = (1.0, 1.0)
    """γ that v was made with, and γ that a refresh in this step makes it with."""
    counters: list[Tensor] = field(default_factory=list)
    theta: list[Tensor] = field(default_factory=list)
    grad: list[Tensor] = field(default_factory=list)
    m: list[Tensor] = field(default_factory=list)
    s: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    exponents: list[Tensor] = field(default_factory=list)
    """Of m's blocks, where m is in 8 bits."""
    counts: list[np.ndarray[Any, Any]] = field(default_factory=list)
    """The counters' memory, if it is known: torch's operations on 0-dimensional tensors take a microsecond each."""

    def add(self, counter: Tensor, tensors: list[Tensor], exponents: Tensor | None = None) -> None:
        """Add a parameter: its step counter, (θ, g, m, s, v), and the exponents of an 8-bit m."""
        self.counters.append(counter)
        self.exponents += [] if exponents is None else [exponents]
        for members, tensor in zip(self.lists, tensors, strict=True):
            members.append(tensor)

    @property
    def lists(self) -> tuple[list[Tensor], ...]:
        """θ, g, m, s, v."""
        return self.theta, self.grad, self.m, self.s, self.v

    def count(self) -> None:
        """Raise the step counters by one."""
        if self.counts and not torch.compiler.is_compiling():
            for count in self.counts:
                count[()] += 1.0
        else:
            torch._foreach_add_(self.counters, 1.0)

    def parts(self, foreach: bool | None) -> Iterator[Bucket]:
        """The bucket in parts of bounded size, or of one tensor each (see `Anon`'s argument `foreach`)."""
        together = self.theta[0].device.type != "cpu" if foreach is None else foreach
        start, elements = 0, 0
        for i, tensor in enumerate(self.theta):
            elements += tensor.numel()
            if not together or elements >= BUCKET_ELEMENTS or i + 1 == len(self.theta):
                lists = (x[start : i + 1] for x in (self.counters, *self.lists, self.exponents))
                part = Bucket(self.step, self.gammas, *lists)  # type: ignore[arg-type]
                part.counts = self.counts[start : i + 1]
                yield part
                start, elements = i + 1, 0


def update_bucket(bucket: Bucket, group: dict[str, Any]) -> None:
    """One Anon step of the bucket's tensors, by torch's foreach operations."""
    plan = schedule_of(group).plan(bucket.step)
    beta1 = group["betas"][0]
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = float(lr) if lr.device.type == "cpu" else lr.reshape(())
    compute = torch.float32
    for stored in bucket.lists:
        compute = torch.promote_types(compute, stored[0].dtype)

    grad = _in(compute, bucket.grad)
    if group["maximize"]:
        grad = list(torch._foreach_neg(grad))
    theta, s, v = (_in(compute, x) for x in (bucket.theta, bucket.s, bucket.v))
    m = _in(compute, _decoded(bucket.m, bucket.exponents))
    if group["weight_decay"]:
        update.decay_weights(theta, 1.0 - lr * group["weight_decay"])
    update.update_momentum(m, grad, beta1)
    if plan.accumulate:
        update.accumulate(s, grad, plan.beta2)
    if plan.refresh:
        gamma, ratio, keep = at_refresh(bucket, group, plan)
        update.refresh(
            v,
            s,
            gamma=gamma,
            gamma_ratio=ratio,
            keep=keep,
            eps=group["eps"],
            debias=plan.debias,
            hold_silent=group["hold_silent"],
        )
    update.apply_update(theta, v, m, lr=lr, debias=1.0 - beta1**bucket.step, clip=group["update_clip"])
    bucket.count()
    _write_back(bucket.theta, theta, salt_of(bucket.step, THETA) if group["stochastic_rounding"] else None)
    if bucket.exponents:
        _encode(bucket.m, bucket.exponents, m, salt_of(bucket.step, EXP_AVG))
    else:
        _write_back(bucket.m, m, salt_of(bucket.step, EXP_AVG))
    if plan.accumulate or plan.refresh:
        _write_back(bucket.s, s, salt_of(bucket.step, EXP_AVG_SQ))
    if plan.refresh:
        _write_back(bucket.v, v)


def update_bucket_fused(bucket: Bucket, group: dict[str, Any]) -> None:
    """One Anon step of the bucket's tensors, by the kernel of their device."""
    kernel_for(bucket.theta[0].device).run(bucket.lists, **step_arguments(bucket, group))
    bucket.count()


def at_refresh(bucket: Bucket, group: dict[str, Any], plan: Plan) -> tuple[float, float, float]:
    """γ of a refresh of the bucket, its ratio to the γ of the old preconditioner, and the weight of that.

    At the first refresh there is none; one of γ = 0 says nothing at another γ, so that this refresh is as the first.
    """
    old, new = bucket.gammas
    ratio = update.gamma_ratio(old, new)
    return (new, 1.0, 0.0) if plan.first or ratio is None else (new, ratio, group["beta3"])


def step_arguments(bucket: Bucket, group: dict[str, Any]) -> dict[str, Any]:
    """What a kernel is told about the bucket's step; see `cpu.run`."""
    plan, lr = schedule_of(group).plan(bucket.step), group["lr"]
    gamma, ratio, keep = at_refresh(bucket, group, plan)
    on_gpu = isinstance(lr, Tensor) and bucket.theta[0].device.type == "cuda" and lr.device.type == "cuda"
    return {
        "lr": lr if on_gpu else float(lr),  # a learning rate that lives on the device stays there
        "beta1": group["betas"][0],
        "beta2": plan.beta2,
        "weight_decay": group["weight_decay"],
        "step": bucket.step,
        "variant": cpu.REFRESH if plan.refresh else cpu.ACCUMULATE if plan.accumulate else cpu.PLAIN,
        "debias_s": plan.debias,
        "keep_d": keep,
        "gamma": gamma,
        "gamma_ratio": ratio,
        "eps": group["eps"],
        "clip": group["update_clip"],
        "hold_silent": group["hold_silent"],
        "maximize": group["maximize"],
        "stochastic": MEANS | {"theta"} if group["stochastic_rounding"] else MEANS,
        "exponents": bucket.exponents or None,
    }


def _in(dtype: torch.dtype, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors themselves if they have this dtype, converted copies if not."""
    return tensors if tensors[0].dtype == dtype else [t.to(dtype) for t in tensors]


def _write_back(stored: list[Tensor], computed: list[Tensor], salt: int | None = None) -> None:
    """Copy; with a salt, stochastically rounded where the stored tensors are bfloat16."""
    if stored is computed:
        return
    if salt is not None and stored[0].dtype == torch.bfloat16:
        computed = [to_bfloat16_stochastically(x.float(), salt) for x in computed]
    torch._foreach_copy_(stored, computed)


def _decoded(m: list[Tensor], exponents: list[Tensor]) -> list[Tensor]:
    return [decode_blocks(codes, e) for codes, e in zip(m, exponents, strict=True)] if exponents else m


def _encode(m: list[Tensor], exponents: list[Tensor], computed: list[Tensor], salt: int) -> None:
    for codes, stored, x in zip(m, exponents, computed, strict=True):
        for target, value in zip((codes, stored), encode_blocks(x.float(), salt), strict=True):
            target.copy_(value)


def local_gradient(p: Tensor) -> Tensor:
    """This rank's part of p's gradient.

    Raises:
        RuntimeError: the gradient is laid out otherwise than the parameter (a pending sum over ranks, say).
    """
    grad = p.detach() if p.grad is None else p.grad  # none: an empty shard
    if isinstance(p, DTensor) != isinstance(grad, DTensor):
        raise RuntimeError(
            f"Anon: the parameter is a {type(p).__name__} and its gradient a {type(grad).__name__}; they must be sharded alike"
        )
    if (
        isinstance(p, DTensor)
        and isinstance(grad, DTensor)
        and (grad.placements, grad.device_mesh) != (p.placements, p.device_mesh)
    ):
        raise RuntimeError(
            f"Anon: gradient placements {grad.placements} differ from the parameter's {p.placements}; redistribute it before step()"
        )
    return local(grad)
