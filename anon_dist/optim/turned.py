"""The step of matrices whose sides are turned into bases of their own, and the renewal of these bases after a refresh.

The gradient is turned, the backend makes the update in the turned frame, elementwise as ever, and the update is turned back. At a refresh
the preconditioner is made of what was measured in the present basis; after that step the basis takes in the covariance of the momentum, and
the momentum and the preconditioner follow it. Only then do ranks talk, and only those that hold other parts of the same matrices: one sum
of their covariances. All of them compute the new basis from it, alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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

AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Elements that are turned at once: a gradient and an update are temporaries, in float32."""


@dataclass
class TurnedWork:
    """The update of a bucket of turned matrices, to be run once."""

    bucket: Bucket
    plans: list[StepPlan]
    backend: Backend
    states: list[Mapping[str, Tensor]]
    sides: list[tuple[Side, ...]]
    renewals: list[Renewal]
    """Where a refresh leaves what comes after the step."""

    def run(self) -> None:
        """Update the tensors in place, and count the step."""
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
        """Indices that are taken at once."""
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
        theta, grad, m, s, v = ([members[i] for i in indices] for members in self.bucket.lists)
        plans, states = [self.plans[i] for i in indices], [self.states[i] for i in indices]
        compute = torch.promote_types(torch.promote_types(torch.float32, theta[0].dtype), grad[0].dtype)
        turned = [frame.turn(frame.matrix(g).to(compute), state) for g, state in zip(grad, states, strict=True)]
        updates = [torch.zeros_like(g) for g in turned]
        handing_back = {id(plan): plan.handing_back() for plan in plans}
        self.backend(
            (updates, turned, *([frame.matrix(x) for x in members] for members in (m, s, v))),
            [handing_back[id(plan)] for plan in plans],
            None if self.bucket.exponents is None else [self.bucket.exponents[i] for i in indices],
            None,
        )
        for theta_i, u, plan, state in zip(theta, updates, plans, states, strict=True):
            _move(theta_i, frame.turn(u, state, back=True).reshape(theta_i.shape), plan)


def _move(theta: Tensor, u: Tensor, plan: StepPlan) -> None:
    """θ ← (1 − η λ) θ − η u, in place, rounded as the plan says."""
    lr = plan.lr.reshape(()) if isinstance(plan.lr, Tensor) else plan.lr
    if plan.found_inf is not None and not known_to_the_host(plan.found_inf):
        lr = lr * (plan.found_inf == 0.0).to(u.dtype).reshape(())  # u is 0 where the backend was told to write nothing
    computed = theta.to(u.dtype)
    update.move([computed], [u], scale=lr, decay=1.0 - lr * plan.weight_decay, cautious=plan.cautious)
    if computed is theta:
        return
    if "theta" in plan.stochastic and theta.dtype == torch.bfloat16:
        computed = to_bfloat16_stochastically(computed.float(), salt_of(plan.step, THETA))
    theta.copy_(computed)


@dataclass
class Member:
    """A matrix whose bases are renewed."""

    p: Tensor
    """The parameter that it is, or lies in."""
    state: Mapping[str, Tensor]
    sides: tuple[Side, ...]
    plan: StepPlan
    fresh: dict[Side, Tensor] = field(default_factory=dict)
    """The covariance of the momentum: this rank's part of it, then the sum."""


class Renewal:
    """The renewal of some parameters' bases after the refresh that they have just made.

    Until `finish`, state and parameters are those of the finished step in the old bases, which is as right.
    """

    def __init__(self, members: list[Member]) -> None:
        self._members = members
        self._device = members[0].state["precond"].device
        self._sums: list[tuple[Tensor, list[tuple[Member, Side]]]] = []
        self._waited_for: list[Any] = []
        self._is_started = False

    @torch.no_grad()
    def start(self) -> None:
        """Compute the covariances, and send them to be added up over ranks. Every rank starts the same ones in the same order."""
        if self._is_started:
            return
        self._is_started = True
        together: dict[tuple[str, ...], tuple[_Ranks, list[tuple[Member, Side]]]] = {}
        with basis.true_float32(self._device):
            for member in self._members:
                m = _momentum(member.state)
                for side in member.sides:
                    block = member.state[KEYS[side][0]].shape[1]
                    member.fresh[side] = basis.covariance(m, block, side)
                    groups, device = flat.summed_over(member.p, side)
                    key = (*(group.group_name for group in groups), str(m.device))
                    together.setdefault(key, ((groups, device), []))[1].append((member, side))
        for (groups, device), those in together.values():
            if groups:
                self._add_up(groups, device, those)

    def _add_up(
        self, groups: tuple[dist.ProcessGroup, ...], device: torch.device, those: list[tuple[Member, Side]]
    ) -> None:
        sums = torch.cat([member.fresh[side].reshape(-1) for member, side in those]).to(device)
        for group in groups[:-1]:
            dist.all_reduce(sums, group=group)
        self._waited_for.append(dist.all_reduce(sums, group=groups[-1], async_op=True))
        self._sums.append((sums, those))

    @torch.no_grad()
    def finish(self) -> None:
        """Go over to the new bases."""
        self.start()
        for handle in self._waited_for:
            handle.wait()
        for sums, those in self._sums:
            parts = sums.to(self._device).split([member.fresh[side].numel() for member, side in those])
            for (member, side), part in zip(those, parts, strict=True):
                member.fresh[side] = part.view_as(member.fresh[side])
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
    plan, moved = member.plan, Moved(dict(member.state), EXPONENTS)
    for side in member.sides:
        q, mean = (local(member.state[key]) for key in KEYS[side])
        turning, turned = basis.rotation(mean, member.fresh[side], plan.keep_d)
        q.copy_(basis.renewed(q, turning))
        mean.copy_(turned)
        moved.by(side, turning, plan.gamma)
    moved.store(plan.step, plan.stochastic)
