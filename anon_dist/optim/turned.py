"""The step of turned matrices, and the renewal of their bases after a refresh.

A step turns the gradient into the frame. A backend computes the update there, element by element, as of any parameter. The update is turned
back, and moves the parameter.

A step that refreshes makes the preconditioner in the present bases. The renewal comes after that step: it makes new bases from the
momentum's covariance, and turns the momentum and the preconditioner into them. s is 0 then. The equations are in `basis.py`; beside them:

- Both sides, where both have a basis, are whitened by the C of before this renewal, and their covariances are of the same momentum. Only
  then are they renewed.
- Of v only σ = v^(−2/γ) of each element is known. It is turned as a diagonal matrix is: σ'_j = Σ_i R_ij² σ_i within
  each row (for rows, each column), then v' = σ'^(−γ/2). Two sides are turned one after the other. Where |γ| < 1/4, v^(−2) takes the place
  of σ. At γ = 0 v stays as it is, 1.

Ranks communicate in a renewal alone. The covariance of a matrix's columns is a sum over its rows. A rank that holds some of the rows
computes the sum over these, and an all-reduce adds up the sums of all ranks that hold rows of the matrix. All of them then compute the same
new basis. Where ranks hold some of the columns each, the covariance of the rows is added up in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anon_dist.optim import basis, flat, frame, update
from anon_dist.optim.backends.choice import Backend
from anon_dist.optim.basis import Side
from anon_dist.optim.frame import KEYS, Moved
from anon_dist.optim.gather import Bucket
from anon_dist.optim.host_copy import known_to_the_host
from anon_dist.optim.plan import StepPlan, Variant
from anon_dist.optim.rounding import THETA, decode_blocks, salt_of, to_bfloat16_stochastically
from anon_dist.optim.state import EXPONENTS, local

_Ranks = tuple[tuple[dist.ProcessGroup, ...], torch.device]
"""The process groups over which a covariance is summed, one after the other, and the device on which they communicate."""

AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Matrices of about so many elements are stepped together. Their turned gradients and updates are temporaries of this size, in float32."""


@dataclass
class TurnedWork:
    """The update of a bucket of turned matrices; `run` is to be called once. All lists have a member for each matrix."""

    bucket: Bucket
    plans: list[StepPlan]
    backend: Backend
    states: list[Mapping[str, Tensor]]
    sides: list[tuple[Side, ...]]
    renewals: list[Renewal]
    """To this list `run` adds the renewal of the matrices that it refreshes."""

    def run(self) -> None:
        """Update the tensors in place, and count the step. Where `found_inf` says so, and the host knows it, nothing is done."""
        flag = self.plans[0].found_inf
        if flag is not None and known_to_the_host(flag) and bool(flag):
            return
        with basis.true_float32(self.bucket.lists[0][0].device):
            for indices in self._portions():
                self._step(indices)
        self.bucket.count()
        due = [i for i, plan in enumerate(self.plans) if plan.variant == Variant.REFRESH]
        if due:
            members = [Member(self.bucket.params[i], self.states[i], self.sides[i], self.plans[i]) for i in due]
            self.renewals.append(Renewal(members))

    def _portions(self) -> Iterator[list[int]]:
        """Indices of the matrices that are stepped together: one, or several of `AT_ONCE` elements at most."""
        theta = self.bucket.lists[0]
        most = AT_ONCE["cpu" if theta[0].device.type == "cpu" else "cuda"]
        portion: list[int] = []
        elements = 0
        for i, tensor in enumerate(theta):
            if portion and elements + tensor.numel() > most:
                yield portion
                portion, elements = [], 0
            portion.append(i)
            elements += tensor.numel()
        yield portion

    def _step(self, indices: list[int]) -> None:
        """Step some of the matrices. The letters are those of `plan.ROLES`."""
        theta, grad, m, s, v = ([members[i] for i in indices] for members in self.bucket.lists)
        plans, states = [self.plans[i] for i in indices], [self.states[i] for i in indices]
        compute = torch.promote_types(torch.promote_types(torch.float32, theta[0].dtype), grad[0].dtype)
        # Scaled gradients are divided here: what is rounding in a product is told by its norm, which must not overflow.
        turned = [
            frame.turn(_divided(frame.matrix(g).to(compute), plan.grad_scale), state)
            for g, plan, state in zip(grad, plans, states, strict=True)
        ]
        updates = [torch.zeros_like(g) for g in turned]
        # The backend writes the updates. The parameters, which are not turned, are moved below.
        handing_back = {id(plan): replace(plan.handing_back(), grad_scale=None) for plan in plans}
        self.backend(
            (updates, turned, *([frame.matrix(x) for x in members] for members in (m, s, v))),
            [handing_back[id(plan)] for plan in plans],
            None if self.bucket.exponents is None else [self.bucket.exponents[i] for i in indices],
            None,
        )
        for theta_i, u, plan, state in zip(theta, updates, plans, states, strict=True):
            _move(theta_i, frame.turn(u, state, back=True).reshape(theta_i.shape), plan)


