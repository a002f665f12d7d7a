"""Hidden parameters: those that have state, and that their param group does not show at the moment.

DeepSpeed shows the optimizer one param group at a time, and in stage 3 one part of a group after the other. The parameters of the other
parts are not in `param_groups` then, but the optimizer holds their state.

A hidden parameter belongs to its group all the same. The group's foremost parameter may be hidden. And a γ that comes into force counts for
hidden parameters too. Their preconditioners cannot be converted together with the others', since a refresh converts in its own arithmetic,
and nobody knows yet whether their next step will be a refresh. So γ°, with which their preconditioners were made, is remembered until the
group shows them again.

γ° does not follow from a parameter's step count. A parameter that started late has missed no change of γ, but has the step counts that
others had before the change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from anon_dist.optim.members import Groups, States, convert_preconds, has_absent, steps_taken
from anon_dist.optim.regime import HISTORY, Regime, from_earlier_version

Group = Mapping[str, Any]


class Hidden:
    """Which parameters belong to which group, shown or hidden; and which preconditioners are still to be converted."""

    def __init__(self) -> None:
        # Not weakly: torch's `swap_tensors` refuses parameters that are weakly referred to.
        self._group_of: dict[Tensor, Group] = {}
        self._made_with: dict[Tensor, float] = {}
        """Parameter → γ°, where that is not the γ in force in its group."""

    def meet(self, groups: Groups, state: States) -> None:
        """Note which parameters the groups show now, and forget those that neither a group nor the state has any more."""
        if torch.compiler.is_compiling():  # in a compiled step nothing is hidden
            return
        shown = {p: group for group in groups for p in group["params"]}
        self._group_of = {p: group for p, group in self._group_of.items() if p in state} | shown
        self._made_with = {p: gamma for p, gamma in self._made_with.items() if p in self._group_of}

    def start_from(self, groups: Groups, state: States) -> None:
        """Forget everything, and start from loaded groups and states. Their history may be of an earlier version (`regime.Record`)."""
        self._group_of.clear()
        self._made_with.clear()
        self.meet(groups, state)
        for group in groups:
            history, turned_at, gamma_before = from_earlier_version(group[HISTORY])
            if turned_at:
                group[HISTORY] = history
                behind = [p for p in group["params"] if state.get(p) and 0 < int(state[p]["step"]) < turned_at]
                self._made_with.update(dict.fromkeys(behind, gamma_before))

    def taken(self, group: Group, groups: Groups, state: States) -> int:
        """The step count of the group's foremost parameters, shown or hidden."""
        hidden = self._hidden(group, state) if has_absent(groups, state) else ()
        return max([steps_taken(group, state), *(int(state[p]["step"]) for p in hidden)])

    def made_with(self, group: Group) -> dict[Tensor, float]:
        """γ° of those parameters that the group shows now and whose γ° is not the γ in force."""
        if not len(self._made_with):
            return {}
        return {p: self._made_with[p] for p in group["params"] if p in self._made_with}

    def stuck(self, regime: Regime, gamma: float, state: States) -> list[float]:
        """γ° of each hidden parameter of the group that could not be converted to `gamma` in its next step."""
        found = []
        for p in self._hidden(regime.group, state):
            made_with, step = self._made_with.get(p, regime.gamma_in_force), int(state[p]["step"]) + 1
            if regime.power(made_with, gamma) is None and not regime.schedule.at(step).refresh:
                found.append(made_with)
        return found

    def converted(self, group: Group) -> None:
        """Note that the parameters that the group shows have been converted to its γ in force."""
        for p in self.made_with(group):
            del self._made_with[p]

    def leave_behind(self, group: Group, state: States, gamma: float) -> None:
        """Note that another γ comes into force in the group, and that its hidden parameters are not converted.

        Args:
            gamma: the γ that was in force. It is γ° of those hidden parameters that were not left behind before.
        """
        for p in self._hidden(group, state):
            self._made_with.setdefault(p, gamma)

    def convert(self, state: States) -> None:
        """Convert all preconditioners that are still to be converted, so that the state may be saved or copied.

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
        """The group's hidden parameters that have taken a step."""
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
