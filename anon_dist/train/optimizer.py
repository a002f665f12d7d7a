"""The optimizer that a configuration asks for, and what becomes of a resumed one whose configuration has changed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from anon_dist.optim import Anon, param_groups
from anon_dist.train.config import OptimConfig
from anon_dist.train.gamma import gamma_at


def build_optimizer(config: OptimConfig, model: nn.Module) -> Optimizer:
    """Anon, or fused AdamW, over the model's decay and no-decay groups. Anon rounds bfloat16 parameters stochastically.

    Raises:
        ValueError: a hyperparameter is out of its range, or a pattern of `gamma_by_name` matches no parameter.
    """
    if config.name == "adamw":
        groups = param_groups(model, config.weight_decay)
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=1e-8 if config.eps is None else config.eps, fused=True
        )
    return Anon(
        param_groups(model, config.weight_decay, gamma=config.gamma_by_name),
        lr=config.lr,
        betas=config.betas,
        eps=1e-16 if config.eps is None else config.eps,
        gamma=gamma_at(1, config.gamma_schedule) if config.gamma_schedule else config.gamma,
        refresh_ratio=config.refresh_ratio,
        beta3=config.beta3,
        update_clip=config.update_clip,
        window=config.window,
        hold_silent=config.hold_silent,
        state_dtype=config.state_dtype,
        stochastic_rounding=any(p.dtype == torch.bfloat16 for p in model.parameters()),
    )


def hyperparameters(optimizer: Optimizer, without: Collection[str] = ("history",)) -> list[dict[str, Any]]:
    """Every group's, without its parameters, and without what is no hyperparameter."""
    return [{k: v for k, v in g.items() if k != "params" and k not in without} for g in optimizer.param_groups]


def apply_hyperparameters(
    optimizer: Optimizer, wanted: list[dict[str, Any]], kept: list[Collection[str]], say: Callable[[str], None]
) -> None:
    """Bring a resumed optimizer, which has the checkpoint's hyperparameters, to the present configuration's, saying each change.

    What Anon's state depends on goes through `Anon.rebase`.

    Args:
        kept: for each group, what stays as it is in the checkpoint, being set at each step (`GammaRules`).

    Raises:
        ValueError: `rebase` refuses the change, or the states' dtype is another.
    """
    for index, (group, new, left) in enumerate(zip(optimizer.param_groups, wanted, kept, strict=True)):
        left = {"lr", "foreach", "fused", *left}
        changed = {k: v for k, v in new.items() if k not in left and _plain(group.get(k)) != _plain(v)}
        for key, value in changed.items():
            say(f"resuming with {key} = {value!r} in param group {index}; the checkpoint had {group.get(key)!r}")
        if "state_dtype" in changed:
            raise ValueError(
                f"optim.state_dtype cannot change during a run; it was {group['state_dtype']!r}: set it to that, or choose another run_dir"
            )
        if isinstance(optimizer, Anon):
            rebased: dict[str, Any] = {
                k: changed.pop(k) for k in ("gamma", "refresh_ratio", "beta3", "window") if k in changed
            }
            if "betas" in changed and changed["betas"][1] != group["betas"][1]:
                rebased["beta2"] = changed["betas"][1]
            if rebased:
                optimizer.rebase(**rebased, group=index)
        group.update(changed)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
