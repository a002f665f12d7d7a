"""From one optimizer to another: AdamW → Anon, Anon → AdamW, and the paper's own port → Anon; element by element, as it is read.

AdamW → Anon, a warm start. With v̂ = exp_avg_sq / (1 − β2^t), AdamW's debiased second moment:

- d = (v̂ + ε)^γ, so that at γ = 1 the next step is AdamW's, but for what its gradient adds to v̂;
- the step count stays, and with it m's debiasing and the position in the refresh schedule;
- s, which Anon has accumulated since the refresh before t, is what it would be had every squared gradient since been v̂: v̂ (1 − β2^age);
- for γ ≠ 1 the learning rate is multiplied, group by group, by the f that `step_size` finds, and clip and decay are divided by it, so
  that steps keep their size, an element moves by at most η c, and η λ keeps its value;
- a basis, if asked for, begins at the identity, in which nothing is turned, and its covariance at 0.

Anon → AdamW. σ = d^(1/γ) − ε is the second moment at the last refresh, older ones mixed in by β3; the present one is s + β2^age σ. γ = 0
says nothing about it and is refused. A basis is left first, see `frames`. What AdamW has no place for is named in the notes.

Anon → Anon without a basis (`drop_basis`), for engines that cannot have one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from decimal import Decimal
from itertools import count
from typing import Any

import torch
from torch import Tensor

from anon_dist.checkpoint.computed import (
    Converted,
    Read,
    accumulated,
    blocks,
    debiased,
    preconditioner,
    present_moment,
    reader,
    scaled,
)
from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.layouts.quantised import NOTE
from anon_dist.checkpoint.optimizers.frames import identities, turned, without_basis
from anon_dist.checkpoint.optimizers.schedules import GROUP_RATES, configured, rescaled
from anon_dist.checkpoint.optimizers.step_size import step_factor
from anon_dist.checkpoint.options import AdamWOptions, AnonOptions
from anon_dist.checkpoint.recognise import ADAM, ADAMW, ANON, PORT
from anon_dist.checkpoint.schema import Checkpoint, Key, ParamGroup
from anon_dist.optim import Anon
from anon_dist.optim.regime import Regime


def to_anon(checkpoint: Checkpoint, options: AnonOptions | None = None) -> Checkpoint:
    """AdamW's (or Adam's) checkpoint, or the paper's port's, as one of Anon. See the module.

    Raises:
        CheckpointError: it is another optimizer's, or a hyperparameter is out of range.
    """
    options = options or AnonOptions()
    found = checkpoint.manifest.optimizer
    if found == ANON:
        return _of_anon(checkpoint, options)
    if options.drop_basis:
        raise CheckpointError(
            f"the optimizer state is {found or 'absent'}, which has no basis to drop (--anon.drop-basis)"
        )
    if found == PORT:
        return _from_port(checkpoint, options)
    if found not in (ADAM, ADAMW):
        raise CheckpointError(
            f"the optimizer state is {found or 'absent'}, not AdamW's (exp_avg, exp_avg_sq): only AdamW, Adam and the paper's port can "
            "become Anon"
        )
    computed, shapes = dict[Key, Read](), dict[Key, tuple[int, ...]]()
    dropped: set[Key] = set()
    notes, groups, factors = [], [], list[float]()
    for index, group in enumerate(checkpoint.manifest.groups):
        old = group.hyperparameters
        _check_decoupled(checkpoint, old, index, options)
        eps = options.eps if options.eps is not None else float(Decimal(str(old["eps"])) ** 2)  # 1e-16, of 1e-8
        new = _anon_group(old, replace(options, basis=old.get("basis", options.basis)), eps=eps, gamma=options.gamma)
        for name in _with_state(checkpoint, group):
            beta2, step = float(old["betas"][1]), _step(checkpoint, name)
            moment = debiased(checkpoint, name, "exp_avg_sq", beta2, step)
            largest = Key(name, "max_exp_avg_sq")
            if largest in checkpoint.tensors:  # AMSGrad steps with the largest
                dropped.add(largest)
            stepped_with = debiased(checkpoint, name, largest.state, beta2, step) if largest in dropped else moment
            weight, _ = accumulated(new, step)
            computed[Key(name, "precond")] = preconditioner(stepped_with, eps, options.gamma)
            computed[Key(name, "exp_avg_sq")] = scaled(moment, weight)
            shape = checkpoint.tensors[Key(name, "exp_avg")].shape
            bases, their_shapes = identities(name, shape, new["basis"], options.basis_block)
            computed.update(bases)
            shapes.update(their_shapes)
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
    return _finish(checkpoint, ANON, groups, computed, dropped, notes, factors, shapes)


def _check_decoupled(checkpoint: Checkpoint, old: Mapping[str, Any], index: int, options: AnonOptions) -> None:
    """Raises `CheckpointError` where weights decay as Adam's gradients do, or it is not known that they do not."""
    if not old.get("weight_decay"):
        return
    if not old.get("decoupled_weight_decay", checkpoint.manifest.optimizer == ADAMW):
        raise CheckpointError(
            f"param group {index} has weight_decay {old['weight_decay']} in Adam's coupled form, which Anon does not have: "
            "its gradients are another's. Train on with decoupled decay (AdamW) first, or set it to 0"
        )
    if NOTE in checkpoint.manifest.notes and not options.decoupled:
        raise CheckpointError(
            f"param group {index} has weight_decay {old['weight_decay']}, and torchao's checkpoint does not say whether it is "
            "decoupled: if the optimizer was AdamW8bit, AdamW4bit or AdamWFp8, say so (--anon.decoupled); coupled decay Anon does "
            "not have"
        )


