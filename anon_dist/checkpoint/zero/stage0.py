"""Stage 0: no sharding; model and optimizer lie whole in `mp_rank_00_model_states.pt`, the optimizer's states by index.

In float32 the optimizer steps the weights themselves. In bf16 and fp16 a wrapper keeps masters: FP16_UnfusedOptimizer by parameter
(`fp32_groups`), FP16_Optimizer, which takes FusedAdam, one flat tensor without padding for each group (`fp32_groups_flat`).
Names are nowhere: see `anon_dist.checkpoint.names`. Masters help, as the weights are the masters rounded.

Source: deepspeed/runtime/engine.py, `_common_checkpoint_state`; runtime/fp16/unfused_optimizer.py and fused_optimizer.py, `state_dict`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint, NamesWanted
from anon_dist.checkpoint.names import NUMBERED, assign, check_once, fitting_names, unnamed
from anon_dist.checkpoint.options import ReadOptions
from anon_dist.checkpoint.schema import MASTER, WEIGHT, Key, ParamGroup, TensorInfo
from anon_dist.checkpoint.torchfiles import rank_local
from anon_dist.checkpoint.zero.files import Files, need
from anon_dist.checkpoint.zero.flat import group_cuts, numel
from anon_dist.checkpoint.zero.header import Header, add_module, add_scaler, fresh, is_number, opened, read_header
from anon_dist.checkpoint.zero.pieces import Piece, Pieces, entire
from anon_dist.optim.frame import with_present_keys

PROBE = 4096
"""Elements of a master that are compared to a weight before all of them are."""


def read(files: Files, name: str, options: ReadOptions) -> Pieces:
    """A checkpoint of stage 0, or of weights alone.

    Args:
        options: what the optimizer's parameters are called, where the files do not tell.

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
    try:
        members = _members(header, saved, wrapper, flat, options)
    except NamesWanted as reason:
        if not options.nameless:
            raise
        return _numbered(header, name, wrapper, reason)
    groups = [
        ParamGroup(m, {k: v for k, v in g.items() if k not in ("params", "param_names")})
        for m, g in zip(members, saved, strict=True)
    ]
    scalars: dict[str, dict[str, Any]] = {}
    found = opened(header, name, groups, scalars)
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
                state = with_present_keys(inner["state"].get(index, {}))
                if "fp32_groups" in wrapper:
                    state = {MASTER: wrapper["fp32_groups"][i][j], **state}
                _add(found, header, scalars, parameter, state)
    _mark_idle(found)
    return found


def _numbered(header: Header, name: str, wrapper: dict[str, Any], reason: NamesWanted) -> Pieces:
    """Where names are not needed: the parameters by their numbers, those of a flat group as one; masters, which are not weights then, as
    a state of the wrapper's name."""
    inner = wrapper.get("optimizer_state_dict", wrapper)
    key = "fp32_groups_flat" if "fp32_groups_flat" in wrapper else "fp32_groups"
    scalars: dict[str, dict[str, Any]] = {}
    groups = []
    states: dict[str, dict[str, Any]] = {}
    for i, group in enumerate(inner["param_groups"]):
        flat = key == "fp32_groups_flat"
        numbers = [group["params"][0]] if flat else list(group["params"])
        masters = [wrapper[key][i]] if flat else wrapper.get(key, {i: [None] * len(numbers)})[i]
        for number, master in zip(numbers, masters, strict=True):
            own = {key: master} if master is not None else {}
            states[unnamed(number)] = {**own, **with_present_keys(inner["state"].get(number, {}))}
        kept = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        groups.append(ParamGroup([unnamed(number) for number in numbers], kept))
    found = opened(header, name, groups, scalars)
    found.manifest.frozen, found.manifest.unsure = [], []
    found.manifest.notes.append(NUMBERED.format(reason))
    add_module(found, header, [*header.names, *header.buffers])
    for number, state in states.items():
        _add(found, header, scalars, number, state)
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
    header: Header, saved: list[dict[str, Any]], wrapper: dict[str, Any], flat: Any, options: ReadOptions
) -> list[list[str]]:
    """The names of each group's members: from the file, from the user, or where the evidence allows one answer."""
    if header.shapes:
        return [list(group) for group in header.shapes]
    shapes = {name: tuple(header.module[name].shape) for name in header.names}
    recorded = all(len(g.get("param_names") or ()) == len(g["params"]) for g in saved)
    given = options.names or ([str(n) for g in saved for n in g["param_names"]] if recorded else options.order)
    if flat is not None:
        return _cut_flat(header, given, flat, shapes, options.names_in_model_order)
    numbers = [list(g["params"]) for g in saved]
    fitting = _fitting(header, numbers, wrapper, shapes)
    if given is None:
        states = wrapper.get("optimizer_state_dict", wrapper)["state"]
        stateless = {n for own in numbers for n in own if not states.get(n) and "fp32_groups" not in wrapper}
        names = assign(
            numbers, fitting, list(shapes), str(header.file), stateless, in_model_order=options.names_in_model_order
        )
        return [[names[n] for n in own] for own in numbers]
    _check_names(header, given, sum(map(len, numbers)), shapes)
    names = dict(zip((n for own in numbers for n in own), given, strict=True))
    if odd := next((n for n in names if names[n] not in fitting[n]), None):
        raise CheckpointError(
            f"{header.file}: {names[odd]} is not its optimizer's parameter {odd}, whose states say otherwise"
        )
    return [[names[n] for n in own] for own in numbers]


