"""Anon's hyperparameters in a param group: their allowed ranges, and plain values for them."""

from __future__ import annotations

import difflib
import math
import numbers
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anon_dist.optim.state import STATE_KEYS

STATE_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "int8": torch.int8}

NUMBERS = (
    "lr",
    "eps",
    "gamma",
    "weight_decay",
    "refresh_ratio",
    "beta3",
    "update_clip",
    "window",
    "max_interval",
    "basis_block",
)
SWITCHES = ("maximize", "hold_silent", "nesterov", "cautious_decay", "stochastic_rounding")
BASES = (None, "columns", "rows", "both")

Group = Mapping[str, Any]


def is_number(value: Any) -> bool:
    """Whether `value` is a plain real number (a bool is not) and not NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _require(ok: bool, name: str, value: Any, allowed: str) -> None:
    if not ok:
        raise ValueError(f"Anon: {name} must be {allowed}, not {value!r}")


def normalise(group: dict[str, Any]) -> None:
    """Bring the hyperparameters of a group to plain Python values, which every checkpoint format keeps; numpy's scalars, say."""
    for name in NUMBERS:
        group[name] = _plain(group[name])
    if isinstance(group["betas"], tuple | list):
        group["betas"] = tuple(_plain(beta) for beta in group["betas"])
    for name in (*SWITCHES, "foreach", "fused"):
        if type(group[name]).__name__ in ("bool", "bool_"):
            group[name] = bool(group[name])
    group["state_dtype"] = _state_dtype_text(group["state_dtype"])


def meant(name: str, arguments: Collection[str]) -> list[str]:
    """The arguments that an unknown name is likely to stand for; none if it is known. `lr_scale` and the like are names of their own."""
    if name in arguments:
        return []
    near = difflib.get_close_matches(name, arguments, cutoff=0.75)
    return [known for known in near if not name.startswith(f"{known}_") and not name.endswith(f"_{known}")]


def no_argument(name: str, arguments: Collection[str]) -> str:
    """What is said of an unknown name."""
    near = " or ".join(meant(name, arguments))
    return f"no argument {name!r}" + (f" ({near}?)" if near else "")


def _state_dtype_text(value: Any) -> str:
    """One word for all states, or "exp_avg=int8, precond=bfloat16": a string, which no checkpoint library takes apart."""
    if value is None:
        return "float32"
    if not isinstance(value, Mapping):
        return str(value).removeprefix("torch.")
    return ", ".join(f"{state}={str(dtype).removeprefix('torch.')}" for state, dtype in value.items()) or "float32"


def state_dtypes(group: Group) -> dict[str, torch.dtype]:
    """The dtypes of exp_avg, exp_avg_sq and precond.

    Raises:
        ValueError: `state_dtype` is not one of those that `Anon` names.
    """
    return dict(_parsed_dtypes(group["state_dtype"]))


@lru_cache(maxsize=64)
def _parsed_dtypes(text: str) -> tuple[tuple[str, torch.dtype], ...]:
    states = STATE_KEYS[1:]
    named, twice = dict.fromkeys(states, text), False
    if "=" in text:
        pairs = [[word.strip() for word in part.split("=", 1)] for part in text.split(",")]
        named = {**dict.fromkeys(states, "float32"), **{pair[0]: pair[-1] for pair in pairs}}
        twice = len({pair[0] for pair in pairs}) < len(pairs)
    known = set(named) == set(states) and set(named.values()) <= set(STATE_DTYPES) and not twice
    _require(
        known and "int8" not in (named["exp_avg_sq"], named["precond"]),
        "state_dtype",
        text,
        "float32, float64 or bfloat16, or these by state, as {'exp_avg_sq': 'bfloat16', 'precond': 'bfloat16'} or "
        "'exp_avg_sq=bfloat16, precond=bfloat16'; exp_avg may be int8 too",
    )
    return tuple((state, STATE_DTYPES[named[state]]) for state in states)


def _plain(value: Any) -> Any:
    if type(value).__module__ == "numpy" and isinstance(value, numbers.Real):
        # By its decimals: a float32 0.1 is meant as 0.1.
        return int(value) if isinstance(value, numbers.Integral) else float(str(value))
    return value


