"""Any checkpoint into a live DeepSpeed engine: other stage, other number of ranks, other format than it was saved in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anon_dist.checkpoint.errors import CheckpointError, GroupsDiffer
from anon_dist.checkpoint.optimizers.frames import check_whole
from anon_dist.checkpoint.schema import EXTRA, MASTER, WEIGHT, Checkpoint, Key, Ref
from anon_dist.checkpoint.together import on_every_rank
from anon_dist.checkpoint.torchfiles import rank_local
from anon_dist.checkpoint.zero.flat import Cut, shard_cuts, whole_members
from anon_dist.engines.errors import EngineError
from anon_dist.engines.restore import check_same_optimizer, copy_range
from anon_dist.engines.saved_bases import laid, refuse_saved, without_basis
from anon_dist.optim.frame import BASIS_KEYS
from anon_dist.optim.state import NEUTRAL


@dataclass(frozen=True)
class Held:
    """A tensor that the optimizer steps on this rank, and what lies in it."""

    master: Tensor
    names: list[str]
    sizes: list[int]
    """Elements of each parameter, unsharded."""
    cuts: list[Cut]
    """Elements of `names[cut.member]`; what none covers is padding."""
    group: int
    """Of the optimizer's param groups."""
    layout: str | None = None
    """How it is cut, see `rank_local`; None: not at all."""


def restore(engine: Any, checkpoint: Checkpoint, strict: bool = True, allow_loss: bool = False) -> None:
    """Fill an engine of stage 0 to 3, BF16_Optimizer and the wrappers of bf16 and fp16 among them, offloaded or not.

    Masters, weights, buffers, every state, the groups' hyperparameters, step, counters, loss scale and learning rate schedule. Each rank
    reads its own ranges of masters and states; every rank must call it. Hyperparameters that the checkpoint lacks stay as they are.

    Args:
        strict: frozen weights that the checkpoint lacks (adapters saved without their base) are an error; False: they stay as they are.
        allow_loss: leave out states of ranks' parts that are cut elsewhere here (`rank_local`), for optimizers that make them anew.

    Raises:
        CheckpointError: a parameter or state is missing or of another shape, or groups do not match; naming it. On every rank.
        EngineError: the optimizer is swapped to NVMe.
    """
    wrapper, optimizer = engine.optimizer, engine.basic_optimizer
    if getattr(wrapper, "swap_optimizer", False):
        raise EngineError(
            "a checkpoint cannot be restored into an optimizer that DeepSpeed swaps to NVMe; offload it to cpu"
        )
    with torch.no_grad():
        with on_every_rank():
            check_same_optimizer(optimizer, checkpoint)
            source = _Source(checkpoint, engine.module)
            held = list(_held(wrapper, optimizer, source.names))
            if any(part.layout not in (None, rank_local.SHARDS) for part in held):
                refuse_saved(f"DeepSpeed's stage {engine.zero_optimization_stage()}", checkpoint)
            local = _local(held, source, allow_loss)
            for part in held:
                _fill(part.master, part, source, MASTER)
            _load_optimizer(wrapper, optimizer, held, source, local)
            _load_fixed(engine.module, source, strict)
            if not _gathers(wrapper):
                _copy_weights(held, source)
        if _gathers(wrapper):
            _push_weights(wrapper)
    _load_counters(engine, wrapper, checkpoint)


