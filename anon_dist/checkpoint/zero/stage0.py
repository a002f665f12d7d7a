"""Stage 0: no sharding; model and optimizer lie whole in `mp_rank_00_model_states.pt`, the optimizer's states by index.

In float32 the optimizer steps the weights themselves. In bf16 and fp16 a wrapper keeps masters: FP16_UnfusedOptimizer by parameter
(`fp32_groups`), FP16_Optimizer, which takes FusedAdam, one flat tensor without padding for each group (`fp32_groups_flat`).
Names are nowhere: see `names`. Masters help, as the weights are the masters rounded.

Source: deepspeed/runtime/engine.py, `_common_checkpoint_state`; runtime/fp16/unfused_optimizer.py and fused_optimizer.py, `state_dict`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anon_dist.checkpoint import rank_local
from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.schema import MASTER, WEIGHT, Key, ParamGroup, TensorInfo
from anon_dist.checkpoint.zero.files import Files, need
from anon_dist.checkpoint.zero.flat import group_cuts, numel
from anon_dist.checkpoint.zero.header import Header, add_module, add_scaler, fresh, is_number, opened, read_header
from anon_dist.checkpoint.zero.names import name_members
from anon_dist.checkpoint.zero.pieces import Piece, Pieces, entire

PROBE = 4096
"""Elements of a master that are compared to a weight."""


def read(files: Files, name: str, names: Sequence[str] | None = None) -> Pieces:
    """A checkpoint of stage 0, or of weights alone.

    Args:
        names: of the optimizer's parameters, in its order, where the files do not tell.

    Raises:
        CheckpointError: files are damaged, or parameters cannot be named; naming the file.
    """
    header = read_header(files, files.models[0])
    wrapper = header.state.get("optimizer")
    if wrapper is None:
        if header.shapes:
            raise DamagedCheckpoint(
                f"{files.folder}: the optimizer states of all {header.world_size} ranks are missing"
            )
        found = opened(header, name, [], {})
        add_module(found, header, [*header.names, *header.buffers])
        return found
    inner = wrapper.get("optimizer_state_dict", wrapper)
    saved = need(inner, "param_groups", header.file, list)
    flat = wrapper.get("fp32_groups_flat")
    members, sure = _members(header, saved, wrapper, flat, names)
    groups = [
        ParamGroup(m, {k: v for k, v in g.items() if k not in ("params", "param_names")})
        for m, g in zip(members, saved, strict=True)
    ]
    scalars: dict[str, dict[str, Any]] = {}
    found = opened(header, name, groups, scalars)
    if not sure:
        found.manifest.notes.append(
            "Which parameters are frozen is not recorded at stage 0; taken to be whole modules: "
            + ", ".join(found.manifest.frozen)
        )
    loss = {k: v for k, v in wrapper.items() if k not in ("optimizer_state_dict", "fp32_groups", "fp32_groups_flat")}
    if inner is not wrapper:
        add_scaler(found, loss)
    add_module(found, header, [*header.names, *header.buffers])
    for i, group in enumerate(saved):
        if flat is not None:
            state = {MASTER: flat[i], **inner["state"].get(group["params"][0], {})}
            _add_flat(found, header, scalars, members[i], state)
        else:
            for j, (index, parameter) in enumerate(zip(group["params"], members[i], strict=True)):
                state = dict(inner["state"].get(index, {}))
                if "fp32_groups" in wrapper:
                    state = {MASTER: wrapper["fp32_groups"][i][j], **state}
                _add(found, header, scalars, parameter, state)
    _mark_idle(found)
    return found


def _mark_idle(found: Pieces) -> None:
    """Members that have no state where others have: frozen, and stay members, as the optimizer counts them."""
    manifest = found.manifest
    stepped = {key.parameter for key in found.tensors if key.state != WEIGHT} | set(manifest.scalars)
    idle = {m for group in manifest.groups for m in group.members} - stepped if stepped else set()
    if idle:
        manifest.frozen = [name for name in manifest.order if name in idle or name in manifest.frozen]
        manifest.notes.append(f"No state of {', '.join(sorted(idle))}, which the optimizer has: taken to be frozen.")


def _members(
    header: Header, saved: list[dict[str, Any]], wrapper: dict[str, Any], flat: Any, names: Sequence[str] | None
) -> tuple[list[list[str]], bool]:
    """The names of each group's members, from the file, from the user, or by the evidence; and whether that allows only one answer."""
    if header.shapes:
        return [list(group) for group in header.shapes], True
    if all(len(g.get("param_names") or ()) == len(g["params"]) for g in saved):
        return [list(g["param_names"]) for g in saved], True
    shapes = {name: tuple(header.module[name].shape) for name in header.names}
    if names is not None:
        counts = [_count(header, g, flat, i) for i, g in enumerate(saved)]
        return _cut(header, list(names), counts, shapes), True
    if flat is not None:
        if len(saved) == 1 and flat[0].numel() == sum(numel(s) for s in shapes.values()):
            return [list(shapes)], True
        raise CheckpointError(
            f"{header.file}: FP16_Optimizer does not say which parameters are in its {len(saved)} flat "
            "groups; give the names of the optimizer's parameters, in its order"
        )
    states = wrapper.get("optimizer_state_dict", wrapper)["state"]

    def fits(group: int, place: int, name: str) -> bool:
        if "fp32_groups" in wrapper:
            master, weight = wrapper["fp32_groups"][group][place], header.module[name]
            same = master.shape == weight.shape
            return same and torch.equal(master.reshape(-1)[:PROBE].to(weight.dtype), weight.reshape(-1)[:PROBE])
        state = states.get(saved[group]["params"][place], {})
        tensors = [v for v in state.values() if isinstance(v, Tensor) and v.dim()]
        return not tensors or any(tuple(v.shape) == shapes[name] for v in tensors)

    runs = [run for i, g in enumerate(saved) for run in _runs(i, g, wrapper, states)]
    named, sure = name_members(
        [len(places) for _, places in runs],
        shapes,
        lambda r, at, name: fits(runs[r][0], runs[r][1][at], name),
        str(header.file),
    )
    at = {
        (g, place): n
        for (g, places), own in zip(runs, named, strict=True)
        for place, n in zip(places, own, strict=True)
    }
    return [[at[i, place] for place in range(len(g["params"]))] for i, g in enumerate(saved)], sure


