"""A sweep as a Markdown page with pictures, as a page that is one file, and as a table for programs; at any time, of what is there."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from anon_dist.page import page, picture
from anon_dist.sweep.cells import CellFolder
from anon_dist.sweep.grid import OWN_GAMMAS, short, show
from anon_dist.sweep.plots import LR, draw_all
from anon_dist.sweep.results import Results, Setting, Spread, paired
from anon_dist.train.config.parsing import ConfigError

NAMES = {"anon": "Anon", "adamw": "AdamW"}


def write_report(sweep: Path) -> Path:
    """Write `report.md`, its pictures, `report.html` with all of it in one file, and `cells.csv`, a row for each cell, into the folder.

    Returns:
        `report.md`.

    Raises:
        ConfigError: it is no sweep's folder.
    """
    if not (sweep / "sweep.json").exists():
        raise ConfigError(f"{sweep} is no sweep's folder: it has no sweep.json")
    record = json.loads((sweep / "sweep.json").read_text())
    results = Results.read(sweep)
    pictures = draw_all(results, sweep)
    parts = [
        f"# Sweep {sweep.resolve().name}",
        _state(results),
        _best(results),
        *(f"![{caption}]({name})\n\n{caption}" for name, caption in pictures),
        _all(results),
        _not_results(results),
        _how(record, results),
    ]
    _replace(sweep / "cells.csv", _rows(results))
    text = "\n\n".join(part for part in parts if part) + "\n"
    _replace(sweep / "report.html", _html(text, sweep, dict(pictures)))
    _replace(sweep / "report.md", text)
    return sweep / "report.md"


def _html(text: str, sweep: Path, pictures: dict[str, str]) -> str:
    """The Markdown as a page. Of HTML in it only our own `details` counts: settings and logs are text."""
    import markdown

    reader = markdown.Markdown(extensions=["tables", "fenced_code", "sane_lists"])
    reader.preprocessors.deregister("html_block")
    reader.inlinePatterns.deregister("html")
    body = reader.convert(text)
    body = re.sub(
        r"<p>&lt;details&gt;&lt;summary&gt;(.*?)&lt;/summary&gt;</p>", r"<details><summary>\1</summary>", body
    )
    body = body.replace("<p>&lt;/details&gt;</p>", "</details>")
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    for name, caption in pictures.items():
        png = (sweep / name).read_bytes()
        body = re.sub(rf'<img [^>]*src="{re.escape(name)}"[^>]*>', lambda _, png=png, c=caption: picture(png, c), body)  # type: ignore[misc]
    return page(f"Sweep {sweep.resolve().name}", body)


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(text)
    temporary.replace(file)


def _rows(results: Results) -> str:
    """A line for each cell. Settings are as the grid has them; `factor` is what the learning rate was multiplied by."""
    fields = _fields(results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    sets = _sets(results)
    losses = [f"loss/{name}" for name in sets]
    writer.writerow(["optimizer", *fields, "factor", "seed", "state", "step", "loss", "bits_per_byte", *losses])
    for folder in results.folders:
        cell, outcome = folder.cell, folder.outcome
        settings = [show(cell.settings[f]) if f in cell.settings else "" for f in fields]
        loss, bits = (outcome.loss, outcome.bits_per_byte) if outcome else (None, None)
        ended = [cell.seed, folder.state, outcome.step if outcome else _step(folder), loss, bits]
        ended += [folder.by_set().get(name) for name in sets]
        writer.writerow([cell.optimizer, *settings, f"{cell.factor:.6g}", *ended])
    return text.getvalue()


def _fields(results: Results) -> list[str]:
    """What the grid sets."""
    return list(dict.fromkeys(name for s in results.settings for name in s.cell.settings))


def _sets(results: Results) -> list[str]:
    """Sources and sets that cells were validated on, each by itself."""
    return list(dict.fromkeys(name for folder in results.folders for name in folder.by_set()))


def _state(results: Results) -> str:
    counts = Counter(f.state for f in results.folders)
    said = ", ".join(f"{n} {state}" for state, n in counts.most_common())
    return f"{len(results.folders)} cells: {said}. Losses are on the validation split (eval.final_sequences of it), nats per token."


def _best(results: Results) -> str:
    """The best setting of AdamW, and of Anon for each γ."""
    rows, adamw, anon = [], results.best(results.of("adamw")), results.best(results.of("anon"))
    if results.of("adamw"):
        rows.append(_best_row("AdamW", "", adamw, None, results))
    by_gamma = results.best_by("optim.gamma")
    for gamma, setting in by_gamma.items():
        rows.append(_best_row("Anon", "" if gamma is None else show(gamma), setting, adamw, results, setting is anon))
    head = [
        "optimizer",
        "γ",
        "learning rate",
        "other settings",
        "loss",
        "seeds",
        "bits per byte",
        "minus AdamW, by seed",
    ]
    notes = [
        "Each at its best learning rate and other settings, mean ± standard error over seeds; the lowest is bold. The minimum of several "
        "noisy means flatters. Seeds share their data order across settings, so the last column's standard error is what to judge by: "
        "a difference within about two of them is none."
    ]
    edges = [s for s in (adamw, *by_gamma.values()) if s and results.at_edge(s)]
    if edges:
        names = ", ".join(
            f"γ = {show(s.cell.gamma)}" if s.cell.gamma is not None else NAMES[s.cell.optimizer] for s in edges
        )
        notes.append(
            f"(edge): the best learning rate is the lowest or highest that was tried: extend the grid for {names} before believing it."
        )
    return "## Best\n\n" + _table(head, rows) + "\n\n" + "\n\n".join(notes)


def _best_row(
    name: str, gamma: str, setting: Setting | None, adamw: Setting | None, results: Results, strong: bool = False
) -> list[str]:
    if setting is None or setting.loss is None:
        return [name, gamma, "", "", "no setting that finished without a failed or stopped seed", "", "", ""]
    difference = paired(setting, adamw) if adamw else None
    loss = f"**{setting.loss}**" if strong else str(setting.loss)
    return [
        name,
        gamma,
        _rate(setting) + (" (edge)" if results.at_edge(setting) else ""),
        setting.other(LR, "optim.gamma"),
        loss,
        f"{len(setting.losses)} of {len(setting.folders)}",
        f"{setting.bits_per_byte:.4f}" if setting.bits_per_byte is not None else "",
        f"{difference.mean:+.4f}" + (f" ± {difference.error:.4f}" if difference.error is not None else "")
        if difference
        else "",
    ]


def _rate(setting: Setting) -> str:
    lr, factor = setting.cell.lr, setting.cell.factor
    if lr is None:
        return ""
    return f"{lr:g}" + (f" × {factor:g} = {lr * factor:.3g}" if factor != 1.0 else "")


def _all(results: Results) -> str:
    """Every setting."""
    fields, sets, rows = _fields(results), _sets(results), []
    for s in results.settings:
        values = [_rate(s) if f == LR else show(s.cell.settings[f]) if f in s.cell.settings else "" for f in fields]
        loss = "" if s.loss is None else str(s.loss) if s.ranked else f"({s.loss})"
        found = [folder.by_set() for folder in s.folders]
        each = [str(Spread.of(have)) if (have := [f[name] for f in found if name in f]) else "" for name in sets]
        rows.append([NAMES[s.cell.optimizer], *values, loss, *each, s.summary()])
    head = ["optimizer", *(short(f) for f in fields), "loss", *(f"loss, {name}" for name in sets), "cells"]
    return (
        "## All settings\n\n"
        + _table(head, rows)
        + "\n\nIn parentheses: the mean of the seeds that finished where another failed or was "
        "stopped; not a candidate for the best."
    )


def _not_results(results: Results) -> str:
    """Cells without a result, and why."""
    rows, tails = [], []
    for folder in results.folders:
        state, outcome = folder.state, folder.outcome
        if state == "finished":
            continue
        rows.append(
            [folder.cell.setting, str(folder.cell.seed), state, str(_step(folder)), outcome.reason if outcome else ""]
        )
        if outcome and outcome.log_tail:
            tails.append(
                f"<details><summary>{folder.cell.setting} seed={folder.cell.seed}: end of its log</summary>\n\n"
                f"```\n{outcome.log_tail}\n```\n\n</details>"
            )
    if not rows:
        return ""
    page = "## Cells without a result\n\n" + _table(["cell", "seed", "state", "step", "why"], rows)
    return "\n\n".join(
        [page, "Unfinished cells run now or were interrupted; the same command goes on with them.", *tails]
    )


def _step(folder: CellFolder) -> int:
    records = folder.metrics()
    return int(records[-1]["step"]) if records else 0


def _how(record: dict[str, Any], results: Results) -> str:
    """What it takes to do it again."""
    lines = ["## How this was run", ""]
    for entry in record["commands"]:
        room, versions = entry["room"], ", ".join(f"{k} {v}" for k, v in entry["versions"].items())
        where = f"on devices {', '.join(room['devices'])}" if room["devices"] else f"of {room['threads']} threads"
        lines += [
            f"- {entry['time']}: `{entry['command']}`",
            f"  on {entry['machine']}; {versions}; {room['parallel']} runs at a time {where}",
        ]
    if record["match_rms"]:
        factors = {s.cell.gamma: s.cell.factor for s in results.of("anon")}
        said = ", ".join(f"{f:g}" + (f" at γ = {show(g)}" if g is not None else "") for g, f in factors.items())
        fields = {f"optim.{k}" for k, v in record["config"]["optim"].items() if v}
        if not fields.union(*(s.cell.settings for s in results.settings)).isdisjoint(OWN_GAMMAS):
            said = "a factor for each param group (lr_factor/i in metrics.jsonl)"
        lines += [
            "",
            f"Learning rates are multiplied by {said}, which keeps the root mean square of γ = 1's steps, measured in "
            f"{record['match_rms']}; update_clip and weight_decay are divided by it.",
        ]
    config = yaml.safe_dump(record["config"], sort_keys=False)
    return "\n".join(
        [*lines, "", f"Corpus: fingerprint {record['corpus']}. What all cells share:", "", f"```yaml\n{config}```"]
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; columns that are empty throughout are left out."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [
        [head[i] for i in kept],
        ["---"] * len(kept),
        *([row[i].replace("|", "\\|") for i in kept] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
