"""A sweep in pictures. Colours are told apart by colour-blind eyes (viridis for ordered values, black for AdamW), and never alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from anon_dist.sweep.grid import short, show
from anon_dist.sweep.results import Results, Setting, Spread, paired
from anon_dist.train.reports.metrics import Record

LR = "optim.lr"
MARKERS = "oD^vP*X<>ph"
DODGE = 0.012
"""Lines are set apart sideways by this share of the learning rate, so that their error bars can be told apart."""
MOST_LINES = 12
LOSS = "validation loss (nats per token)"


def draw_all(results: Results, folder: Path) -> list[tuple[str, str]]:
    """Draw what there is to draw.

    Returns:
        (file name, caption) of each picture; none while no cell has a validation loss.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update(
        {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    )
    drawn = []
    if any(s.losses for s in results.settings):
        if any(s.cell.lr is not None for s in results.settings):
            drawn.append(("lr.png", _by_lr(results, folder / "lr.png")))
        for field, values in results.axes.items():
            numbers = [v for v in values if isinstance(v, int | float)]
            if field != LR and len(numbers) > 1:
                name = f"{short(field)}.png"
                drawn.append((name, _by_field(results, field, folder / name)))
    if any("val_loss" in r for s in results.settings for f in s.folders for r in f.metrics()):
        drawn.append(("curves.png", _curves(results, folder / "curves.png")))
    return drawn


# -- loss against learning rate ---------------------------------------------------------------------------------------


def _by_lr(results: Results, path: Path) -> str:
    figure, axes = _figure(8.5, 5.2)
    lines = _lines(results)
    highest = _ceiling(results)
    for i, (label, settings, style) in enumerate(lines):
        points, bad = [], []
        for lr, group in sorted(_grouped(settings, lambda s: s.cell.lr).items()):
            best = results.best(group)
            if best and best.loss:
                points.append((lr, best.loss.mean, best.loss.error or 0.0))
            elif any(s.states["failed"] or s.states["stopped"] for s in group):
                bad.append(lr)
        if points:
            x, y, error = zip(*points, strict=True)
            x = tuple(lr * (1.0 + DODGE * (i - (len(lines) - 1) / 2)) for lr in x)
            axes.errorbar(x, y, error, label=label, capsize=3, lw=1.6, ms=6, **style)
        for lr in (lr * (1.0 + DODGE * (i - (len(lines) - 1) / 2)) for lr in bad):
            axes.plot([lr], [highest], ls="none", marker="x", ms=8, mew=2, color=style["color"], clip_on=False)
            axes.annotate(
                label.split(" = ")[-1], (lr, highest), (0, 7 + 9 * (i % 3)), textcoords="offset points", ha="center", size=7,
                color=style["color"],
            )  # fmt: skip
    if any(s.states["failed"] or s.states["stopped"] for s in results.settings):
        axes.plot([], [], ls="none", marker="x", ms=8, mew=2, color="0.4", label="a seed failed or was stopped")
    matched = any(s.cell.factor != 1.0 for s in results.settings)
    axes.set(
        xscale="log",
        xlabel="learning rate" + (" at γ = 1 (times the factor of each γ)" if matched else ""),
        ylabel=LOSS,
    )
    rates = sorted({s.cell.lr for s in results.settings if s.cell.lr is not None})
    if len(rates) <= 10:
        axes.set_xticks(rates, [f"{lr:g}" for lr in rates])
        axes.minorticks_off()
    _legend(axes, len(lines))
    _save(figure, path)
    rest = [short(a) for a in results.axes if a not in (LR, "optim.gamma")]
    also = f", at the best {' and '.join(rest)} for each" if rest and "optim.gamma" in results.axes else ""
    return f"Loss against learning rate, mean and standard error over seeds{also}. Crosses at the top: no result there."


def _lines(results: Results) -> list[tuple[str, list[Setting], dict[str, Any]]]:
    """(label, settings, style): one for each γ; without several γ, one for each combination of the other settings."""
    anon = results.of("anon")
    if "optim.gamma" in results.axes:
        groups = {f"γ = {show(v)}": g for v, g in sorted(_grouped(anon, lambda s: s.cell.gamma).items())}
    else:
        groups = dict(_grouped(anon, lambda s: f"Anon {s.other(LR)}".strip()))
        ranked = sorted(groups, key=lambda k: _level(results.best(groups[k])))[:MOST_LINES]
        groups = {k: g for k, g in groups.items() if k in ranked}
    found = [(label, g, _style(i, len(groups))) for i, (label, g) in enumerate(groups.items())]
    if adamw := results.of("adamw"):
        found.append(("AdamW", adamw, {"color": "black", "marker": "s", "ls": "--"}))
    return found


# -- loss against another field ---------------------------------------------------------------------------------------


def _by_field(results: Results, field: str, path: Path) -> str:
    from matplotlib import pyplot as plt

    symbol = "γ" if field == "optim.gamma" else short(field)
    best = {v: s for v, s in results.best_by(field).items() if isinstance(v, int | float)}
    adamw = results.best(results.of("adamw"))
    wide, width = (2, 14.0) if adamw else (1, 8.5)
    figure, panels = plt.subplots(1, wide, figsize=(width, 5.0), layout="constrained", squeeze=False)
    axes = panels[0][0]
    points = [(v, s, s.loss) for v, s in best.items() if s and s.loss]
    _errorbars(axes, [(v, loss, s.losses.values()) for v, s, loss in points])
    for v, s, loss in points:
        said = f"lr {s.cell.lr:g}" if s.cell.lr is not None else ""
        said += " (edge)" if results.at_edge(s) else ""
        said += f"\n{loss.count} of {len(s.folders)} seeds" if loss.count < len(s.folders) else ""
        box = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8}
        right = v < max(best)
        place: dict[str, Any] = {"xytext": (8 if right else -8, 8), "ha": "left" if right else "right"}
        axes.annotate(said.strip(), (v, loss.mean), textcoords="offset points", size=8, bbox=box, zorder=4, **place)
    if adamw and adamw.loss:
        rate = f", lr {adamw.cell.lr:g}" if adamw.cell.lr is not None else ""
        axes.axhline(adamw.loss.mean, color="black", ls="--", lw=1.4, label=f"AdamW{rate}")
        if adamw.loss.error:
            low, high = adamw.loss.mean - adamw.loss.error, adamw.loss.mean + adamw.loss.error
            axes.axhspan(low, high, color="black", alpha=0.12, lw=0, label="AdamW ± standard error")
        difference = panels[0][1]
        _errorbars(difference, [(v, d, _differences(s, adamw)) for v, s, _ in points if (d := paired(s, adamw))])
        difference.axhline(0.0, color="black", ls="--", lw=1.4)
        difference.set(title="the same, minus AdamW's with the same seed", ylabel="loss − AdamW's (nats per token)")
    for panel in panels[0]:
        missing = [v for v, s in best.items() if s is None]
        for i, v in enumerate(missing):
            panel.axvline(v, color="#D55E00", ls=":", lw=1.5, label=None if i else "none finished with every seed")
        panel.margins(x=0.1, y=0.15)
        panel.set(xlabel="adaptivity γ" if symbol == "γ" else symbol, xticks=sorted(best))
    axes.set(ylabel=LOSS)
    axes.legend(frameon=False, fontsize=9)
    _save(figure, path)
    rest = " and other settings" if len(results.axes.keys() - {field, LR}) else ""
    return f"Loss against {symbol}, each at its best learning rate{rest}."


