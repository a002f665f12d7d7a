#!/usr/bin/env python
"""Image classification with a small CNN: where along γ does Anon do best, and beside which baselines?

    python tools/claims/images.py --out DIR                  # scikit-learn's digits: 1,797 images of 8 × 8
    python tools/claims/images.py --out DIR --set fashion    # Fashion-MNIST, halved to 14 × 14: `apt-get install dataset-fashion-mnist`

Each optimizer's learning rate is the best of a log grid by validation loss, on seeds of its own. Reported on other seeds: test accuracy,
training loss, and flatness: how much the training loss rises when every weight tensor gets noise of 10% of its own size. A seed whose
training loss stays above 2 (guessing gives 2.30) has failed: counted, and left out of the means.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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
from torch import Tensor, nn

BATCH = 50
TUNING = (100, 101)
"""Seeds that choose the learning rate."""
NOISE = 0.1
FAILED = 2.0
MEASURES = {
    "test_accuracy": "test accuracy",
    "train_loss": "training loss",
    "rise_under_noise": "rise of the training loss under noise",
}


@dataclass(frozen=True)
class Images:
    """Images [count, 1, side, side] of mean 0 and variance 1, and classes [count]."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def _split(x: Tensor, y: Tensor, sizes: Sequence[int]) -> Images:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = [(x[i], y[i]) for i in order[: sum(sizes)].split(list(sizes))]
    mean, std = parts[0][0].mean(), parts[0][0].std()
    return Images(*(((x - mean) / std, y) for x, y in parts))