def _of_anon(checkpoint: Checkpoint, options: AnonOptions) -> Checkpoint:
    """Anon's own, as it is or without its basis."""
    if replace(options, drop_basis=False) != AnonOptions():
        raise CheckpointError(
            "the optimizer state is Anon's already, and of --anon.… only --anon.drop-basis changes one: other values come from the run "
            "that goes on with it, and optimizer.rebase"
        )
    if options.drop_basis and not turned(checkpoint):
        checkpoint.manifest.notes.append("there is no basis to drop")
    return without_basis(checkpoint) if options.drop_basis else checkpoint


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
    own, checkpoint = checkpoint, without_basis(checkpoint)
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
            _, remaining = accumulated(old, step)
            present = present_moment(checkpoint, name, gamma, float(old["eps"]), remaining)
            computed[Key(name, "exp_avg_sq")] = scaled(present, 1.0 - float(old["betas"][1]) ** step)
        factor = 1.0
        if gamma != 1.0 and not options.keep_lr:
            preconditioners = {
                key: reader(own, key) for n in group.members if (key := Key(n, "precond")) in own.tensors
            }
            sides = _updates(checkpoint, group, preconditioners, options.eps, computed, own)
            factor = step_factor([(theirs, ours) for ours, theirs in sides], old.get("update_clip"))
        factors.append(factor)
        _rescale(new, factor)
        groups.append(ParamGroup(list(group.members), new))
        lost = [k for k in _LOST if k in old] + [
            k for k in _LOST_IF_SET if own.manifest.groups[index].hyperparameters.get(k)
        ]
        values = ", ".join(f"{k} = {own.manifest.groups[index].hyperparameters[k]}" for k in lost)
        notes.append(f"group {index}: lost: {values}{_said_factor(factor)}")
    notes.append("older second moments that β3 keeps in the preconditioner are taken for the latest")
    return _finish(checkpoint, ADAMW, groups, computed, dropped, notes, factors)


