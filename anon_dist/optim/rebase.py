"""Changes, in the middle of a run, of hyperparameters that the state depends on: `Anon.rebase`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from anon_dist.optim import flat
from anon_dist.optim.hyper import normalise, validate
from anon_dist.optim.members import Groups, States, convert_preconds, has_absent, steps_taken
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


def change(groups: Groups, state: States, given: Mapping[str, Any], indices: Iterable[int]) -> None:
    """Give some groups new values, and convert their state to them. All is checked before anything is changed.

    Args:
        given: by name as in `Anon.rebase`; `beta2` is the second of `betas`.

    Raises:
        ValueError, RuntimeError: see `Anon.rebase`.
    """
    if has_absent(groups, state):
        raise RuntimeError("Anon: rebase() needs all parameters in param_groups, and some with state are not there")
    changed = []
    for index in indices:
        old = groups[index]
        new = {**old, **{name: value for name, value in given.items() if name != "beta2"}}
        if "beta2" in given:
            new["betas"] = (old["betas"][0], given["beta2"])
        normalise(new)
        validate(new)
        new[HISTORY], ratio = Regime(old).rebased(index, new, steps_taken(old, state), set(given))
        for p in old["params"]:
            flat.check(p, new)
        changed.append((old, new, ratio))
    for old, new, ratio in changed:
        states = [(p, state[p]) for p in old["params"] if state.get(p)]
        if ratio != 1.0:
            convert_preconds((own for _, own in states), ratio)
        for p, own in states:
            flat.change(p, own, new, Regime(new).gamma_in_force, EXPONENTS)
        old.update(new)