def _divided(grad: Tensor, scale: Tensor | None) -> Tensor:
    return grad if scale is None else grad / scale.to(grad.dtype).reshape(())


def _move(theta: Tensor, u: Tensor, plan: StepPlan) -> None:
    """θ ← (1 − η λ) θ − η u, in place, rounded as the plan says."""
    lr = plan.lr.reshape(()) if isinstance(plan.lr, Tensor) else plan.lr
    if plan.found_inf is not None and not known_to_the_host(plan.found_inf):
        # Where the flag is set, the backend has left u = 0; η = 0 keeps the weight from decaying too.
        lr = lr * (plan.found_inf == 0.0).to(u.dtype).reshape(())
    computed = theta.to(u.dtype)
    update.move([computed], [u], scale=lr, decay=1.0 - lr * plan.weight_decay, cautious=plan.cautious)
    if computed is theta:
        return
    if "theta" in plan.stochastic and theta.dtype == torch.bfloat16:
        computed = to_bfloat16_stochastically(computed.float(), salt_of(plan.step, THETA))
    theta.copy_(computed)


@dataclass
class Member:
    """A turned matrix in a renewal."""

    p: Tensor
    """The parameter that is the matrix, or the flat tensor that the matrix lies in."""
    state: Mapping[str, Tensor]
    sides: tuple[Side, ...]
    """Those that have a basis."""
    plan: StepPlan
    """Of the step that has refreshed it."""
    covariances: dict[Side, Tensor] = field(default_factory=dict)
    """Of the momentum, by side: first this rank's part of it, then the sum over ranks."""


class Renewal:
    """The renewal of some matrices' bases after a step that has refreshed them.

    Until `finish`, parameters and states are those after that step, in the old bases, and consistent.
    """

    def __init__(self, members: list[Member]) -> None:
        self._members = members
        self._device = members[0].state["precond"].device
        self._sums: list[tuple[Tensor, list[tuple[Member, Side]]]] = []
        self._waited_for: list[Any] = []
        self._is_started = False

    @torch.no_grad()
    def start(self) -> None:
        """Compute the covariances, and begin the all-reduces of those that are sums over ranks. A second call does nothing.

        Every rank must start the same renewals in the same order.
        """
        if self._is_started:
            return
        self._is_started = True
        # One all-reduce for all covariances that are summed over the same process groups.
        together: dict[tuple[str, ...], tuple[_Ranks, list[tuple[Member, Side]]]] = {}
        with basis.true_float32(self._device):
            for member in self._members:
                m = _momentum(member.state)
                for side in member.sides:
                    block_size = member.state[KEYS[side][0]].shape[1]
                    other: Side = "rows" if side == "columns" else "columns"
                    y = basis.whitened(m, local(member.state[KEYS[other][1]]), other) if other in member.sides else m
                    member.covariances[side] = basis.covariance(y, block_size, side)
                    groups, device = flat.summed_over(member.p, side)
                    key = (*(group.group_name for group in groups), str(m.device))
                    together.setdefault(key, ((groups, device), []))[1].append((member, side))
        for (groups, device), summed in together.values():
            if groups:
                self._add_up(groups, device, summed)

    def _add_up(
        self, groups: tuple[dist.ProcessGroup, ...], device: torch.device, summed: list[tuple[Member, Side]]
    ) -> None:
        sums = torch.cat([member.covariances[side].reshape(-1) for member, side in summed]).to(device)
        for group in groups[:-1]:
            dist.all_reduce(sums, group=group)
        self._waited_for.append(dist.all_reduce(sums, group=groups[-1], async_op=True))
        self._sums.append((sums, summed))

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for the sums, and go over to the new bases."""
        self.start()
        for handle in self._waited_for:
            handle.wait()
        for sums, summed in self._sums:
            parts = sums.to(self._device).split([member.covariances[side].numel() for member, side in summed])
            for (member, side), part in zip(summed, parts, strict=True):
                member.covariances[side] = part.view_as(member.covariances[side])
        with basis.true_float32(self._device):
            for member in self._members:
                _renew(member)


def _momentum(state: Mapping[str, Tensor]) -> Tensor:
    """m as a local matrix, in float32 or more."""
    m = local(state["exp_avg"])
    if EXPONENTS in state:
        m = decode_blocks(m, state[EXPONENTS])
    return frame.matrix(m).to(torch.promote_types(m.dtype, torch.float32))


def _renew(member: Member) -> None:
    """Make a matrix's new bases from its covariances, and turn its momentum and preconditioner into them."""
    plan, moved = member.plan, Moved(dict(member.state), EXPONENTS)
    for side in member.sides:
        q, mean = (local(member.state[key]) for key in KEYS[side])
        turning, turned = basis.rotation(mean, member.covariances[side], plan.keep_d)
        q.copy_(basis.renewed(q, turning))
        mean.copy_(turned)
        moved.by(side, turning, plan.gamma)
    moved.store(plan.step, plan.stochastic)
