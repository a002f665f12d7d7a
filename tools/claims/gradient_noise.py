#!/usr/bin/env python
"""Gradient noise: the incremental delayed update (IDU) against AMSGrad's maximum.

    python tools/claims/gradient_noise.py --out DIR

- spike: gradients are standard normal but for one of 300, at step 1,000 (just before a refresh at 1,024, the worst case for Anon) or at
  10,000 (long before one at 16,384). Followed is the effective rate: what the optimizer multiplies m̂ with, relative to what it would be
  without the spike. β2 = 0.999, γ = 1.
- quadratic: ½ Σ h_i x_i² in 50 dimensions, h from 0.01 to 1, from x = 1, with Student's t noise of several degrees of freedom (at 2 and
  below its variance is infinite) and scales. Learning rates fall to 0 along a cosine. The loss is without the noise, its geometric mean
  over seeds; learning rates are the best of a log grid by half of the seeds, losses of the other half.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import arguments, cosine, finish, plots, prepare, save, table
from torch import Tensor
from torch.distributions import StudentT
from torch.optim import SGD, Adam, Optimizer

from anon_dist import Anon

Maker = Callable[[Any], Optimizer]

STEADY = {"refresh_ratio": 1.1, "beta3": 0.8}
SPIKE, SPIKES_AT, STREAMS = 300.0, (1_000, 10_000), 32
ADAPTIVE: dict[str, Maker] = {
    "Anon γ=1": Anon,
    "Anon γ=1, ρ=1.1, β3=0.8": partial(Anon, **STEADY),
    "Adam": Adam,
    "AMSGrad": partial(Adam, amsgrad=True),
}
OPTIMIZERS: dict[str, Maker] = {
    **{f"Anon γ={gamma:g}": partial(Anon, gamma=gamma, hold_silent=gamma < 0) for gamma in (-0.5, 0.0, 0.5, 1.0, 1.5)},
    "Anon γ=1, ρ=1.1, β3=0.8": partial(Anon, **STEADY),
    "Anon γ=1, ρ=1.1, β3=0.8, update_clip=1": partial(Anon, **STEADY, update_clip=1.0),
    "SGD, momentum 0.9": partial(SGD, momentum=0.9),
    "Adam": Adam,
    "AMSGrad": partial(Adam, amsgrad=True),
}
CONDITIONS = [(freedom, scale) for scale in (0.1, 1.0) for freedom in (math.inf, 3.0, 2.0, 1.5)]
LRS = [10.0 ** (-4 + i / 3) for i in range(19)]


def rate(optimizer: Optimizer, x: Tensor) -> Tensor:
    """What the optimizer multiplies m̂ with, apart from the learning rate."""
    state = optimizer.state[x]
    if "precond" in state:
        return state["precond"].clone()
    beta2 = optimizer.param_groups[0]["betas"][1]
    second = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    return (second / (1.0 - beta2 ** float(state["step"]))).rsqrt()


def rates(make: Maker, steps: int, spike: float, at: int) -> Tensor:
    """Effective rates, geometric mean over `STREAMS` streams of gradients, at every step: [steps]."""
    torch.manual_seed(0)
    x = torch.zeros(STREAMS, requires_grad=True)
    optimizer, found = make([x]), []
    for step in range(1, steps + 1):
        x.grad = torch.randn(STREAMS)
        if step == at:
            x.grad += spike
        optimizer.step()
        found.append(rate(optimizer, x).log().mean().exp())
    return torch.stack(found)


def share_left(make: Maker, steps: int, at: int, spike: float = SPIKE) -> Tensor:
    """The effective rate with the spike, relative to that without: [steps]."""
    return rates(make, steps, spike, at) / rates(make, steps, 0.0, at)


def recovered(share: Tensor, level: float) -> int | None:
    """The first step from which on the rate is at `level` of what it would be; None if it ends below."""
    below = (share < level).nonzero()
    last = int(below[-1]) + 1 if len(below) else 0  # steps count from 1
    return None if last == len(share) else last + 1


def quadratic(make: Maker, steps: int, seeds: int) -> tuple[Tensor, Tensor]:
    """Losses [times, learning rates, conditions, seeds], and the times."""
    torch.manual_seed(0)
    h = torch.logspace(-2.0, 0.0, 50)
    x = torch.ones(len(LRS), len(CONDITIONS), seeds, 50)
    rows = list(x.unbind())
    optimizer = make([{"params": [row], "lr": lr} for row, lr in zip(rows, LRS, strict=True)])
    decay = cosine(optimizer, steps)
    noises = [
        partial(torch.randn, seeds, 50) if math.isinf(freedom) else partial(StudentT(freedom).sample, (seeds, 50))
        for freedom, _ in CONDITIONS
    ]
    scales = torch.tensor([scale for _, scale in CONDITIONS]).view(-1, 1, 1)
    marks = {round(steps ** (i / 60)) for i in range(61)}
    times, losses = [], []
    for step in range(1, steps + 1):
        noise = torch.stack([sample() for sample in noises]) * scales
        for row in rows:
            row.grad = h * row + noise
        optimizer.step()
        decay.step()
        if step in marks:
            times.append(step)
            losses.append(0.5 * (h * x.square()).sum(-1))
    return torch.stack(losses), torch.tensor(times)


def tuned(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each condition the best learning rate's index, and the other half's log10 losses: means [times, conditions], final errors.

    Args:
        losses: [times, learning rates, conditions, seeds].
    """
    logs = losses.log10().nan_to_num(nan=math.inf)
    half = logs.shape[-1] // 2
    best = logs[-1, :, :, :half].mean(-1).argmin(0)
    kept = logs[:, best, torch.arange(len(best)), half:]
    return best, kept.mean(-1), kept[-1].std(-1) / half**0.5


