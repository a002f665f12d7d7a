"""The step of flat tensors (`flat.py`): their turned matrices are stepped as in `turned.py`, all else element by element."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from anon_dist.optim import flat
from anon_dist.optim.backends.choice import Backend
from anon_dist.optim.basis import Side
from anon_dist.optim.frame import Group
from anon_dist.optim.gather import Bucket
from anon_dist.optim.host_copy import known_to_the_host
from anon_dist.optim.plan import StepPlan
from anon_dist.optim.turned import Renewal, TurnedWork

Tensors = list[Tensor]
"""Of one matrix, or of one stretch of a flat tensor: θ, g, m, s, v (`plan.ROLES`)."""


@dataclass
class FlatWork:
    """The update of a bucket of flat tensors; `run` is to be called once."""

    bucket: Bucket
    plans: list[StepPlan]
    backend: Backend
    group: Group
    states: list[Mapping[str, Tensor]]
    renewals: list[Renewal]
    """To this list `run` adds the renewal of the matrices that it refreshes."""

    def run(self) -> None:
        """Update the tensors in place, and count the step. Where `found_inf` says so, and the host knows it, nothing is done."""
        flag = self.plans[0].found_inf
        if flag is not None and known_to_the_host(flag) and bool(flag):
            return
        matrices, rest = _Views(), _Views()
        for i in range(len(self.bucket.params)):
            for place, sides, state in self._parts(i):
                views = matrices if sides else rest
                views.add(self.bucket.params[i], place, self.plans[i], sides, state)
        if matrices.params:
            bucket = matrices.bucket()
            TurnedWork(bucket, matrices.plans, self.backend, matrices.states, matrices.sides, self.renewals).run()
        if rest.params:
            self.backend(rest.bucket().lists, rest.plans, None, None)
        self.bucket.count()

    def _parts(self, i: int) -> Iterator[tuple[Tensors, tuple[Side, ...], Mapping[str, Tensor]]]:
        """The parts of the i-th flat tensor, which together are all of it: each turned matrix, with its sides and state; and each stretch
        between two of them, with no sides and no state."""
        tensors, reached = [members[i].detach() for members in self.bucket.lists], 0
        for (share, sides), state in flat.matrices(self.bucket.params[i], self.states[i], self.group):
            if share.offset > reached:
                yield [x[reached : share.offset] for x in tensors], (), {}
            yield [share.of(x) for x in tensors], sides, state
            reached = share.offset + share.numel
        if reached < tensors[0].numel():
            yield [x[reached:] for x in tensors], (), {}


@dataclass
class _Views:
    """Parts of flat tensors, gathered to be made a bucket."""

    params: list[Tensor] = field(default_factory=list)
    tensors: list[Tensors] = field(default_factory=list)
    plans: list[StepPlan] = field(default_factory=list)
    sides: list[tuple[Side, ...]] = field(default_factory=list)
    states: list[Mapping[str, Tensor]] = field(default_factory=list)

    def add(
        self, p: Tensor, tensors: Tensors, plan: StepPlan, sides: tuple[Side, ...], state: Mapping[str, Tensor]
    ) -> None:
        """Add a part of the flat tensor p: its five tensors by role, and its sides and state if it is a turned matrix."""
        self.params.append(p)
        self.tensors.append(tensors)
        self.plans.append(plan)
        self.sides.append(sides)
        self.states.append(state)

    def bucket(self) -> Bucket:
        """A bucket of the parts. It has no step counts, since those of the flat tensors are raised."""
        theta, grad, m, s, v = map(list, zip(*self.tensors, strict=True))
        return Bucket(self.params, (theta, grad, m, s, v), None, [plan.step for plan in self.plans], [])
