"""What `step.py` measured, as tables and as a picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from anon_dist.bench.optimizers import BASE
from anon_dist.bench.step_result import MEAN_STEPS, Measured, Result

Points = list[tuple[float, list[float]]]


def show(result: Result) -> None:
    """Print it."""
    console = Console(highlight=False, markup=False)
    for measured in result.lists:
        _show_list(console, measured)
    console.print(f"{result.machine.line()}; medians and quartiles of {result.repeats} repeats of {result.pairs} pairs")


def _show_list(console: Console, measured: Measured) -> None:
    titles = (
        "optimizer",
        "step",
        f"time / {BASE}",
        "quartiles",
        "ms",
        "GB/s",
        "of the stream",
        "state B/elem",
        "peak B/elem",
    )
    table = Table(title=f"{measured.name}: {measured.tensors} tensors, {measured.elements:,} elements")
    for i, title in enumerate(titles):
        table.add_column(title, justify="left" if i < 2 else "right")
    shown = set[str]()
    for row in measured.rows:
        first = row.optimizer not in shown
        shown.add(row.optimizer)
        low, middle, high = row.ratio
        table.add_row(
            row.optimizer if first else "",
            row.step,
            f"{middle:.3f}",
            f"{low:.3f}–{high:.3f}",
            f"{row.milliseconds[1]:.2f}",
            f"{row.gb_per_s:.1f}",
            "" if row.stream_share is None else f"{row.stream_share:.2f}",
            _number(measured.state_bytes.get(row.optimizer)) if first else "",
            _number(measured.peak_bytes.get(row.optimizer)) if first else "",
        )
    console.print(table)
    if measured.means:
        columns = sorted({(m.schedule, m.steps) for m in measured.means})
        table = Table(title="mean over a run's steps, time / " + BASE)
        table.add_column("optimizer")
        for schedule, steps in columns:
            table.add_column(f"{schedule}, {steps:,} steps", justify="right")
        for name in dict.fromkeys(m.optimizer for m in measured.means):
            cells = {(m.schedule, m.steps): m.ratio for m in measured.means if m.optimizer == name}
            table.add_row(name, *("{1:.3f} ({0:.3f}–{2:.3f})".format(*cells[c]) for c in columns))
        console.print(table)
    for name, reason in measured.unavailable.items():
        console.print(f"{name}: not measured, {reason}", soft_wrap=True)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def series(result: Result) -> dict[str, Points]:
    """What is drawn: optimizer → (elements, quartiles of the ratio). Of Anon, the mean of the preset's schedule over the first steps."""
    drawn: dict[str, Points] = {}
    for measured in result.lists:
        means = {
            m.optimizer: m for m in measured.means if m.steps == MEAN_STEPS[0]
        }  # the last schedule is the preset's
        for row in measured.rows:
            mean = means.get(row.optimizer)
            if row.optimizer in measured.state_bytes and (mean is None or row.step == "plain"):
                drawn.setdefault(row.optimizer, []).append((measured.elements, mean.ratio if mean else row.ratio))
    return drawn


def plot(result: Result, path: Path) -> None:
    """The ratios with their quartiles, as a PNG: one below the other, or over the number of elements if there are several lists."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    drawn = {label: sorted(points) for label, points in series(result).items() if label != BASE}
    averaged = {mean.optimizer: mean for measured in result.lists for mean in measured.means}
    single = len(result.lists) == 1
    figure, axes = plt.subplots(figsize=(10, 2 + 0.4 * len(drawn) if single else 6), layout="constrained")
    for i, (label, points) in enumerate(drawn.items()):
        ours = label in averaged
        middles = [q[1] for _, q in points]
        whiskers = [[q[1] - q[0] for _, q in points], [q[2] - q[1] for _, q in points]]
        color = plt.get_cmap("tab20")(i % 20)
        style = {"marker": "o" if ours else "s", "ms": 5, "capsize": 3, "color": color}
        if single:
            axes.errorbar(middles, [i], xerr=whiskers, **{**style, "color": "tab:blue" if ours else "tab:gray"})
            axes.annotate(
                f"{middles[0]:.2f}", (middles[0], i), xytext=(0, 6), textcoords="offset points", ha="center", size=8
            )
        else:
            axes.errorbar(
                [n for n, _ in points], middles, yerr=whiskers, ls="-" if ours else "--", label=label, **style
            )
    title = "Time of an optimizer's step: median and quartiles"
    if averaged:  # the last schedule is the preset's
        title += f"\ncircles: mean over the first {MEAN_STEPS[0]:,} steps, {next(reversed(averaged.values())).schedule}"
    axis = axes.xaxis if single else axes.yaxis
    (axes.set_xscale if single else axes.set_yscale)("log")
    (axes.axvline if single else axes.axhline)(1.0, color="black", lw=1)
    axis.set_major_locator(mpl.ticker.LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())
    if single:
        axes.set_yticks(range(len(drawn)), list(drawn))
        axes.set_ylim(len(drawn) - 0.4, -0.8)
        axes.set_xlabel(f"time / {BASE}; {result.lists[0].name}")
    else:
        axes.set(xscale="log", xlabel="elements", ylabel=f"time / {BASE}")
        figure.legend(loc="outside right upper", fontsize=8)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3, which="both")
    figure.text(0.01, -0.02, result.machine.line(), fontsize=7, va="top")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
