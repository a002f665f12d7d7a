"""Matrices in bases of their own (`Anon(basis=…)`) under an engine: which can hold them.

A basis needs whole rows of a matrix. FSDP1 and DeepSpeed's stages 1 and 2 put matrices one after the other into a vector and cut that
anywhere: a rank would have to send its part of a cut row to its neighbour at every step, where bases have ranks talk at refreshes alone.
DeepSpeed's stage 3 cuts each matrix by itself, between rows if their number divides: then the optimizer is told where they lie.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from anon_dist.engines.errors import EngineError
from anon_dist.optim import Anon, flat


def refuse_flattened(engine: str, optimizer: Optimizer) -> None:
    """Refuse a basis under an engine that cuts matrices anywhere.

    Args:
        engine: its name, for the message.

    Raises:
        EngineError: a param group has a basis.
    """
    for index, group in enumerate(optimizer.param_groups):
        if isinstance(optimizer, Anon) and group["basis"] is not None:
            raise EngineError(
                f"basis is {group['basis']!r} in param group {index}, and {engine} cuts matrices into flat parts, within rows, which a "
                "basis needs whole: use FSDP2, DDP, ZeroRedundancyOptimizer (train.engine fsdp2, ddp, zero1) or DeepSpeed's stage 3, or "
                "basis None (optim.basis None in a training configuration)"
            )


def place(engine: Any) -> None:
    """Tell the Anon of a DeepSpeed engine where matrices lie in what it steps, before its state is made. Every rank must call it.

    Raises:
        EngineError: a param group has a basis that cannot follow how matrices are cut, or that DeepSpeed swaps to NVMe; with the remedy.
    """
    optimizer, wrapper = engine.basic_optimizer, engine.optimizer
    if not is_stage3(wrapper):
        if not any(p.dim() > 1 for group in optimizer.param_groups for p in group["params"]):
            refuse_flattened(f"DeepSpeed's stage {engine.zero_optimization_stage()}", optimizer)
        return
    from deepspeed.accelerator import get_accelerator

    device, names = torch.device(get_accelerator().current_device_name()), engine.param_names
    for i, members in enumerate(wrapper.fp16_groups):
        shares, offset = [], 0
        for p in members:
            shares.append(flat.Share(names[p], tuple(p.ds_shape), offset, int(p.partition_numel())))
            offset += shares[-1].numel
        ranks = wrapper._get_sub_group_process_group(i)
        layout = flat.Layout(tuple(shares), ranks if dist.get_world_size(ranks) > 1 else None, device)
        group, master = (
            optimizer.param_groups[wrapper.sub_group_to_group_id[i]],
            wrapper.fp32_partitioned_groups_flat[i],
        )
        flat.lay_out(master, layout)
        if group["basis"] and wrapper.swap_optimizer:
            raise EngineError(
                "a basis is renewed when DeepSpeed has swapped it to NVMe: offload the optimizer to cpu, or basis None"
            )
        try:
            flat.check(master, group)
        except RuntimeError as error:
            raise EngineError(str(error).removeprefix("Anon: ")) from None


def is_stage3(wrapper: Any) -> bool:
    """Whether DeepSpeed's wrapper of an optimizer cuts each parameter by itself."""
    return hasattr(wrapper, "fp32_partitioned_groups_flat")


def refuse_universal(optimizer: Anon) -> None:
    """Refuse DeepSpeed's own loading of a universal checkpoint, of which it takes exp_avg and exp_avg_sq alone.

    Raises:
        EngineError: a param group has a basis, in which these are to be understood.
    """
    if any(group["basis"] for group in optimizer.param_groups):
        raise EngineError(
            "DeepSpeed loads exp_avg and exp_avg_sq of a universal checkpoint alone, and no basis, without which they mean nothing: "
            "anon_dist.engines.zero_restore.restore loads any checkpoint (load_universal_checkpoint: false)"
        )


def allocate(optimizer: Any) -> None:
    """Make the state of an optimizer's final parameters, if that can be done before its first step.

    Raises:
        EngineError: blocks of a basis would lie across shards; with the block that fits.
    """
    if hasattr(optimizer, "init_state"):
        try:
            optimizer.init_state()
        except RuntimeError as error:
            raise EngineError(str(error).removeprefix("Anon: ")) from None
