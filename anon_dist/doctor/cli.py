"""`anon-dist doctor`: where it runs, and who says what was found."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from anon_dist.doctor.options import Doctor

if TYPE_CHECKING:
    from anon_dist.doctor.place import Place
    from anon_dist.doctor.report import Report
    from anon_dist.train.config.parsing import Config

VERDICT_SECONDS = 120.0


def run(options: Doctor, rest: Sequence[str]) -> int:
    """Examine, and say what was found: node 0 for all, or this process for nodes that it reached over ssh, or a node that met nobody.

    Args:
        rest: options of the training.

    Returns:
        The exit code.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what torch warns of, a finding says
    from anon_dist.doctor.over_ssh import examine_all
    from anon_dist.doctor.place import PlaceError, find, is_known
    from anon_dist.train.config.parsing import ConfigError, parse_args

    try:
        config: Config | None = parse_args(rest, "anon-dist doctor", others=_own_options()) if rest else None
        if options.nodes is not None:
            return _say(options, config, *examine_all(options, rest))
        place = find(options, os.environ)
    except (PlaceError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if place is None:
        return 0
    if place.nodes > 1 and not is_known(place.address):
        print(_unknown(place, options.wait), file=sys.stderr, flush=True)
        if place.rank == 0:
            return 1
    return _on_this_node(options, config, place)


def _unknown(place: Place, wait: float) -> str:
    """What to say where node 0's name leads nowhere: a node's own name will not become known, that of another may."""
    remedy = "give --master-addr (MASTER_ADDR), a name or an address of node 0 that all nodes know"
    if place.rank == 0:
        return f"error: node 0's name, {place.address}, is not known on node 0: {remedy}"
    return f"node 0's name, {place.address}, is not known on this node {place.rank} yet; waiting up to {wait:.0f} s for it. Or {remedy}"


def _own_options() -> list[str]:
    return [f"--{field.name.replace('_', '-')}" for field in fields(Doctor)]


def _on_this_node(options: Doctor, config: Config | None, place: Place) -> int:
    from anon_dist.doctor.examine import examine
    from anon_dist.doctor.over_ssh import MARK, REPORTS
    from anon_dist.doctor.report import Report

    report, meeting = examine(place, config, options.wait)
    if os.environ.get(REPORTS):
        print(MARK, report.to_json(), flush=True)
        if meeting is not None:
            meeting.leave()
        return 0
    if meeting is None:
        return _say(options, config, {place.rank: report}, {}, {}, place.nodes)
    meeting.tell("report", report.to_json())
    if place.rank == 0:
        told = meeting.hear("report", 30)
        reports = {rank: Report.from_json(text) for rank, text in told.items()}
        code = _say(options, config, reports, meeting.absent, {}, place.nodes)
        meeting.store.set("verdict", str(code))
        meeting.leave()
        return code
    if not meeting.comes("verdict", VERDICT_SECONDS, "what node 0 found"):
        print("node 0 does not say what was found; see what it says there", file=sys.stderr)
        return 1
    code = int(meeting.store.get("verdict"))
    meeting.leave()
    return code


def _say(
    options: Doctor,
    config: Config | None,
    reports: Mapping[int, Report],
    absent: Mapping[int, str],
    names: Mapping[int, str],
    nodes: int = 1,
) -> int:
    from anon_dist.doctor.judge import judge
    from anon_dist.doctor.nodes import Nodes, Wanted
    from anon_dist.doctor.screen import show, write
    from anon_dist.doctor.storage import checkpoint_bytes, vocabulary

    wanted = None
    if config is not None:
        vocab = vocabulary(config) or 50304
        wanted = Wanted(config.run_dir, checkpoint_bytes(config, vocab), config.checkpoint.keep)
    missed = {rank: why for report in reports.values() for rank, why in report.absent.items() if rank not in reports}
    found = Nodes(reports, {**missed, **absent}, names, nodes)
    findings = judge(found, wanted)
    show(findings)
    if options.json is not None:
        write(options.json, findings, found)
    return int(any(finding.level == "fail" for finding in findings))