class _Source:
    """A checkpoint, asked by the engine's names."""

    def __init__(self, checkpoint: Checkpoint, module: nn.Module) -> None:
        self.checkpoint = checkpoint
        self.names = {p: name for name, p in module.named_parameters()}
        self._stored: dict[str, str] = {}
        for (
            alias,
            name,
        ) in checkpoint.manifest.tied.items():  # the engine may call a tied parameter by another of its names
            self._stored.setdefault(alias, name)
        for name, p in module.named_parameters(remove_duplicate=False):
            if any(Key(name, s) in checkpoint.tensors for s in (WEIGHT, MASTER)):
                self._stored.setdefault(self.names[p], name)
        self.states: dict[str, list[str]] = {}
        for key in checkpoint.tensors:
            if key.state not in (WEIGHT, MASTER, EXTRA):
                self.states.setdefault(key.parameter, []).append(key.state)

    def stored(self, name: str) -> str:
        """The checkpoint's name of a parameter."""
        return (
            name
            if any(Key(name, s) in self.checkpoint.tensors for s in (WEIGHT, MASTER))
            else self._stored.get(name, name)
        )

    def key(self, name: str, state: str, numel: int) -> Key:
        """Where a parameter's state of so many elements is; the weight where there is no master, and the other way round."""
        other = {MASTER: WEIGHT, WEIGHT: MASTER}.get(state, state)
        tensors = self.checkpoint.tensors
        found = next((k for s in (state, other) if (k := Key(self.stored(name), s)) in tensors), None)
        if found is None:
            raise CheckpointError(f"the checkpoint has no {state} of {name}; it is of another model or optimizer")
        if tensors[found].numel != numel:
            raise CheckpointError(
                f"{name}: {state} has shape {tensors[found].shape} in the checkpoint, {numel} elements in the model"
            )
        return found

    def read(self, name: str, state: str, start: int, stop: int, numel: int) -> Tensor:
        """Elements of a parameter's state; see `key`."""
        return self.checkpoint.read(self.key(name, state, numel), start, stop)


def _local(held: list[Held], source: _Source, allow_loss: bool) -> list[dict[str, Any]]:
    """Of each of the optimizer's tensors, the states that belong to this rank's part of a buffer as such.

    Raises:
        CheckpointError: there are some, and parameters are cut elsewhere here.
    """
    manifest, layout = source.checkpoint.manifest, next((part.layout for part in held if part.layout), None)
    if not rank_local.keys(manifest):
        return [{} for _ in held]
    ranks, rank = (1, 0) if layout in (None, rank_local.WHOLE) else (dist.get_world_size(), dist.get_rank())
    buffers = [[source.stored(name) for name in part.names] for part in held]
    found, why = rank_local.laid(manifest, layout or "stage 0", ranks, buffers)
    if why and not allow_loss:
        raise CheckpointError(
            f"{why}; resume so, or call zero_restore.restore with allow_loss=True, which leaves it out: nothing is lost with "
            "an optimizer that makes it anew at each step, as Adafactor does"
        )

    def whole(value: Any) -> Any:
        if isinstance(value, Ref):
            info = source.checkpoint.tensors[value.key]
            return source.checkpoint.read(value.key, 0, info.numel).view(info.shape).clone()
        return value.clone() if isinstance(value, Tensor) else value

    return [{k: whole(v[rank]) for k, v in own.items() if v[rank] is not None} for own in found]


