"""What the studies of the paper's claims share: optimizers by name, many small trainings in one, learning rates, tables and plots."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from anon_dist import Anon
from anon_dist.optim.matching import Spectrum

GAMMAS = tuple(i / 4 for i in range(-2, 7))
"""−0.5, −0.25, … 1.5."""

HALF_DECADE = 10.0**0.5
PAPER, PACKAGE = "Anon, the paper's settings", "Anon, ρ=1.1, β3=0.8, clip"
"""Families of recipes that differ in γ alone. The package's are as in its language-model presets."""


@dataclass(frozen=True)
class Recipe:
    """An optimizer by name."""

    name: str
    make: Callable[[Any], Optimizer]
    """From param groups, each with its learning rate."""
    gamma: float | None = None
    """Anon's γ."""
    family: str = ""
    unit: float = 1.0
    """The γ whose unit the learning rate has."""
    scale: float = 1.0
    """Where to look for the learning rate, relative to that of Anon at `unit`."""
    clip: float | None = None
    """Anon's update_clip, in the unit of γ = 1."""

    def fitted(self, gradients: Iterable[Tensor], lr: float = 1e-3) -> tuple[Recipe, float]:
        """This recipe with its clip in γ's unit, and where to look for its learning rate: steps of the size that `lr` gives at γ = 1.

        Args:
            gradients: of each tensor for some batches at the start, [batches, …].
        """
        spectrum = Spectrum()
        for g in gradients:
            spectrum.add(g.square().mean(0) + 1e-16, g.mean(0))
        factor = spectrum.lr_factor(self.unit, self.clip)
        make = self.make if self.clip is None else partial(self.make, update_clip=self.clip / factor)
        return replace(self, make=make), lr * factor * self.scale


def anon(gamma: float) -> Recipe:
    """Anon at this γ; the paper's settings but for `hold_silent` at γ < 0 (see its docstring)."""
    return Recipe(f"Anon γ={gamma:g}", partial(Anon, gamma=gamma, hold_silent=gamma < 0.0), gamma, PAPER, unit=gamma)


def steady(gamma: float) -> Recipe:
    """Anon with more frequent refreshes, averaged over more of them, and a clip of 1."""
    make = partial(Anon, gamma=gamma, refresh_ratio=1.1, beta3=0.8, hold_silent=gamma < 0.0)
    return Recipe(f"Anon γ={gamma:g}, ρ=1.1, β3=0.8, clip", make, gamma, PACKAGE, unit=gamma, clip=1.0)


def torch_recipes() -> list[Recipe]:
    """The baselines that torch has."""
    return [
        Recipe("SGD, momentum 0.9", partial(SGD, momentum=0.9), unit=0.0, scale=0.1),
        Recipe("Adam", Adam),
        Recipe("AdamW, decay 0.01", partial(AdamW, weight_decay=0.01)),
        Recipe("AMSGrad", partial(Adam, amsgrad=True)),
    ]


def all_recipes() -> list[Recipe]:
    """Anon over γ, as in the paper and as in this package's presets, and all baselines.

    Raises:
        ImportError: pytorch-optimizer is not installed.
    """
    try:
        from pytorch_optimizer import AdaBelief, Lion
    except ImportError as error:
        raise ImportError("AdaBelief and Lion need pytorch-optimizer: pip install -e '.[claims]'") from error
    more = [Recipe("AdaBelief", AdaBelief), Recipe("Lion", Lion, scale=0.1)]
    return [*(anon(g) for g in GAMMAS), *(steady(g) for g in GAMMAS), *torch_recipes(), *more]


# -- many trainings in one -------------------------------------------------------------------------


class Runs:
    """Copies of one small model with weights of their own: one for each pair of learning rate and seed.

    Every optimizer here is elementwise, so that one tensor may hold the weights of all seeds, and one param group each learning rate's: the
    copies train as they would alone. A copy that diverges does not touch the others.

    Attributes:
        groups: a param group for each learning rate, its tensors of shape [seeds, *shape].
        count: copies; learning rates × seeds, seeds fastest.
    """

    def __init__(self, make: Callable[[], nn.Module], lrs: Sequence[float], seeds: Sequence[int]) -> None:
        models = []
        for seed in seeds:
            torch.manual_seed(seed)
            models.append(make())
        self._model = models[0]
        stacked = {
            name: torch.stack([dict(m.named_parameters())[name].detach() for m in models])
            for name, _ in self._model.named_parameters()
        }
        self.groups: list[dict[str, Any]] = [
            {"params": [w.clone().requires_grad_() for w in stacked.values()], "lr": lr} for lr in lrs
        ]
        self._names = list(stacked)
        self.lrs, self.seeds, self.count = len(lrs), len(seeds), len(lrs) * len(seeds)

    def weights(self) -> dict[str, Tensor]:
        """All copies' weights by name, [copies, *shape]."""
        return {name: torch.cat([g["params"][i] for g in self.groups]) for i, name in enumerate(self._names)}

    def __call__(self, *inputs: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Each copy's output for each seed's inputs, [seeds, batch, …], or for inputs that all share, [1, batch, …]: [copies, batch, …]."""
        shaped = [x.expand(self.seeds, *x.shape[1:]).repeat(self.lrs, *[1] * (x.dim() - 1)) for x in inputs]
        model = self._model
        return vmap(lambda w, *x: functional_call(model, w, x))(weights or self.weights(), *shaped)

    def per_seed(self, x: Tensor) -> Tensor:
        """[seeds, …] → [copies, …], as the copies are ordered."""
        return x.repeat(self.lrs, *[1] * (x.dim() - 1))


def train(recipe: Recipe, runs: Runs, losses: Callable[[int], Tensor], steps: int) -> None:
    """Train all copies; the learning rate falls to 0 along a cosine.

    Args:
        losses: from the step (0, 1, …) the loss of each copy, [copies].
    """
    optimizer = recipe.make(runs.groups)
    decay = cosine(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        losses(step).sum().backward()
        optimizer.step()
        decay.step()


def cosine(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Learning rates that fall to 0 in so many steps."""
    return LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))


