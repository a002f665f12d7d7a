"""The objects of the files of every stage, ready to be pickled; tensors are stubs that are filled from the source.

What of them DeepSpeed's own `load_checkpoint` needs was read off its loaders; what it ignores is written where its converters, its
`zero_to_fp32` or our reader go by it.
"""

from __future__ import annotations

from typing import Any

import torch

from anon_dist.checkpoint.schema import MASTER
from anon_dist.checkpoint.torchfiles import rank_local
from anon_dist.checkpoint.zero.flat import (
    basis_cuts,
    group_cuts,
    group_partition,
    round_robin,
    shard,
    shard_cuts,
    sub_groups,
    whole_members,
)
from anon_dist.checkpoint.zero.header import fresh
from anon_dist.checkpoint.zero.model_states import VERSION, config, loss_scaler, model_states, slice_mapping
from anon_dist.checkpoint.zero.source import Group, MuonOrder, Source
from anon_dist.optim.frame import KEYS

MODEL = "mp_rank_00_model_states.pt"


def stage0(source: Source, world_size: int) -> dict[str, Any]:
    """File name → object. A bf16 or fp16 model gets the masters that FP16_UnfusedOptimizer keeps, which leaves out what is frozen."""
    groups, state, index, param_groups = source.groups(source.dtype == torch.float32, muon="size"), {}, 0, []
    for members, hyperparameters in groups:
        first = index
        for name in members:
            if own := source.own(name):  # by parameter nothing has to be alike: every one keeps what it has
                state[index] = own
            index += 1
        param_groups.append({**hyperparameters, "params": list(range(first, index))})
    masters = [[source.master(name) for name in members] for members, _ in groups]
    optimizer: dict[str, Any] = {"state": state, "param_groups": param_groups}
    if source.dtype != torch.float32:
        optimizer = {
            "dynamic_loss_scale": False,
            "cur_scale": vars(loss_scaler(source))["cur_scale"],
            "cur_iter": source.manifest.step or 0,
            "optimizer_state_dict": optimizer,
            "fp32_groups": masters,
        }
    states = model_states(
        source, world_size, [members for members, _ in groups], optimizer=optimizer, zero={"stage": 0}
    )
    return {MODEL: {**states, "frozen_param_shapes": None, "frozen_param_fragments": None}}


def stage12(
    source: Source, stage: int, world_size: int, rotate: bool, muon_momentum: str | None = None
) -> dict[str, Any]:
    """File name → object. Both stages, and BF16_Optimizer, load the same file.

    Args:
        rotate: lay parameters as an engine with `round_robin_gradients` does.
        muon_momentum: see `WriteOptions`.
    """
    groups, scaler = source.flat_groups(), loss_scaler(source)
    whole = not source.muon_in_parts(stage, muon_momentum)
    orders = [
        [g.members[i] for i in round_robin(len(g.members), world_size)] if rotate else list(g.members) for g in groups
    ]
    zero = {"stage": stage, "round_robin_gradients": rotate, "elastic_checkpoint": False}
    files: dict[str, Any] = {MODEL: model_states(source, world_size, orders, zero=zero)}
    totals = [sum(source.numel(name) for name in order) for order in orders]
    local = source.local(rank_local.FLAT, world_size, orders)
    for rank in range(world_size):
        masters, states, paddings, mappings = [], {}, [], []
        for i, (group, order, total) in enumerate(zip(groups, orders, totals, strict=True)):
            length = group_partition(total, world_size)
            held = min(length, max(0, total - rank * length))
            sizes = [source.numel(name) for name in order]
            cuts = group_cuts(sizes, [0] * len(sizes), length, rank)
            masters.append(source.laid(order, MASTER, torch.float32, cuts, held))
            paddings.append(length - held)
            mappings.append(slice_mapping(order, cuts))
            flat = {k: source.laid(order, k, dtype, cuts, length) for k, dtype in group.states.items()}
            if whole and group.hyperparameters.get("use_muon") and "momentum_buffer" in flat:
                members, elements = whole_members(cuts, sizes)
                dtype = group.states["momentum_buffer"]
                flat = (
                    {"momentum_buffer": source.laid(order, "momentum_buffer", dtype, members, elements)} if cuts else {}
                )
            own = {k: v[rank] for k, v in local[i].items() if v[rank] is not None}
            states[i] = {**group.numbers, **flat, **own}
        base = {"state": states, "param_groups": [{**g.hyperparameters, "params": [i]} for i, g in enumerate(groups)]}
        # No param_alignment_paddings: without them an engine with parameter_alignment lays the buffers anew when it loads.
        optimizer = {
            "loss_scaler": scaler,
            "dynamic_loss_scale": bool(vars(scaler).get("dynamic")),
            "overflow": False,
            **source.clip,
            "base_optimizer_state": base,
            "single_partition_of_fp32_groups": masters,
            "zero_stage": stage,
            "group_paddings": paddings,
            "partition_count": [world_size] * len(groups),
            "param_slice_mappings": mappings,
            "ds_version": VERSION,
        }
        files[_optimizer_file(source, rank)] = _wrapped(source, optimizer, zero)
    return files


