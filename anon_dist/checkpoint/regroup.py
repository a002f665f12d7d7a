"""Param groups cut otherwise: so that a checkpoint fits an optimizer that has its parameters in other groups.

torch and DeepSpeed load groups by their number. Here they are found by the parameters' names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.names import unwrapped
from anon_dist.checkpoint.optimizers.schedules import regrouped as schedules_regrouped
from anon_dist.checkpoint.schema import MASTER, WEIGHT, Checkpoint, Key, ParamGroup

DECAY: Literal["decay"] = "decay"
"""The rule of `anon_dist.optim.param_groups`, in a word."""
_FORM = 'a list such as [{"params": ["*wte*"], "weight_decay": 0.0}, {"params": ["*"]}]'
_NAMES = "param_names"


@dataclass(frozen=True)
class Group:
    """A group that is to be."""

    params: tuple[str, ...]
    """Names of its parameters, or patterns of them (`fnmatch`)."""
    weight_decay: float | None = None
    """None: what its parameters have had."""


Groups = Literal["decay"] | tuple[Group, ...]


def read_groups(words: str) -> Groups:
    """What `--groups` says: `decay`, or a JSON file with a list of groups.

    Raises:
        CheckpointError: the file cannot be read, or is no such list.
    """
    if words == DECAY:
        return DECAY
    where = f"--groups {words}"
    try:
        content = json.loads(Path(words).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{where} is neither {DECAY!r} nor a file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where} cannot be read: {error}; it is to be {_FORM}") from None
    if not isinstance(content, list) or not content or not all(isinstance(entry, dict) for entry in content):
        raise CheckpointError(f"{where} is not {_FORM}")
    return _clean([_group(entry, f"{where}: group {index}") for index, entry in enumerate(content)])


def _group(entry: Mapping[str, Any], where: str) -> Group:
    params, decay = entry.get("params"), entry.get("weight_decay")
    if foreign := sorted(set(entry) - {"params", "weight_decay"}):
        raise CheckpointError(f"{where} has {foreign[0]}; only params and weight_decay can be given, and lr goes on")
    if not isinstance(params, list) or not params or not all(isinstance(name, str) for name in params):
        raise CheckpointError(f"{where} needs params, a list of names or patterns")
    if decay is not None and not (type(decay) in (int, float) and 0.0 <= decay < float("inf")):
        raise CheckpointError(f"{where}: weight_decay must be a number ≥ 0, not {decay!r}")
    return Group(tuple(params), None if decay is None else float(decay))


def _clean(groups: Sequence[Group]) -> tuple[Group, ...]:
    """With the names of the unwrapped model."""
    clean = unwrapped(list(dict.fromkeys(name for group in groups for name in group.params)))
    return tuple(replace(group, params=tuple(clean[name] for name in group.params)) for group in groups)


def regroup(checkpoint: Checkpoint, groups: Groups) -> Checkpoint:
    """The same checkpoint with its optimizer's parameters in these groups; schedules' rates follow.

    A parameter goes to the first group that has its name, else to the first with a pattern that fits. Within a group parameters keep the
    optimizer's order, or have the model's where they come from several groups. By `decay` matrices and embeddings keep their weight
    decay, and vectors have none; the group of the first parameter comes first, as `param_groups` makes them.

    Raises:
        CheckpointError: there is no optimizer, a parameter or pattern is left over, or a group would have parameters whose
            hyperparameters differ.
    """
    manifest = checkpoint.manifest
    if not manifest.groups:
        raise CheckpointError("the checkpoint has no optimizer state, so no param groups (--groups)")
    old = {name: index for index, group in enumerate(manifest.groups) for name in group.members}
    members = _in_order(old, manifest.order)
    shares = _by_decay(checkpoint, members) if isinstance(groups, str) else _by_name(members, groups)
    made, origins = [], []
    for share, decay in shares:
        sources = sorted({old[name] for name in share})
        share = _in_order({name: old[name] for name in share}, manifest.order)
        values = _values(manifest.groups, sources, decay)
        if _NAMES in values:
            values[_NAMES] = [_recorded(manifest.groups[old[name]])[name] for name in share]
        made.append(ParamGroup(share, values))
        origins.append(sources[0])
    sizes = " and ".join(f"{len(group.members)} (weight_decay {_decay(group)})" for group in made)
    extras = schedules_regrouped(manifest.extras, origins, len(manifest.groups))
    notes = [*manifest.notes, f"{len(old)} parameters are in {len(made)} param groups now, of {sizes}"]
    checkpoint.manifest = replace(manifest, groups=made, extras=extras, notes=notes)
    return checkpoint


def _in_order(members: Mapping[str, int], model: Sequence[str]) -> list[str]:
    """Names, each with its old group: in the optimizer's order if that is one, else in the model's as far as it is known."""
    if len(set(members.values())) == 1:
        return list(members)
    places = {name: place for place, name in enumerate(model)}
    return sorted(members, key=lambda name: places.get(name, len(places)))


def _by_decay(checkpoint: Checkpoint, members: Iterable[str]) -> list[tuple[list[str], float | None]]:
    shares: dict[bool, list[str]] = {}
    for name in members:
        info = next(
            (checkpoint.tensors[k] for s in (WEIGHT, MASTER) if (k := Key(name, s)) in checkpoint.tensors), None
        )
        if info is None:
            raise CheckpointError(
                f"the checkpoint has no weights of {name}, so it is not known whether it is a matrix: give --groups FILE"
            )
        shares.setdefault(len(info.shape) >= 2, []).append(name)
    return [(share, None if matrices else 0.0) for matrices, share in shares.items()]


def _by_name(members: Iterable[str], groups: Sequence[Group]) -> list[tuple[list[str], float | None]]:
    shares: list[list[str]] = [[] for _ in groups]
    used: set[str] = set()
    for name in members:
        fits = [(i, p) for i, group in enumerate(groups) for p in group.params if p == name or fnmatchcase(name, p)]
        if not fits:
            raise CheckpointError(
                f'--groups: {name} is in none of the groups; a last one with "params": ["*"] has the rest'
            )
        used |= {pattern for _, pattern in fits}
        shares[next((i for i, pattern in fits if pattern == name), fits[0][0])].append(name)
    unused = [pattern for group in groups for pattern in group.params if pattern not in used]
    empty = [index for index, share in enumerate(shares) if not share]
    if unused or empty:
        what = f"{unused[0]!r} matches no parameter of the optimizer" if unused else f"group {empty[0]} is left empty"
        raise CheckpointError(f"--groups: {what}")
    return [(share, group.weight_decay) for share, group in zip(shares, groups, strict=True)]


def _values(groups: Sequence[ParamGroup], sources: Sequence[int], decay: float | None) -> dict[str, Any]:
    """The hyperparameters of a group with members from these groups."""
    first = dict(groups[sources[0]].hyperparameters)
    for index in sources[1:]:
        other = groups[index].hyperparameters
        for key in [k for k in {**first, **other} if k != _NAMES and not (k == "weight_decay" and decay is not None)]:
            if key not in first or key not in other or not _same(first[key], other[key]):
                raise CheckpointError(
                    f"--groups: parameters of the param groups {sources[0]} and {index} cannot be in one group, as they have {key} = "
                    f"{first.get(key)!r} and {other.get(key)!r}" + (_SAY_WHICH if key == "weight_decay" else "")
                )
    if decay is not None:
        first["weight_decay"] = decay
    return first


_SAY_WHICH = '; say which ("weight_decay": …)'


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)


def _recorded(group: ParamGroup) -> dict[str, str]:
    """Each member's name as the optimizer recorded it, wrappers included."""
    return dict(zip(group.members, group.hyperparameters.get(_NAMES) or group.members, strict=True))


def _decay(group: ParamGroup) -> str:
    return f"{group.hyperparameters.get('weight_decay', 'unknown')}"
