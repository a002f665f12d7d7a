"""DCP folders as checkpoints, in the layouts of this package, of accelerate, of torchtitan, and of plain torch scripts.

- anon_dist: one folder with `model.…` and `optimizer.…`; trainer.json, random states and other extras as files beside, but for those that
  a script's folder had in it (`dcp.save({"model": …, "optimizer": …, "schedule": …})`), and learning-rate schedules, which are in it too.
- accelerate: `pytorch_model_fsdp_0/` and `optimizer_0/`; scheduler.bin, random_states_*.pkl and so on beside them.
- trainer: the same two folders; scheduler.pt, rng_state_*.pth, trainer_state.json beside them.
- torchtitan: one folder; the model's keys bare, `optimizer.state.NAME.KEY`, `optimizer.param_groups.NAME.KEY`, the rest under its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from anon_dist.checkpoint.assemble import extras_and_step, model_tree, optimizer_tree
from anon_dist.checkpoint.beside import read_beside, write_beside
from anon_dist.checkpoint.dcp.read import METADATA, DcpFolder
from anon_dist.checkpoint.dcp.write import dcp_files
from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.layouts.statedict import interpret
from anon_dist.checkpoint.optimizers.schedules import is_schedule
from anon_dist.checkpoint.options import ReadOptions, WriteOptions
from anon_dist.checkpoint.schema import Checkpoint, OutFile

_TITAN = ("lr_scheduler", "dataloader", "train_state")
_OWN = "anon_dist"
"""Key under which extras lie that torchtitan has no key for."""
_MODEL, _OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"


def detect(path: Path) -> bool:
    """A folder of DCP, or of accelerate's two."""
    return any((path / part / METADATA).is_file() for part in ("", _MODEL, _OPTIMIZER)) or any(
        path.glob("__*_*.distcp")
    )


def open_dcp(path: Path, options: ReadOptions) -> Checkpoint:
    """See `formats.Format`.

    Raises:
        CheckpointError: see `DcpFolder` and `interpret`.
    """
    tree: dict[str, Any] = {}
    ranks = 0
    parts = [path] if (path / METADATA).is_file() else [path / p for p in (_MODEL, _OPTIMIZER) if (path / p).is_dir()]
    if not parts:
        raise CheckpointError(f"{path / METADATA} is missing; without it the .distcp files cannot be read")
    for part in parts:
        folder = DcpFolder(part)
        tree.update(folder.tree)
        ranks = max(ranks, folder.world_size)
    _nest(tree)
    around = path.parent if path.name in (_MODEL, _OPTIMIZER) else path
    beside = {**read_beside(around, options.unsafe), **tree.pop(_OWN, {})}
    found = interpret(tree, str(path), options, beside, format="dcp", world_size=ranks)
    found.manifest.inside = [k for k in found.manifest.extras if k not in beside]
    return found


def _nest(tree: dict[str, Any]) -> None:
    """Keys that were flat when they were saved: `optimizer.state.NAME.KEY` and `model.NAME` go below `optimizer` and `model`."""
    for name in ("optimizer", "optim"):
        if name not in tree and any(str(k).startswith(f"{name}.state.") for k in tree):
            own = [k for k in tree if str(k).startswith((f"{name}.state.", f"{name}.param_groups."))]
            tree[name] = {k.removeprefix(f"{name}."): tree.pop(k) for k in own}
            models = [k for k in tree if str(k).startswith("model.")]
            if models and all(k in models or k == name or not hasattr(tree[k], "shape") for k in tree):
                tree["model"] = {k.removeprefix("model."): tree.pop(k) for k in models}


def plan(checkpoint: Checkpoint, options: WriteOptions) -> list[OutFile]:
    """The folder's files, as `world_size` ranks would have written them."""
    model, optimizer = model_tree(checkpoint), optimizer_tree(checkpoint)
    here, ranks = PurePosixPath("."), options.world_size
    if options.layout == "torchtitan":
        extras = extras_and_step(checkpoint)
        rest = {k: extras.pop(k) for k in _TITAN if k in extras}
        if extras:
            rest[_OWN] = extras
        if clash := sorted({*rest, "optimizer"} & set(model)):
            raise CheckpointError(
                f"the model has a parameter {clash[0]}, which torchtitan keeps something else under; choose another --layout"
            )
        flat = {"optimizer": _flat(optimizer)} if optimizer else {}
        return dcp_files(here, {**model, **flat, **rest}, ranks)
    trees: Mapping[str, Any] = {k: v for k, v in (("model", model), ("optimizer", optimizer)) if v}
    extras = extras_and_step(checkpoint)
    if options.layout in ("accelerate", "trainer"):
        places = {"model": here / _MODEL, "optimizer": here / _OPTIMIZER}
        files = [f for name, tree in trees.items() for f in dcp_files(places[name], {name: tree}, ranks)]
    else:
        inside = {k: extras.pop(k) for k in checkpoint.manifest.inside if k in extras and k not in trees}
        if (
            "progress" not in extras
        ):  # where scripts keep their schedules; whole beside too, as DCP loses empty dictionaries
            inside |= {k: v for k, v in extras.items() if is_schedule(v) and k not in trees}
        files = dcp_files(here, {**trees, **inside}, ranks)
    return files + write_beside(extras, options.layout, ranks, checkpoint.manifest.step)


def _flat(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state dictionary with flat keys."""
    flat = {f"state.{name}.{key}": v for name, state in optimizer["state"].items() for key, v in state.items()}
    for group in optimizer["param_groups"]:
        for name in group["params"]:
            flat.update({f"param_groups.{name}.{key}": v for key, v in group.items() if key != "params"})
    return flat