def stage3(source: Source, world_size: int, sub_group_size: int, muon_order: MuonOrder | None = None) -> dict[str, Any]:
    """File name → object.

    Args:
        sub_group_size: of the engine that will load: it takes as many flat buffers as it has sub-groups, of the same lengths.
        muon_order: see `WriteOptions`.

    Raises:
        CheckpointError: `muon_order` is None, and it would make a difference.
    """
    scaler = loss_scaler(source)
    parts: list[Group] = []
    param_groups = []
    for members, hyperparameters in source.sure_groups(muon_order):
        first = len(parts)
        for places in sub_groups([source.numel(name) for name in members], world_size, sub_group_size):
            parts.append(source.common([members[i] for i in places], hyperparameters))
        param_groups.append({**hyperparameters, "params": list(range(first, len(parts)))})
    zero = {"stage": 3, "sub_group_size": sub_group_size}
    local = source.local(rank_local.SHARDS, world_size, [part.members for part in parts])
    files: dict[str, Any] = {}
    for rank in range(world_size):
        masters, states = [], {}
        for i, part in enumerate(parts):
            sizes = [source.numel(name) for name in part.members]
            cuts, length = shard_cuts(sizes, world_size, rank), sum(shard(size, world_size) for size in sizes)
            masters.append(source.laid(part.members, MASTER, torch.float32, cuts, length))
            flat = {k: source.laid(part.members, k, dtype, cuts, length) for k, dtype in part.states.items()}
            for key, elements in source.bases(part.members, world_size).items():
                cuts = basis_cuts(elements, world_size, rank, sharded=key in KEYS["rows"])
                flat[key] = source.laid(part.members, key, torch.float32, cuts, sum(c.stop - c.start for c in cuts))
            states[i] = {**part.numbers, **flat, **{k: v[rank] for k, v in local[i].items()}}
        optimizer = {
            "zero_stage": 3,
            "loss_scaler": scaler,
            "dynamic_loss_scale": bool(vars(scaler).get("dynamic")),
            "overflow": False,
            "partition_count": world_size,
            "optimizer_state_dict": {"state": states, "param_groups": param_groups},
            "fp32_flat_groups": masters,
        }
        name = f"zero_pp_rank_{rank}_{MODEL}"
        files[name] = model_states(source, world_size, [part.members for part in parts], rank=rank, zero=zero)
        files[_optimizer_file(source, rank)] = _wrapped(source, optimizer, zero)
    return files


def universal(source: Source) -> dict[str, Any]:
    """File name → object. It has model states for stages 0 to 2 and for stage 3, and so loads into either."""
    groups = source.flat_groups("DeepSpeed's loader of universal checkpoints")
    scaler, orders = loss_scaler(source), [group.members for group in groups]
    files: dict[str, Any] = {
        MODEL: model_states(source, 1, orders, zero={"round_robin_gradients": False}),
        f"zero_pp_rank_0_{MODEL}": model_states(source, 1, orders, rank=0, zero={}),
    }
    others: dict[str, dict[str, Any]] = {}
    for group in groups:
        for name in group.members:
            files[f"zero/{name}/fp32.pt"] = {"param": source.master(name), "cat_dim": 0}
            for key in group.states:
                files[f"zero/{name}/{key}.pt"] = {"param": source.state(name, key), "cat_dim": 0}
            for key, value in group.numbers.items():
                if key == "step":
                    files[f"zero/{name}/step.pt"] = value
                else:  # DeepSpeed would take a file of any other key for a tensor
                    others.setdefault(name, {})[key] = fresh(value)
    param_groups = [{**g.hyperparameters, "params": [i]} for i, g in enumerate(groups)]
    files["zero/optimizer_state.pt"] = {
        "loss_scaler": scaler,
        "dynamic_loss_scale": bool(vars(scaler).get("dynamic")),
        "overflow": False,
        **source.clip,
        "ds_version": VERSION,
        "param_groups": param_groups,
        "optimizer_state_dict": {
            "state": {i: {k: fresh(v) for k, v in group.numbers.items()} for i, group in enumerate(groups)},
            "param_groups": param_groups,
        },
        "numbers": others,
    }
    return files


def _optimizer_file(source: Source, rank: int) -> str:
    """The name goes by the precision of the engine that will load (engine.py, `_get_zero_ckpt_prefix`)."""
    prefix = "bf16_" if source.dtype == torch.bfloat16 else ""
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def _wrapped(source: Source, optimizer: dict[str, Any], zero: dict[str, Any]) -> dict[str, Any]:
    return {"optimizer_state_dict": optimizer, "ds_config": config(source, zero), "ds_version": VERSION}
