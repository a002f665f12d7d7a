#!/usr/bin/env python
"""The online convex problems on which Adam does not converge (Reddi, Kale, Kumar 2018): Anon, AMSGrad and Adam.

    python tools/claims/online_convex.py --out DIR

On [−1, 1], the best fixed x being −1 in both:

- counterexample (their section 3): f_t(x) = 3 x if t mod 3 = 1, else −x; β1 = 0, β2 = 1/10. Plain Adam goes to +1, the worst x;
- stochastic (their section 5): f_t(x) = 1010 x with probability 0.01, else −10 x; β1 = 0.9, β2 = 0.99.

The learning rate is α/√t and x is put back into [−1, 1], as in the theory; x starts at 0. α is a fixed number times the gradients' root
mean square to the power γ − 1, so that steps are of one size. Regret is against x = −1, averaged over t; in the stochastic problem that of
the expected loss, whose gradient is 0.2.

Anon is run over γ with the paper's refreshes (ρ = 2, β3 = 1/2), with others, with the package's window and clip, and with a refresh at
every step, which is Anon without its incremental delayed update: at γ = 1 this is Adam whose β2 is Anon's β3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import arguments, finish, mean_error, plots, prepare, save, table
from torch import Tensor
from torch.optim import Adam, Optimizer

from anon_dist import Anon

GAMMAS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
EVERY_STEP = 1.000001
"""A refresh ratio that asks for a refresh at every step of a million."""


@dataclass(frozen=True)
class Problem:
    """Linear losses on [−1, 1]."""

    gradients: Tensor
    """[steps, seeds], float64."""
    slopes: Tensor
    """Gradients that regret is counted with, [steps, 1] or [steps, seeds]."""
    betas: tuple[float, float]
    alpha: float
    """α at γ = 1."""

    def alpha_at(self, gamma: float) -> float:
        """α in the unit of this γ."""
        return self.alpha * float(self.gradients.square().mean().sqrt()) ** (gamma - 1.0)


def counterexample(steps: int) -> Problem:
    """Section 3, with C = 3."""
    gradients = torch.where(torch.arange(1, steps + 1) % 3 == 1, 3.0, -1.0).double().unsqueeze(1)
    return Problem(gradients, gradients, betas=(0.0, 1.0 / (1.0 + 3.0**2)), alpha=0.1)


def stochastic(steps: int, seeds: int) -> Problem:
    """Section 5."""
    rare = torch.rand(steps, seeds, generator=torch.Generator().manual_seed(0)) < 0.01
    gradients = torch.where(rare, 1010.0, -10.0).double()
    return Problem(gradients, torch.full((steps, 1), 0.2).double(), betas=(0.9, 0.99), alpha=0.6)


PAPER, STEADY, EVERY = "ρ=2, β3=0.5 (the paper)", "ρ=1.1, β3=0.8", "refreshed every step"


def variants(beta2: float) -> dict[str, dict[str, Any]]:
    """Anon's refreshes and limits, by name."""
    return {
        PAPER: {},
        "ρ=2, β3=0": {"beta3": 0.0},
        "ρ=1.1, β3=0.5": {"refresh_ratio": 1.1},
        STEADY: {"refresh_ratio": 1.1, "beta3": 0.8},
        "ρ=2, window=auto": {"window": "auto"},
        "ρ=2, update_clip=1": {"update_clip": 1.0},
        EVERY: {"refresh_ratio": EVERY_STEP, "beta3": beta2},
    }


