"""Learning-rate schedulers among a checkpoint's extras: found by what their state is, whatever a script calls them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anon_dist.checkpoint.errors import CheckpointError

USUAL = ("lr_scheduler", "scheduler", "lr_scheduler_state_dict", "scheduler_state_dict")
"""Names that count where what lies under them does not tell."""
_TORCH = ("base_lrs", "_last_lr", "_step_count", "_get_lr_called_within_step", "_schedulers")
_RATES = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")
"""One for each param group: torch's LRScheduler, CyclicLR, ReduceLROnPlateau."""
_OF_GROUPS = (*_RATES, "lr_lambdas")
"""Whatever there is one of for each param group; LambdaLR's functions, too."""
_RATE = ("eta_min", "default_min_lr")
"""One for all groups: CosineAnnealingLR, ReduceLROnPlateau."""
GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""In a param group: its own, and what OneCycleLR and SWALR keep there."""


def is_schedule(value: Any) -> bool:
    """Whether it is the state of one of torch's schedulers (transformers' and accelerate's are), or of DeepSpeed's."""
    if not isinstance(value, Mapping):
        return False
    return set(value) == {"last_batch_iteration"} or ("last_epoch" in value and any(k in value for k in _TORCH)) or (
        "_schedulers" in value and "_last_lr" in value
    )  # fmt: skip


def schedule_key(extras: Mapping[str, Any]) -> str | None:
    """Under which name the state of the learning-rate scheduler is; None: there is none, or several of no usual name."""
    found = [str(name) for name, value in extras.items() if is_schedule(value)]
    usual = [name for name in USUAL if name in found] or [
        n for n in USUAL if isinstance(extras.get(n), Mapping) and not found
    ]
    return usual[0] if usual else found[0] if len(found) == 1 else None


def rescaled(value: Any, factors: Sequence[float], where: str = "") -> Any:
    """A nested value, the learning rates of all schedules in it multiplied, group by group.

    Raises:
        CheckpointError: a schedule has one rate for groups whose factors differ.
    """
    if isinstance(value, list | tuple):
        again = [rescaled(inner, factors, f"{where}[{i}]") for i, inner in enumerate(value)]
        return type(value)(again) if type(value) in (list, tuple) else value
    if type(value) is not dict:
        return value
    if not is_schedule(value):
        return {k: rescaled(v, factors, f"{where}.{k}" if where else str(k)) for k, v in value.items()}
    return {k: _rescaled_entry(k, v, factors, where) for k, v in value.items()}


def _rescaled_entry(key: str, value: Any, factors: Sequence[float], where: str) -> Any:
    if key in _RATES and isinstance(value, list):
        if len(value) != len(factors):
            raise CheckpointError(
                f"the schedule {where} has {len(value)} learning rates ({key}), and the optimizer {len(factors)} param groups: it is not "
                "known how to convert it. Keep the rates (--anon.keep-lr, --adamw.keep-lr)"
            )
        return [float(rate) * factor for rate, factor in zip(value, factors, strict=True)]
    if key in _RATE and value:
        if max(factors) > min(factors) * (1 + 1e-9):
            raise CheckpointError(
                f"the schedule {where} has {key} = {value} for all param groups, whose learning rates are multiplied by different factors "
                f"({', '.join(f'{f:.4g}' for f in factors)}). Keep the rates (--anon.keep-lr, --adamw.keep-lr), or set it to 0 first"
            )
        return float(value) * factors[0]
    if key == "_schedulers":
        return [{k: _rescaled_entry(k, v, factors, where) for k, v in inner.items()} for inner in value]
    return value


def regrouped(value: Any, origins: Sequence[int], before: int, where: str = "") -> Any:
    """A nested value, all schedules in it as for other param groups.

    Args:
        origins: for each new group, an old one of the same learning rate.
        before: how many old groups there were.

    Raises:
        CheckpointError: a schedule has rates of another number of groups.
    """
    if isinstance(value, list | tuple):
        again = [regrouped(inner, origins, before, f"{where}[{i}]") for i, inner in enumerate(value)]
        return type(value)(again) if type(value) in (list, tuple) else value
    if type(value) is not dict:
        return value
    inside, found = is_schedule(value), {}
    for key, inner in value.items():
        if inside and key in _OF_GROUPS and isinstance(inner, list):
            if len(inner) != before:
                raise CheckpointError(
                    f"the schedule {where} has {len(inner)} entries in {key}, and the optimizer {before} param groups: it is not known "
                    "which is whose (--groups)"
                )
            found[key] = [inner[origin] for origin in origins]
        else:
            found[key] = regrouped(inner, origins, before, f"{where}.{key}" if where else str(key))
    return found


def configured(extras: Mapping[str, Any]) -> Iterator[str]:
    """Names of schedules that keep no rates in their state, but take them from the run's configuration: DeepSpeed's own."""
    for name, value in extras.items():
        if is_schedule(value) and "last_batch_iteration" in value:
            yield str(name)
