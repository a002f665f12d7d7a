"""The step of tensors in which matrices lie (`flat.py`): these are stepped in their frames, as any matrix; all else element by element."""

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
"""θ, g, m, s, v."""


@dataclass
class FlatWork:
    """The update of a bucket of such tensors, to be run once."""

    bucket: Bucket
    plans: list[StepPlan]
    backend: Backend
    group: Group
    states: list[Mapping[str, Tensor]]
    renewals: list[Renewal]
    """Where a refresh leaves what comes after the step."""

    def run(self) -> None:
        """Update the tensors in place, and count the step."""
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
        """Of a tensor, all of it: each turned matrix with its sides and state, and what lies between, with none."""
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
    """Parts of tensors, as a bucket has them."""

    params: list[Tensor] = field(default_factory=list)
    tensors: list[Tensors] = field(default_factory=list)
    plans: list[StepPlan] = field(default_factory=list)
    sides: list[tuple[Side, ...]] = field(default_factory=list)
    states: list[Mapping[str, Tensor]] = field(default_factory=list)

    def add(
        self, p: Tensor, tensors: Tensors, plan: StepPlan, sides: tuple[Side, ...], state: Mapping[str, Tensor]
    ) -> None:
        """One part of a tensor: its five tensors by role, the sides that are turned, and their states."""
        self.params.append(p)
        self.tensors.append(tensors)
        self.plans.append(plan)
        self.sides.append(sides)
        self.states.append(state)

    def bucket(self) -> Bucket:
        """Without counters: the whole tensors' are counted."""
        theta, grad, m, s, v = map(list, zip(*self.tensors, strict=True))
        return Bucket(self.params, (theta, grad, m, s, v), None, [plan.step for plan in self.plans], [])
