"""Checkpoints of any format into any other, whatever engine, world size and optimizer wrote them.

convert(Path("global_step500"), Path("fsdp2"), to="dcp", options=WriteOptions(world_size=4))
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from anon_dist.checkpoint import formats
from anon_dist.checkpoint.copy import write_files
from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.optimizers.semantics import to_optimizer
from anon_dist.checkpoint.options import AdamWOptions, AnonOptions, ReadOptions, WriteOptions
from anon_dist.checkpoint.recognise import BASIS_STATES
from anon_dist.checkpoint.regroup import Groups, regroup
from anon_dist.checkpoint.schema import EXTRA, MASTER, WEIGHT, Checkpoint, Manifest
from anon_dist.exits import at_work


def convert(
    source: Path,
    target: Path,
    to: str,
    options: WriteOptions | None = None,
    read: ReadOptions | None = None,
    workers: int = 2,
    overwrite: bool = False,
    quiet: bool = True,
    optimizer: AnonOptions | AdamWOptions | None = None,
    groups: Groups | None = None,
) -> list[str]:
    """Write `source` again as `target`, in the format `to`. The source is only read; the target is complete or absent.

    Memory stays at a few blocks for each worker, whatever the size. Killed, the same call goes on.

    Args:
        workers: threads that copy.
        overwrite: replace an existing target, once the new one is complete.
        quiet: no progress bar.
        optimizer: of which optimizer the result is, and its hyperparameters; None: of the source's.
        groups: its param groups, see `regroup`; None: the source's.

    Returns:
        What had to be assumed, for the user to see.

    Raises:
        CheckpointError: see `formats.open_checkpoint`, `formats.plan` and `copy.write_files`; or the target exists.
    """
    source, target = Path(source), Path(target)
    _check_target(source, target, overwrite)
    read = read or ReadOptions()
    checkpoint = formats.open_checkpoint(source, replace(read, nameless=to == "hf"))  # which has the weights alone
    try:
        if groups is not None:
            checkpoint = regroup(checkpoint, groups, to_anon=isinstance(optimizer, AnonOptions))
        if optimizer is not None:
            checkpoint = to_optimizer(checkpoint, optimizer)
        if (groups is not None or optimizer is not None) and to == "dcp":
            _begin_schedules(checkpoint.manifest)
        files = formats.plan(checkpoint, to, options or WriteOptions())
        fresh = target.with_name(target.name + ".new") if target.exists() else target
        target.parent.mkdir(parents=True, exist_ok=True)
        with at_work():
            write_files(files, checkpoint, [fingerprint(source), repr(optimizer), repr(groups)], fresh, workers, quiet)
            if fresh != target:
                _replace(target, fresh)
    finally:
        checkpoint.close()
    return checkpoint.manifest.notes


def _begin_schedules(manifest: Manifest) -> None:
    """Give groups that no schedule has had the rate that one begins with: a script that has one asks for it, and DCP has no defaults.

    Not of this package's runs, which have none.
    """
    if "progress" not in manifest.extras:
        for group in manifest.groups:
            if "lr" in group.hyperparameters:
                group.hyperparameters.setdefault("initial_lr", group.hyperparameters["lr"])


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    inside = source.resolve() in [target.resolve(), *target.resolve().parents] and (
        source.is_dir() or source.resolve() == target.resolve()
    )
    around = target.resolve() in source.resolve().parents
    if inside or around:
        raise CheckpointError(f"{target} and the source {source} lie in each other; choose another target")
    if (target.exists() or target.is_symlink()) and not overwrite:
        raise CheckpointError(f"{target} exists; choose another target, or replace it with --overwrite")


def _replace(target: Path, fresh: Path) -> None:
    """The fresh one takes the old one's name. Between two renames the old one is there as `.deleting`."""
    old = target.with_name(target.name + ".deleting")
    shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old) if old.is_dir() else old.unlink()


def fingerprint(source: Path) -> list[list[Any]]:
    """Path, size and time of change of each file of a checkpoint."""
    paths = [Path(folder) / n for folder, _, names in os.walk(source) for n in names] if source.is_dir() else [source]
    return [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(paths)]


def inspect(source: Path, read: ReadOptions | None = None) -> dict[str, Any]:
    """What a checkpoint is, as JSON: format, optimizer, world size, step, groups, states with their shapes' totals and dtypes, extras."""
    checkpoint = formats.open_checkpoint(Path(source), replace(read or ReadOptions(), nameless=True))
    try:
        return describe(checkpoint)
    finally:
        checkpoint.close()


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """See `inspect`."""
    manifest = checkpoint.manifest
    states: dict[str, dict[str, Any]] = {}
    for key, info in checkpoint.tensors.items():
        name = f"{key.state} ({str(info.dtype).removeprefix('torch.')})"
        total = states.setdefault(name, {"tensors": 0, "elements": 0, "bytes": 0})
        total["tensors"] += 1
        total["elements"] += info.numel
        total["bytes"] += info.numel * info.dtype.itemsize
    scalars = Counter(key for own in manifest.scalars.values() for key in own)
    groups = [
        {"parameters": len(g.members), "elements": _elements(checkpoint, g.members), **_readable(g.hyperparameters)}
        for g in manifest.groups
    ]
    return {
        "format": manifest.format,
        "optimizer": manifest.optimizer,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "parameters": len(manifest.order),
        "buffers": len(manifest.buffers),
        "frozen": len(manifest.frozen),
        "tied": manifest.tied,
        "bytes": sum(s["bytes"] for s in states.values()),
        "states": states,
        "scalars": dict(scalars),
        "groups": groups,
        "extras": sorted(map(str, manifest.extras)),
        "notes": manifest.notes,
    }


def _elements(checkpoint: Checkpoint, members: list[str]) -> int:
    """Of the weights, else of a state of each."""
    sizes: dict[str, int] = {}
    for key, info in checkpoint.tensors.items():
        if key.state in (WEIGHT, MASTER):
            sizes[key.parameter] = info.numel
        elif key.state not in (EXTRA, *BASIS_STATES):
            sizes.setdefault(key.parameter, info.numel)
    return sum(sizes.get(m, 0) for m in members)


def _readable(value: Any) -> Any:
    """For JSON: what it does not have, as text."""
    if isinstance(value, dict):
        return {str(k): _readable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.item() if getattr(value, "ndim", None) == 0 else str(value)