def main() -> None:
    args = arguments(__doc__, "gradient_noise").parse_args()
    began = prepare(args.out)
    steps, places = (2_500, SPIKES_AT[:1]) if args.quick else (32_000, SPIKES_AT)
    shares = {(name, at): share_left(make, steps, at) for at in places for name, make in ADAPTIVE.items()}
    spikes = {
        f"{name}, spike at {at}": {
            "least_share": float(share.min()),
            "share_at_end": float(share[-1]),
            "at_half_from": recovered(share, 0.5),
            "at_90%_from": recovered(share, 0.9),
        }
        for (name, at), share in shares.items()
    }
    table(
        f"one gradient of {SPIKE:g} standard deviations: effective rate relative to that without",
        ("optimizer", "least", f"at step {steps}", "at half or more from step", "at 90% or more from step"),
        [
            (
                name,
                f"{s['least_share']:.3f}",
                f"{s['share_at_end']:.3f}",
                *(str(s[key] or "never") for key in ("at_half_from", "at_90%_from")),
            )
            for name, s in spikes.items()
        ],
    )
    descents, curves = quadratics(steps=100 if args.quick else 2000, seeds=8 if args.quick else 32)
    draw(shares, curves, args.out / "gradient_noise.png")
    save(args.out / "gradient_noise.json", began, {"spike": spikes, "quadratic": descents})


def quadratics(steps: int, seeds: int) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """Results by optimizer and condition; and mean log losses [times, conditions] with their times."""
    results: dict[str, Any] = {}
    curves = {}
    for name, make in OPTIMIZERS.items():
        losses, times = quadratic(make, steps, seeds)
        best, mean, error = tuned(losses)
        curves[name] = (mean, times)
        results[name] = {
            _said(condition): {
                "lr": LRS[int(best[i])],
                "lr_at_the_end_of_the_grid": int(best[i]) in (0, len(LRS) - 1),
                "log10_loss": float(mean[-1, i]),
                "standard_error": float(error[i]),
            }
            for i, condition in enumerate(CONDITIONS)
        }
    table(
        f"noisy quadratic, {steps} steps: log10 of the final loss (lower is better; standard errors in the JSON)",
        ("optimizer", *map(_said, CONDITIONS)),
        [
            (name, *(f"{r['log10_loss']:.2f}{'!' if r['lr_at_the_end_of_the_grid'] else ''}" for r in row.values()))
            for name, row in results.items()
        ],
    )
    return results, curves


def _said(condition: tuple[float, float]) -> str:
    freedom, scale = condition
    return f"{'normal' if math.isinf(freedom) else f't, {freedom:g} df'} × {scale:g}"


def draw(shares: dict[tuple[str, int], Tensor], curves: dict[str, tuple[Tensor, Tensor]], path: Any) -> None:
    """Rates after the spike, and losses over steps for each noise of scale 1."""
    figure, axes = plots(5, width=3.8)
    for (name, at), share in shares.items():
        first = at == SPIKES_AT[0]
        look = {"label": name, "ls": "-"} if first else {"ls": ":"}
        axes[0, 0].plot(range(1, len(share) + 1), share, lw=1.2, color=f"C{list(ADAPTIVE).index(name)}", **look)
    axes[0, 0].set(xscale="log", yscale="log", xlabel="step", title="effective rate after one spike")
    axes[0, 0].set_xlim(left=800)
    for axis, i in zip(axes[0, 1:], range(len(CONDITIONS) // 2, len(CONDITIONS)), strict=True):
        for j, (name, (mean, times)) in enumerate(curves.items()):
            axis.plot(times, 10.0 ** mean[:, i], lw=1.2, color=f"C{j}", label=name, ls="-" if "Anon" in name else "--")
        axis.set(xscale="log", yscale="log", xlabel="step", title=f"loss, noise {_said(CONDITIONS[i])}")
    axes[0, 0].legend(fontsize=7)
    axes[0, 1].legend(fontsize=5)
    finish(figure, path)


if __name__ == "__main__":
    main()
