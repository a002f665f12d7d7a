"""Param groups by the usual rules: what is weight-decayed, and which parameters have their own γ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.1,
    *,
    gamma: Mapping[str, float] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    no_decay: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Param groups for `Anon` (or any torch optimizer): matrices and embeddings decayed, vectors (biases, norm weights) not.

    Frozen parameters are left out, tied ones appear once. Patterns are shell-style (`fnmatch`) and matched against the names of
    `model.named_parameters()`; the first one that matches a parameter counts.

        param_groups(model, 0.1, gamma={"*wte*": 0.5, "*ln_*": 0.0})

    Args:
        weight_decay: λ of the parameters that are decayed.
        gamma: pattern → γ of the parameters it matches.
        overrides: pattern → any hyperparameters of the parameters it matches, over `gamma` and the decay rule.
        no_decay: patterns of further parameters that are not decayed.

    Returns:
        Groups in the order in which their first parameter appears in the model; none is empty. Which parameters are together depends on
        the decay rule and the patterns alone, not on the values, so that a checkpoint fits after a value has changed.

    Raises:
        ValueError: a pattern matches no trainable parameter.
    """
    gamma, overrides = gamma or {}, overrides or {}
    unused = {*gamma, *overrides, *no_decay}
    groups: dict[tuple[bool, str | None, str | None], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        matches = [
            pattern for pattern in {**gamma, **overrides, **dict.fromkeys(no_decay)} if fnmatchcase(name, pattern)
        ]
        unused.difference_update(matches)
        decayed = p.dim() >= 2 and not any(m in no_decay for m in matches)
        settings: dict[str, Any] = {"weight_decay": weight_decay if decayed else 0.0}
        own_gamma = next((m for m in matches if m in gamma), None)
        own = next((m for m in matches if m in overrides), None)
        if own_gamma is not None:
            settings["gamma"] = gamma[own_gamma]
        if own is not None:
            settings.update(overrides[own])
        groups.setdefault((decayed, own_gamma, own), {"params": [], **settings})["params"].append(p)
    if unused:
        names = ", ".join(n for n, p in list(model.named_parameters())[:4])
        raise ValueError(f"param_groups: {sorted(unused)} match no trainable parameter; the names are like {names}, …")
    return list(groups.values())
