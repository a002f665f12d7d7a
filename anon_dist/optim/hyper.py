"""Anon's hyperparameters: their allowed ranges, and the record of those that the state depends on.

The preconditioner and the second moment are only meaningful together with the γ, ρ, β2, β3 and window that made them. Each param group
therefore carries, under `HISTORY`, a record of the values its state was made with. A group whose ρ, β2, β3 or window have drifted from
their record was edited past `Anon.rebase`, and a step refuses it. A γ that has been edited takes effect at a refresh, and goes on record
there: the last record's is the one *in force*, which made the preconditioners of all of the group's parameters. The record is a JSON
string: one leaf, which no checkpoint library takes apart.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from anon_dist.optim.schedule import Regime, Schedule, schedule
from anon_dist.optim.state import STATE_KEYS

HISTORY = "history"
STATE_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "int8": torch.int8}

Group = Mapping[str, Any]


def is_number(value: Any) -> bool:
    """Whether `value` is a plain real number (a bool is not) and not NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _require(ok: bool, name: str, value: Any, allowed: str) -> None:
    if not ok:
        raise ValueError(f"Anon: {name} must be {allowed}, not {value!r}")


def normalise(group: dict[str, Any]) -> None:
    """Bring the hyperparameters of a group to plain Python values, which every checkpoint format keeps; numpy's scalars, say."""
    for name in ("lr", "eps", "gamma", "weight_decay", "refresh_ratio", "beta3", "update_clip", "window"):
        group[name] = _plain(group[name])
    if isinstance(group["betas"], tuple | list):
        group["betas"] = tuple(_plain(beta) for beta in group["betas"])
    for name in ("maximize", "hold_silent", "stochastic_rounding", "foreach", "fused"):
        if type(group[name]).__name__ in ("bool", "bool_"):
            group[name] = bool(group[name])
    group["state_dtype"] = _state_dtype_text(group["state_dtype"])


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
    named = dict.fromkeys(states, text)
    if "=" in text:
        pairs = [[word.strip() for word in part.split("=", 1)] for part in text.split(",")]
        named = {**dict.fromkeys(states, "float32"), **{pair[0]: pair[-1] for pair in pairs}}
    known = set(named) == set(states) and set(named.values()) <= set(STATE_DTYPES)
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


def validate(group: Group) -> None:
    """Check every hyperparameter of a param group.

    Raises:
        ValueError: naming the first argument that is out of its range, and the range.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor):
        _require(lr.numel() == 1, "lr", lr, "a number or a tensor of one element")
    else:
        _require(is_number(lr) and 0.0 <= lr < math.inf, "lr", lr, "a finite number ≥ 0")
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        _require(0.0 <= float(lr) < math.inf, "lr", lr, "a finite number ≥ 0")
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
    whole = isinstance(window, int) and not isinstance(window, bool) and window >= 1
    _require(window is None or window == "auto" or whole, "window", window, "None, 'auto' or an integer ≥ 1")
    for name in ("maximize", "hold_silent", "stochastic_rounding"):
        _require(isinstance(group[name], bool), name, group[name], "True or False")
    for name in ("foreach", "fused"):
        _require(group[name] in (None, True, False), name, group[name], "None, True or False")
    _require(not (group["foreach"] and group["fused"]), "fused", group["fused"], "False or None with foreach=True")
    state_dtypes(group)


def recorded(group: Group, since: int = 0) -> dict[str, Any]:
    """The record of a group's present values, in force after step `since`."""
    return {
        "since": since,
        "gamma": group["gamma"],
        "refresh_ratio": group["refresh_ratio"],
        "beta2": group["betas"][1],
        "beta3": group["beta3"],
        "window": group["window"],
    }


def new_history(group: Group) -> str:
    """The history of a group that has taken no step."""
    return json.dumps([recorded(group)])


def append_history(group: Group, since: int) -> str:
    """The group's history, followed by its present values from step `since` on (0: they replace it)."""
    entries = [e for e in json.loads(group[HISTORY]) if e["since"] < since]
    return json.dumps([*entries, recorded(group, since)])


def drifted(group: Group) -> dict[str, tuple[Any, Any]]:
    """Hyperparameters whose value is not the one on record: name → (recorded, present)."""
    record = last_record(group)
    present = recorded(group)
    return {k: (record[k], v) for k, v in present.items() if k != "since" and record[k] != v}


def check_drift(index: int, group: Group, allowed: Collection[str] = ()) -> None:
    """Refuse values that are not the ones on record, except those named in `allowed`.

    Raises:
        RuntimeError: naming the first, and the remedy.
    """
    for name, (recorded, present) in drifted(group).items():
        if name not in allowed:
            raise RuntimeError(
                f"Anon: {name} of param group {index} was changed from {recorded!r} to {present!r} after steps were taken. The state was "
                f"made with {recorded!r}: call optimizer.rebase({name}={present!r}), which converts it, or set {recorded!r} again"
            )


def gamma_in_force(group: Group) -> float:
    """γ of the group's preconditioners, which is not yet `group["gamma"]` where that was edited since the last refresh."""
    return float(last_record(group)["gamma"] if HISTORY in group else group["gamma"])


def gamma_before(group: Group, step: int) -> float:
    """γ of the preconditioner of a parameter that is about to take `step`; see `turned`."""
    record = last_record(group)
    return float(record["gamma_before"] if step <= record.get("turned_at", 0) else record["gamma"])


def turned(group: Group, step: int, others: bool) -> str:
    """The group's history once its edited γ has come into force, at the refresh in `step`.

    Args:
        others: whether the group has parameters that cannot be seen now, and whose turn in the same step comes next (DeepSpeed's stage 3
            steps a group in parts): theirs are still of the γ before.
    """
    *entries, last = json.loads(group[HISTORY])
    kept = {key: last[key] for key in recorded(group)}
    turn = {"turned_at": step, "gamma_before": last["gamma"]} if others else {}
    return json.dumps([*entries, {**kept, "gamma": float(group["gamma"]), **turn}])


def last_record(group: Group) -> dict[str, Any]:
    """The values that the state of the group was last made with."""
    return _last(group[HISTORY])


@lru_cache(maxsize=256)
def _last(history: str) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads(history)[-1]
    return entry


@lru_cache(maxsize=256)
def _schedule(history: str) -> Schedule:
    return schedule(*(Regime(e["since"], e["refresh_ratio"], e["beta2"], e["window"]) for e in json.loads(history)))


def schedule_of(group: Group) -> Schedule:
    """The refresh schedule of a group, past changes included."""
    return _schedule(group[HISTORY])
