"""ZeRO stage 3: every parameter is cut into equal shares over the ranks, and each rank's shares of a sub-group lie in one flat buffer.

`zero_pp_rank_R_mp_rank_00_model_states.pt` has names and shapes (`param_shapes`, by sub-group), buffers, and rank R's shares of what is
frozen; `[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt` has the masters (`fp32_flat_groups`) and the states, by sub-group. The weights
themselves are in no file: they are the masters, rounded to the dtype of the empty tensors that stand for them in `module`.

Source: deepspeed/runtime/zero/stage3.py, `_rigid_state_dict` and `_rigid_load_state_dict`; utils/zero_to_fp32.py,
`_zero3_merge_trainable_params` and `_zero3_merge_frozen_params`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.recognise import BASIS_STATES
from anon_dist.checkpoint.schema import MASTER, WEIGHT, Key, ParamGroup, TensorInfo
from anon_dist.checkpoint.torchfiles import rank_local
from anon_dist.checkpoint.zero.files import Files, check_ranks, need
from anon_dist.checkpoint.zero.flat import basis_cuts, numel, shard, shard_cuts
from anon_dist.checkpoint.zero.header import Header, add_module, add_scaler, fresh, is_number, opened, read_header
from anon_dist.checkpoint.zero.pieces import Piece, Pieces
from anon_dist.checkpoint.zero.stage12 import agreed
from anon_dist.optim.frame import KEYS, length_of, sides_of, with_present_keys


def read(files: Files, name: str) -> Pieces:
    """A checkpoint of stage 3.

    Raises:
        CheckpointError: ranks are missing, or sizes, steps or states disagree; naming the file.
    """
    headers = [read_header(files, file) for file in files.models]
    header = headers[0]
    check_ranks(files.models, header.world_size, "model states")
    check_ranks(files.optimizers, header.world_size, "optimizer states")
    agreed("global_steps", [need(h.state, "global_steps", h.file) for h in headers], files.models)
    ranks = [files.load_optimizer(f) for f in files.optimizers]
    inner = need(ranks[0], "optimizer_state_dict", files.optimizers[0], dict)
    scalars: dict[str, dict[str, Any]] = {}
    found = opened(header, name, groups_of(header, inner["param_groups"]), scalars)
    add_scaler(found, ranks[0].get("loss_scaler"))
    add_weights(found, headers)
    groups = [group for group in inner["param_groups"] for _ in group["params"]]
    for i in range(len(header.shapes)):
        _add_sub_group(found, header, scalars, i, ranks, files)
        states = [_state(rank, i, file) for rank, file in zip(ranks, files.optimizers, strict=True)]
        _add_bases(found, header.shapes[i], groups[i], states, files)
    return found


def groups_of(header: Header, saved: list[dict[str, Any]]) -> list[ParamGroup]:
    """The param groups: each holds as many sub-groups as it has `params`, in the order of all."""
    held = sum(len(group["params"]) for group in saved)
    if held != len(header.shapes):
        raise CheckpointError(f"{header.file}: {len(header.shapes)} in param_shapes, {held} in the optimizer's groups")
    groups, remaining = [], iter(header.shapes)
    for group in saved:
        members = [name for _ in group["params"] for name in next(remaining)]
        groups.append(ParamGroup(members, {k: v for k, v in group.items() if k != "params"}))
    return groups


def add_weights(found: Pieces, headers: list[Header]) -> None:
    """Buffers, and the frozen parameters from every rank's share."""
    header = headers[0]
    add_module(found, header, header.buffers)
    for name in header.buffers:
        if any(
            not torch.equal(other, header.module[name])
            for h in headers[1:]
            if (other := h.module.get(name)) is not None
        ):
            found.manifest.notes.append(f"Ranks have different values of the buffer {name}: rank 0's is taken.")
    for name, shape in header.frozen.items():
        dtype, pieces = header.module[name].dtype, []
        for rank, at in enumerate(headers):
            fragment: Tensor = need(need(at.state, "frozen_param_fragments", at.file, dict), name, at.file, Tensor)
            for cut in shard_cuts([numel(shape)], header.world_size, rank):
                pieces.append(Piece(cut.start, cut.stop, fragment, cut.offset, at.file))
        found.add(Key(name, WEIGHT), TensorInfo(shape, dtype), pieces)


