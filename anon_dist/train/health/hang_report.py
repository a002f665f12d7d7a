"""What the ranks told when a run hung, in ten lines: who is not there, who waits in what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST = 4
"""Culprits, and kinds of waiting, that are named; of more the rest is counted."""
LINES = 10


@dataclass(frozen=True)
class Found:
    """Who keeps the others waiting."""

    missing: list[int]
    """Ranks that said nothing."""
    busy: list[int]
    """Ranks that answered, and are not where the others wait for them."""
    waiting: dict[str, list[int]]
    """What is waited in → the ranks."""


def judge(reports: Mapping[int, Mapping[str, Any]], ranks: int) -> Found:
    """Who keeps whom waiting, by what each rank reported itself; see `hangs` for what is in a report.

    A rank that is in no collective keeps those waiting that are. Where nothing is recorded of collectives, its stack says whether it is.
    """
    missing = [rank for rank in range(ranks) if rank not in reports]
    recorded = any(report["collectives"] for report in reports.values())
    waiting: dict[str, list[int]] = defaultdict(list)
    busy = []
    for rank, report in sorted(reports.items()):
        running = _running(report)
        if running is not None:
            waiting[_collective(running)].append(rank)
        elif missing or (not recorded and "torch/distributed" in report["where"]):
            waiting[report["where"]].append(rank)
        else:
            busy.append(rank)
    return Found(missing, busy, dict(waiting))


def _running(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The oldest collective that is not done."""
    return next((entry for entry in report["collectives"] if entry["running"]), None)


def _collective(entry: Mapping[str, Any]) -> str:
    ranks = entry["ranks"]
    group = "all ranks" if ranks is None or len(ranks) == 0 else f"ranks {spelled(ranks)}"
    sizes = "".join(str(size) for size in entry["sizes"][:2])
    return f"{entry['name'].replace(':', ' ')} number {entry['number']} of {group}, {sizes}"


def spelled(ranks: Sequence[int]) -> str:
    """0-3, 5, 7: ranks in few characters."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    shown = [str(p[0]) if len(p) == 1 else f"{p[0]}{'-' if len(p) > 2 else ', '}{p[-1]}" for p in parts]
    return ", ".join(shown[:8]) + (f" and {sum(map(len, parts[8:]))} more" if len(parts) > 8 else "")


def summary(
    reports: Mapping[int, Mapping[str, Any]],
    seen: Mapping[int, Mapping[str, Any]],
    places: Sequence[Mapping[str, Any]],
    folder: Path,
    limit: str,
    cut: Sequence[int] = (),
    store: str = "",
) -> list[str]:
    """At most ten lines, of which the first says who it was.

    Args:
        reports: of the ranks that answered.
        seen: of ranks that did not, what others of their hosts saw.
        places: host and pid of every rank.
        folder: where the whole is.
        limit: what was passed, in words.
        cut: ranks whose words came through the folder alone, and not through the store,
        store: whose address this is.
    """
    found = judge(reports, len(places))
    guilty = [*found.missing, *found.busy]
    names = _names(guilty, places)
    who = f"waits for {names}" if found.waiting else f"hangs on {names}"
    if not guilty and cut:
        who = f"waits: cut off from the store at {store} on {places[0]['host']}: {_names(cut, places)}"
    elif not guilty:
        alike = "all in the same collective: the network, or a device, hangs"
        who = f"waits, {alike if len(found.waiting) == 1 else 'the ranks for each other, in different collectives'}"
    lines = [f"This run {who}. {limit}"]
    for rank in guilty[:MOST]:
        words = _of_missing(seen.get(rank)) if rank in found.missing else _of_busy(reports[rank])
        lines.append(f"  {_name(rank, places)}, pid {places[rank]['pid']}: {words}")
    for what, waiting in sorted(found.waiting.items(), key=lambda item: -len(item[1]))[:MOST]:
        lines.append(f"  waiting: rank{'s' * (len(waiting) > 1)} {spelled(waiting)} in {what}")
    hosts = {places[rank]["host"] for rank in found.missing}
    silent = [h for h in sorted(hosts) if not any(places[rank]["host"] == h for rank in reports)]
    if silent and len(places) > 1:
        text = f"  no rank of {', '.join(silent[:MOST])} answers: stopped, cut off or without power"
        lines = [*lines[: LINES - 2], text]
    if guilty and cut:
        lines = [*lines[: LINES - 2], f"  cut off from the store at {store}: ranks {spelled(cut)}"]
    return [*lines[: LINES - 1], f"  all stacks and last collectives: {folder}"]


def _names(ranks: Sequence[int], places: Sequence[Mapping[str, Any]]) -> str:
    more = f" and {len(ranks) - MOST} more" if len(ranks) > MOST else ""
    return ", ".join(_name(rank, places) for rank in ranks[:MOST]) + more


def _name(rank: int, places: Sequence[Mapping[str, Any]]) -> str:
    return f"rank {rank} on {places[rank]['host']}"


def _of_missing(seen: Mapping[str, Any] | None) -> str:
    if seen is None:
        return "does not answer, and nobody on its host does"
    last = f"; after step {seen['step']}, {seen['age']:.0f} s ago, it was at: {seen['doing']}" if "step" in seen else ""
    where = f"; {seen['where']}" if seen.get("where") else ""
    return f"{seen['state']}{last}{where}"


def _of_busy(report: Mapping[str, Any]) -> str:
    quiet = (
        f"no progress for {report['age']:.0f} s"
        if report["late"]
        else f"slow; the last progress was {report['age']:.0f} s ago"
    )
    return f"{quiet}, after step {report['step']}, at: {report['doing']}; in {report['where']}"