def _errorbars(axes: Any, points: Sequence[tuple[float, Spread, Iterable[float]]]) -> None:
    """Mean and standard error, and the single seeds, at each place."""
    if not points:
        return
    x, means, errors = [v for v, *_ in points], [d.mean for _, d, _ in points], [d.error or 0.0 for _, d, _ in points]
    style = {"color": "#0072B2", "marker": "o", "ms": 7, "capsize": 4, "lw": 1.8, "zorder": 3}
    axes.errorbar(x, means, errors, label="Anon, mean and standard error", **style)
    seeds = [(v, one) for v, spread, ones in points if spread.count > 1 for one in ones]
    if seeds:
        look = {"s": 22, "color": "#56B4E9", "edgecolor": "white", "lw": 0.5, "zorder": 4}
        axes.scatter(*zip(*seeds, strict=True), label="single seeds", **look)


def _differences(a: Setting, b: Setting) -> list[float]:
    return [a.losses[seed] - b.losses[seed] for seed in a.losses.keys() & b.losses.keys()]


# -- curves -----------------------------------------------------------------------------------------------------------


def _curves(results: Results, path: Path) -> str:
    from matplotlib import pyplot as plt

    figure, (loss, spread, largest) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    for label, settings, style in _lines(results):
        setting = results.best(settings) or _furthest(settings)
        if setting is None:
            continue
        style = {**style, "lw": 1.6, "ms": 4}
        rate = f", lr {setting.cell.lr:g}" if setting.cell.lr is not None else ""
        ended = "" if setting.ranked else f" ({setting.summary()})"
        runs = [f.metrics() for f in setting.folders]
        loss.plot(*_mean_over(runs, "val_loss"), label=f"{label}{rate}{ended}", **style)
        for axes, key, unit in ((spread, "precond_spread/0", 1.0), (largest, "update_max", setting.cell.factor)):
            x, y = _mean_over(runs, key)
            if x:
                axes.plot(x, [unit * value for value in y], markevery=max(1, len(x) // 8), **style)
    loss.set(title="validation loss", xlabel="step", ylabel=LOSS)
    values = [y for line in loss.lines for y in line.get_ydata()]
    if values:
        low, high = min(values), sorted(values)[int(0.85 * (len(values) - 1))]
        span = (high - low) or 0.1
        loss.set_ylim(low - 0.05 * span, high + 0.15 * span)
    spread.set(title="preconditioner spread, matrices", xlabel="step", ylabel="standard deviation of log2 v")
    unit_of = "× factor of γ" if any(s.cell.factor != 1.0 for s in results.settings) else "(unit depends on γ)"
    largest.set(
        title="largest |v · m̂|, before the clip", xlabel="step", yscale="log", ylabel=f"largest |v · m̂| {unit_of}"
    )
    figure.legend(*loss.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    _save(figure, path)
    return (
        "Each line at its best learning rate, mean over seeds. The spread is that of the first param group (matrices, or embeddings where "
        "these have one): 0 means one learning rate for all. The first steps of the loss may lie above the picture."
    )


def _mean_over(runs: Sequence[Sequence[Record]], key: str) -> tuple[list[int], list[float]]:
    """Steps that all runs have, and the mean there; non-finite values are left out."""
    values: dict[int, list[float]] = defaultdict(list)
    for records in runs:
        for record in records:
            if math.isfinite(record.get(key, math.nan)):
                values[int(record["step"])].append(float(record[key]))
    most = max(map(len, values.values()), default=0)
    steps = sorted(step for step, found in values.items() if len(found) == most)
    return steps, [mean(values[step]) for step in steps]


def _furthest(settings: Sequence[Setting]) -> Setting | None:
    """The one whose runs came furthest, where none is ranked."""
    steps = {i: sum(r[-1]["step"] for f in s.folders if (r := f.metrics())) for i, s in enumerate(settings)}
    i = max(steps, key=lambda i: steps[i], default=None)
    return settings[i] if i is not None and steps[i] else None


# -- common -----------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=130, format="png")
    temporary.replace(path)
    plt.close(figure)


def _legend(axes: Any, lines: int) -> None:
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=1 + lines // 16)


def _style(i: int, count: int) -> dict[str, Any]:
    import matplotlib as mpl

    shade = mpl.colormaps["viridis"](0.87 * i / max(1, count - 1))
    return {"color": shade, "marker": MARKERS[i % len(MARKERS)]}


def _grouped(settings: Sequence[Setting], key: Callable[[Setting], Any]) -> dict[Any, list[Setting]]:
    groups: dict[Any, list[Setting]] = defaultdict(list)
    for setting in settings:
        if key(setting) is not None:
            groups[key(setting)].append(setting)
    return groups


def _ceiling(results: Results) -> float:
    """Where crosses stand: above all that is drawn."""
    means = [s.loss.mean for s in results.settings if s.loss and s.ranked]
    if not means:
        means = [s.loss.mean for s in results.settings if s.loss]
    return max(means) + 0.08 * (max(means) - min(means) or 1.0)


def _level(setting: Setting | None) -> float:
    return setting.loss.mean if setting and setting.loss else math.inf
