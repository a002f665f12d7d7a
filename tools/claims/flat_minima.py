#!/usr/bin/env python
"""A sharp and a flat minimum of equal depth: does a lower γ leave the sharp one at smaller steps?

    python tools/claims/flat_minima.py --out DIR

f(x) = −log(e^(−50 (x + 1)²) + e^(−½ (x − 1)²)): curvature 100 at −1, 1 at +1. Gradients are taken at x + 0.05 ξ with ξ standard normal,
as of minibatches whose minima lie apart by chance; their noise is therefore larger where it is sharp. Starts are in the sharp valley, and
learning rates fall to 0 along a cosine. They are swept in the unit of each γ: at the same "step size" all optimizers move equally far on
average over [−2, 2]. Reported is the step size from which on half of the runs end in the flat valley.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from common import GAMMAS, Recipe, anon, arguments, cosine, finish, plots, prepare, save, shade, table, torch_recipes
from torch import Tensor

SHARP, FLAT = 100.0, 1.0
JITTER = 0.05
SIZES = [10.0 ** (-1.5 + i / 8) for i in range(16)]


def slope(x: Tensor) -> Tensor:
    """f′."""
    a, b = -0.5 * SHARP * (x + 1.0).square(), -0.5 * FLAT * (x - 1.0).square()
    in_sharp = torch.sigmoid(a - b)
    return in_sharp * SHARP * (x + 1.0) + (1.0 - in_sharp) * FLAT * (x - 1.0)


def noisy(x: Tensor) -> Tensor:
    """f′ at places beside x."""
    return slope(x + JITTER * torch.randn(x.shape[-1:]))


def in_flat(x: Tensor) -> Tensor:
    """Whether x is in the flat valley."""
    return 0.5 * SHARP * (x + 1.0).square() > 0.5 * FLAT * (x - 1.0).square()


def centre(recipe: Recipe) -> float:
    """The learning rate of step size 1 in the recipe's unit."""
    torch.manual_seed(1)
    places = torch.linspace(-2.0, 2.0, 401)
    return recipe.fitted([torch.stack([noisy(places) for _ in range(64)])], lr=1.0)[1]


def ended_in_flat(recipe: Recipe, sizes: Sequence[float], runs: int, steps: int) -> Tensor:
    """Share of runs that end in the flat valley, having started in the sharp one, at each step size."""
    unit = centre(recipe)
    torch.manual_seed(0)
    start = -1.0 + 0.05 * torch.randn(runs)
    leaves = [start.clone() for _ in sizes]
    optimizer = recipe.make([{"params": [x], "lr": unit * size} for x, size in zip(leaves, sizes, strict=True)])
    decay = cosine(optimizer, steps)
    for _ in range(steps):
        gradients = noisy(torch.stack(leaves))
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()
        decay.step()
    return in_flat(torch.stack(leaves)).float().mean(1)


def threshold(sizes: Sequence[float], shares: Tensor) -> float:
    """The first step size at which half of the runs end in the flat valley, between sizes by the logarithm; ∞ if there is none."""
    above = (shares >= 0.5).nonzero()
    if not len(above):
        return math.inf
    i = int(above[0])
    if i == 0:
        return sizes[0]
    low, high = float(shares[i - 1]), float(shares[i])
    return sizes[i - 1] * (sizes[i] / sizes[i - 1]) ** ((0.5 - low) / (high - low))


def main() -> None:
    args = arguments(__doc__, "flat_minima").parse_args()
    began = prepare(args.out)
    steps, runs = (50, 64) if args.quick else (1000, 1024)
    results = {}
    figure, axes = plots(1, width=6.5)
    for recipe in [*map(anon, GAMMAS), *torch_recipes()]:
        shares = ended_in_flat(recipe, SIZES, runs, steps)
        results[recipe.name] = {"half_from_step_size": threshold(SIZES, shares), "shares": shares.tolist()}
        look = {"ls": "--"} if recipe.gamma is None else {"color": shade(recipe.gamma)}
        axes[0, 0].plot(SIZES, shares, lw=1.2, label=recipe.name, **look)
    table(
        f"from the sharp valley, {steps} steps, {runs} runs",
        ("optimizer", "half end in the flat valley from step size"),
        [(name, f"{r['half_from_step_size']:.3g}") for name, r in results.items()],
    )
    axes[0, 0].set(
        xscale="log",
        xlabel="step size (learning rate in the unit of each γ)",
        ylabel="share that ends in the flat valley",
    )
    axes[0, 0].legend(fontsize=7)
    save(args.out / "flat_minima.json", began, {"steps": steps, "runs": runs, "step_sizes": SIZES, "results": results})
    finish(figure, args.out / "flat_minima.png")


if __name__ == "__main__":
    main()
