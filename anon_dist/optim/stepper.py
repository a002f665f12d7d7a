"""A step made ready: which tensors, under which plans, by which backend."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from anon_dist.optim import flat, frame
from anon_dist.optim.backends import choice
from anon_dist.optim.flat_step import FlatWork
from anon_dist.optim.gather import Bucket, Gathered, gather
from anon_dist.optim.host_copy import HostCopy, known_to_the_host
from anon_dist.optim.hyper import normalise, validate, validate_lr
from anon_dist.optim.members import Groups, States, allocate, convert_preconds, has_absent, steps_taken
from anon_dist.optim.plan import StepPlan
from anon_dist.optim.regime import HISTORY, GammaChange, Regime
from anon_dist.optim.turned import Renewal, TurnedWork

LONGEST_VECTOR = 1 << 13
"""A parameter with more elements and one dimension is taken for a flattened matrix."""


@dataclass
class Work:
    """The update of a bucket, to be run once."""

    bucket: Bucket
    plans: list[StepPlan]
    backend: choice.Backend

    def run(self) -> None:
        """Update the tensors in place, and count the step."""
        self.backend(self.bucket.lists, self.plans, self.bucket.exponents, self.bucket.addresses)
        self.bucket.count()


AnyWork = Work | TurnedWork | FlatWork


@dataclass(frozen=True)
class Told:
    """What a step takes from the device; see `Anon.grad_scale` and `Anon.found_inf`."""

    grad_scale: Tensor | None
    found_inf: Tensor | None

    @classmethod
    def of(cls, optimizer: Optimizer) -> Told:
        """What has been set on the optimizer."""
        return cls(getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))

    @property
    def skips(self) -> bool:
        """Whether the host knows at once that the step is none."""
        return self.found_inf is not None and known_to_the_host(self.found_inf) and bool(self.found_inf)

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """The two on a device."""
        if self.grad_scale is None and self.found_inf is None:
            return None, None
        scale, flag = (None if x is None else x.to(device) for x in (self.grad_scale, self.found_inf))
        return scale, flag


class Stepper:
    """Makes an optimizer's steps ready. From one to the next it remembers what the groups' tensors were, what the ranks agreed on, and
    what it has counted before it knew."""

    def __init__(self) -> None:
        self.known: Sequence[Gathered] = ()
        """What each group's tensors were when they were last gathered."""
        self.kernel_agreed: bool | None = None
        """Whether all ranks can use the fused kernel; None before the first step."""
        self._unsettled: tuple[HostCopy, list[Bucket]] | None = None
        self._renewals: list[Renewal] = []
        self._checked: dict[int, tuple[list[Any], Regime]] = {}
        """What each group's hyperparameters were, without lr, when they were last found to be in order, and the regime that they make."""

    def settle(self) -> None:
        """Finish the last step: take back its counts, if it was none; renew the bases of what it has refreshed."""
        while self._renewals:
            self._renewals.pop(0).finish()
        if self._unsettled is not None:
            (flag, buckets), self._unsettled = self._unsettled, None
            if flag.value():
                for bucket in buckets:
                    bucket.count(-1.0)

    def ready(
        self, groups: Groups, state: States, told: Told, parts: Sequence[Iterable[Tensor]]
    ) -> list[Callable[[], None]]:
        """The updates of a step, checked and to be run without autograd, of each part and of the parameters that are in none.

        Raises:
            RuntimeError, ValueError: see `Anon.step`.
        """
        return [partial(_run, work) for work in self._work_of_parts(groups, state, told, parts)]

    def _work_of_parts(
        self, groups: Groups, state: States, told: Told, parts: Sequence[Iterable[Tensor]]
    ) -> list[list[AnyWork]]:
        _refuse_capture()
        self.settle()
        if self.kernel_agreed is None and (kinds := choice.kinds(groups)):
            self.kernel_agreed = choice.agree(kinds)  # before anything that could keep a rank from it
        work: list[list[AnyWork]] = [[] for _ in range(len(parts) + 1)]
        regimes = [self._regime(index, group, groups, state) for index, group in enumerate(groups)]
        found = self._buckets(groups, state)
        if not any(found) and _has_no_gradient(groups):
            warnings.warn(
                "Anon: step() found no gradient in any parameter and did nothing. If the model was sharded after the optimizer was made "
                "(torch's fully_shard), the optimizer holds parameters that are not trained: make it afterwards",
                stacklevel=4,
            )
            return work
        if told.skips:
            return work
        absent = any(regime.is_pending for regime in regimes) and has_absent(groups, state)  # it takes time
        changes = [_gamma_change(i, r, b, state, absent) for i, (r, b) in enumerate(zip(regimes, found, strict=True))]
        late = told.found_inf is not None and not known_to_the_host(told.found_inf)
        if late and (any(changes) or _renews(regimes, found)):  # rare enough to wait for a GPU
            if bool(told.found_inf):
                return work
            late = False
        part_of = {p: i for i, part in enumerate(parts) for p in part}
        for regime, group, buckets, change in zip(regimes, groups, found, changes, strict=True):
            for bucket in buckets:
                backend = _backend(bucket, group, bool(self.kernel_agreed))
                plans = _plans(regime, bucket, change[0] if change else None, told, later=bool(parts))
                for part, indices in _by_part(bucket, part_of).items():
                    chosen = bucket if len(indices) == len(bucket.params) else bucket.of(indices)
                    work[part].append(self._work(chosen, [plans[i] for i in indices], backend, group, state))
        for regime, group, change in zip(regimes, groups, changes, strict=True):
            if change:
                convert_preconds(change[1], 1.0 if change[0].ratio is None else change[0].ratio)
                group[HISTORY] = regime.after_change(change[0], absent)
        if late and told.found_inf is not None:
            self._unsettled = HostCopy(told.found_inf), [one.bucket for some in work for one in some]
        return work

    def _work(
        self, bucket: Bucket, plans: list[StepPlan], backend: choice.Backend, group: dict[str, Any], state: States
    ) -> AnyWork:
        if (kind := flat.kind(bucket.params[0], group)) is None:
            return Work(bucket, plans, backend)
        states: list[Mapping[str, Tensor]] = [state[p] for p in bucket.params]
        if kind == "flat":
            return FlatWork(bucket, plans, backend, group, states, self._renewals)
        sides = [frame.sides(p, group) for p in bucket.params]
        return TurnedWork(bucket, plans, backend, states, sides, self._renewals)

    def start_renewals(self) -> None:
        """Begin what a refresh leaves to be done after the step, so that ranks talk while they go on."""
        for renewal in self._renewals:
            renewal.start()

    def _regime(self, index: int, group: dict[str, Any], groups: Groups, state: States) -> Regime:
        """A group's regime. Refused are values out of range and, once steps were taken, values that the state was not made with.

        An edited γ waits.
        """
        values, regime = self._checked.get(index, ([], None))
        if regime is not None and regime.group is group and _are_the_same(group, values):
            validate_lr(group["lr"])
            return regime
        normalise(group)
        validate(group)
        regime = Regime(group)
        if regime.drift():
            if steps_taken(group, state) or has_absent(groups, state):
                regime.check_drift(index)
            else:
                group[HISTORY] = regime.fresh()
                regime, self.known = Regime(group), ()  # the state may be another's now, see `members.allocate`
        self._checked[index] = [value for name, value in group.items() if name != "lr"], regime
        return regime

    def _buckets(self, groups: Groups, state: States) -> list[list[Bucket]]:
        """The buckets of each group."""
        if _has_no_gradient(groups):
            return [[] for _ in groups]
        known = self.known if len(self.known) == len(groups) else [None] * len(groups)
        found = [k.buckets(group, state) if k else None for k, group in zip(known, groups, strict=True)]
        renewed = [buckets for buckets in found if buckets is not None]
        if any(renewed) and len(renewed) == len(groups):
            return renewed
        _check_matrices(groups)
        allocate(groups, state)
        gathered = [gather(index, group, state) for index, group in enumerate(groups)]
        self.known = [remembered for _, remembered in gathered]
        return [buckets for buckets, _ in gathered]


