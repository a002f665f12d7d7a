"""A param group's regime: what its state was made with, and what follows from that for the next step.

The preconditioner and the second moment mean something only together with the γ, ρ, β2, β3, window and basis that made them. Each group
therefore carries its *history* under the key `HISTORY`: a record for each stretch of steps in which these values were the same. It is a
JSON string, one leaf, which no checkpoint library takes apart. A `Regime` reads a group and its history; everything that changes γ, ρ, β2,
β3 or the window in the middle of a run goes through it:

- `rebase`: new values act at once, and the preconditioner is converted to the new γ, d ← d^(γ'/γ).
- an edit of `group["gamma"]`: the γ *in force*, which made the group's preconditioners, stays. The new one is *pending* until a step
  refreshes the group's foremost parameters, those with the most steps: the *change of γ*. Preconditioners that are refreshed in it are
  converted as a part of the refresh, the others alongside, since a group has one γ.
- an edit of ρ, β2, β3, the window, the longest interval or the basis: refused by the next step.

What can be converted is decided in one place, `update.gamma_ratio`, by the two γ and the dtype of the preconditioner.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from anon_dist.optim import update
from anon_dist.optim.hyper import state_dtypes
from anon_dist.optim.plan import MEANS, StepPlan, Variant
from anon_dist.optim.schedule import Phase, Schedule, Window, schedule

HISTORY = "history"
"""The key of a group's history among its hyperparameters."""

ROUNDED = MEANS | {"v"}
ROUNDED_WITH_THETA = ROUNDED | {"theta"}


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
    """The step of the last change of γ, if some parameters of the group could not be seen then (DeepSpeed's stage 3 steps a group
    in parts): until they take that step, their preconditioners are of `gamma_before`. No basis has to do with it: checkpoints that
    are older than bases have the name."""
    gamma_before: float = 1.0

    @classmethod
    def of(cls, group: Mapping[str, Any], since: int = 0) -> Record:
        """Of a group's present values."""
        values = {key: group[key] for key in ("gamma", "refresh_ratio", "beta3", "window", "max_interval", "basis")}
        block = group["basis_block"] if group["basis"] else 0  # without a basis it means nothing
        return cls(since=since, beta2=group["betas"][1], basis_block=block, **values)

    def values(self) -> dict[str, Any]:
        """The hyperparameters in it."""
        return {name: getattr(self, name) for name in RECORDED}