def _fitting(
    header: Header, numbers: list[list[int]], wrapper: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> dict[int, set[str]]:
    """Number → the names that its master's contents, else its states' shapes allow."""
    masters = {
        n: m
        for own, held in zip(numbers, wrapper.get("fp32_groups", ()), strict=False)
        for n, m in zip(own, held, strict=True)
    }
    states = wrapper.get("optimizer_state_dict", wrapper)["state"]
    return {
        number: {n for n in shapes if _rounds_to(masters[number], header.module[n])}
        if number in masters
        else fitting_names(states.get(number, {}), shapes)
        for own in numbers
        for number in own
    }


def _rounds_to(master: Tensor, weight: Tensor) -> bool:
    if master.shape != weight.shape:
        return False
    one, two = master.reshape(-1), weight.reshape(-1)
    return torch.equal(one[:PROBE].to(two.dtype), two[:PROBE]) and torch.equal(one.to(two.dtype), two)


def _check_names(header: Header, names: Sequence[str], count: int, shapes: dict[str, tuple[int, ...]]) -> None:
    check_once(names, f"{header.file}: the names given")
    unknown = [n for n in names if n not in shapes]
    if unknown or len(names) != count:
        raise CheckpointError(
            f"{header.file}: the names given are not those of its optimizer's {count} parameters"
            + (f": {unknown[0]} is not in the model" if unknown else f": there are {len(names)}")
        )


def _cut_flat(
    header: Header,
    names: Sequence[str] | None,
    flat: list[Tensor],
    shapes: dict[str, tuple[int, ...]],
    in_model_order: bool,
) -> list[list[str]]:
    """Members of FP16_Optimizer's flat groups: as the user says, else those whose weights the masters round to, one after the other."""
    if names is None and in_model_order and len(flat) == 1 and flat[0].numel() == sum(map(numel, shapes.values())):
        names = list(shapes)
    if names is not None:
        _check_names(header, names, len(names), shapes)
    rest, groups = list(names or shapes), []
    for masters in flat:
        group, at = [], 0
        while at < masters.numel():
            fitting = [
                n
                for n in rest[: 1 if names else None]
                if _rounds_to(masters[at : at + numel(shapes[n])], header.module[n].reshape(-1))
            ]
            if len(fitting) != 1:
                problem = (
                    f"{rest[0]} is not what its flat groups have next"
                    if names and rest
                    else "the names given end too early"
                    if names
                    else "its flat groups do not say which parameters are in them"
                )
                raise (CheckpointError if names else NamesWanted)(
                    f"{header.file}: FP16_Optimizer: {problem}; give the names of the optimizer's parameters in its order (--names FILE)"
                )
            group.append(fitting[0])
            rest.remove(fitting[0])
            at += numel(shapes[fitting[0]])
        groups.append(group)
    if names and rest:
        raise CheckpointError(f"{header.file}: its optimizer does not have {rest[0]}, which the names given have")
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
