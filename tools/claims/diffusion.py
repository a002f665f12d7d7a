#!/usr/bin/env python
"""A small denoising diffusion model of scikit-learn's digits: validation loss for Anon's γ and for baselines.

    python tools/claims/diffusion.py --out DIR

DDPM (Ho, Jain, Abbeel 2020): x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, and a network of two hidden layers says ε from x_t and t. The loss is the
mean squared error of ε, at the same times and noises for all. Each optimizer's learning rate is the best of a log grid by the loss on 300
images, on seeds of its own; reported is the loss on 497 others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    Recipe,
    Runs,
    all_recipes,
    arguments,
    batches,
    best_lr,
    finish,
    over_gamma,
    plots,
    prepare,
    save,
    shown,
    table,
    train,
)
from images import TUNING, Images, digits
from torch import Tensor, nn

TIMES = 100
BATCH = 50
HIDDEN = 128
MEASURES = {"loss": "loss on other images", "train_loss": "training loss"}
ALPHA_BAR = torch.linspace(1.0 - 1e-3, 1.0 - 0.12, TIMES).cumprod(0)
"""ᾱ_t: what is left of an image's variance, from 0.999 to 0.002."""


class Denoiser(nn.Module):
    """ε from x_t and t: 35,136 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64 + 16, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 64)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """[batch, 64], [batch] → [batch, 64]."""
        angles = t.unsqueeze(-1) * 2.0 ** -torch.arange(8)
        return self.body(torch.cat([x, angles.sin(), angles.cos()], -1))


def noised(images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t of flat images [..., 64] at times [...]."""
    left = ALPHA_BAR[t].unsqueeze(-1)
    return left.sqrt() * images + (1.0 - left).sqrt() * noise


def flat(images: Tensor) -> Tensor:
    """[count, 1, 8, 8] → [count, 64]."""
    return images.flatten(1)


def fit(recipe: Recipe, lrs: Sequence[float], seeds: Sequence[int], data: Images, steps: int) -> Runs:
    """Train a denoiser for each learning rate and seed."""
    x = flat(data.train[0])
    runs = Runs(Denoiser, lrs, seeds)
    batch = batches(len(x), BATCH, seeds)
    generator = torch.Generator().manual_seed(int(seeds[0]))

    def losses(step: int) -> Tensor:
        shape = (len(seeds), BATCH)
        t, noise = torch.randint(TIMES, shape, generator=generator), torch.randn(*shape, 64, generator=generator)
        said = runs(noised(x[batch(step)], t, noise), t)
        return (said - runs.per_seed(noise)).square().mean((1, 2))

    train(recipe, runs, losses, steps)
    return runs


@torch.no_grad()
def evaluate(runs: Runs, images: Tensor, repeats: int = 8) -> Tensor:
    """Each denoiser's loss, [runs], on flat images, each at `repeats` times."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(runs.count)
    for _ in range(repeats):
        t = torch.randint(TIMES, (1, len(images)), generator=generator)
        noise = torch.randn(1, len(images), 64, generator=generator)
        total += (runs(noised(images, t, noise), t) - noise).square().mean((1, 2)) / repeats
    return total


def first_gradients(data: Images) -> list[Tensor]:
    """Gradients of each tensor for some batches at the start, [batches, …]."""
    torch.manual_seed(TUNING[0])
    model, found = Denoiser(), []
    for x in flat(data.train[0])[: 8 * BATCH].split(BATCH):
        t, noise = torch.randint(TIMES, (BATCH,)), torch.randn(BATCH, 64)
        loss = (model(noised(x, t, noise), t) - noise).square().mean()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    return [torch.stack(g) for g in zip(*found, strict=True)]


def study(recipe: Recipe, data: Images, steps: int, tuning: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    """Tune one optimizer, then measure it."""
    recipe, centre = recipe.fitted(first_gradients(data))

    def values(lrs: list[float]) -> list[float]:
        runs = fit(recipe, lrs, tuning, data, steps)
        return evaluate(runs, flat(data.val[0])).view(len(lrs), -1).mean(1).tolist()

    lr, tried = best_lr(values, centre)
    runs = fit(recipe, [lr], seeds, data, steps)
    loss = evaluate(runs, flat(data.test[0]))
    learned = loss < 1.0  # saying 0 gives 1
    return {
        "lr": lr,
        "tuning_loss_by_lr": tried,
        "failed": int((~learned).sum()),
        "loss": loss[learned].tolist(),
        "train_loss": evaluate(runs, flat(data.train[0]))[learned].tolist(),
    }


def draw(results: dict[str, Any], recipes: Sequence[Recipe], title: str, path: Path) -> None:
    """Both losses over γ."""
    figure, axes = plots(2, width=5.5)
    for axis, (measure, label) in zip(axes.flat, MEASURES.items(), strict=True):
        over_gamma(axis, {name: r[measure] for name, r in results.items()}, recipes, label)
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(f"{title}, each at its best learning rate")
    finish(figure, path)


def main() -> None:
    args = arguments(__doc__, "diffusion").parse_args()
    began = prepare(args.out)
    data = digits()
    steps = 50 if args.quick else 1000
    tuning = TUNING[:1] if args.quick else TUNING
    seeds = range(2 if args.quick else 4)

    recipes, results = all_recipes(), {}
    for recipe in recipes:
        results[recipe.name] = study(recipe, data, steps, tuning, seeds)
        print(recipe.name, shown(results[recipe.name]["loss"]), flush=True)
    table(
        f"diffusion: {steps} steps of {BATCH}, mean ± standard error of {len(seeds)} seeds",
        ("optimizer", "lr", "failed", *MEASURES.values()),
        [(n, f"{r['lr']:.2g}", str(r["failed"]), *(shown(r[m]) for m in MEASURES)) for n, r in results.items()],
    )
    settings = {"steps": steps, "batch": BATCH, "seeds": len(seeds), "tuning_seeds": len(tuning)}
    save(args.out / "diffusion.json", began, {**settings, "results": results})
    draw(results, recipes, f"denoising diffusion on digits, {steps} steps", args.out / "diffusion.png")


if __name__ == "__main__":
    main()
