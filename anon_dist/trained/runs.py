"""`anon-dist runs`: the runs below a folder, side by side, in a table, a picture and a page that is one file."""

from __future__ import annotations

import html
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from anon_dist.checkpoint import CheckpointError
from anon_dist.files import write_text
from anon_dist.page import page, picture
from anon_dist.train.config import strict_yaml
from anon_dist.train.config.parsing import flat
from anon_dist.train.reports.metrics import TASK, WORDS, Record, read_metrics
from anon_dist.train.reports.report import RESULT
from anon_dist.train.saves.lock import LOCK, SILENT_SECONDS
from anon_dist.trained.options import Runs

INSIDE = ("checkpoints", "model", "tensorboard")
"""Folders of a run in which no other run lies."""
PLACES = ("run_dir", "resume")
MOST_DIFFERENCES = 8
"""Fields of the configuration that are shown, of those in which the runs differ; and scores on tasks."""
FIRST = ("run", "step", "state", "val loss", "loss", "bits/byte")
"""Columns that a narrow terminal shows before all others."""
LAST = ("tokens/s", "last written")
"""Those that it leaves out first."""
LONGEST_NAME = 40
MANY = 12
"""Runs whose names do not fit into the picture beside their curves."""


SETS = ("final_loss/", "val_loss/")
"""Begin the names of what a run says of one of its sources, or of a set it is validated on."""


@dataclass(frozen=True)
class Run:
    """A run's folder, as it is now."""

    name: str
    """The folder, below the one that was asked for."""
    folder: Path
    config: dict[str, Any]
    """Field → value."""
    records: list[Record]

    @property
    def step(self) -> int:
        """The last that is recorded."""
        return int(max((r["step"] for r in self.records), default=0))

    @property
    def written(self) -> float:
        """When a metric was last written, in seconds since the epoch."""
        return (self.folder / "metrics.jsonl").stat().st_mtime

    @cached_property
    def state(self) -> str:
        """How far it is."""
        try:
            done = json.loads((self.folder / RESULT).read_text())["step"] >= self.config.get("train.steps", 0)
        except (OSError, ValueError, KeyError, TypeError):
            done = False
        if done:
            return "finished"
        return f"{self.step / max(int(self.config.get('train.steps') or 1), 1):.0%}{', running' * self._at_work()}"

    def _at_work(self) -> bool:
        """Whether a process says that it trains here, and has given a sign of life."""
        try:
            found = (self.folder / LOCK).stat()
        except OSError:
            return False
        return found.st_size > 0 and time.time() - found.st_mtime < SILENT_SECONDS

    def curve(self, *keys: str) -> list[tuple[int, float]]:
        """(step, value) of the records that have one of the keys."""
        return [(int(r["step"]), float(r[k])) for r in self.records for k in keys if k in r]

    def last(self, *keys: str) -> float | None:
        """The last value of the first key that is recorded at all."""
        return next((self.curve(k)[-1][1] for k in keys if self.curve(k)), None)


def runs(options: Runs) -> None:
    """Print the table; write runs.png and runs.html.

    Raises:
        CheckpointError: there is no run below the folder.
    """
    found, unreadable = collect(options.folder)
    for problem in unreadable:
        print(f"WARNING: {problem}; this run is left out", file=sys.stderr)
    found.sort(key=_order(options.sort))
    columns, rows = table(found)
    left_out = show(columns, rows)
    if options.pictures:
        out = options.out or options.folder
        out.mkdir(parents=True, exist_ok=True)
        draw(found, out / "runs.png")
        write_text(out / "runs.html", page_of(options.folder, columns, rows, (out / "runs.png").read_bytes()))
        whole = "with the whole table" if left_out else "with the table"
        print(f"curves: {out / 'runs.png'}, and {whole}: {out / 'runs.html'}")


