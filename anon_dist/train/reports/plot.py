"""The loss curve as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anon_dist.train.reports.metrics import Record


def plot_loss(path: Path, records: list[Record], levels: dict[str, float], title: str) -> None:
    """Training and validation loss over the steps, the latter of each set too, as a PNG.

    Args:
        levels: losses to compare with, drawn as horizontal lines: label → nats per token.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    each = dict.fromkeys(key for r in records for key in r if key.startswith("val_loss/"))
    lines: list[tuple[str, str, dict[str, Any]]] = [
        ("loss", "training", {"lw": 0.8, "alpha": 0.6}),
        ("val_loss", "validation", {"lw": 2, "marker": "o", "ms": 3}),
        *((key, key.partition("/")[2].replace("$", r"\$"), {"lw": 1, "marker": ".", "ms": 3}) for key in each),
    ]
    for key, label, style in lines:
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    for (label, value), color in zip(levels.items(), ("tab:gray", "tab:red", "tab:purple"), strict=False):
        axes.axhline(value, ls="--", lw=1, color=color, label=f"{label}: {value:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
