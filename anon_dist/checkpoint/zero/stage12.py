"""ZeRO stages 1 and 2, and BF16_Optimizer: each param group is one flat buffer, cut into equal parts over the ranks.

`mp_rank_00_model_states.pt` has the weights whole; `[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt` has rank R's part of the float32
masters (`single_partition_of_fp32_groups`, without the padding at the end) and of every state (`base_optimizer_state`, with it, except
in elastic checkpoints). DeepSpeed's Muon has its momentum otherwise, see `flat.whole_members`. Order and shapes are `param_shapes` of
the model states: `param_slice_mappings`, which DeepSpeed's own converter goes by, is wrong under `round_robin_gradients`, as it ignores
the order in which that lays the parameters.

Source: deepspeed/runtime/zero/stage_1_and_2.py, `state_dict` and `_load_legacy_checkpoint`; runtime/bf16_optimizer.py, `state_dict`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.schema import MASTER, Key, ParamGroup, TensorInfo
from anon_dist.checkpoint.torchfiles import rank_local
from anon_dist.checkpoint.zero.files import Files, check_ranks, need
from anon_dist.checkpoint.zero.flat import ALIGNMENT, Cut, group_cuts, numel, round_robin, whole_members
from anon_dist.checkpoint.zero.header import (
    Header,
    add_module,
    add_scaler,
    fresh,
    is_number,
    opened,
    read_header,
    same_number,
)
from anon_dist.checkpoint.zero.pieces import Piece, Pieces


@dataclass(frozen=True)
class RankGroup:
    """What a rank holds of a group."""

    file: Path
    master: Tensor
    partition: int
    """Elements, with padding."""
    states: dict[str, Any]


def read(files: Files, name: str) -> Pieces:
    """A checkpoint of stage 1 or 2.

    Raises:
        CheckpointError: ranks are missing, or sizes, steps or states disagree; naming the file.
    """
    header = read_header(files, files.models[0])
    check_ranks(files.optimizers, header.world_size, "optimizer states")
    ranks = [files.load_optimizer(f) for f in files.optimizers]
    gaps = ranks[0].get("param_alignment_paddings") or [[0] * len(shapes) for shapes in header.shapes]
    scalars: dict[str, dict[str, Any]] = {}
    found = opened(header, name, _groups(header, ranks[0]), scalars)
    add_scaler(found, ranks[0].get("loss_scaler"))
    if isinstance(ranks[0]["base_optimizer_state"], list):
        found.manifest.notes.append("An elastic checkpoint does not record the groups' hyperparameters.")
    add_module(found, header, [*header.names, *header.buffers])
    for i, shapes in enumerate(header.shapes):
        held = [_rank_group(rank, i, file) for rank, file in zip(ranks, files.optimizers, strict=True)]
        _add_group(found, scalars, shapes, gaps[i], held)
    return found


def _groups(header: Header, rank: dict[str, Any]) -> list[ParamGroup]:
    """Members in the optimizer's order, which is not the buffer's under `round_robin_gradients`."""
    base = rank["base_optimizer_state"]
    hyper = base["param_groups"] if isinstance(base, dict) else [{} for _ in header.shapes]
    groups = []
    for shapes, group in zip(header.shapes, hyper, strict=True):
        members = list(shapes)
        if header.zero_config.get("round_robin_gradients"):
            places = round_robin(len(members), header.world_size)
            members = [m for _, m in sorted(zip(places, members, strict=True))]
        groups.append(ParamGroup(members, {k: v for k, v in group.items() if k != "params"}))
    return groups


def _rank_group(rank: dict[str, Any], group: int, file: Path) -> RankGroup:
    masters = need(rank, "single_partition_of_fp32_groups", file, list)
    base = need(rank, "base_optimizer_state", file, (dict, list))
    if group >= len(masters):
        raise DamagedCheckpoint(f"{file}: {len(masters)} param groups, and the model states have more")
    master: Tensor = masters[group].reshape(-1)
    # Stages 1 and 2 cut the padding off the masters; BF16_Optimizer does not, and writes no stage.
    padding = int(need(rank, "group_paddings", file, list)[group]) if "zero_stage" in rank else 0
    states = base[group] if isinstance(base, list) else _state(base, group)
    return RankGroup(file, master, master.numel() + padding, states)


def _state(base: dict[str, Any], group: int) -> dict[str, Any]:
    """The states of a group's one tensor; none before the first step."""
    found: dict[str, Any] = base["state"].get(base["param_groups"][group]["params"][0], {})
    return found