def show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Print as many columns as the terminal has room for, whole; all where there is no terminal and no COLUMNS.

    Returns:
        those that were left out.
    """
    widths = {
        name: max(cell_len(cell) for cell in column) + 3
        for name, column in zip(columns, zip(columns, *rows, strict=True), strict=True)
    }
    console = Console(highlight=False, markup=False)
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        widths[columns[0]] = min(widths[columns[0]], max(console.width // 3, 12), LONGEST_NAME)
    else:
        console.width = sum(widths.values()) + 1
    room, kept = console.width - 1, set()
    for name in sorted(columns, key=lambda c: FIRST.index(c) if c in FIRST else len(FIRST) + (c in LAST)):
        if widths[name] > room:
            break
        kept.add(name)
        room -= widths[name]
    kept |= set(columns[:2])
    shown = Table()
    for i, name in enumerate(columns):
        if name in kept:
            shown.add_column(name, justify="right" if i else "left", overflow="fold", max_width=widths[name] - 3)
    for row in rows:
        shown.add_row(*(cell for name, cell in zip(columns, row, strict=True) if name in kept))
    console.print(shown)
    left_out = [name for name in columns if name not in kept]
    if left_out:
        print(f"not shown, as the terminal is narrow: {', '.join(left_out)}")
    return left_out


def collect(folder: Path) -> tuple[list[Run], list[str]]:
    """The runs in and below a folder, by name: what has config.yaml and metrics.jsonl. And what is wrong with those that cannot be read.

    Raises:
        CheckpointError: there is none.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; name one with runs in it, or below it")
    found: list[Run] = []
    unreadable: list[str] = []
    for parent, folders, files in os.walk(folder):
        if {"config.yaml", "metrics.jsonl"} <= set(files):
            path = Path(parent)
            name = path.relative_to(folder).as_posix() if path != folder else folder.resolve().name
            name = "".join(c if ord(c) >= ord(" ") else "\N{REPLACEMENT CHARACTER}" for c in name)
            try:
                found.append(Run(name, path, _config(path / "config.yaml"), _records(path / "metrics.jsonl")))
            except (CheckpointError, OSError) as error:
                unreadable.append(str(error))
            folders[:] = [f for f in folders if f not in INSIDE]
        folders.sort()
    if not found:
        raise CheckpointError(
            "; ".join(unreadable)
            or f"there is no run in or below {folder}: no folder with config.yaml and metrics.jsonl"
        )
    return found, unreadable


def _config(path: Path) -> dict[str, Any]:
    try:
        content = strict_yaml.load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} cannot be read: it is no mapping of sections")
    return flat(content)


def _records(path: Path) -> list[Record]:
    records = read_metrics(path)
    for record in records:
        wrong = [key for key, value in record.items() if key not in WORDS and not isinstance(value, int | float)]
        if wrong:
            raise CheckpointError(f"{path} cannot be read: {wrong[0]} = {record[wrong[0]]!r} is no number")
    return records


def _order(sort: str) -> Any:
    def by_loss(run: Run) -> tuple[bool, float]:
        loss = run.last("final_loss", "val_loss")
        return loss is None or math.isnan(loss), loss or 0.0

    if sort == "loss":
        return by_loss
    return (lambda run: -run.written) if sort == "time" else (lambda run: run.name)


