"""The findings on one screen, and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from anon_dist.doctor.nodes import Finding, Nodes

WIDTH = 100
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def show(findings: Sequence[Finding]) -> None:
    """As a table, each remedy under what it is for."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console = Console(width=min(console.width, WIDTH))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        word = "-" if finding.level == "skip" else finding.level
        text = Text(finding.text)
        if finding.remedy and finding.level != "ok":
            text.append(f"\n→ {finding.remedy}", style="bold")
        table.add_row(Text(word, style=STYLES[finding.level]), finding.check, text)
    console.print(table)
    failed, warned = (sum(f.level == level for f in findings) for level in ("fail", "warn"))
    verdict = f"{failed} of {len(findings)} checks failed" if failed else "No check failed"
    console.print(f"{verdict}{f', {warned} to look at' if warned else ''}.", highlight=False)


def write(path: Path, findings: Sequence[Finding], nodes: Nodes) -> None:
    """All of it. Bytes, seconds, operations per second."""
    content = {
        "ok": not any(f.level == "fail" for f in findings),
        "findings": [asdict(finding) for finding in findings],
        "absent": nodes.absent,
        "nodes": [asdict(report) for report in nodes.reports.values()],
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
