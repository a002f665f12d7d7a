"""The model states that DeepSpeed's engine reads beside the optimizer's: names, weights, buffers, counters, the user's own entries."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from anon_dist.checkpoint.assemble import with_stubs
from anon_dist.checkpoint.optimizers.schedules import schedule_key
from anon_dist.checkpoint.schema import WEIGHT, Stub
from anon_dist.checkpoint.torchfiles.pickles import StandIn
from anon_dist.checkpoint.zero.flat import Cut, numel, shard, shard_cuts
from anon_dist.checkpoint.zero.header import CARRIED, ENGINE_KEYS
from anon_dist.checkpoint.zero.source import Source

VERSION = "0.19.0"
"""What is written as `ds_version`; the loaders ask for 0.3.17 or more."""


def model_states(
    source: Source,
    world_size: int,
    shapes: list[list[str]],
    *,
    rank: int | None = None,
    optimizer: dict[str, Any] | None = None,
    zero: dict[str, Any],
) -> dict[str, Any]:
    """As `_common_checkpoint_state` of deepspeed/runtime/engine.py writes them.

    Args:
        shapes: names of each group or sub-group, in the order of the flat buffers.
        rank: the model states of this rank of stage 3, whose weights lie elsewhere; None: weights are whole.
        optimizer: at stage 0.
        zero: what of `zero_optimization` in the recorded configuration this layout fixes.
    """
    manifest, sharded = source.manifest, rank is not None
    extras: dict[str, Any] = with_stubs(source.checkpoint, manifest.extras)
    module: OrderedDict[str, Any] = OrderedDict()
    stubs: dict[str, Stub] = {}
    for name in source.buffers:
        module[name] = source.weight(name)
    for name in source.order:
        stubs[name] = Stub((0,), source.dtypes[name], []) if sharded else source.weight(name)
        module[name] = stubs[name]
    for alias, name in source.tied.items():
        module[alias] = stubs[name]
    module.update(extras.get("model_extra_state") or {})
    frozen = OrderedDict((name, torch.Size(source.shape(name))) for name in source.frozen)
    client = extras.get("client_state")
    found = {
        "module": module,
        "buffer_names": list(source.buffers),
        "optimizer": optimizer,
        "param_shapes": [OrderedDict((n, torch.Size(source.shape(n))) for n in group) for group in shapes],
        "frozen_param_shapes": frozen or None,  # the loader wants all of the engine's there, or nothing
        "shared_params": dict(source.tied),
        "frozen_param_fragments": OrderedDict((n, _fragment(source, n, world_size, rank)) for n in frozen) or None,
        "lr_scheduler": extras.get(schedule_key(extras) or "lr_scheduler"),
        "data_sampler": extras.get("data_sampler"),
        "random_ltd": extras.get("random_ltd"),
        "skipped_steps": extras.get("skipped_steps", 0),
        "global_steps": manifest.step or 0,
        "dp_world_size": world_size,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": config(source, zero),
        "ds_version": VERSION,
        **{k: v for k, v in (client if isinstance(client, dict) else {}).items() if k not in ENGINE_KEYS},
        CARRIED: {"optimizer": manifest.optimizer, "unsure": list(source.unsure)},
    }
    if "global_samples" in extras:  # absent, the loader takes steps times batch
        found["global_samples"] = extras["global_samples"]
    return found


def config(source: Source, zero: dict[str, Any]) -> dict[str, Any]:
    """The source's configuration, as far as it is known, with the layout that is written."""
    return {**source.config, "zero_optimization": {**source.zero_config, **zero}}


def _fragment(source: Source, name: str, world_size: int, rank: int | None) -> Stub:
    """A frozen parameter: whole, or a rank's share of it with its padding."""
    if rank is None:
        return source.weight(name)
    size = numel(source.shape(name))
    cuts = shard_cuts([size], world_size, rank)
    return source.laid([name], WEIGHT, source.dtypes[name], cuts, shard(size, world_size))


def inert(module: str, name: str, attributes: dict[str, Any]) -> StandIn:
    """An object of a class of DeepSpeed's, to be pickled by its name."""
    kind: type[StandIn] = type(name, (StandIn,), {"__module__": module, "__qualname__": name})
    made = StandIn.__new__(kind)
    made.__setstate__(attributes)
    return made


def slice_mapping(members: list[str], cuts: list[Cut]) -> OrderedDict[str, StandIn]:
    """Where a rank's buffer has its part of each parameter; DeepSpeed's converter to universal goes by it."""
    where = "deepspeed.utils.tensor_fragment"
    found = ((members[c.member], {"numel": c.stop - c.start, "start": c.offset}) for c in cuts)
    return OrderedDict((name, inert(where, "fragment_address", at)) for name, at in found)


def loss_scaler(source: Source) -> StandIn:
    """DeepSpeed's loss scaler with the source's attributes, or one that does not scale; pickled by name, without DeepSpeed.

    Source: deepspeed/runtime/fp16/loss_scaler.py, `LossScaler` and `DynamicLossScaler`.
    """
    saved = source.manifest.extras.get("loss_scaler")
    saved = dict(saved) if isinstance(saved, dict) else {}
    name = str(saved.pop("class", "")).rpartition(".")[2]
    if name not in ("LossScaler", "DynamicLossScaler"):  # a wrapper's numbers (stage 0), or another engine's
        name, saved = "LossScaler", {"cur_scale": float(saved.get("cur_scale", 1.0)), "dynamic": False}
    return inert("deepspeed.runtime.fp16.loss_scaler", name, saved)