def _add_group(
    found: Pieces,
    scalars: dict[str, dict[str, Any]],
    shapes: dict[str, tuple[int, ...]],
    gaps: list[int],
    held: list[RankGroup],
) -> None:
    """The masters and states of a group's members; a state that is one number goes to `scalars`."""
    for part in held:
        if part.partition != held[0].partition:
            raise DamagedCheckpoint(
                f"{part.file}: a partition of {part.partition} elements; {held[0].file.name} has {held[0].partition}"
            )
    wanted, found_here = sum(map(numel, shapes.values())) + sum(gaps), sum(part.master.numel() for part in held)
    if not wanted <= found_here < wanted + ALIGNMENT * len(held):  # BF16_Optimizer leaves the padding on
        raise DamagedCheckpoint(
            f"{held[0].file}: the ranks have {found_here} elements of the group of {next(iter(shapes), 'nothing')}, "
            f"its parameters {wanted}"
        )
    sizes = [numel(shape) for shape in shapes.values()]
    cuts = [group_cuts(sizes, gaps, part.partition, rank) for rank, part in enumerate(held)]
    _add_flat(found, MASTER, shapes, cuts, held, [part.master for part in held])
    local: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for part in held for key in part.states):
        values = [part.states.get(key) for part in held]
        for part, value, own in zip(held, values, cuts, strict=True):
            if value is None and own:  # a rank whose part is padding may have made no state
                raise CheckpointError(
                    f"{part.file}: no {key} of the group of {next(iter(shapes))}, which other ranks have"
                )
        present = [(v, part.file) for v, part in zip(values, held, strict=True) if v is not None]
        if all(is_number(v) for v, _ in present) and rank_local.is_common(key, [v for v, _ in present]):
            number = agreed(key, *map(list, zip(*present, strict=True)))
            for name in shapes:
                scalars.setdefault(name, {})[key] = fresh(number)
        elif key in rank_local.FLAT_STATES or _is_flat(values, sizes, cuts, held):
            _add_flat(found, key, shapes, cuts, held, values)
        else:
            path = f"{rank_local.KEY}.{next(iter(shapes))}.{key}"
            local[key] = [
                found.add_nested(f"{path}.{rank}", value, part.file)
                for rank, (value, part) in enumerate(zip(values, held, strict=True))
            ]
    rank_local.keep(
        found.manifest, rank_local.ALIGNED if any(gaps) else rank_local.FLAT, len(held), list(shapes), local
    )


def _is_flat(values: list[Any], sizes: list[int], cuts: list[list[Cut]], held: list[RankGroup]) -> bool:
    """Whether a state has an element for each of a rank's parameters', on one rank at least: on the others it should then."""
    return any(
        isinstance(value, Tensor)
        and value.dim() == 1
        and value.numel() in (part.partition, part.master.numel(), whole_members(own, sizes)[1])
        for value, own, part in zip(values, cuts, held, strict=True)
        if own
    )


def _add_flat(
    found: Pieces,
    key: str,
    shapes: dict[str, tuple[int, ...]],
    cuts: list[list[Cut]],
    held: list[RankGroup],
    values: list[Any],
) -> None:
    """A state that ranks have of their part, or of every member whole of which they have a part."""
    names, sizes = list(shapes), [numel(shape) for shape in shapes.values()]
    pieces: dict[str, list[Piece]] = {name: [] for name in names}
    whole = [whole_members(own, sizes) for own in cuts]
    lengths = [value.numel() if isinstance(value, Tensor) and value.dim() == 1 else None for value in values]
    wholes = all(length == w[1] for length, w, own in zip(lengths, whole, cuts, strict=True) if own)
    for value, part, own, (members, _) in zip(values, held, cuts, whole, strict=True):
        if not wholes and own and (value.dim() != 1 or value.numel() not in (part.partition, part.master.numel())):
            raise DamagedCheckpoint(f"{part.file}: {key} has {value.numel()} elements, the partition {part.partition}")
        for cut, member in zip(own, members, strict=True):
            offset = member.offset + cut.start if wholes else cut.offset
            pieces[names[cut.member]].append(Piece(cut.start, cut.stop, value, offset, part.file))
    dtypes = {value.dtype for value in values if isinstance(value, Tensor)}
    for name, shape in shapes.items():
        found.add(
            Key(name, key), TensorInfo(shape, torch.float32 if key == MASTER else next(iter(dtypes))), pieces[name]
        )


def agreed(key: str, values: list[Any], files: list[Path]) -> Any:
    """A number that all ranks wrote.

    Raises:
        CheckpointError: they differ: the files are of different steps.
    """
    for value, file in zip(values, files, strict=True):
        if not is_number(value) or not same_number(value, values[0]):
            shown = [float(v) if is_number(v) else v for v in (value, values[0])]
            raise DamagedCheckpoint(
                f"{file}: {key} is {shown[0]}, in {files[0].name} {shown[1]}: files of different steps"
            )
    return values[0]
