#!/usr/bin/env python
"""Two classic surfaces: how γ changes the path, beside SGD with momentum, Adam, AdamW and AMSGrad.

    python tools/claims/landscapes.py --out DIR

Rosenbrock's valley (1 − x)² + 100 (y − x²)², minimum at (1, 1), and Rastrigin's egg box 20 + Σ x_i² − 10 cos 2π x_i, minimum at (0, 0).
Exact gradients; learning rates fall to 0 along a cosine, from the best of a log grid by the geometric mean of the final values from 32
random starts, none of which may diverge. Reported over 64 others, and drawn from one start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import (
    GAMMAS,
    Recipe,
    anon,
    arguments,
    best_lr,
    cosine,
    finish,
    plots,
    prepare,
    save,
    shade,
    table,
    torch_recipes,
)
from torch import Tensor


@dataclass(frozen=True)
class Surface:
    """A function of the plane."""

    value: Callable[[Tensor], Tensor]
    """[..., 2] → [...]."""
    minimum: tuple[float, float]
    start: tuple[float, float]
    """Where the drawn paths begin."""
    side: float
    """Random starts are in [−side, side]²."""
    near: float
    """What distance from the minimum counts as reached."""


def rosenbrock(x: Tensor) -> Tensor:
    """[..., 2] → [...]."""
    return (1.0 - x[..., 0]).square() + 100.0 * (x[..., 1] - x[..., 0].square()).square()


def rastrigin(x: Tensor) -> Tensor:
    """[..., 2] → [...]."""
    return 20.0 + (x.square() - 10.0 * (2.0 * math.pi * x).cos()).sum(-1)


SURFACES = {
    "Rosenbrock": Surface(rosenbrock, (1.0, 1.0), (-2.0, 2.0), side=2.0, near=0.1),
    "Rastrigin": Surface(rastrigin, (0.0, 0.0), (-2.0, 3.5), side=4.0, near=0.5),
}


def starts(surface: Surface, count: int, seed: int) -> Tensor:
    """Random starts, [count, 2]; the first is the one that is drawn."""
    x = (2.0 * torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) - 1.0) * surface.side
    x[0] = torch.tensor(surface.start)
    return x


def descend(recipe: Recipe, surface: Surface, lrs: Sequence[float], x: Tensor, steps: int) -> Tensor:
    """Paths, [steps + 1, lrs, starts, 2], from starts [starts, 2]."""
    leaves = [x.clone().requires_grad_() for _ in lrs]
    optimizer = recipe.make([{"params": [leaf], "lr": lr} for leaf, lr in zip(leaves, lrs, strict=True)])
    decay = cosine(optimizer, steps)
    path = [torch.stack([leaf.detach() for leaf in leaves])]
    for _ in range(steps):
        optimizer.zero_grad()
        surface.value(torch.stack(leaves)).sum().backward()
        optimizer.step()
        decay.step()
        path.append(torch.stack([leaf.detach() for leaf in leaves]))
    return torch.stack(path)


def log_value(surface: Surface, x: Tensor) -> Tensor:
    """Mean over the starts of log10 of the value, [..., starts, 2] → [...]; ∞ if one diverged."""
    return surface.value(x).nan_to_num(nan=math.inf).clamp(min=1e-12).log10().mean(-1)


def study(recipe: Recipe, surface: Surface, steps: int) -> tuple[dict[str, Any], Tensor]:
    """Tune one optimizer and measure it; and its path from the drawn start, [steps + 1, 2]."""
    tuning, others = starts(surface, 32, 1), starts(surface, 64, 0)

    def values(lrs: list[float]) -> list[float]:
        return log_value(surface, descend(recipe, surface, lrs, tuning, steps)[-1]).tolist()

    x = tuning.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(surface.value(x).sum(), x)
    recipe, centre = recipe.fitted([gradient.unsqueeze(0)], lr=0.03)
    lr, tried = best_lr(values, centre)
    path = descend(recipe, surface, [lr], others, steps)[:, 0]
    distance = (path[-1] - torch.tensor(surface.minimum)).norm(dim=-1).nan_to_num(nan=math.inf)
    settled = distance < 100.0
    result = {
        "lr": lr,
        "log10_value_by_lr": tried,
        "diverged": int((~settled).sum()),
        "value": 10.0 ** float(log_value(surface, path[-1, settled])),
        "median_distance": float(distance.median()),
        "reached": float((distance < surface.near).float().mean()),
        "drawn_start_distance": float(distance[0]),
    }
    return result, path[:, 0]


def main() -> None:
    args = arguments(__doc__, "landscapes").parse_args()
    began = prepare(args.out)
    steps = 100 if args.quick else 1000
    recipes = [*map(anon, GAMMAS), *torch_recipes()]
    results: dict[str, dict[str, Any]] = {}
    figure, axes = plots(2, 2, width=5.2, height=4.4)
    for row, (kind, surface) in zip(axes, SURFACES.items(), strict=True):
        found = {recipe.name: study(recipe, surface, steps) for recipe in recipes}
        results[kind] = {name: result for name, (result, _) in found.items()}
        table(
            f"{kind}: {steps} steps from 64 starts",
            (
                "optimizer",
                "lr",
                "diverged",
                "value",
                "median distance",
                f"ended within {surface.near:g}",
                "distance from the drawn start",
            ),
            [
                (
                    n,
                    f"{r['lr']:.2g}",
                    str(r["diverged"]),
                    f"{r['value']:.2g}",
                    f"{r['median_distance']:.2g}",
                    f"{r['reached']:.0%}",
                    f"{r['drawn_start_distance']:.2g}",
                )
                for n, r in results[kind].items()
            ],
        )
        _draw(row, kind, surface, {recipe: found[recipe.name][1] for recipe in recipes})
    save(args.out / "landscapes.json", began, {"steps": steps, **results})
    finish(figure, args.out / "landscapes.png")


def _draw(axes: Any, kind: str, surface: Surface, paths: dict[Recipe, Tensor]) -> None:
    """Anon's paths on the left, the others' on the right."""
    reach = 1.25 * max(map(abs, surface.start))
    grid = torch.linspace(-reach, reach, 200)
    x, y = torch.meshgrid(grid, grid, indexing="xy")
    height = surface.value(torch.stack([x, y], -1)).add(1e-3).log()
    for axis in axes:
        axis.contour(x, y, height, 12, colors="gray", linewidths=0.4, alpha=0.6)
        axis.plot(*surface.minimum, "k*", ms=9)
        axis.plot(*surface.start, "ko", ms=4)
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach), title=kind)
    others = 0
    for recipe, path in paths.items():
        if recipe.gamma is None:
            axis, color, others = axes[1], f"C{others}", others + 1
        else:
            axis, color = axes[0], shade(recipe.gamma)
        axis.plot(path[:, 0], path[:, 1], "-", color=color, lw=1, alpha=0.9, label=recipe.name)
        axis.plot(*path[-1], "x", color=color, ms=6, mew=2)
    for axis in axes:
        axis.legend(fontsize=6, loc="lower right")


if __name__ == "__main__":
    main()
