"""Two checkpoints compared, whatever their formats: tensors bit for bit, scalars, groups."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anon_dist.checkpoint.assemble import model_names, weight_key
from anon_dist.checkpoint.checksums import checksums
from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.layouts.canonical import Canonical
from anon_dist.checkpoint.optimizers.schedules import schedule_key
from anon_dist.checkpoint.options import ReadOptions
from anon_dist.checkpoint.schema import EXTRA, MASTER, WEIGHT, Checkpoint, Key, Ref
from anon_dist.checkpoint.torchfiles import rank_local
from anon_dist.checkpoint.torchfiles.pickles import StandIn

_BLOCK = 1 << 22
"""Elements compared at a time."""


class Difference(NamedTuple):
    """Something that is not the same in both."""

    what: str
    """A tensor, scalar or hyperparameter."""
    how: str


def verify(a: Path, b: Path | None = None, read: ReadOptions | None = None, workers: int = 2) -> list[Difference]:
    """What differs. Checkpoints that have checksums, the training loop's and canonical folders, are compared with them too.

    Compared are weights (their float32 masters, where both or one have them and the other is float32), every state of every parameter,
    scalars, and each parameter's hyperparameters; the order of parameters and of groups is not. Extras are compared where both have
    them, but for what describes an engine or a rank (ds_config, rng); a learning-rate scheduler must be in both or in neither.

    Args:
        b: None: `a` is compared with its checksums alone.

    Raises:
        CheckpointError: one cannot be read; or there is one alone, and it has no checksums.
    """
    paths = [Path(p) for p in (a, b) if p is not None]
    sums = [checksums(p) if p.is_dir() else None for p in paths]
    found = [Difference(*wrong) for own in sums if own is not None for wrong in own.verify(workers)]
    if found:
        return found  # what is damaged may not be readable
    opened = [open_checkpoint(p, read) for p in paths]
    try:
        if b is None and sums[0] is None and not isinstance(opened[0], Canonical):
            raise CheckpointError(
                f"{a} has no checksums: it can be read, and whether its bits are as they were written cannot be told. "
                "Compare it with another copy: verify A B"
            )
        found = [Difference("checksum", line) for c in opened if isinstance(c, Canonical) for line in c.check()]
        return found + (differences(opened[0], opened[1], workers) if len(opened) == 2 else [])
    finally:
        for checkpoint in opened:
            checkpoint.close()


def foreign(*paths: Path | None) -> list[Path]:
    """Files in checkpoints with checksums that were not written with them: no difference, as nothing reads them."""
    sums = [(p, checksums(p)) for p in paths if p is not None and p.is_dir()]
    return [p / name for p, own in sums if own is not None for name in own.foreign()]


def differences(a: Checkpoint, b: Checkpoint, workers: int = 2) -> list[Difference]:
    """See `verify`."""
    found = [
        *_hyperparameters(a, b),
        *_mappings("scalar", a.manifest.scalars, b.manifest.scalars),
        *_extras(a, b),
    ]
    pairs = _pairs(a, b)
    with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool:
        for difference in pool.map(lambda pair: _tensors(a, b, *pair), pairs.items()):
            found += [difference] if difference else []
    return found


def _pairs(a: Checkpoint, b: Checkpoint) -> dict[str, tuple[Key | None, Key | None]]:
    """What is compared with what."""
    pairs: dict[str, tuple[Key | None, Key | None]] = {}
    sides = []
    for checkpoint in (a, b):
        own = {f"{k.parameter}: {k.state}": k for k in checkpoint.tensors if k.state not in (WEIGHT, MASTER, EXTRA)}
        own.update({f"{n}: {WEIGHT}": Key(n, WEIGHT) for n in model_names(checkpoint)})
        own.update({f"{alias}: {WEIGHT}": Key(n, WEIGHT) for alias, n in checkpoint.manifest.tied.items()})
        sides.append(own)
    for name in {**sides[0], **sides[1]}:
        first, second = sides[0].get(name), sides[1].get(name)
        if first and second and first.state == WEIGHT:
            first, second = _weights(a, b, first.parameter, second.parameter)
        pairs[name] = (first, second)
    for name in model_names(a):
        key = Key(name, MASTER)
        if key in a.tensors and key in b.tensors and Key(name, WEIGHT) in a.tensors and Key(name, WEIGHT) in b.tensors:
            pairs[f"{name}: {MASTER}"] = (key, key)
    return pairs


def _weights(a: Checkpoint, b: Checkpoint, one: str, two: str) -> tuple[Key, Key]:
    """The weight in both; where they differ in dtype because only one has a master beside it, the master."""
    first, second = Key(one, WEIGHT), Key(two, WEIGHT)
    if first in a.tensors and second in b.tensors and a.tensors[first].dtype == b.tensors[second].dtype:
        return first, second
    return weight_key(a, one), weight_key(b, two)


def _tensors(a: Checkpoint, b: Checkpoint, name: str, keys: tuple[Key | None, Key | None]) -> Difference | None:
    first, second = keys
    if first is None or second is None:
        return Difference(name, f"only in {'B' if first is None else 'A'}")
    one, two = a.tensors.get(first), b.tensors.get(second)
    if one is None or two is None:
        return Difference(name, f"only in {'B' if one is None else 'A'}")
    if one.shape != two.shape:
        return Difference(name, f"shape {one.shape} in A, {two.shape} in B")
    if one.dtype != two.dtype:
        return Difference(name, f"{one.dtype} in A, {two.dtype} in B")
    wrong, at = 0, None
    for start in range(0, one.numel, _BLOCK):
        stop = min(one.numel, start + _BLOCK)
        x, y = a.read(first, start, stop), b.read(second, start, stop)
        x, y = x.view(torch.uint8), y.view(torch.uint8)
        if torch.equal(x, y):
            continue
        unequal = (x != y).view(stop - start, one.dtype.itemsize).any(1)
        at = start + int(unequal.nonzero()[0]) if at is None else at
        wrong += int(unequal.sum())
    return Difference(name, f"{wrong} of {one.numel} elements, the first at {at}") if wrong else None


def _hyperparameters(a: Checkpoint, b: Checkpoint) -> list[Difference]:
    sides: list[dict[str, dict[str, Any]]] = [
        {
            m: {
                k: v for k, v in g.hyperparameters.items() if k != "param_names"
            }  # the members again; not every format keeps it
            for g in c.manifest.groups
            for m in g.members
        }
        for c in (a, b)
    ]
    found = _mappings("hyperparameter", *sides)
    partitions = [{frozenset(g.members) for g in c.manifest.groups} for c in (a, b)]
    if not found and partitions[0] != partitions[1] and all(c.manifest.groups for c in (a, b)):
        found.append(Difference("param groups", "the same hyperparameters, in other groups"))
    return found


def _extras(a: Checkpoint, b: Checkpoint) -> list[Difference]:
    common = a.manifest.extras.keys() & b.manifest.extras.keys() - {"progress", "rng", "ds_config"}
    sides = [{k: c.manifest.extras[k] for k in common} for c in (a, b)]
    schedules = [schedule_key(c.manifest.extras) for c in (a, b)]
    different = []
    if None in schedules and any(schedules):
        different = [Difference(f"extra {schedules[0] or schedules[1]}", f"only in {'A' if schedules[0] else 'B'}")]
    elif (
        schedules[0] is not None and schedules[1] is not None and schedules[0] != schedules[1]
    ):  # of another name there
        values = [c.manifest.extras[key] for c, key in zip((a, b), schedules, strict=True) if key is not None]
        if not same(*values):
            different = [Difference(f"extra {schedules[0]}", f"differs from {schedules[1]} in B")]
    if (rank_local.KEY in a.manifest.extras) != (rank_local.KEY in b.manifest.extras):
        side = a if rank_local.KEY in a.manifest.extras else b
        states = ", ".join(sorted(rank_local.keys(side.manifest)))
        different.append(Difference(f"states of ranks' parts: {states}", f"only in {'A' if side is a else 'B'}"))
    return different + _mappings("extra", {"": sides[0]}, {"": sides[1]})


def _mappings(kind: str, a: Mapping[str, Mapping[str, Any]], b: Mapping[str, Mapping[str, Any]]) -> list[Difference]:
    """Name → key → value, compared; one line for each key, naming how many differ."""
    wrong: dict[tuple[str, str], list[str]] = {}
    for name in sorted({*a, *b}):
        one, two = a.get(name, {}), b.get(name, {})
        for key in sorted({*map(str, one), *map(str, two)}):
            if _empty(one.get(key, {})) and _empty(two.get(key, {})):
                continue  # DCP has no empty dictionaries
            if key not in one or key not in two:
                wrong.setdefault((key, f"only in {'B' if key not in one else 'A'}"), []).append(name)
            elif not same(one[key], two[key]):
                wrong.setdefault((key, f"{_short(one[key])} in A, {_short(two[key])} in B"), []).append(name)
    return [
        Difference(f"{kind} {key}", how + (f" ({len(names)} parameters, such as {names[0]})" if names != [""] else ""))
        for (key, how), names in wrong.items()
    ]


def _empty(value: Any) -> bool:
    return isinstance(value, dict) and not value


def same(a: Any, b: Any) -> bool:
    """Equal in value and type; tensors and arrays bit for bit. Lists and tuples, which some formats do not tell apart, are one."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return {*map(str, a)} == {*map(str, b)} and all(same(x, y) for x, y in _zipped(a, b))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Ref) and isinstance(b, Ref):
        return a == b
    if isinstance(a, StandIn) and isinstance(b, StandIn):  # each file's have a class of their own
        kinds = [(type(x).__module__, type(x).__qualname__) for x in (a, b)]
        return kinds[0] == kinds[1] and same(vars(a), vars(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool(a.tobytes() == b.tobytes())
    return bool(a == b) or (a != a and b != b) or repr(a) == repr(b)


def _zipped(a: dict[Any, Any], b: dict[Any, Any]) -> list[tuple[Any, Any]]:
    other = {str(k): v for k, v in b.items()}
    return [(v, other[str(k)]) for k, v in a.items()]


def _bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _short(value: Any) -> str:
    text = str(value.item()) if isinstance(value, Tensor) and value.numel() == 1 else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