def table(found: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: how far, how good, how fast; the loss on each source or set; the scores on tasks; and the settings
    in which the runs differ."""
    names = dict.fromkeys(name for run in found for name in run.config)
    changed = [n for n in names if n not in PLACES and len({_text(r.config.get(n)) for r in found}) > 1]
    scored = list(dict.fromkeys(k for run in found for r in run.records for k in r if k.startswith(TASK)))
    scored = [key for key in scored if "_stderr" not in key][:MOST_DIFFERENCES]
    sets = list(
        dict.fromkeys(k.partition("/")[2] for run in found for r in run.records for k in r if k.startswith(SETS))
    )
    sets = sets[:MOST_DIFFERENCES]
    columns = ["run", "step", "state", "loss", "val loss", "bits/byte", "tokens/s", "last written"]
    rows = [
        [
            run.name,
            f"{run.step:,}",
            run.state,
            _number(run.last("loss")),
            _number(run.last("final_loss", "val_loss")),
            _number(run.last("final_bits_per_byte", "val_bits_per_byte")),
            f"{statistics.median(v for _, v in speed):,.0f}" if (speed := run.curve("tokens_per_s")) else "",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.written)),
            *(_number(run.last(*(f"{begin}{name}" for begin in SETS))) for name in sets),
            *(_number(run.last(key)) for key in scored),
            *(_text(run.config.get(n)) for n in changed[:MOST_DIFFERENCES]),
        ]
        for run in found
    ]
    columns += [f"val loss, {name}" for name in sets]
    return [*columns, *(key.removeprefix(TASK) for key in scored), *changed[:MOST_DIFFERENCES]], rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def draw(found: Sequence[Run], path: Path) -> None:
    """Training losses thin, validation losses with dots; one colour for a run. Of runs whose curves are equal all are seen: the first is
    drawn through, the others are dashed over it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    colours = plt.get_cmap("tab20" if len(found) > 10 else "tab10")
    drawn: list[tuple[list[tuple[int, float]], list[tuple[int, float]]]] = []
    for i, run in enumerate(found):
        colour = colours(i % colours.N)
        training, validation = run.curve("loss"), run.curve("val_loss", "final_loss")
        below = sum(alike(training, t) and alike(validation, v) for t, v in drawn if training or validation)
        drawn.append((training, validation))
        style: dict[str, Any] = {"color": colour, "ls": (0, (4, 4 * below)) if below else "-"}
        if training:
            dot = "." if len(training) == 1 else ""
            axes.plot(*zip(*training, strict=True), marker=dot, lw=0.8, alpha=1.0 if below else 0.5, **style)
        if validation:
            axes.plot(*zip(*validation, strict=True), lw=1.8, marker="o", ms=3 - below / (1 + below), **style)
        if training or validation:
            axes.plot([], [], label=_legend(run.name), **style)
    axes.set(xlabel="step", ylabel="loss (nats per token); dots: validation")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if axes.lines and len(found) > MANY:
        figure.legend(fontsize="x-small", loc="outside right upper", ncols=1 + len(found) // 40)
    elif axes.lines:
        axes.legend(fontsize="small")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the page has the names as text
        figure.savefig(path, dpi=120)
    plt.close(figure)


def alike(a: Sequence[tuple[int, float]], b: Sequence[tuple[int, float]]) -> bool:
    """Whether one curve, of (step, value), would hide the other, as far as both go: they differ by less than 0.2%."""
    other = dict(b)
    both = [(value, other[step]) for step, value in a if step in other]
    return len(both) >= min(len(a), len(b)) and all(math.isclose(x, y, rel_tol=2e-3) for x, y in both)


def _legend(name: str) -> str:
    """A name as matplotlib shows it: `$` is no formula, and one that begins with `_` is not left out."""
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME // 2]}…{name[-LONGEST_NAME // 2 :]}"
    return " " * name.startswith("_") + name.replace("$", r"\$")


def page_of(folder: Path, columns: Sequence[str], rows: Sequence[Sequence[str]], png: bytes) -> str:
    """The table and the picture as a page."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values)

    title = f"Runs in {folder if folder.name else folder.resolve()}"
    lines = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return page(
        title,
        f"<h1>{html.escape(title)}</h1>\n<p>{len(rows)} run{'s' * (len(rows) != 1)}, {time.strftime('%Y-%m-%d %H:%M')}.</p>\n"
        f'<div class="wide"><table>\n<thead><tr>{cells("th", columns)}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table></div>\n'
        f"<p>{picture(png, 'Loss of each run over its steps')}</p>",
    )
