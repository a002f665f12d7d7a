"""From one optimizer to another: AdamW → Anon, Anon → AdamW, and the paper's own port → Anon; element by element, as it is read.

AdamW → Anon, a warm start. With v̂ = exp_avg_sq / (1 − β2^t), AdamW's debiased second moment:

- d = (v̂ + ε)^γ, so that at γ = 1 the next step is AdamW's, but for what its gradient adds to v̂;
- the step count stays, and with it m's debiasing and the position in the refresh schedule;
- s, which Anon has accumulated since the refresh before t, is what it would be had every squared gradient since been v̂: v̂ (1 − β2^age);
- for γ ≠ 1 the learning rate is multiplied, group by group, by the f that `step_size` finds, and clip and decay are divided by it, so
  that steps keep their size, an element moves by at most η c, and η λ keeps its value.

Anon → AdamW. σ = d^(1/γ) − ε is the second moment at the last refresh, older ones mixed in by β3; the present one is s + β2^age σ. γ = 0
says nothing about it and is refused. What AdamW has no place for is named in the notes.

Arithmetic is float64, results float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.options import AdamWOptions, AnonOptions
from anon_dist.checkpoint.recognise import ADAM, ADAMW, ANON, PORT
from anon_dist.checkpoint.schedules import GROUP_RATES, configured, rescaled
from anon_dist.checkpoint.schema import Checkpoint, Key, Manifest, ParamGroup, TensorInfo
from anon_dist.checkpoint.step_size import step_factor
from anon_dist.optim import Anon
from anon_dist.optim.regime import HISTORY, Regime
from anon_dist.optim.update import D_MAX, D_MIN

BLOCK = 1 << 20
"""Elements read at once where all of a tensor has to be looked at."""

Read = Callable[[int, int], Tensor]


class Converted(Checkpoint):
    """A checkpoint some of whose tensors are computed, when read, from those of another."""

    def __init__(self, source: Checkpoint, manifest: Manifest, computed: Mapping[Key, Read], dropped: set[Key]) -> None:
        self._source, self._computed, self.manifest = source, computed, manifest
        kept = {key: info for key, info in source.tensors.items() if key not in dropped}
        shapes = {key.parameter: info.shape for key, info in source.tensors.items() if key.state == "exp_avg"}
        self.tensors = kept | {key: TensorInfo(shapes[key.parameter], torch.float32) for key in computed}

    def read(self, key: Key, start: int, stop: int) -> Tensor:
        """See `Checkpoint`."""
        if key in self._computed:
            return self._computed[key](start, stop).to(torch.float32)
        return self._source.read(key, start, stop)

    def close(self) -> None:
        """See `Checkpoint`."""
        self._source.close()


def to_anon(checkpoint: Checkpoint, options: AnonOptions | None = None) -> Checkpoint:
    """AdamW's (or Adam's) checkpoint, or the paper's port's, as one of Anon. See the module.

    Raises:
        CheckpointError: it is another optimizer's, or a hyperparameter is out of range.
    """
    options = options or AnonOptions()
    found = checkpoint.manifest.optimizer
    if found == ANON:
        return checkpoint
    if found == PORT:
        return _from_port(checkpoint, options)
    if found not in (ADAM, ADAMW):
        raise CheckpointError(
            f"the optimizer state is {found or 'absent'}, not AdamW's (exp_avg, exp_avg_sq): only AdamW, Adam and the paper's port can "
            "become Anon"
        )
    computed: dict[Key, Read] = {}
    dropped: set[Key] = set()
    notes, groups, factors = [], [], list[float]()
    for index, group in enumerate(checkpoint.manifest.groups):
        old = group.hyperparameters
        if old.get("weight_decay") and not old.get("decoupled_weight_decay", found == ADAMW):
            raise CheckpointError(
                f"param group {index} has weight_decay {old['weight_decay']} in Adam's coupled form, which Anon does not have: "
                "its gradients are another's. Train on with decoupled decay (AdamW) first, or set it to 0"
            )
        eps = options.eps if options.eps is not None else float(old["eps"]) ** 2
        new = _anon_group(old, options, eps=eps, gamma=options.gamma)
        for name in _with_state(checkpoint, group):
            beta2, step = float(old["betas"][1]), _step(checkpoint, name)
            moment = _debiased(checkpoint, name, "exp_avg_sq", beta2, step)
            largest = Key(name, "max_exp_avg_sq")
            if largest in checkpoint.tensors:  # AMSGrad steps with the largest
                dropped.add(largest)
            stepped_with = _debiased(checkpoint, name, largest.state, beta2, step) if largest in dropped else moment
            weight, _ = _accumulated(new, step)
            computed[Key(name, "precond")] = _preconditioner(stepped_with, eps, options.gamma)
            computed[Key(name, "exp_avg_sq")] = _scaled(moment, weight)
        factor = 1.0
        if options.gamma != 1.0 and not options.keep_lr:
            sides = _updates(checkpoint, group, computed, float(old["eps"]))
            factor = step_factor(sides, options.update_clip)
        factors.append(factor)
        _rescale(new, factor)
        groups.append(ParamGroup(list(group.members), new))
        notes.append(_position(checkpoint, group, new, index) + _said_factor(factor))
    if dropped:
        notes.append(
            "AMSGrad's max_exp_avg_sq became the preconditioner and is not kept: Anon's is refreshed from recent gradients"
        )
    return _finish(checkpoint, ANON, groups, computed, dropped, notes, factors)


def to_adamw(checkpoint: Checkpoint, options: AdamWOptions | None = None) -> Checkpoint:
    """Anon's checkpoint as one of torch's AdamW. See the module.

    Raises:
        CheckpointError: it is another optimizer's, or some γ is 0.
    """
    options = options or AdamWOptions()
    found = checkpoint.manifest.optimizer
    if found == ADAMW:
        return checkpoint
    if found == PORT:
        return to_adamw(to_anon(checkpoint), options)
    if found != ANON:
        raise CheckpointError(
            f"the optimizer state is {found or 'absent'}, not Anon's (exp_avg, exp_avg_sq, precond): only Anon can become AdamW"
        )
    computed: dict[Key, Read] = {}
    dropped = {key for key in checkpoint.tensors if key.state == "precond"}
    notes, groups, factors = [], [], list[float]()
    for index, group in enumerate(checkpoint.manifest.groups):
        old = group.hyperparameters
        gamma = Regime(old).gamma_in_force
        if gamma == 0.0:
            raise CheckpointError(
                f"param group {index} has gamma = 0: its preconditioner is 1 and says nothing about the gradient's scale, which AdamW "
                "needs. Keep the weights and start a new optimizer"
            )
        adamw = torch.optim.AdamW([torch.zeros(1)], lr=1.0, betas=tuple(old["betas"]), eps=options.eps)
        defaults = {k: v for k, v in adamw.param_groups[0].items() if k != "params"}
        carried = {k: v for k, v in old.items() if k in ("lr", "weight_decay", "maximize")}
        new = {**defaults, **carried, **_foreign(old, Anon)}
        for name in _with_state(checkpoint, group):
            step = _step(checkpoint, name)
            _, remaining = _accumulated(old, step)
            present = _present_moment(checkpoint, name, gamma, float(old["eps"]), remaining)
            computed[Key(name, "exp_avg_sq")] = _scaled(present, 1.0 - float(old["betas"][1]) ** step)
        factor = 1.0
        if gamma != 1.0 and not options.keep_lr:
            sides = _updates(checkpoint, group, _own_preconditioner(checkpoint, group), options.eps, computed)
            factor = step_factor([(theirs, ours) for ours, theirs in sides], old.get("update_clip"))
        factors.append(factor)
        _rescale(new, factor)
        groups.append(ParamGroup(list(group.members), new))
        lost = ("gamma", "refresh_ratio", "beta3", "update_clip", "window", "hold_silent")
        notes.append(
            f"group {index}: lost: " + ", ".join(f"{k} = {old[k]}" for k in lost if k in old) + _said_factor(factor)
        )
    notes.append("older second moments that β3 keeps in the preconditioner are taken for the latest")
    return _finish(checkpoint, ADAMW, groups, computed, dropped, notes, factors)


def _from_port(checkpoint: Checkpoint, options: AnonOptions) -> Checkpoint:
    """The paper's single-file port keeps v as `fixed_lr`, k as the integer `t`, and is otherwise the same."""
    computed: dict[Key, Read] = {}
    dropped = {key for key in checkpoint.tensors if key.state == "fixed_lr"}
    scalars = {name: dict(values) for name, values in checkpoint.manifest.scalars.items()}
    groups = []
    paper = replace(options, refresh_ratio=2.0, beta3=0.5, update_clip=None, window=None, hold_silent=False)
    for index, group in enumerate(checkpoint.manifest.groups):
        old = group.hyperparameters
        if old.get("weight_decay") and not options.decoupled:
            raise CheckpointError(
                f"param group {index} has weight_decay {old['weight_decay']}, and the port's checkpoint does not say whether it is "
                "decoupled. If it was built with weight_decouple=True, say so (--anon.decoupled); coupled decay Anon does not have"
            )
        for name in _with_state(checkpoint, group):
            step, refreshes = _step(checkpoint, name), int(scalars[name].pop("t"))
            if refreshes != step.bit_length():
                raise CheckpointError(f"{name}: t = {refreshes} refreshes do not fit step {step}; the state is damaged")
            computed[Key(name, "precond")] = _reader(checkpoint, Key(name, "fixed_lr"))
        new = _anon_group(old, paper, eps=float(old["eps"]), gamma=float(old["gamma"]))
        groups.append(ParamGroup(list(group.members), {k: v for k, v in new.items() if k != "buffer"}))
    notes = ["the port's schedule and hyperparameters are kept: refreshes at powers of 2, beta3 = 0.5"]
    converted = _finish(checkpoint, ANON, groups, computed, dropped, notes, [1.0] * len(groups))
    converted.manifest.scalars = {
        name: {**values, "step": _as_step(values["step"])} for name, values in scalars.items()
    }
    return converted