def digits() -> Images:
    """scikit-learn's handwritten digits: 1,000 to train on, 300 to tune with, 497 to test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install -e '.[claims]'") from error
    found = load_digits()
    return _split(
        torch.tensor(found.images, dtype=torch.float32).unsqueeze(1), torch.tensor(found.target), (1000, 300, 497)
    )


def fashion(folder: Path) -> Images:
    """Fashion-MNIST at half its resolution: 4,000 to train on, 2,000 to tune with, 10,000 to test.

    Raises:
        FileNotFoundError: it is not there.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no {folder}: apt-get install dataset-fashion-mnist, or name its folder with --data")

    def read(kind: str) -> tuple[Tensor, Tensor]:
        pixels = gzip.decompress((folder / f"{kind}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((folder / f"{kind}-labels-idx1-ubyte.gz").read_bytes())[8:]
        x = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, 1, 28, 28).float()
        return F.avg_pool2d(x, 2), torch.frombuffer(bytearray(labels), dtype=torch.uint8).long()

    x, y = read("train")
    test_x, test_y = read("t10k")
    some = _split(x, y, (4_000, 2_000, 0))
    mean, std = x.mean(), x.std()
    return Images(some.train, some.val, ((test_x - mean) / std, test_y))


def network(side: int) -> nn.Module:
    """Two convolutions and a linear layer: 1,898 weights for the digits."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * (side // 4) ** 2, 10),
    )


def fit(recipe: Recipe, lrs: Sequence[float], seeds: Sequence[int], data: Images, steps: int) -> Runs:
    """Train a network for each learning rate and seed."""
    x, y = data.train
    runs = Runs(lambda: network(x.shape[-1]), lrs, seeds)
    batch = batches(len(x), BATCH, seeds)

    def losses(step: int) -> Tensor:
        chosen = batch(step)
        return _cross_entropy(runs(x[chosen]), runs.per_seed(y[chosen]))

    train(recipe, runs, losses, steps)
    return runs


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """[runs, batch, classes], [runs, batch] → [runs]."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


@torch.no_grad()
def evaluate(
    runs: Runs, data: tuple[Tensor, Tensor], weights: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of each network: [runs], [runs]."""
    loss, right = torch.zeros(runs.count), torch.zeros(runs.count)
    for x, y in zip(*(part.split(500) for part in data), strict=True):
        logits, labels = runs(x.unsqueeze(0), weights=weights), y.expand(runs.count, -1)
        loss += _cross_entropy(logits, labels) * len(y)
        right += (logits.argmax(-1) == labels).sum(1)
    return loss / len(data[0]), right / len(data[0])


@torch.no_grad()
def rise_under_noise(runs: Runs, data: tuple[Tensor, Tensor], trials: int = 4) -> Tensor:
    """Mean rise of the loss when each tensor of weights gets Gaussian noise of `NOISE` times its root mean square: [runs]."""
    torch.manual_seed(0)
    before = evaluate(runs, data)[0]
    rise = torch.zeros_like(before)
    for _ in range(trials):
        noisy = {
            name: w
            + NOISE * w.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (w.dim() - 1)) * torch.randn_like(w[:1])
            for name, w in runs.weights().items()
        }
        rise += (evaluate(runs, data, noisy)[0] - before) / trials
    return rise


def first_gradients(data: Images) -> list[Tensor]:
    """Gradients of each tensor for some batches at the start, [batches, …]."""
    x, y = data.train
    torch.manual_seed(TUNING[0])
    model, found = network(x.shape[-1]), []
    for i in range(8):
        part = slice(i * BATCH, (i + 1) * BATCH)
        found.append(torch.autograd.grad(F.cross_entropy(model(x[part]), y[part]), list(model.parameters())))
    return [torch.stack(g) for g in zip(*found, strict=True)]


def study(recipe: Recipe, data: Images, steps: int, tuning: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    """Tune one optimizer, then measure it."""
    recipe, centre = recipe.fitted(first_gradients(data))

    def values(lrs: list[float]) -> list[float]:
        runs = fit(recipe, lrs, tuning, data, steps)
        return evaluate(runs, data.val)[0].view(len(lrs), -1).mean(1).tolist()

    lr, tried = best_lr(values, centre)
    runs = fit(recipe, [lr], seeds, data, steps)
    some = (data.train[0][:2000], data.train[1][:2000])
    test_loss, test_accuracy = evaluate(runs, data.test)
    train_loss = evaluate(runs, some)[0]
    learned = train_loss < FAILED
    return {
        "lr": lr,
        "validation_loss_by_lr": tried,
        "failed": int((~learned).sum()),
        "test_accuracy": test_accuracy[learned].tolist(),
        "test_loss": test_loss[learned].tolist(),
        "train_loss": train_loss[learned].tolist(),
        "rise_under_noise": rise_under_noise(runs, some)[learned].tolist(),
    }


def draw(results: dict[str, Any], recipes: Sequence[Recipe], title: str, path: Path) -> None:
    """Every measure over γ."""
    figure, axes = plots(3)
    for axis, (measure, label) in zip(axes.flat, MEASURES.items(), strict=True):
        over_gamma(axis, {name: r[measure] for name, r in results.items()}, recipes, label)
        if measure != "test_accuracy":
            axis.set_yscale("log")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(f"{title}, each at its best learning rate")
    finish(figure, path)


def main() -> None:
    parser = arguments(__doc__, "images-SET")
    parser.add_argument("--set", choices=("digits", "fashion"), default="digits")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    args = parser.parse_args()
    began = prepare(args.out)
    data = digits() if args.set == "digits" else fashion(args.data)
    steps = 20 if args.quick else 300
    tuning = TUNING[:1] if args.quick else TUNING
    seeds = range(2 if args.quick else {"digits": 10, "fashion": 6}[args.set])

    recipes, results = all_recipes(), {}
    for recipe in recipes:
        results[recipe.name] = study(recipe, data, steps, tuning, seeds)
        print(recipe.name, shown(results[recipe.name]["test_accuracy"]), flush=True)
    table(
        f"{args.set}: {steps} steps of {BATCH}, mean ± standard error of {len(seeds)} seeds",
        ("optimizer", "lr", "failed", *MEASURES.values()),
        [(name, f"{r['lr']:.2g}", str(r["failed"]), *(shown(r[m]) for m in MEASURES)) for name, r in results.items()],
    )
    name = f"images-{args.set}"
    settings = {"steps": steps, "batch": BATCH, "seeds": len(seeds), "tuning_seeds": len(tuning)}
    save(args.out / f"{name}.json", began, {**settings, "results": results})
    draw(results, recipes, f"{args.set}, small CNN, {steps} steps", args.out / f"{name}.png")


if __name__ == "__main__":
    main()
