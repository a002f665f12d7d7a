"""What came out of a sweep: losses by setting, over seeds; the best; and what is no result."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from anon_dist.sweep.cells import CellFolder, Outcome
from anon_dist.sweep.grid import Cell, show


@dataclass(frozen=True)
class Spread:
    """Mean and standard error over seeds."""

    mean: float
    error: float | None
    """Of the mean, s / √n; None for one seed."""
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """At least one value."""
        found = list(values)
        error = stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
        return cls(mean(found), error, len(found))

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ± {self.error:.4f}" if self.error is not None else "")


class Setting:
    """The cells that differ in their seed alone."""

    def __init__(self, folders: list[CellFolder]) -> None:
        self.folders = sorted(folders, key=lambda f: f.cell.seed)
        self.cell: Cell = self.folders[0].cell
        self.outcomes: dict[int, Outcome | None] = {f.cell.seed: f.outcome for f in self.folders}
        self.losses: dict[int, float] = {s: o.loss for s, o in self.outcomes.items() if o and o.loss is not None}
        """Seed → loss, of the finished."""
        self.states = Counter(f.state for f in self.folders)

    @cached_property
    def loss(self) -> Spread | None:
        """None while no cell has finished."""
        return Spread.of(self.losses.values()) if self.losses else None

    @property
    def bits_per_byte(self) -> float | None:
        """Mean over seeds."""
        found = [o.bits_per_byte for o in self.outcomes.values() if o and o.bits_per_byte is not None]
        return mean(found) if found else None

    @property
    def ranked(self) -> bool:
        """Whether it may be the best: some seed finished, and none failed or was stopped. The mean over the seeds that survived would
        flatter."""
        return bool(self.losses) and not self.states["failed"] and not self.states["stopped"]

    def summary(self) -> str:
        """`2 finished, 1 stopped`"""
        return ", ".join(f"{n} {state}" for state, n in self.states.most_common())

    def other(self, *left_out: str) -> str:
        """Its settings but for some, for a person."""
        kept = {k: v for k, v in self.cell.settings.items() if k not in left_out}
        return Cell(self.cell.optimizer, kept, 0).setting.removeprefix(self.cell.optimizer).strip()


@dataclass(frozen=True)
class Results:
    """All of a sweep."""

    settings: list[Setting]

    @classmethod
    def read(cls, sweep: Path) -> Results:
        """As they are now; the sweep may be running."""
        groups: dict[tuple[Any, ...], list[CellFolder]] = {}
        for folder in CellFolder.all(sweep):
            cell = folder.cell
            key = (cell.optimizer, cell.factor, str(sorted(cell.settings.items())))
            groups.setdefault(key, []).append(folder)
        return cls(sorted(map(Setting, groups.values()), key=_order))

    @property
    def folders(self) -> list[CellFolder]:
        """Every cell."""
        return [f for s in self.settings for f in s.folders]

    @property
    def axes(self) -> dict[str, list[Any]]:
        """Field → its values in this sweep's Anon cells (AdamW's, where there are no others), sorted; fields of one value are left out."""
        source = self.of("anon") or self.settings
        names = dict.fromkeys(name for s in source for name in s.cell.settings)
        values = {n: sorted({_hashable(s.cell.settings.get(n)) for s in source}, key=_sortable) for n in names}
        return {n: v for n, v in values.items() if len(v) > 1}

    def of(self, optimizer: str) -> list[Setting]:
        """The settings of one optimizer."""
        return [s for s in self.settings if s.cell.optimizer == optimizer]

    def best(self, settings: Iterable[Setting]) -> Setting | None:
        """The lowest mean loss among those with the most finished seeds; None if none may be ranked."""
        found = [s for s in settings if s.ranked]
        most = max((len(s.losses) for s in found), default=0)
        return min(
            (s for s in found if len(s.losses) == most), key=lambda s: s.loss.mean if s.loss else 0.0, default=None
        )

    def best_by(self, field: str, optimizer: str = "anon") -> dict[Any, Setting | None]:
        """Value of a field → the best setting that has it."""
        values = {_hashable(s.cell.settings.get(field)): None for s in self.of(optimizer)}
        return {
            v: self.best(s for s in self.of(optimizer) if _hashable(s.cell.settings.get(field)) == v)
            for v in sorted(values, key=_sortable)
        }

    def at_edge(self, setting: Setting) -> bool:
        """Whether its learning rate is the lowest or highest that was tried for it, so that a better one may lie beyond."""
        same = [s for s in self.of(setting.cell.optimizer) if s.other("optim.lr") == setting.other("optim.lr")]
        rates = [s.cell.lr for s in same if s.cell.lr is not None]
        return len(rates) > 1 and setting.cell.lr in (min(rates), max(rates))


def paired(a: Setting, b: Setting) -> Spread | None:
    """a − b over the seeds that both finished."""
    seeds = a.losses.keys() & b.losses.keys()
    return Spread.of(a.losses[s] - b.losses[s] for s in seeds) if seeds else None


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else show(value) if isinstance(value, dict) else value


def _sortable(value: Any) -> tuple[bool, Any]:
    number = isinstance(value, int | float)
    return (not number, value if number else str(value))


def _order(setting: Setting) -> list[Any]:
    return [setting.cell.optimizer, *(_sortable(_hashable(v)) for v in setting.cell.settings.values())]