# -- groups -----------------------------------------------------------------------------------------------------------


def _anon_group(old: Mapping[str, Any], options: AnonOptions, eps: float, gamma: float) -> dict[str, Any]:
    """All hyperparameters of an Anon group, `history` included; lr, betas, decay and names are the old group's."""
    try:
        anon = Anon(
            [torch.zeros(1)],
            lr=float(old["lr"]),
            betas=tuple(float(beta) for beta in old["betas"]),  # type: ignore[arg-type]
            eps=eps,
            gamma=gamma,
            weight_decay=float(old.get("weight_decay", 0.0)),
            refresh_ratio=options.refresh_ratio,
            beta3=options.beta3,
            update_clip=options.update_clip,
            window=options.window,
            hold_silent=options.hold_silent,
            maximize=bool(old.get("maximize", False)),
        )
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    new = {k: v for k, v in anon.param_groups[0].items() if k != "params"}
    return new | _foreign(old, torch.optim.AdamW)


def _foreign(group: Mapping[str, Any], optimizer: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """What schedulers and scripts keep in a group: all that its optimizer does not know."""
    own = {*optimizer([torch.zeros(1)], lr=1.0).param_groups[0], *_OTHER_ADAMS}  # type: ignore[call-arg]
    return {k: v for k, v in group.items() if k not in own}


_OTHER_ADAMS = ("bias_correction", "correct_bias", "step", "buffer", "gamma")
"""Hyperparameters of Adams that are not torch's, and of the port."""


def _rescale(group: dict[str, Any], factor: float) -> None:
    """lr · factor, and update_clip and weight_decay / factor, whose products with it stay."""
    if factor == 1.0:
        return
    for key in GROUP_RATES:
        if group.get(key) is not None:
            group[key] = float(group[key]) * factor
    for key in ("weight_decay", "update_clip"):
        if group.get(key) is not None:
            group[key] = float(group[key]) / factor


def _said_factor(factor: float) -> str:
    return (
        ""
        if factor == 1.0
        else f"; lr × {factor:.4g}, update_clip and weight_decay / {factor:.4g}, so that updates keep their root mean square"
    )


def _position(checkpoint: Checkpoint, group: ParamGroup, new: dict[str, Any], index: int) -> str:
    """Where in the schedule the group's parameters come to be."""
    steps = sorted({_step(checkpoint, name) for name in _with_state(checkpoint, group)})
    if not steps:
        return f"group {index}: no state"
    schedule = Regime(new).schedule
    last = max(schedule.refreshes(steps[-1]), default=0)
    following = next(t for t in count(steps[-1] + 1) if schedule.at(t).refresh)
    return f"group {index}: step {steps[-1]} kept; as if refreshed at step {last}, and next at {following}"


def _accumulated(group: Mapping[str, Any], step: int) -> tuple[float, float]:
    """Summed weight of what s holds at a step, 1 − β2^age, and the rest, β2^age; age counts the accumulating steps since the refresh."""
    age, beta2 = _age(group[HISTORY], step), float(group["betas"][1])
    if age == 0:
        return 0.0, 1.0
    return (-math.expm1(age * math.log(beta2)), beta2**age) if beta2 else (1.0, 0.0)


@lru_cache(maxsize=256)
def _age(history: str, step: int) -> int:
    """Accumulating steps up to `step` since the refresh before or at it."""
    schedule = Regime({HISTORY: history}).schedule
    for age in range(step):
        due = schedule.at(step - age)
        if due.refresh or not due.accumulate:
            return age
    return step


# -- elements ---------------------------------------------------------------------------------------------------------


def _reader(checkpoint: Checkpoint, key: Key) -> Read:
    return lambda start, stop: checkpoint.read(key, start, stop).double()


def _scaled(read: Read, factor: float) -> Read:
    return lambda start, stop: read(start, stop) * factor


def _debiased(checkpoint: Checkpoint, name: str, state: str, beta2: float, step: int) -> Read:
    """v̂"""
    return _scaled(_reader(checkpoint, Key(name, state)), 1.0 / (1.0 - beta2**step) if step else 0.0)


def _preconditioner(moment: Read, eps: float, gamma: float) -> Read:
    """v = d^(−1/2), d = (v̂ + ε)^γ."""

    def read(start: int, stop: int) -> Tensor:
        d = moment(start, stop).add_(eps).log_().mul_(gamma).exp_().clamp_(D_MIN, D_MAX)
        return d.rsqrt_()

    return read


def _present_moment(checkpoint: Checkpoint, name: str, gamma: float, eps: float, remaining: float) -> Read:
    """s + β2^age σ, with σ = d^(1/γ) − ε ≥ 0."""
    v, s = _reader(checkpoint, Key(name, "precond")), _reader(checkpoint, Key(name, "exp_avg_sq"))

    def read(start: int, stop: int) -> Tensor:
        sigma = v(start, stop).log_().mul_(-2.0 / gamma).exp_().sub_(eps).clamp_(min=0.0)
        return sigma.mul_(remaining).add_(s(start, stop))

    return read


def _own_preconditioner(checkpoint: Checkpoint, group: ParamGroup) -> dict[Key, Read]:
    return {Key(n, "precond"): _reader(checkpoint, Key(n, "precond")) for n in _with_state(checkpoint, group)}


def _updates(
    checkpoint: Checkpoint,
    group: ParamGroup,
    anon: Mapping[Key, Read],
    eps: float,
    adamw: Mapping[Key, Read] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Elements of Anon's updates v m̂ and of AdamW's, m̂ / (√v̂ + ε), over the group, block by block.

    Args:
        eps: AdamW's.
        adamw: its second moments, by key; None: the checkpoint's.
    """
    beta1, beta2 = map(float, group.hyperparameters["betas"])
    for name in _with_state(checkpoint, group):
        step = _step(checkpoint, name)
        if step == 0:
            continue
        m = _scaled(_reader(checkpoint, Key(name, "exp_avg")), 1.0 / (1.0 - beta1**step))
        second = _reader(checkpoint, Key(name, "exp_avg_sq")) if adamw is None else adamw[Key(name, "exp_avg_sq")]
        for start, stop in _blocks(checkpoint.tensors[Key(name, "exp_avg")].numel):
            update = m(start, stop)
            denominator = second(start, stop).div_(1.0 - beta2**step).sqrt_().add_(eps)
            yield update * anon[Key(name, "precond")](start, stop), update / denominator


def _blocks(numel: int) -> Iterator[tuple[int, int]]:
    for start in range(0, numel, BLOCK):
        yield start, min(numel, start + BLOCK)


# -- manifest ---------------------------------------------------------------------------------------------------------


def _with_state(checkpoint: Checkpoint, group: ParamGroup) -> list[str]:
    return [name for name in group.members if Key(name, "exp_avg") in checkpoint.tensors]


def _step(checkpoint: Checkpoint, name: str) -> int:
    values = checkpoint.manifest.scalars.get(name, {})
    if "step" not in values:
        raise CheckpointError(f"{name} has optimizer state and no step count")
    return int(values["step"])


def _as_step(value: Any) -> Tensor:
    """Torch's convention, which Anon and AdamW share: 0-dim, float32, on the CPU."""
    return torch.tensor(float(value), dtype=torch.float32)


def _finish(
    checkpoint: Checkpoint,
    optimizer: str,
    groups: list[ParamGroup],
    computed: dict[Key, Read],
    dropped: set[Key],
    notes: list[str],
    factors: list[float],
) -> Converted:
    """The converted checkpoint; schedules' own records of the rates follow the groups."""
    old = checkpoint.manifest
    scalars = {
        name: {**values, "step": _as_step(values["step"])} if "step" in values else dict(values)
        for name, values in old.scalars.items()
    }
    extras = dict(old.extras)
    if any(factor != 1.0 for factor in factors):
        extras = rescaled(extras, factors)
        notes += [
            f"the schedule {name} takes its rates from the run's configuration: multiply them there, as lr above"
            for name in configured(extras)
        ]
    manifest = replace(
        old, optimizer=optimizer, groups=groups, scalars=scalars, extras=extras, notes=[*old.notes, *notes]
    )
    return Converted(checkpoint, manifest, computed, dropped)


def to_optimizer(checkpoint: Checkpoint, options: AnonOptions | AdamWOptions) -> Checkpoint:
    """The checkpoint as one of the optimizer whose options are given; itself if it is that already.

    Raises:
        CheckpointError: see `to_anon` and `to_adamw`.
    """
    return to_anon(checkpoint, options) if isinstance(options, AnonOptions) else to_adamw(checkpoint, options)
