"""A checkpoint as a nested state dictionary, stubs for its tensors: what writers of torch's formats lay out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.recognise import training_step
from anon_dist.checkpoint.schema import EXTRA, MASTER, WEIGHT, Checkpoint, Key, Part, Ref, Stub

Keyed = str
"""`name` or `index`: how an optimizer's state dictionary calls its parameters."""


def stub(checkpoint: Checkpoint, key: Key) -> Stub:
    """The whole tensor, as it is."""
    info = checkpoint.tensors[key]
    return Stub(info.shape, info.dtype, [Part(key, 0, info.numel)])


def with_stubs(checkpoint: Checkpoint, value: Any) -> Any:
    """A nested value, stubs instead of `Ref`s."""
    return replaced(value, lambda ref: stub(checkpoint, ref.key))


def replaced(value: Any, by: Callable[[Ref], Any]) -> Any:
    """A nested value, its `Ref`s replaced."""
    if isinstance(value, Ref):
        return by(value)
    if type(value) is dict:
        return {k: replaced(v, by) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(replaced(v, by) for v in value)
    return value


def refs(value: Any) -> Iterator[Ref]:
    """Those in a nested value."""
    if isinstance(value, Ref):
        yield value
    elif type(value) is dict:
        for inner in value.values():
            yield from refs(inner)
    elif type(value) in (list, tuple):
        for inner in value:
            yield from refs(inner)


def weight_key(checkpoint: Checkpoint, name: str) -> Key:
    """What a format without masters stores as the weight: the float32 copy where there is one, since the weight follows from it."""
    master = Key(name, MASTER)
    return master if master in checkpoint.tensors else Key(name, WEIGHT)


def model_names(checkpoint: Checkpoint) -> list[str]:
    """Parameters and buffers that the checkpoint has values of, in the model's order."""
    valued = dict.fromkeys(k.parameter for k in checkpoint.tensors if k.state in (WEIGHT, MASTER))
    first = [n for n in checkpoint.manifest.order if n in valued]
    return [*first, *(n for n in valued if n not in set(first))]


def model_tree(checkpoint: Checkpoint) -> dict[str, Any]:
    """Name → stub; tied parameters are the same stub."""
    tree: dict[str, Any] = {n: stub(checkpoint, weight_key(checkpoint, n)) for n in model_names(checkpoint)}
    for alias, name in checkpoint.manifest.tied.items():
        if name in tree:
            tree[alias] = tree[name]
    return {**tree, **checkpoint.manifest.extras.get("model_extra_state", {})}


def optimizer_tree(checkpoint: Checkpoint, keyed: Keyed = "name") -> dict[str, Any]:
    """`{"state": …, "param_groups": …}`, as `Optimizer.state_dict` or `get_optimizer_state_dict` give it; empty if there is none.

    Where parameters are numbered, groups have their names too, as torch's do of optimizers that were given named parameters.

    Raises:
        CheckpointError: states of a parameter that is in no group, which has no number.
    """
    manifest = checkpoint.manifest
    if not manifest.groups:
        return {}
    order = [m for g in manifest.groups for m in g.members]
    numbers: dict[str, Any] = {name: i for i, name in enumerate(order)}
    states = states_by_name(checkpoint)
    if stray := sorted(set(states) - set(order)):
        raise CheckpointError(f"{stray[0]} has states of the optimizer, but is in none of its param groups")
    called = numbers if keyed == "index" else {n: n for n in order}
    named = [{"param_names": list(g.members)} if keyed == "index" else {} for g in manifest.groups]
    groups = [
        {**names, **g.hyperparameters, "params": [called[m] for m in g.members]}
        for names, g in zip(named, manifest.groups, strict=True)
    ]
    return {"state": {called[n]: states[n] for n in order if n in states}, "param_groups": groups}


def states_by_name(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Parameter → state key → scalar, nested value or stub."""
    nested = {ref.key for own in checkpoint.manifest.scalars.values() for ref in refs(list(own.values()))}
    states: dict[str, dict[str, Any]] = {}
    for name, own in checkpoint.manifest.scalars.items():
        states[name] = with_stubs(checkpoint, dict(own))
    for key in checkpoint.tensors:
        if key.state not in (WEIGHT, MASTER, EXTRA) and key not in nested:
            states.setdefault(key.parameter, {})[key.state] = stub(checkpoint, key)
    return states


def extras_and_step(checkpoint: Checkpoint) -> dict[str, Any]:
    """The extras, and the training step among them if nothing else would tell it: for formats with no place for it."""
    extras, manifest = extras_tree(checkpoint), checkpoint.manifest
    if manifest.step is not None and training_step(manifest.extras, manifest.scalars) is None:
        extras["step"] = manifest.step
    return extras


def extras_tree(checkpoint: Checkpoint, without: Sequence[str] = ()) -> dict[str, Any]:
    """The extras but for some, stubs for their large tensors."""
    left_out = {*without, "model_extra_state"}
    return {k: with_stubs(checkpoint, v) for k, v in checkpoint.manifest.extras.items() if k not in left_out}
