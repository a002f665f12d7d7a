"""Param groups cut otherwise: so that a checkpoint fits an optimizer that has its parameters in other groups.

torch and DeepSpeed load groups by their number. Here they are found by the parameters' names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.names import unwrapped
from anon_dist.checkpoint.optimizers.schedules import regrouped as schedules_regrouped
from anon_dist.checkpoint.options import Basis
from anon_dist.checkpoint.recognise import ADAM, ADAMW
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
    basis: Basis | Literal[""] | None = ""
    """Where AdamW's state becomes Anon's: the sides of its matrices that are turned. "": those of `AnonOptions.basis`."""

    @property
    def given(self) -> dict[str, Any]:
        """The hyperparameters that it has of its own."""
        decay = {} if self.weight_decay is None else {"weight_decay": self.weight_decay}
        return decay if self.basis == "" else {**decay, "basis": self.basis}


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
    params, decay, basis = entry.get("params"), entry.get("weight_decay"), entry.get("basis", "")
    if foreign := sorted(set(entry) - {"params", "weight_decay", "basis"}):
        raise CheckpointError(
            f"{where} has {foreign[0]}; only params, weight_decay and basis can be given, and lr goes on"
        )
    if not isinstance(params, list) or not params or not all(isinstance(name, str) for name in params):
        raise CheckpointError(f"{where} needs params, a list of names or patterns")
    if decay is not None and not (type(decay) in (int, float) and 0.0 <= decay < float("inf")):
        raise CheckpointError(f"{where}: weight_decay must be a number ≥ 0, not {decay!r}")
    if "basis" in entry and basis not in (None, *get_args(Basis)):
        raise CheckpointError(f"{where}: basis must be null, {', '.join(map(repr, get_args(Basis)))}, not {basis!r}")
    return Group(tuple(params), None if decay is None else float(decay), basis)


def _clean(groups: Sequence[Group]) -> tuple[Group, ...]:
    """With the names of the unwrapped model."""
    clean = unwrapped(list(dict.fromkeys(name for group in groups for name in group.params)))
    return tuple(replace(group, params=tuple(clean[name] for name in group.params)) for group in groups)


def regroup(checkpoint: Checkpoint, groups: Groups, to_anon: bool = False) -> Checkpoint:
    """The same checkpoint with its optimizer's parameters in these groups; schedules' rates follow.

    A parameter goes to the first group that has its name, else to the first with a pattern that fits. Within a group parameters keep the
    optimizer's order, or have the model's where they come from several groups. By `decay` matrices and embeddings keep their weight
    decay, and vectors have none; the group of the first parameter comes first, as `param_groups` makes them.

    Args:
        to_anon: the state is about to become Anon's.

    Raises:
        CheckpointError: there is no optimizer, a parameter or pattern is left over, a group would have parameters whose hyperparameters
            differ, or groups have a basis, and AdamW's state does not become Anon's.
    """
    manifest = checkpoint.manifest
    if not (to_anon and manifest.optimizer in (ADAM, ADAMW)) and any(
        "basis" in g.given for g in groups if isinstance(g, Group)
    ):
        raise CheckpointError(
            "--groups: a basis can be given where AdamW's state becomes Anon's (--optimizer anon). Anon's own keeps the one that it has: "
            "optimizer.rebase(basis=…, group=…) in the run that goes on"
        )
    if not manifest.groups:
        raise CheckpointError("the checkpoint has no optimizer state, so no param groups (--groups)")
    old = {name: index for index, group in enumerate(manifest.groups) for name in group.members}
    members = _in_order(old, manifest.order)
    shares = _by_decay(checkpoint, members) if isinstance(groups, str) else _by_name(members, groups)
    made, origins = [], []
    for share, given in shares:
        sources = sorted({old[name] for name in share})
        share = _in_order({name: old[name] for name in share}, manifest.order)
        values = _values(manifest.groups, sources, given)
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


def _by_decay(checkpoint: Checkpoint, members: Iterable[str]) -> list[tuple[list[str], dict[str, Any]]]:
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
    return [(share, {} if matrices else {"weight_decay": 0.0}) for matrices, share in shares.items()]


def _by_name(members: Iterable[str], groups: Sequence[Group]) -> list[tuple[list[str], dict[str, Any]]]:
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
    return [(share, group.given) for share, group in zip(shares, groups, strict=True)]


def _values(groups: Sequence[ParamGroup], sources: Sequence[int], given: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a group with members from these groups; those `given` are its own."""
    first = dict(groups[sources[0]].hyperparameters)
    for index in sources[1:]:
        other = groups[index].hyperparameters
        for key in [k for k in {**first, **other} if k != _NAMES and k not in given]:
            if key not in first or key not in other or not _same(first[key], other[key]):
                raise CheckpointError(
                    f"--groups: parameters of the param groups {sources[0]} and {index} cannot be in one group, as they have {key} = "
                    f"{first.get(key)!r} and {other.get(key)!r}" + (_SAY_WHICH if key == "weight_decay" else _APART)
                )
    return {**first, **given}


_APART = "; keep them apart: --groups FILE, a JSON list with an entry for each group"
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
