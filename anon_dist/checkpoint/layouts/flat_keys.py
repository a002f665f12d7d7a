"""Optimizer state dictionaries with flat keys, as torch's `flatten_optimizer_state_dict` and torchtitan write them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor


def nested(optimizer: Mapping[str, Any], known: Set[str]) -> dict[str, Any]:
    """`state.NAME.KEY` and `param_groups.NAME.KEY` (torch's `flatten_optimizer_state_dict`, torchtitan) as states and groups.

    Parameters of equal hyperparameters are one group.
    """
    hyper: dict[str, dict[str, Any]] = {}
    for key, value in optimizer.items():
        if key.startswith("param_groups."):
            name, _, option = key.removeprefix("param_groups.").rpartition(".")
            hyper.setdefault(name, {})[option] = value
    names = {*known, *hyper}
    states: dict[str, dict[str, Any]] = {}
    for key, value in optimizer.items():
        if key.startswith("state."):
            path = key.removeprefix("state.")
            name = _longest(path, names)
            states.setdefault(name, {})[path[len(name) + 1 :]] = value
    groups: list[dict[str, Any]] = []
    for name, options in hyper.items():
        group = next((g for g in groups if _same(g["options"], options)), None)
        if group is None:
            groups.append(group := {"options": options, "params": []})
        group["params"].append(name)
    return {"state": states, "param_groups": [{**g["options"], "params": g["params"]} for g in groups]}


def _longest(path: str, names: Set[str]) -> str:
    """The longest name that the path begins with; without any, all but the last part."""
    name = path
    while "." in name:
        name = name.rpartition(".")[0]
        if name in names:
            return name
    return path.rpartition(".")[0]


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor) or isinstance(y, Tensor):
            return isinstance(x, Tensor) and isinstance(y, Tensor) and torch.equal(x, y)
        return type(x) is type(y) and x == y

    return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
