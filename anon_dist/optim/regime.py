"""A param group's regime: what its state was made with, and what follows from that for the next step.

The preconditioner and the second moment mean something only together with the γ, ρ, β2, β3, window and basis that made them. Each group
therefore carries its *history* under the key `HISTORY`: a record for each stretch of steps in which ρ, β2 and window were the same. The
last record has all the present values; the earlier ones say where the refreshes were. It is a JSON string, one leaf, which no checkpoint
library takes apart. A `Regime` reads a group and its history; everything that changes γ, ρ, β2, β3 or the window in the middle of a run
goes through it:

- `rebase`: the new values act at once.
- an edit of `group["gamma"]`: the γ *in force* stays for now. The new one is *pending* until a step refreshes the group's foremost
  parameters, those with the most steps: in that step it comes into force, for the whole group, since a group has one γ and one lr.
- an edit of ρ, β2, β3, the window, the longest interval or the basis: refused by the next step.

A preconditioner that was made with γ° is *converted* to another γ in force: d ← d^(γ/γ°). There are three places where that happens:

1. in a refresh, as a part of its arithmetic (`plan`; `update.refresh` and the kernels carry it out);
2. beside a step: parameters that do not refresh in the step in which the γ comes into force (`stepper`);
3. in `rebase`.

A parameter that its group does not show in that step (see `hidden`) is converted when it is shown again, as in 1 or 2. Each preconditioner
is converted exactly once for a γ. What can be converted is decided in one place, `update.conversion_power`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from anon_dist.optim import update
from anon_dist.optim.hyper import state_dtypes, validate
from anon_dist.optim.plan import STORED, StepPlan, Variant
from anon_dist.optim.schedule import Phase, Schedule, Window, schedule

HISTORY = "history"
"""The key of a group's history among its hyperparameters."""

ALL_ROUNDED = frozenset(STORED)
STATES_ROUNDED = ALL_ROUNDED - {"theta"}
"""What is rounded stochastically: the state always, θ too with `stochastic_rounding`."""

RECORDED = ("gamma", "refresh_ratio", "beta2", "beta3", "window", "max_interval", "basis", "basis_block")
"""The hyperparameters that a state depends on."""


@dataclass(frozen=True)
class Record:
    """The values that a group's state is made with after step `since`."""

    since: int
    gamma: float
    refresh_ratio: float
    beta2: float
    beta3: float
    window: Window
    max_interval: int | None = None
    basis: str | None = None
    basis_block: int = 0
    """0: no basis."""
    turned_at: int = 0
    """In checkpoints of earlier versions alone: the preconditioners of parameters that had taken fewer steps than this are of
    `gamma_before`. It was written where a group did not show all of its parameters (see `hidden`)."""
    gamma_before: float = 1.0

    @classmethod
    def of(cls, group: Mapping[str, Any], since: int = 0) -> Record:
        """Of a group's present values."""
        values = {key: group[key] for key in ("gamma", "refresh_ratio", "beta3", "window", "max_interval", "basis")}
        block = group["basis_block"] if group["basis"] else 0  # without a basis it means nothing
        return cls(since=since, beta2=group["betas"][1], basis_block=block, **values)

    @property
    def phase(self) -> Phase:
        """What of it the schedule depends on."""
        return Phase(self.since, self.refresh_ratio, self.beta2, self.window, self.max_interval)

    def values(self) -> dict[str, Any]:
        """The hyperparameters in it."""
        return {name: getattr(self, name) for name in RECORDED}


