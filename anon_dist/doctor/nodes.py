"""The nodes that were examined, and what a check of them is called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from anon_dist.doctor.report import Report

Level = Literal["ok", "warn", "fail", "skip"]
NAMED = 4
"""Of more nodes than this, the rest is counted."""


@dataclass(frozen=True)
class Finding:
    """Of one check."""

    check: str
    level: Level
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Wanted:
    """What the run that is meant needs; of node 0."""

    run_dir: str
    checkpoint: int | None
    """Bytes of one; None: not known."""
    keep: int


class Nodes:
    """The reports, and how their nodes are called.

    Args:
        reports: by rank, of the nodes that sent one.
        absent: why the others did not.
        names: of nodes as the user knows them; without one, the host's.
        count: how many there should be. One that met nobody knows of itself alone.
    """

    def __init__(
        self, reports: Mapping[int, Report], absent: Mapping[int, str], names: Mapping[int, str], count: int = 1
    ) -> None:
        self.reports = dict(sorted(reports.items()))
        self.absent = dict(absent)
        self._names = {rank: report.host for rank, report in self.reports.items()} | dict(names)
        self.count = max(count, len(set(self.reports) | set(self.absent)))

    def name(self, rank: int) -> str:
        """As it is called, if no other is."""
        name = self._names.get(rank, "")
        return (
            name
            if name and list(self._names.values()).count(name) == 1
            else f"node {rank} ({name})"
            if name
            else f"node {rank}"
        )

    def all(self, ranks: Iterable[int]) -> str:
        """Several."""
        ranks = sorted(ranks)
        more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
        return ", ".join(map(self.name, ranks[:NAMED])) + more

    def differences(self, value: Callable[[Report], str]) -> str:
        """Who has another value than most; "" if nobody has."""
        found: dict[str, list[int]] = defaultdict(list)
        for rank, report in self.reports.items():
            found[value(report)].append(rank)
        if len(found) < 2:
            return ""
        *odd, usual = sorted(found.items(), key=lambda item: (len(item[1]), -min(item[1])))
        return ", ".join(f"{v} on {self.all(ranks)}" for v, ranks in odd) + f", {usual[0]} on {self.all(usual[1])}"