def play(problem: Problem, make: Callable[[Any], Optimizer], groups: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Play every step with each group's settings, side by side.

    Args:
        make: the optimizer from its param groups.
        groups: settings of each group, with α as `lr`.

    Returns:
        At some of the steps, `at`: `x` and the average `regret`, each [groups, seeds, times].
    """
    steps, seeds = problem.gradients.shape
    x = torch.zeros(len(groups), seeds, dtype=torch.float64)
    rows = list(x.unbind())
    optimizer = make([{**group, "params": [row]} for group, row in zip(groups, rows, strict=True)])
    regret, at, xs, regrets = torch.zeros_like(x), [], [], []
    marks = {round(steps ** (i / 200)) for i in range(1, 201)}
    for t in range(1, steps + 1):
        regret += problem.slopes[t - 1] * (x + 1.0)
        gradient = problem.gradients[t - 1]
        for row, group, settings in zip(rows, optimizer.param_groups, groups, strict=True):
            row.grad = gradient
            group["lr"] = settings["lr"] / math.sqrt(t)
        optimizer.step()
        x.clamp_(-1.0, 1.0)
        if t in marks:
            at.append(t)
            xs.append(x.clone())
            regrets.append(regret / t)
    return {"at": torch.tensor(at), "x": torch.stack(xs, -1), "regret": torch.stack(regrets, -1)}


def adam(problem: Problem, *, amsgrad: bool) -> Callable[[Any], Optimizer]:
    """torch's Adam as the problem asks for it."""
    return partial(Adam, betas=problem.betas, eps=1e-16, amsgrad=amsgrad)


def anon(problem: Problem) -> Callable[[Any], Optimizer]:
    """Anon with the problem's β."""
    return partial(Anon, betas=problem.betas, hold_silent=True, fused=False, state_dtype=torch.float64)


def anon_group(problem: Problem, gamma: float, options: dict[str, Any]) -> dict[str, Any]:
    """A param group of Anon's. `update_clip` is given in the unit of γ = 1, as a multiple of the gradients' size."""
    alpha = problem.alpha_at(gamma)
    if "update_clip" in options:
        options = {**options, "update_clip": options["update_clip"] * problem.alpha / alpha}
    return {"lr": alpha, "gamma": gamma, **options}


def study(problem: Problem, names: Sequence[str]) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    """x and average regret of every optimizer, by name, each [seeds, times]; and the times.

    Args:
        names: of Anon's variants.
    """
    found = {}
    for name, amsgrad in (("Adam", False), ("AMSGrad", True)):
        played = play(problem, adam(problem, amsgrad=amsgrad), [{"lr": problem.alpha}])
        found[name] = {key: played[key][0] for key in ("x", "regret")}
    cells = [(gamma, name, o) for name, o in variants(problem.betas[1]).items() if name in names for gamma in GAMMAS]
    played = play(problem, anon(problem), [anon_group(problem, gamma, o) for gamma, _, o in cells])
    for i, (gamma, name, _) in enumerate(cells):
        found[f"γ={gamma:g}, {name}"] = {key: played[key][i] for key in ("x", "regret")}
    return found, played["at"]


def verdict(run: dict[str, Tensor], at: Tensor) -> dict[str, Any]:
    """Where a run ended: x averaged over the last tenth of the steps, and the average regret at a tenth and at the end; over seeds."""
    late = at > 0.9 * at[-1]
    tenth = int((at <= at[-1] / 10).sum()) - 1
    return {
        "x_at_end": run["x"][:, late].mean(1).tolist(),
        "regret_at_a_tenth": run["regret"][:, tenth].tolist(),
        "regret": run["regret"][:, -1].tolist(),
    }


def main() -> None:
    args = arguments(__doc__, "online_convex").parse_args()
    began = prepare(args.out)
    problems = {
        "counterexample": (counterexample(600 if args.quick else 8_000), list(variants(0.0))),
        "stochastic": (stochastic(600 if args.quick else 300_000, seeds=16), [PAPER, STEADY, EVERY]),
    }
    figure, axes = plots(2, 2, width=5.5)
    results: dict[str, Any] = {}
    for column, (kind, (problem, names)) in enumerate(problems.items()):
        found, at = study(problem, names)
        results[kind] = {name: verdict(run, at) for name, run in found.items()}
        table(
            f"{kind}, {len(problem.gradients)} steps: x at the end (average regret at a tenth → at the end); best x is −1",
            ("Anon", *(f"γ={gamma:g}" for gamma in GAMMAS)),
            [(name, *(_cell(results[kind][f"γ={gamma:g}, {name}"]) for gamma in GAMMAS)) for name in names],
        )
        for name in ("Adam", "AMSGrad"):
            print(f"{name}: {_cell(results[kind][name])}")
        _draw(axes[:, column], kind, found, at)
    axes[0, 0].legend(fontsize=7)
    steps = {kind: len(problem.gradients) for kind, (problem, _) in problems.items()}
    save(args.out / "online_convex.json", began, {"steps": steps, **results})
    finish(figure, args.out / "online_convex.png")


def _cell(result: dict[str, Any]) -> str:
    x, early, late = (mean_error(result[key])[0] for key in ("x_at_end", "regret_at_a_tenth", "regret"))
    return f"{x:+.2f} ({early:.2g} → {late:.2g})"


def _draw(axes: Any, kind: str, found: dict[str, dict[str, Tensor]], at: Tensor) -> None:
    lines = {f"Anon γ={gamma:g}": (f"γ={gamma:g}, {PAPER}", f"C{i}", "-") for i, gamma in enumerate(GAMMAS)}
    lines |= {"Adam": ("Adam", "black", "--"), "AMSGrad": ("AMSGrad", "gray", "--")}
    for label, (name, color, style) in lines.items():
        axes[0].plot(at, found[name]["x"].mean(0), color=color, ls=style, lw=1.2, label=label)
        axes[1].plot(at, found[name]["regret"].mean(0), color=color, ls=style, lw=1.2)
    axes[0].set(xscale="log", ylabel="x (the best is −1)", title=kind)
    axes[1].set(xscale="log", yscale="log", xlabel="step", ylabel="average regret")


if __name__ == "__main__":
    main()
