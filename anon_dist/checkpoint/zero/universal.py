"""Universal checkpoints: a folder `zero/NAME` for every trained parameter, with a file for every state, whole.

A state's file holds the tensor, or a dict with it at `param`; `fp32.pt` is the master, `step.pt` a number. `zero/optimizer_state.pt` has
the param groups. Model states lie beside as the stage wrote them that was converted.

DeepSpeed's converter keeps only exp_avg, exp_avg_sq and the master; its loader for stage 3 takes these keys alone, the step of the
first sub-group for all, and the first group's hyperparameters for every group. No stage gets buffers and frozen weights back from it.
Reading and writing here keep all; `restore` of `engines.zero_restore` brings all into an engine.

Source: deepspeed/checkpoint/ds_to_universal.py; checkpoint/universal_checkpoint.py, `load_hp_checkpoint_state`;
runtime/base_optimizer.py and runtime/zero/stage3.py, `load_hp_checkpoint_state_from_checkpoint_dir[_stage3]`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.inside import inside
from anon_dist.checkpoint.recognise import BASIS_STATES
from anon_dist.checkpoint.schema import MASTER, WEIGHT, Key, TensorInfo
from anon_dist.checkpoint.torchfiles import rank_local
from anon_dist.checkpoint.zero.files import Files, check_ranks, need
from anon_dist.checkpoint.zero.flat import numel
from anon_dist.checkpoint.zero.header import Header, add_module, add_scaler, fresh, is_number, opened, read_header
from anon_dist.checkpoint.zero.pieces import Pieces, entire
from anon_dist.checkpoint.zero.stage3 import add_weights, groups_of
from anon_dist.optim.frame import with_present_keys

FP32 = "fp32"
"""DeepSpeed's key of the master."""


def read(files: Files, name: str) -> Pieces:
    """A universal checkpoint.

    Raises:
        CheckpointError: files are missing, damaged, or of other shapes, naming file and parameter; or DeepSpeed has dropped bases.
    """
    headers = [read_header(files, file) for file in files.models]
    header, folder = headers[0], files.folder / "zero"
    file = folder / "optimizer_state.pt"
    saved = files.load(file, "the optimizer's state")
    groups = groups_of(header, need(saved, "param_groups", file, list))
    scalars: dict[str, dict[str, Any]] = {}
    found = opened(header, name, groups, scalars)
    add_scaler(found, saved.get("loss_scaler"))
    sharded = not all(header.module[n].numel() == numel(header.shape(n)) for n in header.names)
    if sharded:
        check_ranks(files.models, header.world_size, "model states")
        add_weights(found, headers)
    else:
        add_module(found, header, [*header.names, *header.buffers])
    _add_numbers(found, header, saved, scalars)
    for parameter in [m for group in groups for m in group.members]:
        _add(found, header, files, parameter, scalars, sharded)
    return found


def _add_numbers(found: Pieces, header: Header, saved: dict[str, Any], scalars: dict[str, dict[str, Any]]) -> None:
    """States that are one number and have no file: DeepSpeed leaves those of stage 3, by sub-group, in a copy of rank 0's state."""
    inner = saved.get("optimizer_state_dict")
    states = inner.get("state", {}) if isinstance(inner, dict) else {}
    dropped: set[str] = set()
    for i, shapes in enumerate(header.shapes):
        for key, value in with_present_keys(states.get(i, {})).items():
            if is_number(value) and rank_local.is_common(key, [value]):
                for name in shapes:
                    scalars.setdefault(name, {})[key] = fresh(value)
            elif key not in ("exp_avg", "exp_avg_sq"):
                dropped.add(key)
    for name, numbers in (saved.get("numbers") or {}).items():
        scalars.setdefault(name, {}).update(numbers)
    if bases := sorted(dropped.intersection(BASIS_STATES)):
        raise CheckpointError(
            f"{header.file.parent}: DeepSpeed's converter has dropped {', '.join(bases)}, without which exp_avg and exp_avg_sq mean "
            "nothing: take the checkpoint of stage 3 that it was made of, as it is"
        )
    if dropped:
        found.manifest.notes.append(
            f"DeepSpeed's converter has dropped {', '.join(sorted(dropped))}: only rank 0's part is left."
        )


def _add(
    found: Pieces, header: Header, files: Files, name: str, scalars: dict[str, dict[str, Any]], sharded: bool
) -> None:
    """A parameter's states; its weight too where the model states have it not."""
    shape, folder = header.shape(name), inside(files.folder, f"zero/{name}", header.file.name)
    states = sorted(folder.glob("*.pt"))
    if not any(file.stem == FP32 for file in states):
        raise DamagedCheckpoint(f"{folder / 'fp32.pt'} is missing: the master of {name}")
    for file in states:
        held = files.open(file)
        value = held["param"] if isinstance(held, dict) and "param" in held else held
        key = MASTER if file.stem == FP32 else file.stem
        if is_number(value) and key != MASTER:
            scalars.setdefault(name, {})[key] = fresh(value)
        elif not isinstance(value, Tensor):
            raise DamagedCheckpoint(f"{file}: {key} of {name} is a {type(value).__name__}")
        else:
            pieces, same = entire(value, file), key in (MASTER, *rank_local.FLAT_STATES)
            found.add(Key(name, key), TensorInfo(shape if same else tuple(value.shape), value.dtype), pieces)
            if key == MASTER and sharded:
                found.add(Key(name, WEIGHT), TensorInfo(shape, header.module[name].dtype), pieces)
