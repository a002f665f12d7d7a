"""Changes, in the middle of a run, of hyperparameters that the state depends on: `Anon.rebase`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from anon_dist.optim import flat
from anon_dist.optim.hidden import Hidden
from anon_dist.optim.hyper import normalise, validate
from anon_dist.optim.members import Groups, States, check_dtypes, convert_preconds, has_absent, steps_taken
from anon_dist.optim.regime import HISTORY, Regime
from anon_dist.optim.state import EXPONENTS

UNSET: Any = object()
"""An argument of `Anon.rebase` that was not given, where None is a value."""
MAY_BE_NONE = ("window", "max_interval", "basis")


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters among the arguments of `Anon.rebase` that were given."""
    return {
        name: value
        for name, value in arguments.items()
        if name not in ("self", "group") and value is not UNSET and (value is not None or name in MAY_BE_NONE)
    }


def chosen(groups: Groups, group: int | None) -> Sequence[int]:
    """The indices of the param groups that `Anon.rebase` changes.

    Raises:
        ValueError: there is no such group.
    """
    indices = range(len(groups))
    if group is None:
        return indices
    try:
        return [indices[group]]
    except (IndexError, TypeError):
        raise ValueError(
            f"Anon: rebase(group={group!r}): the number of param groups is {len(groups)}; give an index from 0 to {len(groups) - 1}, or "
            "None for all"
        ) from None


def change(groups: Groups, state: States, hidden: Hidden, given: Mapping[str, Any], indices: Iterable[int]) -> None:
    """Give some groups new values, and convert their state to them. All is checked before anything is changed.

    Args:
        given: by name as in `Anon.rebase`; `beta2` is the second of `betas`.

    Raises:
        ValueError, RuntimeError: see `Anon.rebase`.
    """
    if has_absent(groups, state):
        raise RuntimeError("Anon: rebase() needs all parameters in param_groups, and some with state are not there")
    changed = [_changed(index, groups[index], state, hidden, given) for index in indices]
    for old, new, powers in changed:
        for p, power in powers.items():
            convert_preconds([state[p]], power)
            flat.rebase(p, state[p], new, Regime(new).gamma_in_force, EXPONENTS)
        hidden.converted(old)
        old.update(new)


def _changed(
    index: int, old: dict[str, Any], state: States, hidden: Hidden, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[Tensor, float]]:
    """A group as it is, as it will be, and the powers that convert its parameters' preconditioners."""
    check_dtypes(index, old, state)
    new = {**old, **{name: value for name, value in given.items() if name != "beta2"}}
    if "beta2" in given:
        new["betas"] = (old["betas"][0], given["beta2"])
    normalise(new)
    validate(new)
    regime, taken = Regime(old), steps_taken(old, state)
    new[HISTORY], gamma = regime.rebased(index, new, taken, set(given))
    made_with = hidden.made_with(old)
    powers: dict[Tensor, float] = {}
    for p in old["params"]:
        flat.check(p, new)
        if state.get(p):
            before = made_with.get(p, regime.gamma_in_force)
            power = regime.power(before, gamma) if int(state[p]["step"]) else 1.0
            if power is None:
                raise ValueError(
                    f"Anon: preconditioners of param group {index} are at gamma {before!r} still, since their parameters were not shown "
                    f"when it changed, and cannot be converted to {gamma!r}: {regime.why_not(before)}. Give gamma={before!r}, or step "
                    "them first"
                )
            powers[p] = power
    return old, new, powers