def _held(wrapper: Any, optimizer: Any, names: dict[Any, str]) -> Iterator[Held]:
    """What this rank's optimizer steps, by the layout that the wrapper made."""
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):  # stage 3
        for i, members in enumerate(wrapper.fp16_groups):
            sizes = [int(p.ds_numel) for p in members]
            ranks, rank = wrapper._get_sub_group_partition_count(i), wrapper._get_sub_group_partition_rank(i)
            group = wrapper.sub_group_to_group_id[i]
            master = wrapper.fp32_partitioned_groups_flat[i]
            yield Held(
                master, [names[p] for p in members], sizes, shard_cuts(sizes, ranks, rank), group, rank_local.SHARDS
            )
    elif hasattr(wrapper, "single_partition_of_fp32_groups"):  # stages 1 and 2
        for i, members in enumerate(wrapper.round_robin_bit16_groups):
            low = wrapper.partition_size[i] * dist.get_rank(wrapper.real_dp_process_group[i])
            offsets = wrapper.round_robin_bit16_offsets[i]
            layout = rank_local.ALIGNED if any(map(any, wrapper.round_robin_bit16_padding)) else rank_local.FLAT
            yield _flat(wrapper.single_partition_of_fp32_groups[i], members, offsets, low, i, names, layout)
    elif hasattr(wrapper, "fp32_groups_flat_partition"):  # BF16_Optimizer
        for i, (members, master) in enumerate(
            zip(wrapper.bf16_groups, wrapper.fp32_groups_flat_partition, strict=True)
        ):
            low = master.numel() * dist.get_rank(wrapper.real_dp_process_group[i])
            yield _flat(master, members, None, low, i, names, rank_local.FLAT)
    elif hasattr(wrapper, "fp32_groups_flat"):  # FP16_Optimizer
        for i, (members, master) in enumerate(zip(wrapper.fp16_groups, wrapper.fp32_groups_flat, strict=True)):
            yield _flat(master, members, None, 0, i, names, rank_local.WHOLE)
    else:  # stage 0, alone or in FP16_UnfusedOptimizer
        for i, group in enumerate(optimizer.param_groups):
            members = wrapper.fp16_groups[i] if hasattr(wrapper, "fp16_groups") else group["params"]
            for p, master in zip(members, group["params"], strict=True):
                if p.requires_grad:
                    yield _flat(master, [p], None, 0, i, names)


def _flat(
    master: Tensor,
    members: list[Tensor],
    offsets: list[int] | None,
    low: int,
    group: int,
    names: dict[Any, str],
    layout: str | None = None,
) -> Held:
    """A master that holds elements [low, low + its length) of a buffer of members, one after the other unless `offsets` say otherwise."""
    sizes = [p.numel() for p in members]
    begins = offsets or [sum(sizes[:i]) for i in range(len(sizes))]
    cuts = []
    for i, (size, begin) in enumerate(zip(sizes, begins, strict=True)):
        first, last = max(begin, low), min(begin + size, low + master.numel())
        if first < last:
            cuts.append(Cut(i, first - begin, last - begin, first - low))
    return Held(master, [names[p] for p in members], sizes, cuts, group, layout)


def _fill(target: Tensor, part: Held, source: _Source, state: str, cuts: list[Cut] | None = None) -> None:
    """A tensor of the master's length, or cut otherwise, with its elements of a state; padding becomes what it is before the first step."""
    flat = target.detach().view(-1)
    flat.fill_(NEUTRAL.get(state, 0.0))
    for cut in part.cuts if cuts is None else cuts:
        key = source.key(part.names[cut.member], state, part.sizes[cut.member])
        copy_range(flat[cut.offset : cut.offset + cut.stop - cut.start], source.checkpoint, key, cut.start, cut.stop)


