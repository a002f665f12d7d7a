"""A step made ready: which tensors it updates, by which plans, and with which backend."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from anon_dist.optim import flat, frame
from anon_dist.optim.backends import choice
from anon_dist.optim.flat_step import FlatWork
from anon_dist.optim.gather import Bucket, Gathered, gather
from anon_dist.optim.hidden import Hidden
from anon_dist.optim.host_copy import HostCopy
from anon_dist.optim.hyper import SilenceWarning, normalise, validate, validate_lr
from anon_dist.optim.members import Groups, States, allocate, check_dtypes, convert_preconds, has_absent, steps_taken
from anon_dist.optim.plan import StepPlan
from anon_dist.optim.regime import HISTORY, Regime
from anon_dist.optim.scaling import GradScaling
from anon_dist.optim.turned import Renewal, TurnedWork

LONGEST_VECTOR = {True: 1 << 16, False: 1 << 13}
"""By whether it is a `nn.Parameter`, as a model's biases are and DeepSpeed's flat tensors are not: one of one dimension with more elements
than this, and no matrices beside it, is taken for matrices that an engine has flattened."""


@dataclass
class Work:
    """The update of a bucket, element by element; `run` is to be called once."""

    bucket: Bucket
    plans: list[StepPlan]
    backend: choice.Backend

    def run(self) -> None:
        """Update the tensors in place, and count the step."""
        self.backend(self.bucket.lists, self.plans, self.bucket.exponents, self.bucket.addresses)
        self.bucket.count()


AnyWork = Work | TurnedWork | FlatWork


@dataclass
class NewGamma:
    """A change of γ in a param group's step: the γ in force in the step, and the preconditioners that were made with another one."""

    gamma: float
    """In force in this step."""
    made_with: dict[Tensor, float]
    """γ° of the parameters that missed an earlier change of γ: it is not the γ that was in force before this step (see `hidden`)."""
    beside: list[tuple[Mapping[str, Tensor], float]]
    """States whose preconditioners this step does not refresh, and the power that converts each of them."""


@dataclass
class Due:
    """A param group's part in a step."""

    group: dict[str, Any]
    regime: Regime
    buckets: list[Bucket]
    new_gamma: NewGamma | None = None

    @property
    def renews(self) -> bool:
        """Whether a basis is renewed after the step."""
        at, buckets = self.regime.schedule.at, self.buckets if self.group["basis"] else []
        return any(at(step).refresh for bucket in buckets for step in set(bucket.steps))