class Regime:
    """A view of one param group; cheap to make, and right until the group or its history changes."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        self.group = group

    @cached_property
    def history(self) -> tuple[Record, ...]:
        """Its records, oldest first; a group without has its present values."""
        return _parsed(self.group[HISTORY]) if HISTORY in self.group else (Record.of(self.group),)

    # -- what was, and is --------------------------------------------------------------------------

    @cached_property
    def gamma_in_force(self) -> float:
        """The γ that the group's preconditioners are of."""
        return float(self.history[-1].gamma if HISTORY in self.group else self.group["gamma"])

    @cached_property
    def is_pending(self) -> bool:
        """Whether `group["gamma"]` has been edited, and waits for a refresh."""
        return bool(self.group["gamma"] != self.gamma_in_force)

    @cached_property
    def schedule(self) -> Schedule:
        """When the preconditioner is refreshed, past changes included."""
        return schedule(*(record.phase for record in _merged(self.history)))

    @cached_property
    def precond_dtype(self) -> torch.dtype:
        """The dtype in which the group's preconditioners are stored."""
        return state_dtypes(self.group)["precond"]

    def drift(self) -> dict[str, tuple[Any, Any]]:
        """Hyperparameters whose value is not the one on record: name → (recorded, present)."""
        if self.history[-1] == (present := Record.of(self.group, self.history[-1].since)):
            return {}
        recorded = self.history[-1].values()
        if present.basis != self.history[-1].basis:
            recorded["basis_block"] = present.basis_block  # it belongs to the basis, which is named
        return {name: (recorded[name], value) for name, value in present.values().items() if recorded[name] != value}

    def check_drift(self, index: int, allowed: Collection[str] = ("gamma",)) -> None:
        """Refuse values that are not the ones on record, except those named in `allowed`.

        Raises:
            RuntimeError: naming the first, and the remedy.
        """
        for name, (recorded, present) in self.drift().items():
            if name not in allowed:
                raise RuntimeError(
                    f"Anon: {name} of param group {index} was changed from {recorded!r} to {present!r} after steps were taken. The state "
                    f"was made with {recorded!r}: call optimizer.rebase({name}={present!r}, group={index}), which converts it, or set "
                    f"{recorded!r} again. Without group= rebase changes all groups"
                )

    # -- what is next ------------------------------------------------------------------------------

    def next_gamma(self, taken: int) -> float:
        """The γ in force in the next step's update, `taken` being the foremost parameters' step count."""
        changes = taken == 0 or (self.is_pending and self.schedule.at(taken + 1).refresh)
        return float(self.group["gamma"]) if changes else self.gamma_in_force

    def gamma_of_step(self, steps: Collection[int], taken: int) -> float:
        """The γ in force in the step that is about to be taken: the pending one, if it comes into force in it.

        Args:
            steps: what the counts of the parameters that step now will be.
            taken: the foremost parameters' step count.
        """
        changes = self.is_pending and taken + 1 in steps and self.schedule.at(taken + 1).refresh
        return float(self.group["gamma"]) if changes else self.gamma_in_force

    def power(self, made_with: float, gamma: float) -> float | None:
        """The power that converts a preconditioner of this group; None: it cannot be converted (see `why_not`)."""
        return update.conversion_power(made_with, gamma, self.precond_dtype)

    def why_not(self, made_with: float) -> str:
        """Why a preconditioner whose `power` is None cannot be converted."""
        if made_with == 0.0:
            return "v = 1 says nothing about the gradient's scale"
        name = str(self.precond_dtype).removeprefix("torch.")
        most = f"{update.MOST_RATIO[self.precond_dtype]:g}"
        return f"a preconditioner in {name} carries a change of gamma by a factor of {most} at most"

    def plan(
        self,
        step: int,
        gamma: float | None = None,
        *,
        made_with: float | None = None,
        lr: float | Tensor | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> StepPlan:
        """What `step` does to a parameter that takes it.

        Args:
            gamma: the γ in force in it (`gamma_of_step`), if that comes into force only now.
            made_with: γ°, the γ of the parameter's preconditioner, if it is not the one that was in force before the step.
            lr: if it is another object than the group's.
            grad_scale, found_inf: see `StepPlan`.
        """
        group, due = self.group, self.schedule.at(step)
        plan = StepPlan(
            step=step,
            variant=Variant.REFRESH if due.refresh else Variant.ACCUMULATE if due.accumulate else Variant.PLAIN,
            lr=lr if lr is not None else group["lr"],
            weight_decay=group["weight_decay"],
            beta1=group["betas"][0],
            beta2=due.beta2,
            clip=group["update_clip"],
            maximize=group["maximize"],
            nesterov=group["nesterov"],
            cautious=group["cautious_decay"],
            stochastic=ALL_ROUNDED if group["stochastic_rounding"] else STATES_ROUNDED,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        if (
            due.refresh
        ):  # the rest is for a refresh alone; most steps are none, and a bucket may have a plan for each step count
            gamma = self.gamma_in_force if gamma is None else gamma
            plan.gamma, plan.eps, plan.debias_s = gamma, group["eps"], due.debias
            plan.hold_silent = bool(group["hold_silent"]) and gamma < 0.0
            if not due.first:
                made_with = self.gamma_in_force if made_with is None else made_with
                power = self.power(made_with, gamma)
                if power is not None:
                    plan.keep_d, plan.gamma_ratio = group["beta3"], power
                elif plan.hold_silent:  # the others are refreshed as at first
                    plan.gamma_ratio = update.power_of_held(made_with, gamma)
        return plan

    # -- changes: each gives a new history ---------------------------------------------------------

    def fresh(self) -> str:
        """The history of a group that has taken no step: its present values."""
        return _text((Record.of(self.group),))

    def with_gamma(self, gamma: float) -> str:
        """The history after a step in which a pending γ has come into force."""
        return _text((*self.history[:-1], replace(self.history[-1], gamma=gamma)))

    def rebased(self, index: int, changed: Mapping[str, Any], taken: int, names: Collection[str]) -> tuple[str, float]:
        """Go over to the values of `changed`, this group's with some replaced, after `taken` steps of its foremost parameters.

        Args:
            names: what is replaced. An edited γ that is not among them goes on waiting for a refresh.

        Returns:
            The new history, and the γ in force.

        Raises:
            RuntimeError: another value was edited.
            ValueError: the preconditioners cannot be converted to the new γ.
        """
        if not taken:
            return _text((Record.of(changed),)), float(changed["gamma"])
        self.check_drift(index, {*names, "gamma"})
        present = self.gamma_in_force
        wanted = float(changed["gamma"]) if "gamma" in names else present
        if self.power(present, wanted) is None:
            raise ValueError(
                f"Anon: gamma cannot be changed from {present!r} to {wanted!r} at once after steps were taken, since "
                f"{self.why_not(present)}. Set it in param_groups: it takes effect at the next refresh"
            )
        earlier = tuple(record for record in self.history if record.since < taken)
        return _text(_merged((*earlier, Record.of({**changed, "gamma": wanted}, taken)))), wanted


def check_history(index: int, group: Mapping[str, Any]) -> None:
    """Refuse a loaded history that is damaged, or that a newer version has written.

    Raises:
        ValueError: naming the param group and the remedy.
    """
    try:
        records = json.loads(group[HISTORY]) if isinstance(group[HISTORY], str) else None
        wrong = _wrong(records, group)
    except (ValueError, TypeError, RecursionError) as error:
        wrong = f"is damaged ({str(error).removeprefix('Anon: ')})"
    if wrong:
        raise ValueError(
            f"Anon: {HISTORY} of param group {index} {wrong}. Load another checkpoint; or load the weights alone and start Anon's state "
            "afresh"
        )


def _wrong(records: Any, group: Mapping[str, Any]) -> str | None:
    """What is wrong with records of a history, or with none; ValueError and TypeError where a value is out of its range."""
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        return "is damaged (it is no list of records)"
    known = {field.name: field.default is MISSING for field in fields(Record)}
    if foreign := sorted({key for record in records for key in record} - set(known)):
        return f"was written by a newer version of anon_dist: fields {', '.join(foreign)}; install that version"
    needed = {name for name, always in known.items() if always}
    if lacking := sorted({key for record in records for key in needed - set(record)}):
        return f"is damaged (fields {', '.join(lacking)} are missing)"
    counts = [count for record in records for count in (record["since"], record.get("turned_at", 0))]
    since = counts[::2]
    if not all(type(count) is int for count in counts) or since[0] != 0 or any(a >= b for a, b in pairwise(since)):
        return f"is damaged (its records begin after the steps {since}, and should follow each other from 0 on)"
    for record in records:
        values = {key: value for key, value in record.items() if key in group and (key != "basis_block" or value)}
        validate({**group, **values, "betas": (group["betas"][0], record["beta2"])})
        validate({**group, "gamma": record.get("gamma_before", 1.0)})
    return None


def _merged(records: tuple[Record, ...]) -> tuple[Record, ...]:
    """The records; of neighbours that are alike for the schedule only the last, which begins where the first did."""
    kept: list[Record] = []
    for record in records:
        if kept and replace(record.phase, since=kept[-1].since) == kept[-1].phase:
            record = replace(record, since=kept.pop().since)
        kept.append(record)
    return tuple(kept)


def from_earlier_version(history: str) -> tuple[str, int, float]:
    """A loaded history in the present form; and, of the record as it was, `turned_at` (0: nothing to be done) and `gamma_before`."""
    records = _parsed(history)
    last = replace(records[-1], turned_at=0, gamma_before=1.0)
    return _text((*records[:-1], last)), records[-1].turned_at, records[-1].gamma_before


def _text(history: tuple[Record, ...]) -> str:
    kept = [asdict(record) for record in history]
    for entry in kept:
        unused = [key for key in ("max_interval", "basis", "basis_block") if not entry[key]]
        for key in ("turned_at", "gamma_before", *unused):
            del entry[key]
    return json.dumps(kept)


@lru_cache(maxsize=256)
def _parsed(text: str) -> tuple[Record, ...]:
    return tuple(Record(**entry) for entry in json.loads(text))