@dataclass(frozen=True)
class GammaChange:
    """The step in which a pending γ comes into force."""

    step: int
    """Of the parameters that are refreshed in it, among which are the foremost."""
    old: float
    new: float
    ratio: float | None
    """The power that converts a preconditioner; None where the old one says too little about the new."""


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
        """The γ that made the group's preconditioners."""
        return float(self.history[-1].gamma if HISTORY in self.group else self.group["gamma"])

    @cached_property
    def is_pending(self) -> bool:
        """Whether `group["gamma"]` has been edited, and waits for a refresh."""
        return bool(self.group["gamma"] != self.gamma_in_force)

    @cached_property
    def schedule(self) -> Schedule:
        """When the preconditioner is refreshed, past changes included."""
        return schedule(*(Phase(r.since, r.refresh_ratio, r.beta2, r.window, r.max_interval) for r in self.history))

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
                    f"was made with {recorded!r}: call optimizer.rebase({name}={present!r}), which converts it, or set {recorded!r} again"
                )

    # -- what is next ------------------------------------------------------------------------------

    def next_gamma(self, taken: int) -> float:
        """The γ in force in the next step's update, `taken` being the foremost parameters' step count."""
        changes = taken == 0 or (self.is_pending and self.schedule.at(taken + 1).refresh)
        return float(self.group["gamma"]) if changes else self.gamma_in_force

    def gamma_change(self, steps: Collection[int], taken: int) -> GammaChange | None:
        """The change of γ, if the pending γ comes into force in the step that is about to be taken.

        Args:
            steps: what the counts of the parameters that step now will be.
            taken: the foremost parameters' step count.
        """
        if not self.is_pending or taken + 1 not in steps or not self.schedule.at(taken + 1).refresh:
            return None
        old, new = self.gamma_in_force, float(self.group["gamma"])
        return GammaChange(taken + 1, old, new, update.gamma_ratio(old, new, self.precond_dtype))

    def why_not(self, change: GammaChange) -> str:
        """Why preconditioners cannot be converted in a change whose `ratio` is None."""
        if change.old == 0.0:
            return "v = 1 says nothing about the gradient's scale"
        name = str(self.precond_dtype).removeprefix("torch.")
        most = f"{update.MOST_RATIO[self.precond_dtype]:g}"
        return f"a preconditioner in {name} carries a change of gamma by a factor of {most} at most"

    def plan(
        self,
        step: int,
        change: GammaChange | None = None,
        *,
        lr: float | Tensor | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> StepPlan:
        """What `step` does to a parameter that takes it.

        Args:
            change: of the same step of the optimizer.
            lr: if it is another object than the group's.
            grad_scale, found_inf: see `StepPlan`.
        """
        group, due = self.group, self.schedule.at(step)
        keep, ratio, gamma = 0.0, 1.0, self.gamma_in_force
        if due.refresh:
            last = self.history[-1]
            old = last.gamma_before if step <= last.turned_at else last.gamma
            gamma = change.new if change else last.gamma
            known = update.gamma_ratio(old, gamma, self.precond_dtype)
            if not due.first and known is not None:  # else the refresh is as the first
                keep, ratio = group["beta3"], known
        return StepPlan(
            step,
            Variant.REFRESH if due.refresh else Variant.ACCUMULATE if due.accumulate else Variant.PLAIN,
            lr if lr is not None else group["lr"],
            group["weight_decay"],
            group["betas"][0],
            due.beta2,
            group["update_clip"],
            group["maximize"],
            due.debias,
            keep,
            gamma,
            ratio,
            group["eps"],
            group["hold_silent"] and gamma < 0.0,
            group["nesterov"],
            group["cautious_decay"],
            ROUNDED_WITH_THETA if group["stochastic_rounding"] else ROUNDED,
            grad_scale,
            found_inf,
        )

    # -- changes: each gives a new history ---------------------------------------------------------

    def fresh(self) -> str:
        """The history of a group that has taken no step: its present values."""
        return _text((Record.of(self.group),))

    def after_change(self, change: GammaChange, others: bool) -> str:
        """The history after a change of γ.

        Args:
            others: whether the group has parameters that cannot be seen now, and which take the same step next.
        """
        last = replace(self.history[-1], gamma=change.new, turned_at=0, gamma_before=1.0)
        if others:
            last = replace(last, turned_at=change.step, gamma_before=change.old)
        return _text((*self.history[:-1], last))

    def rebased(self, index: int, changed: Mapping[str, Any], taken: int, names: Collection[str]) -> tuple[str, float]:
        """Go over to the values of `changed`, this group's with some replaced, after `taken` steps of its foremost parameters.

        Args:
            names: what is replaced. An edited γ that is not among them goes on waiting for a refresh.

        Returns:
            The new history, and the power that converts the preconditioners (1: as they are).

        Raises:
            RuntimeError: another value was edited.
            ValueError: the preconditioners cannot be converted to the new γ.
        """
        if not taken:
            return _text((Record.of(changed),)), 1.0
        self.check_drift(index, {*names, "gamma"})
        present = self.gamma_in_force
        wanted = float(changed["gamma"]) if "gamma" in names else present
        ratio = update.gamma_ratio(present, wanted, self.precond_dtype)
        if ratio is None:
            why = self.why_not(GammaChange(taken, present, wanted, None))
            raise ValueError(
                f"Anon: gamma cannot be changed from {present!r} to {wanted!r} at once after steps were taken, since {why}. Set it in "
                "param_groups: it takes effect at the next refresh"
            )
        earlier = tuple(record for record in self.history if record.since < taken)
        return _text((*earlier, Record.of({**changed, "gamma": wanted}, taken))), ratio


def _text(history: tuple[Record, ...]) -> str:
    kept = [asdict(record) for record in history]
    for entry in kept:
        unused = ("turned_at", "gamma_before") if not entry["turned_at"] else ()
        for key in (*unused, *(key for key in ("max_interval", "basis", "basis_block") if not entry[key])):
            del entry[key]
    return json.dumps(kept)


@lru_cache(maxsize=256)
def _parsed(text: str) -> tuple[Record, ...]:
    return tuple(Record(**entry) for entry in json.loads(text))
