"""`anon-dist runs`: the runs below a folder, side by side, in a table, a picture and a page that is one file."""

from __future__ import annotations

import html
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from anon_dist.checkpoint import CheckpointError
from anon_dist.files import write_text
from anon_dist.page import page, picture
from anon_dist.train import strict_yaml
from anon_dist.train.config import flat
from anon_dist.train.metrics import TASK, Record, read_metrics
from anon_dist.train.report import RESULT
from anon_dist.trained.options import Runs

INSIDE = ("checkpoints", "model", "tensorboard")
"""Folders of a run in which no other run lies."""
PLACES = ("run_dir", "resume")
MOST_DIFFERENCES = 8
"""Fields of the configuration that are shown, of those in which the runs differ; and scores on tasks."""


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
        return "finished" if done else f"{self.step / max(int(self.config.get('train.steps') or 1), 1):.0%}"

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
    shown = Table(*columns[:1])
    for column in columns[1:]:
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(*row)
    Console(highlight=False, markup=False).print(shown)
    if options.pictures:
        out = options.out or options.folder
        out.mkdir(parents=True, exist_ok=True)
        draw(found, out / "runs.png")
        write_text(out / "runs.html", page_of(options.folder, columns, rows, (out / "runs.png").read_bytes()))
        print(f"curves: {out / 'runs.png'}, and with the table: {out / 'runs.html'}")


def collect(folder: Path) -> tuple[list[Run], list[str]]:
    """The runs in and below a folder, by name: what has config.yaml and metrics.jsonl. And what is wrong with those that cannot be read.

    Raises:
        CheckpointError: there is none.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder")
    found: list[Run] = []
    unreadable: list[str] = []
    for parent, folders, files in os.walk(folder):
        if {"config.yaml", "metrics.jsonl"} <= set(files):
            path = Path(parent)
            name = path.relative_to(folder).as_posix() if path != folder else folder.resolve().name
            try:
                found.append(Run(name, path, _config(path / "config.yaml"), read_metrics(path / "metrics.jsonl")))
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
    return flat(content) if isinstance(content, dict) else {}


def _order(sort: str) -> Any:
    if sort == "loss":
        return lambda run: (run.last("final_loss", "val_loss") is None, run.last("final_loss", "val_loss"))
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
    """Training losses thin, validation losses with dots; one colour for a run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    colours = plt.get_cmap("tab20" if len(found) > 10 else "tab10")
    for i, run in enumerate(found):
        colour = colours(i % colours.N)
        training, validation = run.curve("loss"), run.curve("val_loss", "final_loss")
        if training:
            axes.plot(*zip(*training, strict=True), "." * (len(training) == 1) + "-", lw=0.8, alpha=0.5, color=colour)
        if validation:
            axes.plot(*zip(*validation, strict=True), lw=1.8, marker="o", ms=3, color=colour)
        if training or validation:
            axes.plot([], [], color=colour, label=run.name.replace("$", r"\$"))
    axes.set(xlabel="step", ylabel="loss (nats per token); dots: validation")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def page_of(folder: Path, columns: Sequence[str], rows: Sequence[Sequence[str]], png: bytes) -> str:
    """The table and the picture as a page."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values)

    title = f"Runs in {folder}"
    lines = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return page(
        title,
        f"<h1>{html.escape(title)}</h1>\n<p>{len(rows)} run{'s' * (len(rows) != 1)}, {time.strftime('%Y-%m-%d %H:%M')}.</p>\n"
        f'<div class="wide"><table>\n<thead><tr>{cells("th", columns)}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table></div>\n'
        f"<p>{picture(png, 'Loss of each run over its steps')}</p>",
    )
