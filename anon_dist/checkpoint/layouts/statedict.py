"""State dictionaries, as torch users nest them, read as a checkpoint.

The leaves are tensors, `Boxes` for tensors that lie in pieces, or any other value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from anon_dist.checkpoint.boxes import Boxes
from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint, NamesWanted
from anon_dist.checkpoint.layouts import quantised
from anon_dist.checkpoint.layouts.flat_keys import nested
from anon_dist.checkpoint.layouts.quantised import Quantised
from anon_dist.checkpoint.names import NUMBERED, assign, check_once, fitting_names, is_buffer, unnamed, unwrapped
from anon_dist.checkpoint.options import ReadOptions
from anon_dist.checkpoint.recognise import recognise, training_step
from anon_dist.checkpoint.schema import EXTRA, WEIGHT, Checkpoint, Key, Manifest, ParamGroup, Ref, TensorInfo
from anon_dist.optim.frame import with_present_keys

MODEL_KEYS = ("model", "model_state_dict", "state_dict", "model_state", "module", "net", "network", "weights")
OPTIMIZER_KEYS = (
    "optimizer",
    "optimizer_state_dict",
    "optim",
    "optim_state_dict",
    "optimizer_state",
    "opt",
    "osd",
    "optimizer_states",
)
_LARGE = 1 << 20
"""Elements above which a tensor among the extras is streamed, not kept."""


class Pieces(Checkpoint):
    """A checkpoint whose tensors are `Boxes`."""

    def __init__(self, manifest: Manifest, sources: Mapping[Key, Boxes], where: str) -> None:
        self.manifest = manifest
        self.tensors = {key: TensorInfo(boxes.shape, boxes.dtype) for key, boxes in sources.items()}
        self._sources, self._where = sources, where

    def read(self, key: Key, start: int, stop: int) -> Tensor:
        """See `Checkpoint`."""
        with self._named(key):
            return self._sources[key].read(start, stop)

    def pieces(self, key: Key, start: int, stop: int) -> Iterator[Tensor]:
        """See `Checkpoint`."""
        with self._named(key):
            yield from self._sources[key].pieces(start, stop)

    @contextmanager
    def _named(self, key: Key) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # a CheckpointError is one
            kind = DamagedCheckpoint if isinstance(error, DamagedCheckpoint) else CheckpointError
            raise kind(f"{self._where}: {key.state} of {key.parameter} cannot be read: {error}") from error


@dataclass
class _Reading:
    """What has been found so far."""

    where: str
    ordered: bool
    sources: dict[Key, Boxes] = field(default_factory=dict)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: list[ParamGroup] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unnamed: bool = False


def interpret(
    tree: Mapping[str, Any],
    where: str,
    options: ReadOptions,
    extras: Mapping[str, Any] | None = None,
    ordered: bool = True,
    **manifest: Any,
) -> Pieces:
    """A nested state dictionary as a checkpoint: model, optimizer, and the rest.

    Args:
        where: file or folder, for messages.
        options: for optimizers that number their parameters.
        extras: more of them, from files beside.
        ordered: whether the model's entries are in the model's order.
        manifest: format and world_size.

    Raises:
        CheckpointError: neither model nor optimizer is in it; names are wanted.
    """
    model, optimizer, rest = _split(tree)
    if not model and not optimizer:
        raise CheckpointError(
            f"{where} holds neither a model's nor an optimizer's state dictionary; its keys: {', '.join(map(str, list(tree)[:8]))}"
        )
    reading = _Reading(where, ordered)
    weights = _read_model(reading, model)
    if optimizer:
        _read_optimizer(reading, optimizer, weights, options)
    members = {m for g in reading.groups for m in g.members}
    if optimizer:
        _find_tied(reading, weights, members)
    buffers = [n for n, floating in weights.items() if n not in members and is_buffer(n, floating)]
    order = [n for n in weights if n not in buffers] or [m for g in reading.groups for m in g.members]
    idle = [n for n in order if n not in members] if optimizer and not reading.unnamed else []
    for key in (str(k) for k, v in rest.items() if not optimizer and _holds_optimizer(v)):
        reading.notes.append(f"{key} is not one optimizer's state dictionary: it stays as it is, among the extras")
    reading.extras.update(_extra(reading, k, v) for k, v in {**rest, **(extras or {})}.items())
    made = Manifest(
        optimizer=recognise(
            reading.groups, {k.state for k in reading.sources if k.parameter in members}, reading.scalars
        )
        if optimizer
        else None,
        groups=reading.groups,
        scalars=reading.scalars,
        order=order,
        buffers=buffers,
        frozen=idle,
        unsure=idle if "buffer_names" not in reading.extras else [],
        tied=reading.tied,
        step=training_step(reading.extras, reading.scalars),
        extras=reading.extras,
        notes=reading.notes,
        **manifest,
    )
    return Pieces(made, reading.sources, where)


def _split(tree: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any], dict[str, Any]]:
    """Model, optimizer, rest."""
    if _is_optimizer(tree):
        return {}, tree, {}
    optimizer_key = next((k for k in OPTIMIZER_KEYS if k in tree and _is_optimizer(_single(tree[k]))), None)
    model_key = next((k for k in MODEL_KEYS if _is_model(tree.get(k))), None)
    if optimizer_key is None and model_key is None:
        for key, value in tree.items():  # {"app": {"model": …, "optim": …}}
            if isinstance(value, Mapping) and any(k in value for k in (*OPTIMIZER_KEYS, *MODEL_KEYS)):
                model, optimizer, rest = _split(value)
                if model or optimizer:
                    return model, optimizer, {**rest, **{k: v for k, v in tree.items() if k != key}}
        return (tree, {}, {}) if _is_model(tree) else ({}, {}, {})
    rest = {k: v for k, v in tree.items() if k not in (optimizer_key, model_key)}
    model = tree[model_key] if model_key else {}
    if model_key is None:  # torchtitan: the model's tensors beside the optimizer
        model = {k: v for k, v in rest.items() if isinstance(v, Tensor | Boxes)}
        rest = {k: v for k, v in rest.items() if k not in model}
    return model, _single(tree[optimizer_key]) if optimizer_key else {}, rest


def _single(value: Any) -> Any:
    """Lightning keeps a list of optimizers; one is what is read."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _is_optimizer(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    flat = any(str(k).startswith("state.") for k in value) and any(str(k).startswith("param_groups.") for k in value)
    return flat or ("state" in value and "param_groups" in value)


