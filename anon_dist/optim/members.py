"""The state of the parameters in param groups: what there is of it, its allocation, and its check when it is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from anon_dist.optim import basis, flat, update
from anon_dist.optim.frame import BASIS_KEYS, KEYS
from anon_dist.optim.hyper import state_dtypes
from anon_dist.optim.state import LazyState, checked_state, initial_state, local, named_parameters

Groups = Sequence[dict[str, Any]]
States = MutableMapping[Tensor, dict[str, Any]]


def steps_taken(group: Mapping[str, Any], state: States) -> int:
    """The largest step count of the group's parameters."""
    return max((int(state[p]["step"]) for p in group["params"] if state.get(p)), default=0)


def has_absent(groups: Groups, state: States) -> bool:
    """Whether there is state of parameters that are not in the groups at the moment."""
    return len(state) > sum(p in state for group in groups for p in group["params"])


def allocate(groups: Groups, state: States) -> None:
    """Make the state of every parameter that has none.

    State of absent parameters is dropped only where it has not been stepped and others have taken their place: DeepSpeed shows the
    optimizer one param group, or in stage 3 one sub-group, at a time; and it holds on to the state's tensors.
    """
    present, replaced = 0, False
    for group in groups:
        dtypes = state_dtypes(group)
        for p in group["params"]:
            own = state.get(p)
            if own and int(own["step"]) == 0 and not _fits(own, p, group):
                own = None  # the model was moved, or the basis set, since
            if not own and (p.requires_grad or p.grad is not None):
                state[p] = initial_state(p, dtypes, group)
                replaced = True
            present += p in state
    if replaced and len(state) != present:
        for p in absent(groups, state):
            if int(state[p].get("step", 0)) == 0:
                del state[p]


def checked(groups: Groups, states: Mapping[Any, dict[str, Any]]) -> LazyState:
    """Loaded states of the parameters in the groups; those of others are left out.

    Raises:
        ValueError: see `state.checked_state`.
    """
    found, names = LazyState(), dict(named_parameters(groups))
    group_of = {p: group for group in groups for p in group["params"]}
    for p, values in states.items():
        if p in names:
            found[p] = checked_state(names[p], p, values, state_dtypes(group_of[p]), group_of[p])
    _warn_of_damage(found, names, group_of)
    return found


def _warn_of_damage(states: States, names: Mapping[Tensor, str], group_of: Mapping[Tensor, dict[str, Any]]) -> None:
    """Warn, once, of loaded values that no step makes of finite gradients.

    They are taken all the same: the state of a run that has diverged may be copied and saved as any other.
    """
    kinds = {"precond": "not positive", "exp_avg_sq": "negative or no number"}
    flags: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for p, own in states.items():
        for key, values in ((key, local(own[key])) for key in kinds):
            if not values.is_meta:
                fine = values > 0.0 if key == "precond" else values >= 0.0
                if (weights := local(p)).shape == fine.shape and weights.device == fine.device:
                    fine |= ~weights.isfinite()  # what pads a flat tensor of DeepSpeed's may be anything
                if (held := flat.holds(p)) is not None and held.device == fine.device:
                    fine |= ~held
                fine = fine.all()
                flags.setdefault(values.device, []).append((f"some of {key} of {names[p]} is {kinds[key]}", fine))
        for what, fine in _basis_flags(p, own, group_of[p], names[p]):
            flags.setdefault(fine.device, []).append((what, fine))
    wrong = [
        what
        for of_device in flags.values()
        for (what, _), fine in zip(of_device, torch.stack([fine for _, fine in of_device]).tolist(), strict=True)
        if not fine
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more are not right" if len(wrong) > 1 else ""
        warnings.warn(
            f"Anon: in the loaded state {wrong[0]}{more}: the file is damaged, or the run had diverged. These elements do not "
            "recover. Load another checkpoint; or load the weights alone and start Anon's state afresh",
            stacklevel=5,
        )


def _basis_flags(
    p: Tensor, own: Mapping[str, Tensor], group: Mapping[str, Any], name: str
) -> Iterator[tuple[str, Tensor]]:
    """For each basis and covariance of this rank: what is wrong with it, and whether it is not."""
    if not any(key in own for key in BASIS_KEYS) or local(own["precond"]).is_meta:
        return
    every: Iterable[tuple[str, Mapping[str, Tensor]]] = [(name, own)]
    if flat.layout_of(p) is not None:
        every = ((f"{name} ({share.name})", state) for (share, _), state in flat.matrices(p, own, group))
    for whose, state in every:
        for q, c in (keys for keys in KEYS.values() if keys[0] in state):
            yield f"{q} of {whose} is not orthogonal", basis.is_basis(local(state[q]))
            yield f"{c} of {whose} is no covariance", basis.is_covariance(local(state[c]))


def complete(groups: Groups, states: States) -> None:
    """Make the state of parameters for which nothing was loaded; with a warning, if something was for others."""
    missing = [name for p, name in named_parameters(groups) if p.requires_grad and p not in states]
    if missing and len(states):
        warnings.warn(
            f"Anon: the loaded state has nothing for {', '.join(missing)}: it starts afresh there", stacklevel=3
        )
    allocate(groups, states)


def _fits(own: Mapping[str, Tensor], p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a state is on the parameter's device and has its bases."""
    found = {key: tuple(own[key].shape) for key in BASIS_KEYS if key in own}
    dtypes = state_dtypes(group)
    return (
        own["exp_avg"].device == p.device
        and flat.shapes(p, group) == found
        and all(own[key].dtype == dtypes[key] for key in dtypes)
    )


def check_dtypes(index: int, group: Mapping[str, Any], state: States) -> None:
    """Refuse a `state_dtype` that is not the state's: one that was edited after steps were taken.

    Raises:
        RuntimeError: naming the remedy.
    """
    dtypes = state_dtypes(group)
    for own in (state[p] for p in group["params"] if state.get(p) and int(state[p]["step"])):
        for key, dtype in dtypes.items():
            if own[key].dtype != dtype:
                held = str(own[key].dtype).removeprefix("torch.")
                raise RuntimeError(
                    f"Anon: state_dtype of param group {index} was changed to {group['state_dtype']!r} after steps were taken, and its "
                    f"{key} is in {held}. optimizer.load_state_dict(optimizer.state_dict()) brings the state to it; or set it back"
                )


def convert_preconds(states: Iterable[Mapping[str, Tensor]], power: float) -> None:
    """Convert preconditioners to another γ; `power` as `update.conversion_power`."""
    if power != 1.0:
        update.convert_exponent([local(s["precond"]) for s in states], power)


def absent(groups: Groups, state: States) -> list[Tensor]:
    """The tensors with state that are in no group."""
    current = {p for group in groups for p in group["params"]}
    return [p for p in state if isinstance(p, Tensor) and p not in current]