def _runs(
    index: int, group: dict[str, Any], wrapper: dict[str, Any], states: dict[Any, Any]
) -> list[tuple[int, list[int]]]:
    """A group and its places, in runs that keep the model's order: DeepSpeed's Muon sorts its matrices by size, only equal ones keep it."""
    places = list(range(len(group["params"])))
    if not (group.get("use_muon") and "ns_method" in group):
        return [(index, places)]
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for place in places:
        held = states.get(group["params"][place], {}).get("momentum_buffer")
        known = wrapper["fp32_groups"][index][place] if "fp32_groups" in wrapper else held
        by_shape.setdefault(tuple(known.shape) if isinstance(known, Tensor) else (), []).append(place)
    return [(index, run) for run in by_shape.values()]


def _count(header: Header, group: dict[str, Any], flat: Any, index: int) -> int:
    """Members of a group; of a flat one, its elements, negated."""
    return len(group["params"]) if flat is None else -int(flat[index].numel())


def _cut(header: Header, names: list[str], counts: list[int], shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """The user's names, group by group."""
    unknown = [n for n in names if n not in shapes]
    groups: list[list[str]] = []
    rest = list(names)
    for count in counts:
        group: list[str] = []
        while rest and (len(group) < count or sum(numel(shapes.get(n, ())) for n in group) < -count):
            group.append(rest.pop(0))
        groups.append(group)
    if unknown or rest or any(len(g) < c for g, c in zip(groups, counts, strict=True)):
        raise CheckpointError(
            f"{header.file}: the names given are not those of its optimizer's parameters"
            + (f": {unknown[0]} is not in the model" if unknown else "")
        )
    return groups


def _add(found: Pieces, header: Header, scalars: dict[str, dict[str, Any]], name: str, state: dict[str, Any]) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and (value.dim() > 0 or key == MASTER):
            found.add(Key(name, key), TensorInfo(tuple(value.shape), value.dtype), entire(value, header.file))
        else:
            scalars.setdefault(name, {})[key] = found.add_nested(key, value, header.file, name)


def _add_flat(
    found: Pieces, header: Header, scalars: dict[str, dict[str, Any]], names: list[str], state: dict[str, Any]
) -> None:
    shapes = [header.shape(name) for name in names]
    sizes = [numel(shape) for shape in shapes]
    for key, value in state.items():
        if is_number(value) and rank_local.is_common(key, [value]):
            for name in names:
                scalars.setdefault(name, {})[key] = fresh(value)
        elif isinstance(value, Tensor) and value.numel() == sum(sizes):
            for cut in group_cuts(sizes, [0] * len(sizes), sum(sizes), 0):
                piece = Piece(0, cut.stop, value, cut.offset, header.file)
                info = TensorInfo(shapes[cut.member], value.dtype)
                found.add(Key(names[cut.member], key), info, [piece])
        else:
            path = f"{rank_local.KEY}.{names[0]}.{key}"
            states = {key: [found.add_nested(path, value, header.file)]}
            rank_local.keep(found.manifest, rank_local.WHOLE, 1, names, states)