class Stepper:
    """Makes an optimizer's steps ready.

    Between two steps it remembers the groups' tensors, what the ranks agreed on, and what the last step has left to be done (`settle`).
    """

    def __init__(self) -> None:
        self.hidden = Hidden()
        self.silence = SilenceWarning()
        self.known: Sequence[Gathered] = ()
        """By group: its tensors at the last gathering."""
        self.kernel_agreed: bool | None = None
        """Whether all ranks can use the fused kernel; None before the first step."""
        self._unsettled: tuple[HostCopy, list[Bucket]] | None = None
        """The last step's `found_inf`, and the buckets that it counted, where the host did not know whether the step was taken."""
        self._renewals: list[Renewal] = []
        """Of the matrices that the last step has refreshed."""
        self._checked: dict[int, tuple[list[Any], Regime]] = {}
        """By group: its hyperparameters, without lr, at the last check that they passed; and the regime made of them."""

    def settle(self) -> None:
        """Finish the last step: renew the bases of the matrices that it has refreshed; and lower the step counts again if the device has
        found that nothing was to be stepped."""
        while self._renewals:
            self._renewals.pop(0).finish()
        if self._unsettled is not None:
            (flag, buckets), self._unsettled = self._unsettled, None
            if flag.value():
                for bucket in buckets:
                    bucket.count(-1.0)

    def ready(
        self, groups: Groups, state: States, scaling: GradScaling, parts: Sequence[Iterable[Tensor]]
    ) -> list[Callable[[], None]]:
        """Check a step and make its updates ready, to be run without autograd: a function for each part, and one for parameters in no part.

        Raises:
            RuntimeError, ValueError: see `Anon.step`.
        """
        work: list[list[AnyWork]] = [[] for _ in range(len(parts) + 1)]
        due = self._due(groups, state, scaling)
        late = scaling.is_known_late
        if late and any(one.new_gamma or one.renews for one in due):  # both are rare, so the host may wait for the GPU
            due, late = ([], False) if bool(scaling.found_inf) else (due, False)
        part_of = {p: i for i, part in enumerate(parts) for p in part}
        for one in due:
            for part, found in self._work(one, state, scaling, part_of, later=bool(parts)):
                work[part].append(found)
        for one in due:
            if one.new_gamma:
                self._go_over(one, one.new_gamma, groups, state)
        if due and late and scaling.found_inf is not None:
            self._unsettled = HostCopy(scaling.found_inf), [one.bucket for some in work for one in some]
        return [partial(_run, some) for some in work]

    def _due(self, groups: Groups, state: States, scaling: GradScaling) -> list[Due]:
        """What each group does in this step; an empty list if the host knows that nothing is to be stepped. No parameter moves yet."""
        _refuse_capture()
        self.settle()
        if self.kernel_agreed is None and (kinds := choice.kinds(groups)):
            self.kernel_agreed = choice.agree(kinds)  # first: a rank that refuses something below may keep none waiting
        regimes = [self._regime(index, group, groups, state) for index, group in enumerate(groups)]
        due = [Due(*one) for one in zip(groups, regimes, self._buckets(groups, state), strict=True)]
        if not any(one.buckets for one in due) and _has_no_gradient(groups):
            warnings.warn(
                "Anon: step() found no gradient in any parameter and did nothing. If the model was sharded after the optimizer was made "
                "(torch's fully_shard), the optimizer holds parameters that are not trained: make it afterwards",
                stacklevel=4,
            )
            return []
        if scaling.skips:
            return []
        for index, one in enumerate(due):
            one.new_gamma = self._new_gamma(index, one, groups, state)
        return due

    def _new_gamma(self, index: int, due: Due, groups: Groups, state: States) -> NewGamma | None:
        """The γ that comes into force in a group's step, and what is to be converted; None if no preconditioner changes its γ.

        Raises:
            RuntimeError: a preconditioner would have to be converted that this step does not refresh, and it cannot be.
        """
        group, regime, made_with = due.group, due.regime, self.hidden.made_with(due.group)
        if not regime.is_pending and not made_with:
            return None
        steps = {step for bucket in due.buckets for step in bucket.steps}
        gamma = regime.gamma_of_step(steps, self.hidden.taken(group, groups, state))
        if gamma == regime.gamma_in_force and not made_with:
            return None
        refreshed = {
            p
            for bucket in due.buckets
            for p, step in zip(bucket.params, bucket.steps, strict=True)
            if regime.schedule.at(step).refresh
        }
        left = [p for p in group["params"] if p not in refreshed and state.get(p) and int(state[p]["step"])]
        before = {p: made_with.get(p, regime.gamma_in_force) for p in left}
        powers = {p: regime.power(old, gamma) for p, old in before.items()}
        stuck = [before[p] for p, power in powers.items() if power is None]
        if gamma != regime.gamma_in_force and has_absent(groups, state):
            stuck += self.hidden.stuck(regime, gamma, state)
        if stuck:
            changes = gamma != regime.gamma_in_force
            back = f"set {stuck[0]!r} again" if changes else f"go back with optimizer.rebase(gamma={stuck[0]!r})"
            raise RuntimeError(
                f"Anon: gamma of param group {index} was changed from {stuck[0]!r} to {gamma!r}, and {len(stuck)} of its parameters have "
                "taken fewer steps than the others, for want of gradients: they cannot be converted, since "
                f"{regime.why_not(stuck[0])}. Put them in a param group of their own, or {back}"
            )
        return NewGamma(gamma, made_with, [(state[p], power) for p, power in powers.items() if power is not None])

    def _go_over(self, due: Due, new: NewGamma, groups: Groups, state: States) -> None:
        """Convert the preconditioners that the step does not refresh, and put the new γ on record."""
        for own, power in new.beside:
            convert_preconds([own], power)
        self.hidden.converted(due.group)
        if new.gamma != due.regime.gamma_in_force:
            if has_absent(groups, state):
                self.hidden.leave_behind(due.group, state, due.regime.gamma_in_force)
            due.group[HISTORY] = due.regime.with_gamma(new.gamma)

    def _work(
        self, due: Due, state: States, scaling: GradScaling, part_of: Mapping[Tensor, int], later: bool
    ) -> Iterator[tuple[int, AnyWork]]:
        """The updates of a group's buckets, each with the index of the part of the step that it is in; -1 for no part."""
        for bucket in due.buckets:
            backend = _backend(bucket, due.group, bool(self.kernel_agreed))
            plans = _plans(due.regime, bucket, due.new_gamma, scaling, later)
            for part, indices in _by_part(bucket, part_of).items():
                chosen = bucket if len(indices) == len(bucket.params) else bucket.of(indices)
                yield part, self._update(chosen, [plans[i] for i in indices], backend, due.group, state)

    def _update(
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
        """Begin the renewals that the step has left, so that their all-reduces run beside the next forward pass. `settle` finishes them."""
        for renewal in self._renewals:
            renewal.start()

    def let_go(self, groups: Groups) -> None:
        """Forget parameters that have left their groups."""
        same = len(self.known) == len(groups) and all(
            k.is_of(group) for k, group in zip(self.known, groups, strict=True)
        )
        self.known = self.known if same else ()

    def _regime(self, index: int, group: dict[str, Any], groups: Groups, state: States) -> Regime:
        """A group's regime, after a check of its hyperparameters.

        Values out of range are refused; and once steps were taken, other values of those that the state was made with. An edited γ is not
        refused: it is pending.
        """
        values, regime = self._checked.get(index, ([], None))
        if regime is not None and regime.group is group and _are_the_same(group, values):
            validate_lr(group["lr"])
            return regime
        normalise(group)
        validate(group)
        self.silence.check(group)
        if regime is None or regime.group is not group or not any(value is group["state_dtype"] for value in values):
            check_dtypes(index, group, state)
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
        """The buckets of each group; those of the step before are renewed where nothing but gradients and counts has changed."""
        if _has_no_gradient(groups):
            return [[] for _ in groups]
        known = self.known if len(self.known) == len(groups) else [None] * len(groups)
        found = [k.buckets(group, state) if k else None for k, group in zip(known, groups, strict=True)]
        renewed = [buckets for buckets in found if buckets is not None]
        if any(renewed) and len(renewed) == len(groups):
            return renewed
        _check_matrices(groups)
        allocate(groups, state)
        self.hidden.meet(groups, state)
        gathered = [gather(index, group, state) for index, group in enumerate(groups)]
        self.known = [remembered for _, remembered in gathered]
        return [buckets for buckets, _ in gathered]


def _run(work: Iterable[AnyWork]) -> None:
    for one in work:
        one.run()


def _are_the_same(group: Mapping[str, Any], values: list[Any]) -> bool:
    """Whether a group's hyperparameters, without lr, are these very objects. Then they need no check; `normalise` would change nothing."""
    present = [value for name, value in group.items() if name != "lr"]
    same = len(present) == len(values) and all(map(is_, present, values))
    return same and type(group["lr"]).__module__ != "numpy"


def _backend(bucket: Bucket, group: dict[str, Any], agreed: bool) -> choice.Backend:
    """The backend that `choice.choose` gives; it is asked once for as long as the tensors' kinds stay."""
    asked = (group["fused"], group["foreach"], agreed, torch.compiler.is_compiling())
    choices = {} if bucket.choices is None else bucket.choices
    if asked not in choices:
        choices[asked] = choice.choose(bucket.lists, group, agreed)
    chosen: choice.Backend = choices[asked]
    return chosen


def _plans(regime: Regime, bucket: Bucket, new: NewGamma | None, scaling: GradScaling, later: bool) -> list[StepPlan]:
    """The plan of each parameter; one object for all that have the same.

    Args:
        later: other code runs between now and the updates. It may write to a learning rate that is a tensor, so that is copied.
    """
    lr, device = regime.group["lr"], bucket.lists[0][0].device
    if isinstance(lr, Tensor):
        on_gpu = device.type != "cpu" and lr.device.type != "cpu"
        lr = (lr.detach().clone() if later else lr.detach()).to(device) if on_gpu else float(lr)
    scale, flag = scaling.on(device)
    plan = partial(regime.plan, gamma=new.gamma if new else None, lr=lr, grad_scale=scale, found_inf=flag)
    if not new or not new.made_with:
        made = {step: plan(step) for step in set(bucket.steps)}
        return [made[step] for step in bucket.steps]
    keys = [(step, new.made_with.get(p)) for step, p in zip(bucket.steps, bucket.params, strict=True)]
    plans = {key: plan(key[0], made_with=key[1]) for key in set(keys)}
    return [plans[key] for key in keys]


def _check_matrices(groups: Groups) -> None:
    """Refuse a basis where an engine has flattened the matrices. Warn where there are only vectors, which ZeroRedundancyOptimizer may leave
    to a rank, or only matrices that the basis leaves alone."""
    asked = next((group["basis"] for group in groups if group["basis"]), None)
    if asked is None:
        return
    present = [(p, group["basis"]) for group in groups for p in group["params"]]
    wanted = [p for p, basis in present if basis]
    shape = next((tuple(p.shape) for p, _ in present if p.dim() >= 2 and p.numel()), None)
    words = f"Anon: basis={asked!r} turns matrices, and this optimizer has"
    if what := _flattened([p for p in wanted if flat.layout_of(p) is None], beside_matrices=shape is not None):
        raise RuntimeError(
            f"{words} {what}: DeepSpeed and FSDP1 cut matrices into flat parts. Use FSDP2, DDP, ZeroRedundancyOptimizer or, after "
            "anon_dist.register(), DeepSpeed's stage 3, or basis=None"
        )
    if any(flat.kind(p, group) for group in groups for p in group["params"]):
        return
    if shape:
        warnings.warn(
            f"Anon: basis={asked!r} turns none of this optimizer's matrices, of which one has the shape {shape}: a side of one element has "
            f"no basis, nor have rows if there are more than {frame.MOST_ROWS} to a column, nor groups with basis=None",
            stacklevel=5,
        )
    elif any(p.numel() for p in wanted):
        warnings.warn(f"{words} none", stacklevel=5)


def _flattened(params: Sequence[Tensor], beside_matrices: bool) -> str:
    """Which of the parameters an engine has put matrices in, in words; "": none."""
    # torch's FSDP1 marks what it flattens with this attribute; unsharded (NO_SHARD) parameters keep their shapes.
    of_fsdp1 = [p for p in params if getattr(p, "_fsdp_flattened", False)]
    if of_fsdp1 and all(p.dim() < 2 for p in of_fsdp1):
        return "parameters that FSDP1 has flattened"
    long = (p.numel() for p in params if p.dim() == 1 and p.numel() > LONGEST_VECTOR[isinstance(p, nn.Parameter)])
    longest = 0 if beside_matrices else max(long, default=0)
    return f"none, but a flat parameter of {longest} elements" if longest else ""


def _has_no_gradient(groups: Groups) -> bool:
    """Whether there are parameters with elements, and none of them has a gradient."""
    if any(p.grad is not None and p.numel() for group in groups for p in group["params"]):
        return False
    return any(p.numel() for group in groups for p in group["params"])


def _by_part(bucket: Bucket, part_of: Mapping[Tensor, int]) -> dict[int, Sequence[int]]:
    """Part of the step → indices of the bucket's parameters that are in it; -1 for those in no part."""
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