def batches(count: int, size: int, seeds: Sequence[int]) -> Callable[[int], Tensor]:
    """Indices of each seed's batch of a step, [seeds, size]: every epoch a permutation of `count`, the same for every optimizer."""
    per_epoch, known = count // size, {}

    def batch(step: int) -> Tensor:
        epoch, place = divmod(step, per_epoch)
        if epoch not in known:
            known.clear()
            order = [torch.randperm(count, generator=torch.Generator().manual_seed(1000 * s + epoch)) for s in seeds]
            known[epoch] = torch.stack(order)
        return known[epoch][:, place * size : (place + 1) * size]

    return batch


# -- learning rates --------------------------------------------------------------------------------


def best_lr(
    values: Callable[[list[float]], list[float]], centre: float, radius: int = 3
) -> tuple[float, dict[float, float]]:
    """The learning rate of the least value: half decades around `centre`, on while the best lies at an end, then its quarter decades.

    Args:
        values: what to minimise at each of a list of learning rates; not finite where it diverged.

    Returns:
        The learning rate, and all that was tried with its value.
    """
    tried: dict[int, float] = {}  # by quarter decade

    def attempt(places: Iterable[int]) -> int:
        new = [p for p in places if p not in tried]
        for p, value in zip(new, values([centre * HALF_DECADE ** (p / 2) for p in new]), strict=True):
            tried[p] = value if math.isfinite(value) else math.inf
        return min(tried, key=lambda p: tried[p])

    best = attempt(range(-2 * radius, 2 * radius + 1, 2))
    for _ in range(4):
        if best not in (min(tried), max(tried)):
            break
        side = 1 if best == max(tried) else -1
        best = attempt([best + 2 * side, best + 4 * side])
    best = attempt([best - 1, best + 1])
    return centre * HALF_DECADE ** (best / 2), {centre * HALF_DECADE ** (p / 2): tried[p] for p in sorted(tried)}


# -- results ---------------------------------------------------------------------------------------


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std() / len(x) ** 0.5) if len(x) > 1 else 0.0


def shown(values: Sequence[float], digits: int = 4) -> str:
    """mean ± standard error; a dash if there are no values."""
    if not values:
        return "–"
    mean, error = mean_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def arguments(text: str, default: str) -> argparse.ArgumentParser:
    """The arguments that every study has."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {default}.json and {default}.png")
    parser.add_argument("--quick", action="store_true", help="a small version that only shows that it runs")
    return parser


def prepare(out: Path) -> float:
    """Make the folder and settle torch for tiny tensors; returns the CPU time so far."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    return time.process_time()


def save(path: Path, began: float, results: dict[str, Any]) -> None:
    """Write the results with what made them. Infinities are null."""
    made = {
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, one thread",
        "cpu_seconds": round(time.process_time() - began),
    }
    path.write_text(json.dumps(_rounded({"made_with": made, **results}), indent=1, ensure_ascii=False) + "\n")
    print(f"{path}: {made['cpu_seconds']} s of CPU time")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {f"{k:.4g}" if isinstance(k, float) else str(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table."""
    made = Table(*columns, title=title, title_justify="left")
    for row in rows:
        made.add_row(*row)
    Console(width=150).print(made)


def plots(columns: int, rows: int = 1, width: float = 4.6, height: float = 3.8) -> tuple[Any, Any]:
    """A figure and its axes, [rows, columns]."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure, axes


def shade(gamma: float) -> Any:
    """The colour of a γ: from dark at the least to light at the greatest."""
    from matplotlib import colormaps

    return colormaps["viridis"]((gamma - GAMMAS[0]) / (GAMMAS[-1] - GAMMAS[0]))


def over_gamma(axis: Any, values: dict[str, Sequence[float]], recipes: Sequence[Recipe], label: str) -> None:
    """Anon's curve over γ with standard errors, and the others as lines across it; those without values are left out."""
    for family, marker, color in ((PAPER, "o", "black"), (PACKAGE, "s", "tab:gray")):
        members = [r for r in recipes if r.family == family and values[r.name]]
        swept = [(r.gamma, *mean_error(values[r.name])) for r in members]
        axis.errorbar(*zip(*swept, strict=True), marker=marker, ms=4, color=color, label=family)
    for i, recipe in enumerate(r for r in recipes if not r.family and values[r.name]):
        mean, _ = mean_error(values[recipe.name])
        axis.axhline(mean, color=f"C{(0, 1, 2, 3, 4, 9)[i]}", ls="--", lw=1, label=recipe.name)
    axis.set(xlabel="γ", ylabel=label)


def finish(figure: Any, path: Path) -> None:
    """Save a figure, small: 128 colours, rare ones among them."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80)
    Image.open(drawn).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    print(path)