def _run(work: Iterable[AnyWork]) -> None:
    for one in work:
        one.run()


def _are_the_same(group: Mapping[str, Any], values: list[Any]) -> bool:
    """Whether a group's hyperparameters, but lr, are these objects, and `normalise` would find nothing to do."""
    present = [value for name, value in group.items() if name != "lr"]
    same = len(present) == len(values) and all(map(is_, present, values))
    return same and type(group["lr"]).__module__ != "numpy"


def _backend(bucket: Bucket, group: dict[str, Any], agreed: bool) -> choice.Backend:
    """`choice.choose`, which is asked once where the tensors' kinds are those of the steps before."""
    asked = (group["fused"], group["foreach"], agreed, torch.compiler.is_compiling())
    choices = {} if bucket.choices is None else bucket.choices
    if asked not in choices:
        choices[asked] = choice.choose(bucket.lists, group, agreed)
    chosen: choice.Backend = choices[asked]
    return chosen


def _plans(regime: Regime, bucket: Bucket, change: GammaChange | None, told: Told, later: bool) -> list[StepPlan]:
    """The plan of each parameter; `later`: when `lr` may have changed."""
    lr, device = regime.group["lr"], bucket.lists[0][0].device
    if isinstance(lr, Tensor):
        on_gpu = device.type != "cpu" and lr.device.type != "cpu"
        lr = (lr.detach().clone() if later else lr.detach()).to(device) if on_gpu else float(lr)
    scale, flag = told.on(device)
    made = {step: regime.plan(step, change, lr=lr, grad_scale=scale, found_inf=flag) for step in set(bucket.steps)}
    return [made[step] for step in bucket.steps]