def _load_optimizer(
    wrapper: Any, optimizer: Any, held: list[Held], source: _Source, local: list[dict[str, Any]]
) -> None:
    """States and hyperparameters, by the optimizer's own `load_state_dict`, which checks and casts them."""
    staged = hasattr(wrapper, "fp32_partitioned_groups_flat")
    if staged:  # stage 3 shows the optimizer its parameters only while it steps
        wrapper._set_fp32_optimizer_param_groups()
    try:
        order = {id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
        members: list[list[str]] = [[] for _ in optimizer.param_groups]
        state = {}
        for part, own in zip(held, local, strict=True):
            members[part.group] += part.names
            whole = _keeps_matrices(wrapper, optimizer.param_groups[part.group])
            if values := {**_state(optimizer.state.get(part.master, {}), part, source, whole), **own}:
                state[order[id(part.master)]] = values
        groups = [
            {
                **without_basis(group),
                **_hyperparameters(names, source),
                "params": [order[id(p)] for p in group["params"]],
            }
            for group, names in zip(optimizer.param_groups, members, strict=True)
        ]
        try:
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        except (ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{type(optimizer).__name__} does not take the checkpoint's state: {error}") from None
    finally:
        if staged:
            wrapper._clear_fp32_optimizer_param_groups()
    for i, momentum in (getattr(wrapper, "muon_momentum_buffer_partitioned_groups_flat", None) or {}).items():
        momentum.copy_(optimizer.state[wrapper.fp32_partitioned_groups_flat[i]]["momentum_buffer"])
        optimizer.state[wrapper.fp32_partitioned_groups_flat[i]]["momentum_buffer"] = momentum
    if hasattr(wrapper, "_hp_optimizer_states_linked"):  # what DeepSpeed's accessors of whole states go by
        wrapper._link_all_hp_params()
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()


def _keeps_matrices(wrapper: Any, group: dict[str, Any]) -> bool:
    """Whether DeepSpeed's Muon keeps the momentum of this group in whole matrices; see `flat.whole_members`."""
    return bool(group.get("use_muon")) and hasattr(wrapper, "params_in_partition") and not wrapper.cpu_offload


def _state(present: dict[str, Any], part: Held, source: _Source, whole: bool = False) -> dict[str, Any]:
    """The states of one of the optimizer's tensors; in the tensors and dtypes that it has already, where it has."""
    stored = [source.stored(name) for name in part.names]
    scalars, tensors = source.checkpoint.manifest.scalars, source.checkpoint.tensors
    for name in stored if part.layout not in (None, rank_local.SHARDS) else ():
        check_whole(source.states.get(name, []), name, "an engine that lays parameters into flat buffers")
    own = {name: sorted(set(source.states.get(name, [])).difference(BASIS_KEYS)) for name in stored}
    keys, numbers = own[stored[0]], scalars.get(stored[0], {})
    for name in stored[1:]:
        mine = scalars.get(name, {})
        if own[name] != keys or any(k not in mine or float(mine[k]) != float(v) for k, v in numbers.items()):
            raise CheckpointError(
                f"{name} and {stored[0]} share a buffer here, and have other states or steps in the checkpoint; use stage 0"
            )
    found: dict[str, Any] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in numbers.items()}
    for key in keys:
        info, target, cuts, shape = tensors[Key(stored[0], key)], present.get(key), part.cuts, part.master.shape
        if part.layout is None and info.shape != shape:  # of one parameter alone, whole: a factor of it, say
            found[key] = source.checkpoint.read(Key(stored[0], key), 0, info.numel).view(info.shape).clone()
            continue
        if whole and key == "momentum_buffer":
            cuts, elements = whole_members(part.cuts, part.sizes)
            if not cuts:
                continue  # a rank whose part is padding makes no momentum
            shape = torch.Size([elements])
        rounded = key == "momentum_buffer" and isinstance(target, Tensor) and target.dtype != info.dtype
        if (
            not isinstance(target, Tensor) or target.shape != shape or rounded
        ):  # Muon casts it to the gradients' dtype itself
            target = torch.empty(shape, dtype=info.dtype, device=part.master.device)
        _fill(target, part, source, key, cuts)
        found[key] = target
    return found | laid(source.checkpoint, stored, part.sizes, part.cuts, whole=part.layout is None)


def _hyperparameters(members: list[str], source: _Source) -> dict[str, Any]:
    """Those of the checkpoint's group, or groups that agree, in which a group's members are."""
    wanted = {source.stored(name) for name in members}
    groups = [g for g in source.checkpoint.manifest.groups if wanted & set(g.members)]
    known = {name for group in groups for name in group.members}
    if wanted - known:
        raise GroupsDiffer(f"{min(wanted - known)} is in no param group of the checkpoint")
    found = [{k: v for k, v in g.hyperparameters.items() if k not in ("params", "param_names")} for g in groups]
    for other in found[1:]:
        odd = [k for k in {*other, *found[0]} if other.get(k) != found[0].get(k)]
        if odd:
            raise CheckpointError(
                f"{groups[0].members[0]} and {groups[1].members[0]} are in one param group here, and in two of the checkpoint, "
                f"with other {odd[0]}; make the groups alike"
            )
    return found[0] if found else {}


def _load_fixed(module: nn.Module, source: _Source, strict: bool) -> None:
    """Buffers, and parameters that the optimizer does not step."""
    tensors = source.checkpoint.tensors
    for name, buffer in module.named_buffers():
        if Key(name, WEIGHT) in tensors:
            buffer.copy_(source.read(name, WEIGHT, 0, buffer.numel(), buffer.numel()).view(buffer.shape))
    for p, name in source.names.items():
        if p.requires_grad or (size := int(getattr(p, "ds_numel", p.numel()))) == 0:
            continue
        if not any(Key(source.stored(name), state) in tensors for state in (WEIGHT, MASTER)):
            if strict:
                raise CheckpointError(
                    f"the checkpoint has no {name}, which is frozen here: it was saved without its base (exclude_frozen_parameters), or "
                    "is of another model; with strict=False frozen weights that it lacks stay as they are"
                )
            continue
        if not hasattr(p, "ds_tensor"):
            p.copy_(source.read(name, WEIGHT, 0, size, size).view(p.shape))
            continue
        sharded: Any = p
        share, rank = sharded.partition_numel(), dist.get_rank(sharded.ds_process_group)
        first, last = min(size, rank * share), min(size, (rank + 1) * share)
        sharded.ds_tensor.view(-1)[: last - first].copy_(source.read(name, WEIGHT, first, last, size))


def _gathers(wrapper: Any) -> bool:
    """Whether DeepSpeed makes the model's weights from the masters, of which each rank has its part."""
    return hasattr(wrapper, "fp32_partitioned_groups_flat") or hasattr(wrapper, "update_lp_params")


def _copy_weights(held: list[Held], source: _Source) -> None:
    trained = {name for part in held for name in part.names}
    for p, name in source.names.items():
        if name in trained:
            p.copy_(source.read(name, WEIGHT, 0, p.numel(), p.numel()).view(p.shape))


def _push_weights(wrapper: Any) -> None:
    """The model's weights, from the masters; ranks exchange them."""
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        wrapper.checkpoint_event_prologue()
        for master, flat, members in zip(
            wrapper.fp32_partitioned_groups_flat,
            wrapper.fp16_partitioned_groups_flat,
            wrapper.fp16_partitioned_groups,
            strict=True,
        ):
            flat.copy_(master)
            for share, values in zip(members, wrapper.unflatten(flat, members), strict=True):
                share.data = values.data
        wrapper.checkpoint_event_epilogue()
    else:
        wrapper.update_lp_params()


def _dynamic(scaler: dict[str, Any]) -> bool:
    return bool(scaler.get("dynamic", scaler.get("dynamic_loss_scale", False)))


def _load_counters(engine: Any, wrapper: Any, checkpoint: Checkpoint) -> None:
    """Steps, samples, the loss scale, and the schedule that DeepSpeed steps, where the checkpoint has them."""
    extras = checkpoint.manifest.extras
    engine.global_steps = checkpoint.manifest.step or 0
    engine.skipped_steps = extras.get("skipped_steps", 0)
    engine.global_samples = extras.get("global_samples", engine.global_steps * engine.train_batch_size())
    scaler = getattr(wrapper, "loss_scaler", None) or getattr(
        wrapper, "loss_scale_config", None
    )  # the latter at stage 0
    if isinstance(scale := extras.get("loss_scaler"), dict) and scaler is not None:
        present = vars(scaler)
        if _dynamic(scale) == _dynamic(present):  # fp16's is of no use to bf16, nor the other way round
            present.update({k: v for k, v in scale.items() if k in present and k not in ("dtype", "use_grad_scaling")})
    if engine.lr_scheduler is not None and extras.get("lr_scheduler") is not None:
        engine.lr_scheduler.load_state_dict(extras["lr_scheduler"])
