"""Parameters that a param group does not show at the moment.

DeepSpeed shows the optimizer one param group at a time, and in stage 3 one part of a group after the other. The parameters of the other
parts are not in `param_groups` then, but the optimizer holds their state. They belong to their group all the same: its foremost parameter
may be among them, and a γ that comes into force is theirs too. Their preconditioners cannot be converted with the others', since it is not
known yet whether their next step refreshes them. So what they were made with is remembered until they are shown again.

A parameter's step count does not tell that: one that starts late has passed no change of γ, and comes to the same counts later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from anon_dist.optim.members import Groups, States, convert_preconds, has_absent, steps_taken
from anon_dist.optim.regime import HISTORY, Regime, from_earlier_version

Group = Mapping[str, Any]


class Hidden:
    """Which parameters belong to which group, shown or not, and whose preconditioners are still to be converted."""

    def __init__(self) -> None:
        self._group_of: Any = WeakTensorKeyDictionary()
        self._made_with: Any = WeakTensorKeyDictionary()
        """γ° of the preconditioners that are not of their group's γ in force."""

    def meet(self, groups: Groups) -> None:
        """Note what the groups show now."""
        if not torch.compiler.is_compiling():  # a compiled step shows all
            for group in groups:
                for p in group["params"]:
                    self._group_of[p] = group

    def start_from(self, groups: Groups, state: States) -> None:
        """Forget what was; go by groups and state that were loaded, in the form of whatever version."""
        self._group_of.clear()
        self._made_with.clear()
        self.meet(groups)
        for group in groups:
            history, turned_at, gamma_before = from_earlier_version(group[HISTORY])
            if turned_at:
                group[HISTORY] = history
                behind = [p for p in group["params"] if state.get(p) and 0 < int(state[p]["step"]) < turned_at]
                self._made_with.update(dict.fromkeys(behind, gamma_before))

    def taken(self, group: Group, groups: Groups, state: States) -> int:
        """The step count of the group's foremost parameters, shown or not."""
        hidden = self._hidden(group, state) if has_absent(groups, state) else ()
        return max([steps_taken(group, state), *(int(state[p]["step"]) for p in hidden)])

    def made_with(self, group: Group) -> dict[Tensor, float]:
        """γ° of the parameters that the group shows now and whose preconditioners are not of its γ in force."""
        if not len(self._made_with):
            return {}
        return {p: self._made_with[p] for p in group["params"] if p in self._made_with}

    def stuck(self, regime: Regime, gamma: float, state: States) -> list[float]:
        """γ° of the group's hidden parameters that could not be converted to `gamma` in their next step."""
        found = []
        for p in self._hidden(regime.group, state):
            made_with, step = self._made_with.get(p, regime.gamma_in_force), int(state[p]["step"]) + 1
            if regime.power(made_with, gamma) is None and not regime.schedule.at(step).refresh:
                found.append(made_with)
        return found

    def converted(self, group: Group) -> None:
        """The preconditioners of the parameters that the group shows are of its γ in force."""
        for p in self.made_with(group):
            del self._made_with[p]

    def leave_behind(self, group: Group, state: States, gamma: float) -> None:
        """The group goes over to another γ; its hidden parameters' preconditioners are of `gamma` still, if not of an earlier one."""
        for p in self._hidden(group, state):
            self._made_with.setdefault(p, gamma)

    def convert(self, state: States) -> None:
        """Convert what is still to be converted, so that the state may be saved or copied.

        Raises:
            RuntimeError: a preconditioner cannot be converted.
        """
        due = []
        for p, made_with in list(self._made_with.items()):
            if state.get(p):
                regime = Regime(self._group_of[p])
                power = regime.power(made_with, regime.gamma_in_force)
                if power is None:
                    raise RuntimeError(
                        f"Anon: gamma was changed from {made_with!r} to {regime.gamma_in_force!r} in a step that not all parameters of its "
                        f"param group have taken; theirs cannot be converted, since {regime.why_not(made_with)}. Step them before the "
                        "state is saved or copied"
                    )
                due.append((state[p], power))
        for own, power in due:
            convert_preconds([own], power)
        self._made_with.clear()

    def _hidden(self, group: Group, state: States) -> Iterator[Tensor]:
        """The group's parameters that it does not show, and that have been stepped."""
        shown = {id(p) for p in group["params"]}
        for p, own in state.items():
            if (
                own
                and isinstance(p, Tensor)
                and id(p) not in shown
                and self._group_of.get(p) is group
                and int(own["step"])
            ):
                yield p