def validate_lr(lr: Any) -> None:
    """Check a learning rate.

    Raises:
        ValueError: it is out of its range.
    """
    if isinstance(lr, Tensor):
        _require(lr.numel() == 1, "lr", lr, "a number or a tensor of one element")
    if not isinstance(lr, Tensor) or lr.device.type == "cpu":
        value = float(lr) if isinstance(lr, Tensor) else lr
        _require(is_number(value) and 0.0 <= value < math.inf, "lr", lr, "a finite number ≥ 0")


def validate(group: Group) -> None:
    """Check every hyperparameter of a param group.

    Raises:
        ValueError: naming the first argument that is out of its range, and the range.
    """
    validate_lr(group["lr"])
    betas = group["betas"]
    _require(isinstance(betas, tuple | list) and len(betas) == 2, "betas", betas, "a pair (β1, β2)")
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        _require(is_number(beta) and 0.0 <= beta < 1.0, name, beta, "in [0, 1)")
    for name, allowed, ok in (
        ("eps", "a finite number > 0", lambda x: 0.0 < x < math.inf),
        ("gamma", "a finite real number", math.isfinite),
        ("weight_decay", "a finite number ≥ 0", lambda x: 0.0 <= x < math.inf),
        ("refresh_ratio", "a finite number > 1", lambda x: 1.0 < x < math.inf),
        ("beta3", "in [0, 1)", lambda x: 0.0 <= x < 1.0),
    ):
        _require(is_number(group[name]) and ok(group[name]), name, group[name], allowed)
    clip, window = group["update_clip"], group["window"]
    _require(
        clip is None or (is_number(clip) and 0.0 < clip < math.inf), "update_clip", clip, "None or a finite number > 0"
    )
    _require(window is None or window == "auto" or _counts(window), "window", window, "None, 'auto' or an integer ≥ 1")
    longest, block = group["max_interval"], group["basis_block"]
    _require(longest is None or _counts(longest), "max_interval", longest, "None or an integer ≥ 1")
    _require(group["basis"] in BASES, "basis", group["basis"], "None, 'columns', 'rows' or 'both'")
    _require(_counts(block), "basis_block", block, "an integer ≥ 1")
    for name in SWITCHES:
        _require(isinstance(group[name], bool), name, group[name], "True or False")
    for name in ("foreach", "fused"):
        _require(group[name] in (None, True, False), name, group[name], "None, True or False")
    _require(not (group["foreach"] and group["fused"]), "fused", group["fused"], "False or None with foreach=True")
    state_dtypes(group)


def turns_silence_off(group: Group) -> bool:
    """Whether γ < 0 and ε turn an element with no gradient off for a long time."""
    return bool(group["gamma"] < 0 and not group["hold_silent"] and group["eps"] < 1e-10)


class SilenceWarning:
    """Warns of a param group that `turns_silence_off`, once: a schedule may set its γ anew before each step."""

    def __init__(self) -> None:
        self._told: set[int] = set()
        """Identities of the groups."""

    def check(self, group: Group) -> None:
        """Warn, if that has not been done for this group."""
        if not turns_silence_off(group) or torch.compiler.is_compiling() or id(group) in self._told:
            return
        self._told.add(id(group))
        warnings.warn(
            f"Anon: at gamma = {group['gamma']} and eps = {group['eps']} a coordinate whose gradient is exactly zero up to a "
            "refresh (rare embedding rows, zero-initialised layers) hardly moves for a long time after; hold_silent=True or a "
            "larger eps avoids it",
            stacklevel=3,
        )

    def start_from(self, groups: Sequence[Group]) -> None:
        """Forget the earlier groups. These were loaded: whoever made them has been warned."""
        self._told = {id(group) for group in groups if turns_silence_off(group)}


def warn_of_replaced(before: Sequence[Group], after: Sequence[Group]) -> None:
    """Warn, on one rank, of hyperparameters that a loaded state has replaced; not of learning rates, which follow a schedule."""
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return
    found: dict[str, None] = {}
    for old, new in zip(before, after, strict=True):
        for name in ("betas", *NUMBERS[1:], "basis", *SWITCHES):
            ours, theirs = old.get(name), new.get(name)
            if (tuple(ours) if isinstance(ours, list) else ours) != (
                theirs if not isinstance(theirs, list) else tuple(theirs)
            ):
                found[f"{name} {theirs!r}, not {ours!r}"] = None
    if found:
        warnings.warn(
            f"Anon: the loaded state brings its own hyperparameters, as in all of torch's optimizers: {'; '.join(found)}. Set yours after "
            "loading, in param_groups or, where the state depends on them, with rebase()",
            stacklevel=3,
        )