def _holds_optimizer(value: Any) -> bool:
    """Whether an optimizer's state dictionary, or several, is in it: of a model with an optimizer for each of its parts."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return _is_optimizer(value) or any(_is_optimizer(v) for v in inner)


def _is_model(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    tensors = sum(isinstance(v, Tensor | Boxes) for v in value.values())
    return tensors > 0 and all(isinstance(k, str) for k in value) and tensors >= len(value) / 2


def _read_model(reading: _Reading, model: Mapping[str, Any]) -> dict[str, bool]:
    """Weights, by name → whether floating. Tensors that share their storage are tied."""
    found: dict[str, bool] = {}
    stored: dict[Any, str] = {}
    clean = unwrapped([str(k) for k in model])
    for wrapped, value in model.items():
        name = clean[str(wrapped)]
        if not isinstance(value, Tensor | Boxes):
            reading.extras.setdefault("model_extra_state", {})[name] = value
            continue
        if isinstance(value, Tensor):
            place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.dtype)
            if value.numel() and (first := stored.setdefault(place, name)) != name:
                reading.tied[name] = first
                continue
        reading.sources[Key(name, WEIGHT)] = _boxes(value)
        found[name] = value.dtype.is_floating_point
    return found


def _read_optimizer(
    reading: _Reading, optimizer: Mapping[str, Any], weights: Mapping[str, bool], options: ReadOptions
) -> None:
    if "state" not in optimizer:
        optimizer = nested(optimizer, weights.keys())
    states, groups = optimizer["state"], optimizer["param_groups"]
    members = [list(g["params"]) for g in groups]
    named = _names(reading, states, members, groups, weights, options)
    for group, own in zip(groups, members, strict=True):
        hyperparameters = {k: _value(v) for k, v in group.items() if k != "params"}
        reading.groups.append(ParamGroup([named[m] for m in own], hyperparameters))
    for member, values in states.items():
        member = _number(member) if _number(member) in named else member
        if member not in named:
            raise CheckpointError(f"{reading.where}: the optimizer has a state of {member}, which is in no param group")
        name = named[member]
        for key, value in with_present_keys({str(key): value for key, value in values.items()}).items():
            _read_state(reading, name, key, value)
    _find_dimensionless(reading)


def _find_dimensionless(reading: _Reading) -> None:
    """A 0-dim state is of its parameter's shape, not a number beside it, where the parameter has no dimensions and other parameters
    have the state in theirs."""
    shaped = {key.state for key in reading.sources}
    for name, own in reading.scalars.items():
        weight = reading.sources.get(Key(name, WEIGHT))
        if weight is not None and not weight.shape:
            for key in [k for k, v in own.items() if k in shaped and isinstance(v, Tensor)]:
                reading.sources[Key(name, key)] = _boxes(own.pop(key))


def _find_tied(reading: _Reading, weights: dict[str, bool], members: AbstractSet[str]) -> None:
    """Formats that store a tied weight under each of its names do not say so: the optimizer knows only one, and the contents are equal.

    Only matrices of varied contents count; what is constant may be equal by chance.
    """
    known = [n for n in weights if n in members]
    for name in [n for n in weights if n not in members]:
        own = reading.sources[Key(name, WEIGHT)]
        for other in known:
            if len(own.shape) > 1 and _equal(own, reading.sources[Key(other, WEIGHT)]):
                reading.tied[name] = other
                del weights[name], reading.sources[Key(name, WEIGHT)]
                break


def _equal(a: Boxes, b: Boxes) -> bool:
    numel = prod(a.shape)
    if a.shape != b.shape or a.dtype != b.dtype or numel == 0:
        return False
    blocks = [(0, min(numel, 256)), *((i, min(numel, i + _LARGE)) for i in range(0, numel, _LARGE))]
    head = a.read(*blocks[0])
    return not bool((head == head[0]).all()) and all(torch.equal(a.read(*x), b.read(*x)) for x in blocks)


def _names(
    reading: _Reading,
    states: Mapping[Any, Any],
    members: list[list[Any]],
    groups: Sequence[Mapping[str, Any]],
    weights: Mapping[str, bool],
    options: ReadOptions,
) -> dict[Any, str]:
    """What the optimizer calls each parameter → its name."""
    flat = [m for own in members for m in own]
    if all(isinstance(m, str) for m in flat):
        clean = unwrapped(flat)
        found = {m: reading.tied.get(n, n) for m, n in clean.items()}
        check_once([found[m] for m in flat], f"{reading.where}: the optimizer")
        return found
    model = [n for n, floating in weights.items() if floating]
    own = {m: states.get(m, states.get(str(m), {})) for m in flat}
    recorded = all(len(g.get("param_names") or ()) == len(m) for g, m in zip(groups, members, strict=True))
    if options.names is not None or recorded:
        given = [str(n) for g in groups for n in g["param_names"]] if options.names is None else list(options.names)
        if len(given) != len(flat):
            raise CheckpointError(
                f"{reading.where}: --names has {len(given)} names for {len(flat)} parameters of the optimizer"
            )
        clean = unwrapped(given)
        found = {m: reading.tied.get(clean[n], clean[n]) for m, n in zip(flat, given, strict=True)}
        _check_names(reading, own, found, model, "param_names" if options.names is None else "--names")
        return found
    shapes = {n: reading.sources[Key(n, WEIGHT)].shape for n in model}
    fitting = {m: fitting_names(state, shapes) for m, state in own.items()}
    stateless = {m for m, state in own.items() if not state}
    how = {"ordered": reading.ordered, "in_model_order": options.names_in_model_order}
    try:
        found = assign(members, fitting, model, reading.where, stateless, **how)
    except NamesWanted as reason:
        if not options.nameless:
            raise
        reading.unnamed = True
        reading.notes.append(NUMBERED.format(reason))
        return {m: unnamed(m) for m in flat}
    reading.notes.append("the optimizer numbers its parameters; they were named after the model beside it")
    return found


def _check_names(
    reading: _Reading, states: Mapping[Any, Any], named: Mapping[Any, str], model: Sequence[str], said_by: str
) -> None:
    check_once(named.values(), f"{reading.where}: {said_by}")
    for member, name in named.items():
        if model and name not in model:
            raise CheckpointError(f"{reading.where}: {said_by} has {name}, and the model beside the optimizer does not")
        weight = reading.sources.get(Key(name, WEIGHT))
        if weight is not None and not fitting_names(states[member], {name: weight.shape}):
            shapes = sorted({tuple(v.shape) for v in states[member].values() if isinstance(v, Tensor | Boxes)})
            raise CheckpointError(
                f"{reading.where}: {said_by} calls parameter {member} {name}, but its states have shape {shapes[-1]} and {name} has "
                f"{weight.shape}"
            )


def _read_state(reading: _Reading, name: str, key: str, value: Any) -> None:
    if isinstance(value, Quantised) and quantised.NOTE not in reading.notes:
        reading.notes.append(quantised.NOTE)
    if isinstance(value, Tensor | Boxes) and len(value.shape) > 0:
        reading.sources[Key(name, key)] = _boxes(value)
    else:
        reading.scalars.setdefault(name, {})[key] = _replaced(
            value, key, lambda path, tensor: _keep(reading, Key(name, path), tensor), least=0
        )


def _extra(reading: _Reading, key: str, value: Any) -> tuple[str, Any]:
    return str(key), _replaced(
        value, str(key), lambda path, tensor: _keep(reading, Key(path, EXTRA), tensor), least=_LARGE
    )


def _keep(reading: _Reading, key: Key, tensor: Tensor | Boxes) -> Ref:
    reading.sources[key] = _boxes(tensor)
    return Ref(key)


def _replaced(value: Any, path: str, keep: Callable[[str, Tensor | Boxes], Ref], least: int) -> Any:
    """The value, copied; its tensors with dimensions and more than `least` elements are kept elsewhere."""
    if isinstance(value, Tensor | Boxes):
        if len(value.shape) > 0 and prod(value.shape) > least:
            return keep(path, value)
        return _value(value)
    if isinstance(value, Mapping):
        return {k: _replaced(v, f"{path}.{k}", keep, least) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_replaced(v, f"{path}.{i}", keep, least) for i, v in enumerate(value))
    return value


def _value(value: Any) -> Any:
    """A small value, free of the file it came from."""
    if isinstance(value, Boxes):
        return value.read(0, prod(value.shape)).clone().reshape(value.shape)
    return value.detach().clone() if type(value) is Tensor else value


def _boxes(value: Tensor | Boxes) -> Boxes:
    return value if isinstance(value, Boxes) else Boxes.whole(value.detach())


def _number(member: Any) -> Any:
    return int(member) if isinstance(member, str) and member.isdigit() else member