def _gamma_change(
    index: int, regime: Regime, buckets: list[Bucket], state: States, absent: bool
) -> tuple[GammaChange, list[dict[str, Tensor]]] | None:
    """If a pending γ comes into force in this step: the change, and the states that are converted alongside, not being refreshed."""
    if not regime.is_pending:
        return None
    group, steps = regime.group, {step for bucket in buckets for step in bucket.steps}
    change = regime.gamma_change(steps, steps_taken(group, state))
    if change is None:
        return None
    refreshed = {
        id(counter)
        for bucket in buckets
        for counter, step in zip(bucket.counters, bucket.steps, strict=True)
        if regime.schedule.at(step).refresh
    }
    states = [state[p] for p in group["params"] if state.get(p)]
    left = [s for s in states if int(s["step"]) and id(s["step"]) not in refreshed]
    if left and (change.ratio is None or absent):
        raise RuntimeError(
            f"Anon: gamma of param group {index} was changed from {change.old!r} to {change.new!r}, and {len(left)} of its parameters have "
            "taken fewer steps than the others, for want of gradients: they cannot be converted, since "
            f"{'not all parameters are in it' if absent else regime.why_not(change)}. Put them in a param group of their own, or set "
            f"{change.old!r} again"
        )
    return change, left


def _check_matrices(groups: Groups) -> None:
    """Refuse a basis where an engine has flattened the matrices; a rank that was left only vectors (ZeroRedundancyOptimizer) is told."""
    asked = next((group["basis"] for group in groups if group["basis"]), None)
    if asked is None or any(flat.kind(p, group) for group in groups for p in group["params"]):
        return
    longest = max((p.numel() for group in groups for p in group["params"]), default=0)
    words = f"Anon: basis={asked!r} turns matrices, and this optimizer has none"
    if longest > LONGEST_VECTOR:
        raise RuntimeError(
            f"{words}, but a flat parameter of {longest} elements: DeepSpeed and FSDP1 cut matrices into flat parts. Use FSDP2, DDP, "
            "ZeroRedundancyOptimizer or, after anon_dist.register(), DeepSpeed's stage 3, or basis=None"
        )
    if longest:
        warnings.warn(words, stacklevel=5)


def _renews(regimes: list[Regime], found: list[list[Bucket]]) -> bool:
    """Whether a basis is renewed after this step."""
    return any(
        regime.schedule.at(step).refresh
        for regime, buckets in zip(regimes, found, strict=True)
        if regime.group["basis"]
        for bucket in buckets
        for step in set(bucket.steps)
    )


def _has_no_gradient(groups: Groups) -> bool:
    """Whether there are parameters with elements, and none of them has a gradient."""
    if any(p.grad is not None and p.numel() for group in groups for p in group["params"]):
        return False
    return any(p.numel() for group in groups for p in group["params"])


def _by_part(bucket: Bucket, part_of: Mapping[Tensor, int]) -> dict[int, Sequence[int]]:
    """Indices of the bucket's parameters by the part of the step that they are in; -1 for those in none."""
    if not part_of:
        return {-1: range(len(bucket.params))}
    found: dict[int, list[int]] = {}
    for i, p in enumerate(bucket.params):
        found.setdefault(part_of.get(p, -1), []).append(i)
    return dict(found)


def _refuse_capture() -> None:
    """A CUDA graph would replay one step's variant and numbers for ever."""
    if not torch.compiler.is_compiling() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Anon: step() cannot be captured in a CUDA graph, since the host chooses what each step does (refresh, window, counts). "
            "Capture forward and backward, and call step() outside"
        )