def _add_sub_group(
    found: Pieces,
    header: Header,
    scalars: dict[str, dict[str, Any]],
    index: int,
    ranks: list[dict[str, Any]],
    files: Files,
) -> None:
    """The masters, weights and states of a sub-group's members; a state that is one number goes to `scalars`."""
    shapes, states = header.shapes[index], []
    for rank, file in zip(ranks, files.optimizers, strict=True):
        masters = need(rank, "fp32_flat_groups", file, list)
        if index >= len(masters):
            raise DamagedCheckpoint(f"{file}: {len(masters)} sub-groups, and the model states have more")
        states.append({MASTER: masters[index], **_state(rank, index, file)})
        if set(states[-1]) != set(states[0]):
            raise DamagedCheckpoint(
                f"{file}: sub-group {index} has states {sorted(states[-1])}; {files.optimizers[0].name} "
                f"has {sorted(states[0])}"
            )
    sizes = [numel(shape) for shape in shapes.values()]
    length, local = sum(shard(size, len(states)) for size in sizes), dict[str, list[Any]]()
    for key in (key for key in states[0] if key not in BASIS_STATES):
        values = [state[key] for state in states]
        if all(map(is_number, values)) and rank_local.is_common(key, values):
            number = agreed(key, values, files.optimizers)
            for name in shapes:
                scalars.setdefault(name, {})[key] = fresh(number)
        elif key in (MASTER, *rank_local.FLAT_STATES) or any(
            isinstance(v, Tensor) and v.shape == (length,) for v in values
        ):
            _add_flat(found, header, key, shapes, values, files)
        else:
            local[key] = [
                found.add_nested(f"{rank_local.KEY}.{next(iter(shapes))}.{key}.{rank}", value, file)
                for rank, (value, file) in enumerate(zip(values, files.optimizers, strict=True))
            ]
    rank_local.keep(found.manifest, rank_local.SHARDS, len(states), list(shapes), local)


def _state(rank: dict[str, Any], index: int, file: Path) -> dict[str, Any]:
    """A sub-group's, of a rank."""
    found: dict[str, Any] = need(rank, "optimizer_state_dict", file, dict)["state"].get(index, {})
    return with_present_keys(found)


def _add_bases(
    found: Pieces, shapes: dict[str, tuple[int, ...]], group: dict[str, Any], states: list[dict[str, Any]], files: Files
) -> None:
    """The bases of a sub-group's matrices, which lie one after the other (`optim.flat`): of columns every rank has all, of rows its own."""
    names, block = list(shapes), int(group.get("basis_block") or 0)
    for side, keys in KEYS.items():
        turned = [side in sides_of(shape, {"basis": None, **group}) for shape in shapes.values()]
        lengths = [length_of(shape, side) if t else 0 for shape, t in zip(shapes.values(), turned, strict=True)]
        bases = {name: (n, min(block, n)) for name, n in zip(names, lengths, strict=True)}
        for key in (key for key in keys if any(key in state for state in states) or any(lengths)):
            pieces: dict[str, list[Piece]] = {name: [] for name, n in zip(names, lengths, strict=True) if n}
            for rank, file in enumerate(files.optimizers if side == "rows" else files.optimizers[:1]):
                cuts = basis_cuts([numel(bases[name]) for name in names], len(states), rank, sharded=side == "rows")
                length, value = sum(cut.stop - cut.start for cut in cuts), states[rank].get(key)
                if not isinstance(value, Tensor) or value.numel() != length:
                    held = f"{value.numel()} elements" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                    raise DamagedCheckpoint(f"{file}: {key} of {names[0]} …: {held}, its matrices' have {length}")
                for cut in cuts:
                    pieces[names[cut.member]].append(Piece(cut.start, cut.stop, value, cut.offset, file))
            for name, own in pieces.items():
                found.add(Key(name, key), TensorInfo(bases[name], states[0][key].dtype), own)


def _add_flat(
    found: Pieces, header: Header, key: str, shapes: dict[str, tuple[int, ...]], values: list[Tensor], files: Files
) -> None:
    sizes, world_size = [numel(shape) for shape in shapes.values()], len(values)
    length = sum(shard(size, world_size) for size in sizes)
    names = list(shapes)
    pieces: dict[str, list[Piece]] = {name: [] for name in names}
    for rank, (value, file) in enumerate(zip(values, files.optimizers, strict=True)):
        if not isinstance(value, Tensor) or value.numel() != length:
            held = f"{value.numel()} elements" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise DamagedCheckpoint(f"{file}: {key} of {names[0]} …: {held}, its shares have {length} elements")
        for cut in shard_cuts(sizes, world_size, rank):
            pieces[names[cut.member]].append(Piece(cut.start, cut.stop, value, cut.offset, file))
    for name, shape in shapes.items():
        found.add(Key(name, key), TensorInfo(shape, torch.float32 if key == MASTER else values[0].dtype), pieces[name])
        if key == MASTER:
            found.add(Key(name, WEIGHT), TensorInfo(shape, header.module[name].dtype), pieces[name])