_LOST = ("gamma", "refresh_ratio", "beta3", "update_clip", "window", "hold_silent")
_LOST_IF_SET = ("max_interval", "basis", "nesterov", "cautious_decay")
"""Hyperparameters that AdamW has not; the younger ones are named only where they say something."""


def _from_port(checkpoint: Checkpoint, options: AnonOptions) -> Checkpoint:
    """The paper's single-file port keeps v as `fixed_lr`, k as the integer `t`, and is otherwise the same."""
    computed: dict[Key, Read] = {}
    dropped = {key for key in checkpoint.tensors if key.state == "fixed_lr"}
    scalars = {name: dict(values) for name, values in checkpoint.manifest.scalars.items()}
    groups = []
    paper = AnonOptions(refresh_ratio=2.0, beta3=0.5, update_clip=None, window=None)
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
            computed[Key(name, "precond")] = reader(checkpoint, Key(name, "fixed_lr"))
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
            **{key: value for key in _YOUNGER if (value := getattr(options, key)) != getattr(AnonOptions, key)},
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(str(error)) from None
    new = {k: v for k, v in anon.param_groups[0].items() if k != "params"}
    return new | _foreign(old, torch.optim.AdamW)


_YOUNGER = ("max_interval", "basis", "basis_block", "nesterov", "cautious_decay")
"""Hyperparameters whose defaults are Anon's own."""


def _foreign(group: Mapping[str, Any], optimizer: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """What schedulers and scripts keep in a group: all that its optimizer does not know."""
    own = {*optimizer([torch.zeros(1)], lr=1.0).param_groups[0], *_OTHER_ADAMS}  # type: ignore[call-arg]
    return {k: v for k, v in group.items() if k not in own}


_OTHER_ADAMS = ("bias_correction", "correct_bias", "step", "buffer", "gamma", *_YOUNGER)
"""Hyperparameters of Adams that are not torch's, of the port, and of Anon."""


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


# -- sizes of steps ---------------------------------------------------------------------------------------------------


def _updates(
    checkpoint: Checkpoint,
    group: ParamGroup,
    anon: Mapping[Key, Read],
    eps: float,
    adamw: Mapping[Key, Read] | None = None,
    frame: Checkpoint | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Elements of Anon's updates v m̂ and of AdamW's, m̂ / (√v̂ + ε), over the group, block by block.

    Args:
        anon: its preconditioners, by key.
        eps: AdamW's.
        adamw: its second moments, by key; None: the checkpoint's.
        frame: with Anon's first moments, if they are turned; a turn keeps the size of an update.
    """
    beta1, beta2 = map(float, group.hyperparameters["betas"])
    for name in _with_state(checkpoint, group):
        step = _step(checkpoint, name)
        if step == 0:
            continue
        unbias = 1.0 / (1.0 - beta1**step)
        m, own = (scaled(reader(c, Key(name, "exp_avg")), unbias) for c in (checkpoint, frame or checkpoint))
        second = reader(checkpoint, Key(name, "exp_avg_sq")) if adamw is None else adamw[Key(name, "exp_avg_sq")]
        for start, stop in blocks(checkpoint.tensors[Key(name, "exp_avg")].numel):
            update = m(start, stop)
            turned_update = update if own is m or frame is checkpoint else own(start, stop)
            denominator = second(start, stop).div_(1.0 - beta2**step).sqrt_().add_(eps)
            yield turned_update * anon[Key(name, "precond")](start, stop), update / denominator


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
    shapes: Mapping[Key, tuple[int, ...]] | None = None,
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
    return Converted(checkpoint, manifest, computed, dropped, shapes)


def to_optimizer(checkpoint: Checkpoint, options: AnonOptions | AdamWOptions) -> Checkpoint:
    """The checkpoint as one of the optimizer whose options are given; itself if it is that already.

    Raises:
        CheckpointError: see `to_anon` and `to_adamw`.
    """
    return to_anon(checkpoint, options) if isinstance(options, AnonOptions) else to_adamw(checkpoint, options)
