"""What wrote a checkpoint, told by its contents."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from anon_dist.checkpoint.schema import MASTER, WEIGHT, ParamGroup
from anon_dist.optim.frame import BASIS_KEYS

ANON, PORT, ADAM, ADAMW = "Anon", "Anon (the paper's reference port)", "Adam", "AdamW"
"""Names that conversions go by."""
BASIS_STATES = BASIS_KEYS
"""Anon's states of a matrix's sides, see `frames`: not of the parameter's shape, or of it by chance."""


def recognise(groups: Sequence[ParamGroup], states: Collection[str], scalars: Mapping[str, Mapping[str, Any]]) -> str:
    """The optimizer's class name, by its states and hyperparameters; `unknown (…)` with the states' keys if nothing fits.

    Args:
        states: keys of the tensors of all parameters.
    """
    tensors = {key for key in states if key not in (WEIGHT, MASTER)}
    keys = tensors | {key for own in scalars.values() for key in own}
    hyper = {key for group in groups for key in group.hyperparameters}
    if {"exp_avg", "exp_avg_sq", "precond"} <= keys:
        return ANON
    if {"exp_avg", "exp_avg_sq", "fixed_lr"} <= keys:
        return PORT
    if "use_muon" in hyper and tensors <= {"momentum_buffer", "exp_avg", "exp_avg_sq"}:
        return "MuonWithAuxAdam"
    if {"exp_avg", "exp_avg_sq"} <= tensors and keys <= {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"}:
        decoupled = [group.hyperparameters.get("decoupled_weight_decay") for group in groups]
        return ADAM if decoupled and all(d is False for d in decoupled) else ADAMW
    if tensors == {"exp_avg"}:
        return "Lion"
    if "momentum_buffer" in keys and hyper & {"ns_steps", "ns_coefficients"}:
        return "Muon"
    if tensors <= {"momentum_buffer"} and "dampening" in hyper:
        return "SGD"
    return f"unknown ({', '.join(sorted(keys)) or 'no states'})"


def training_step(extras: Mapping[str, Any], scalars: Mapping[str, Mapping[str, Any]]) -> int | None:
    """Steps of training: what the checkpoint says of itself, else the largest `step` of a parameter."""
    said = dict(extras)
    for inner in ("train_state", "trainer_state", "progress"):
        said.update(_mapping(extras.get(inner)))
    for key in ("step", "global_step", "global_steps", "iteration", "iter"):
        value = said.get(key)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    steps = [own["step"] for own in scalars.values() if "step" in own]
    numbers = [int(s) for s in steps if isinstance(s, int | float) or (isinstance(s, Tensor) and s.numel() == 1)]
    return max(numbers, default=None)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
