"""The optimizer that a configuration asks for, and what becomes of a resumed one whose configuration has changed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from anon_dist.optim import Anon, param_groups
from anon_dist.train.config.fields import BY_NAME
from anon_dist.train.config.parsing import Config, ConfigError, OptimConfig
from anon_dist.train.optimizer.gamma import GammaRules, gamma_at
from anon_dist.train.optimizer.spectrum import agreed_spectra

REBASED = ("gamma", "refresh_ratio", "beta3", "window", "max_interval", "basis", "basis_block")
"""What a state depends on, β2 aside, which is one of `betas`."""


MakeOptimizer = Callable[[OptimConfig, nn.Module], Optimizer]


def build_optimizer(config: OptimConfig, model: nn.Module) -> Optimizer:
    """Anon, or fused AdamW, over the model's param groups. Anon rounds bfloat16 parameters stochastically.

    A group's learning rate has its factor of `lr_by_name` in it; `GammaRules` gives it to every step's.

    Raises:
        ValueError: a hyperparameter is out of its range, or a pattern matches no parameter.
    """
    _check_patterns(config, model)
    rates = {pattern: config.lr * factor for pattern, factor in config.lr_by_name.items()}
    anon = config.name == "anon"
    groups = param_groups(
        model,
        config.weight_decay,
        lr=rates,
        decay=config.weight_decay_by_name,
        gamma=config.gamma_by_name if anon else None,
        basis=config.basis if anon else None,
        embeddings=_of_embeddings(config),
    )
    for group in groups:
        if (rate := group.get("lr", config.lr)) * group["weight_decay"] >= 1.0:
            raise ValueError(
                f"a learning rate of {rate:g} and a weight decay of {group['weight_decay']:g} (lr_by_name, weight_decay_by_name) would "
                "decay the weights past 0 in a step; lower one of them"
            )
    if not anon:
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=1e-8 if config.eps is None else config.eps, fused=True
        )
    return Anon(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=1e-16 if config.eps is None else config.eps,
        gamma=gamma_at(1, config.gamma_schedule) if config.gamma_schedule else config.gamma,
        refresh_ratio=config.refresh_ratio,
        beta3=config.beta3,
        update_clip=config.update_clip,
        window=config.window,
        max_interval=config.max_interval,
        nesterov=config.nesterov,
        cautious_decay=config.cautious_decay,
        basis_block=config.basis_block,
        hold_silent=config.hold_silent,
        state_dtype=config.state_dtype,
        stochastic_rounding=any(p.dtype == torch.bfloat16 for p in model.parameters()),
    )


def _check_patterns(config: OptimConfig, model: nn.Module) -> None:
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for field in BY_NAME if config.name == "anon" else (f for f in BY_NAME if f != "gamma_by_name"):
        counting = {next((p for p in getattr(config, field) if fnmatchcase(name, p)), None) for name in names}
        for pattern in (p for p in getattr(config, field) if p not in counting):
            if any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"{field}: {pattern!r} never counts, as patterns before it match all of its parameters, and the first that matches "
                    "counts; put it before them, or leave it out"
                )
            raise ValueError(
                f"{field}: [{pattern!r}] match no trainable parameter; the names are like {', '.join(names[:4])}, …"
            )


def _of_embeddings(config: OptimConfig) -> dict[str, Any] | None:
    """The hyperparameters that embeddings and output matrices have of their own."""
    own: dict[str, Any] = {}
    if config.embedding_beta1 is not None:
        own["betas"] = config.embedding_beta1, config.betas[1]
    if config.embedding_beta3 is not None and config.name == "anon":
        own["beta3"] = config.embedding_beta3
    return own or None


def optimizer_of(config: Config, model: nn.Module, make: MakeOptimizer) -> tuple[Optimizer, GammaRules]:
    """The optimizer of a run, and what sets its γ by step. Every rank calls it.

    Raises:
        ConfigError: a hyperparameter is out of its range, or a pattern of names matches nothing.
    """
    spectra = agreed_spectra(config)
    try:
        optimizer = make(config.optim, model)
        return optimizer, GammaRules(config.optim, optimizer, model, spectra)
    except ValueError as error:
        raise ConfigError(f"optim: {str(error).removeprefix('Anon: ')}") from None


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
        ValueError, RuntimeError: `rebase` refuses the change.
    """
    for index, (group, new, left) in enumerate(zip(optimizer.param_groups, wanted, kept, strict=True)):
        left = {"lr", "foreach", "fused", *left}
        changed = {k: v for k, v in new.items() if k not in left and _plain(group.get(k)) != _plain(v)}
        for key, value in changed.items():
            say(f"resuming with {key} = {value!r} in param group {index}; the checkpoint had {group.get(key)!r}")
        if isinstance(optimizer, Anon):
            rebased: dict[str, Any] = {k: changed.pop(k) for k in REBASED if k in changed}
            if "betas" in changed and changed["betas"][1] != group["betas"][1]:
                rebased["beta2"] = changed["betas"][1]
            if rebased:
                optimizer.rebase(**rebased, group=index)
        group.update(changed)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
