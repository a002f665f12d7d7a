"""γ by step, and what has to follow it: the learning rate, the weight decay and the clip of each param group; and rates by name."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import Optimizer

from anon_dist.engines.base import Engine
from anon_dist.optim import Anon
from anon_dist.optim.matching import Spectra, Spectrum, group_spectrum
from anon_dist.optim.regime import Regime
from anon_dist.train.config.parsing import OptimConfig


def gamma_at(step: int, knots: Mapping[int, float]) -> float:
    """γ of `step`, counted from 1: linear between the knots, constant before the first and after the last."""
    steps = sorted(knots)
    after = bisect_right(steps, step)
    if after in (0, len(steps)):
        return knots[steps[max(0, after - 1)]]
    low, high = steps[after - 1], steps[after]
    return knots[low] + (knots[high] - knots[low]) * (step - low) / (high - low)


@dataclass
class GroupRule:
    """What of a param group follows the step, or γ."""

    scheduled: bool
    """Whether its γ follows `optim.gamma_schedule`."""
    spectrum: Spectrum | None
    """What the values below are matched with; None: they stay."""
    update_clip: float | None
    """Meant for γ = 1."""
    weight_decay: float
    """Meant for γ = 1."""
    lr_factor: float = 1.0
    """By `optim.lr_by_name`, whatever γ is."""
    _factors: dict[float, float] = field(default_factory=dict)

    @property
    def sets(self) -> frozenset[str]:
        """The hyperparameters that `GammaRules` sets, whatever a checkpoint has."""
        matched = {"update_clip", "weight_decay"} if self.spectrum else set()
        return frozenset(matched | ({"gamma"} if self.scheduled else set()))

    def match(self, group: dict[str, Any], gamma: float) -> float:
        """Set what has a unit that depends on γ; the factor of the learning rate."""
        if self.spectrum is None:
            return self.lr_factor
        if gamma not in self._factors:
            self._factors = {gamma: self.spectrum.lr_factor(gamma, self.update_clip)}
        f = self._factors[gamma]
        group["update_clip"] = self.update_clip and self.update_clip / f
        group["weight_decay"] = self.weight_decay / f
        return f * self.lr_factor


class GammaRules:
    """Sets γ before a step, and says by what each group's learning rate is multiplied in it."""

    def __init__(self, config: OptimConfig, optimizer: Optimizer, model: nn.Module, spectra: Spectra | None) -> None:
        """To be made before the engine wraps model and optimizer; it keeps neither.

        Raises:
            ValueError: a parameter has no spectrum, or a param group's parameters have several factors of their learning rate.
        """
        anon, names = isinstance(optimizer, Anon), {p: name for name, p in model.named_parameters()}
        self._knots = config.gamma_schedule if anon else {}
        self.groups: list[GroupRule] = []
        for group in optimizer.param_groups:
            members = [names[p] for p in group["params"]]
            named = any(fnmatchcase(members[0], pattern) for pattern in config.gamma_by_name)
            spectrum = group_spectrum(spectra, group, names) if anon and spectra is not None else None
            scheduled = bool(self._knots) and not named
            factor = self._lr_factor(config, members)
            rule = GroupRule(scheduled, spectrum, group.get("update_clip"), group["weight_decay"], factor)
            self.groups.append(rule)
        matched = any(rule.spectrum for rule in self.groups)
        self.multiplied = matched or any(rule.lr_factor != 1.0 for rule in self.groups)
        """Whether learning rates are multiplied by something."""
        self._settled: tuple[float | None, list[float]] | None = None
        if not matched and not self._knots:
            self._settled = (None, [rule.lr_factor for rule in self.groups])

    @staticmethod
    def _lr_factor(config: OptimConfig, members: list[str]) -> float:
        by_name = config.lr_by_name.items()
        factors = {next((f for pattern, f in by_name if fnmatchcase(name, pattern)), 1.0): name for name in members}
        if len(factors) > 1:
            (one, a), (other, b), *_ = factors.items()
            raise ValueError(
                f"lr_by_name gives {a} the factor {one:g} and {b} {other:g}, and the optimizer has both in one param group; build its "
                "groups with anon_dist.optim.param_groups(model, weight_decay, lr={pattern: rate})"
            )
        return next(iter(factors))

    def restart(self) -> None:
        """Another state was loaded: what was set in the groups holds no more."""
        if self._settled is not None and (self._knots or any(rule.spectrum for rule in self.groups)):
            self._settled = None

    def factors(self, engine: Engine, step: int) -> list[float]:
        """Set the groups' hyperparameters for `step`; the factor of each group's learning rate in it. Every rank calls it.

        The factor is that of the γ in force, which follows the scheduled one at refreshes.
        """
        gamma = gamma_at(step, self._knots) if self._knots else None
        if self._settled is not None and self._settled[0] == gamma:
            return self._settled[1]
        with engine.whole_optimizer() as optimizer:
            assert isinstance(optimizer, Anon)
            groups = optimizer.param_groups
            for rule, group in zip(self.groups, groups, strict=True):
                if rule.scheduled:
                    group["gamma"] = gamma
            following = optimizer.next_gammas()
            factors = [r.match(group, g) for r, group, g in zip(self.groups, groups, following, strict=True)]
            settled = not any(Regime(group).is_pending for group in groups)
        self._settled = (gamma, factors) if settled else None
        return factors
