"""Fill a live model and optimizer from a checkpoint of another engine or world size; each rank reads the elements it holds.

For the engines of torch alone; DeepSpeed's are filled by `zero_restore`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from anon_dist.checkpoint.checksums import checksums
from anon_dist.checkpoint.errors import CheckpointError, GroupsDiffer
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.names import unwrapped
from anon_dist.checkpoint.optimizers.frames import check_whole
from anon_dist.checkpoint.options import ReadOptions
from anon_dist.checkpoint.recognise import ANON, BASIS_STATES
from anon_dist.checkpoint.schema import MASTER, WEIGHT, Checkpoint, Key
from anon_dist.checkpoint.together import on_every_rank
from anon_dist.optim import Anon
from anon_dist.optim.state import decoded_states

DEEPSPEED = "deepspeed"
"""The subfolder of a checkpoint that DeepSpeed writes."""


def restore(model: nn.Module, optimizer: Optimizer, checkpoint: Checkpoint) -> None:
    """Copy weights (the float32 masters where there are some), buffers, states, step counts and hyperparameters, in place.

    Args:
        model: as the engine wrapped it: plain tensors, DTensors, or FSDP1 with `use_orig_params`.
        optimizer: the one that steps this rank's parameters, its state allocated. Parameters that it does not hold are no error:
            ZeroRedundancyOptimizer's ranks keep some each.

    Raises:
        CheckpointError: a tensor is missing there or here, or has another shape; naming it. Nothing has been changed then. On every
            rank, as `DamagedCheckpoint`, which is raised while tensors are filled.
    """
    wrapped = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    plain = unwrapped(list(wrapped))
    parameters = {plain[name]: p for name, p in model.named_parameters()}
    buffers = {plain[name]: buffer for name, buffer in model.named_buffers()}
    with on_every_rank(), decoded_states(optimizer):
        check_same_optimizer(optimizer, checkpoint)
        _fill(model, parameters, buffers, optimizer, checkpoint)


def _fill(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: dict[str, Tensor],
    optimizer: Optimizer,
    checkpoint: Checkpoint,
) -> None:
    ranges = Ranges(model)
    _allocate(parameters, optimizer, checkpoint)
    groups = group_values(optimizer, {p: name for name, p in parameters.items()}, checkpoint)
    work = list(_tensors(parameters, buffers, optimizer, checkpoint, ranges))
    for key, _, owner in work:
        _check(key, owner, checkpoint, ranges)
    _check_nothing_is_left({key for key, *_ in work}, parameters, optimizer, checkpoint)
    with torch.no_grad():
        for key, target, owner in work:
            local = target.to_local() if isinstance(target, DTensor) else target
            ranges.fill(local, checkpoint, key, owner)
        for name, p in parameters.items():
            if p in optimizer.state:
                _set_scalars(optimizer.state[p], name, checkpoint)
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group.update(values)


@contextmanager
def opened(folder: Path, order: Sequence[str]) -> Iterator[Checkpoint]:
    """The checkpoint in a folder that some engine saved to, of whatever format; closed again in the end. Every rank must call it.

    Args:
        order: see `parameter_order`.

    Raises:
        CheckpointError: it cannot be opened, on some rank: raised on all.
    """
    check_present(folder)
    with on_every_rank():
        checkpoint = open_checkpoint(state_folder(folder), ReadOptions(order=order))
    try:
        yield checkpoint
    finally:
        checkpoint.close()


def parameter_order(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of the optimizer's parameters in its order, before an engine wraps the two: DeepSpeed's stage 0 numbers them when it saves."""
    names = {p: name for name, p in model.named_parameters()}
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


def state_folder(folder: Path) -> Path:
    """Where the state lies in a folder that some engine saved to."""
    inner = folder / DEEPSPEED
    return inner if inner.is_dir() else folder


def check_present(folder: Path) -> None:
    """Raises `DamagedCheckpoint`, on every rank, if a file of a training checkpoint is missing or of another size than it was."""
    with on_every_rank():
        if not dist.is_initialized() or dist.get_rank() == 0:
            found = checksums(folder)
            if found is not None:
                found.check_present()


def check_same_optimizer(optimizer: Optimizer, checkpoint: Checkpoint) -> None:
    """Refuse another optimizer's state: states that only one of them has would be dropped, or made up.

    Raises:
        CheckpointError: one of them is Anon and the other is not.
    """
    found = checkpoint.manifest.optimizer
    if isinstance(optimizer, Anon) != (found == ANON):
        raise CheckpointError(
            f"the checkpoint holds the state of {found or 'no optimizer'}, not of {type(optimizer).__name__}. Resume "
            "with that optimizer, or convert it: anon-dist ckpt convert --optimizer"
        )


def group_values(optimizer: Optimizer, names: Mapping[Any, str], checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """For each present param group, the hyperparameters that the checkpoint has for its members; the states' dtypes stay as they are.

    Raises:
        GroupsDiffer: members of one group are in different groups there, or in none.
    """
    found = []
    by_member = {member: i for i, group in enumerate(checkpoint.manifest.groups) for member in group.members}
    for index, group in enumerate(optimizer.param_groups):
        indices = {by_member.get(names[p]) for p in group["params"]}
        if None in indices or len(indices) > 1:
            first = next((names[p] for p in group["params"] if names[p] not in by_member), None)
            raise GroupsDiffer(
                f"param group {index}: {first or names[group['params'][0]]} is in {'none' if first else 'another'} of the checkpoint's "
                "param groups; resume with the groups it was written with (the same model, and the same lr, weight decay and gamma by "
                "name; those of tokens are in a group of their own where rows are turned into a basis, and with a β1 of their own)"
            )
        values = checkpoint.manifest.groups[indices.pop()].hyperparameters if indices else {}  # type: ignore[index]
        found.append({k: v for k, v in values.items() if k not in ("params", "state_dtype")})
    return found


class Ranges:
    """Which elements of each parameter this rank holds, and how to read them."""

    def __init__(self, model: nn.Module) -> None:
        self._flat: dict[Tensor, tuple[int, int]] = {}
        self._shapes: dict[Tensor, tuple[int, ...]] = {}
        for module in FullyShardedDataParallel.fsdp_modules(model):
            handle = module._handle
            if handle is None:
                continue
            flat: Any = handle.flat_param
            for p, info, shape in zip(flat._params, flat._shard_param_infos, flat._shapes, strict=True):
                start = info.intra_param_start_idx if info.in_shard else 0
                self._flat[p] = (start, start + (info.numel_in_shard if info.in_shard else 0))
                self._shapes[p] = tuple(shape)

    def shape(self, owner: Tensor) -> tuple[int, ...]:
        """The parameter's shape, unsharded."""
        return self._shapes.get(owner, tuple(owner.shape))

    def lays_out(self, owner: Tensor, state: Tensor) -> bool:
        """Whether a state says nothing of how it is laid out itself: a flat part, or a plain tensor of a DTensor's."""
        return owner in self._flat or (isinstance(owner, DTensor) and not isinstance(state, DTensor))

    def fill(self, local: Tensor, checkpoint: Checkpoint, key: Key, owner: Tensor) -> None:
        """Copy this rank's elements of a tensor that is laid out as the parameter `owner` is."""
        if owner in self._flat:
            copy_range(local, checkpoint, key, *self._flat[owner])
        elif not isinstance(owner, DTensor):
            copy_range(local, checkpoint, key, 0, owner.numel())
        elif local.numel():
            sizes, offsets = compute_local_shape_and_global_offset(owner.shape, owner.device_mesh, owner.placements)
            row = math.prod(owner.shape[1:])
            start, stop = (offsets[0] * row, (offsets[0] + sizes[0]) * row) if sizes else (0, 1)
            if tuple(sizes[1:]) == tuple(owner.shape[1:]):
                copy_range(local, checkpoint, key, start, stop)
                return
            rows = checkpoint.read(key, start, stop).view(sizes[0], *owner.shape[1:])
            for dim, (offset, size) in enumerate(zip(offsets[1:], sizes[1:], strict=True), start=1):
                rows = rows.narrow(dim, offset, size)
            local.copy_(rows.reshape(local.shape))


def copy_range(target: Tensor, checkpoint: Checkpoint, key: Key, start: int, stop: int) -> None:
    """Elements [start, stop) into a tensor of as many, piece by piece: each is checked and copied while it is in the processor's cache."""
    if not target.is_contiguous():
        target.copy_(checkpoint.read(key, start, stop).view(target.shape))
        return
    flat = target.detach().view(-1)
    for at in range(start, stop, _PIECE):
        end = min(stop, at + _PIECE)
        flat[at - start : end - start].copy_(checkpoint.read(key, at, end))


_PIECE = 1 << 20


def _allocate(parameters: Mapping[str, Tensor], optimizer: Optimizer, checkpoint: Checkpoint) -> None:
    """Make the state of optimizers that have none before their first step, for what is in the checkpoint."""
    members = {p for group in optimizer.param_groups for p in group["params"]}
    for name, p in parameters.items():
        if p in members and not optimizer.state.get(p):
            states = [key.state for key in checkpoint.tensors if key.parameter == name]
            found = {state: torch.zeros_like(p) for state in states if state not in (WEIGHT, MASTER)}
            if found:
                scalars = checkpoint.manifest.scalars.get(name, {})
                optimizer.state[p] = found | {k: v.clone() if isinstance(v, Tensor) else v for k, v in scalars.items()}


def _tensors(
    parameters: Mapping[str, Tensor],
    buffers: dict[str, Tensor],
    optimizer: Optimizer,
    checkpoint: Checkpoint,
    ranges: Ranges,
) -> Iterator[tuple[Key, Tensor, Tensor]]:
    """(key in the checkpoint, tensor to fill, tensor whose layout it has: a parameter, or itself)."""
    for name, p in parameters.items():
        master = Key(name, MASTER)
        yield master if master in checkpoint.tensors else Key(name, WEIGHT), p, p
        for state, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and (value.dim() or ranges.shape(p) == ()) and state != "step":
                yield Key(name, state), value, p if ranges.lays_out(p, value) else value
    for name, buffer in buffers.items():
        key = Key(name, WEIGHT)
        if key in checkpoint.tensors:  # others are made by the model itself
            yield key, buffer, buffer


def _check(key: Key, owner: Tensor, checkpoint: Checkpoint, ranges: Ranges) -> None:
    if key not in checkpoint.tensors:
        if key.state in BASIS_STATES and Key(key.parameter, "exp_avg") in checkpoint.tensors:
            raise CheckpointError(
                f"the checkpoint has no {key.state} for {key.parameter}: it was written without a basis. Resume with basis None, and call "
                "optimizer.rebase(basis=…)"
            )
        raise CheckpointError(
            f"the checkpoint has no {key.state} for {key.parameter}: it is of another model or optimizer (its optimizer: "
            f"{checkpoint.manifest.optimizer}; `anon-dist ckpt convert --optimizer` changes it)"
        )
    if checkpoint.tensors[key].shape != ranges.shape(owner):
        raise CheckpointError(
            f"{key.state} of {key.parameter} has shape {checkpoint.tensors[key].shape} in the checkpoint and {ranges.shape(owner)} here: "
            "resume with the model configuration it was written with"
        )


def _check_nothing_is_left(
    taken: set[Key], parameters: Mapping[str, Tensor], optimizer: Optimizer, checkpoint: Checkpoint
) -> None:
    """Every state of the parameters that the optimizer holds must have found its place."""
    held = {name for name, p in parameters.items() if p in optimizer.state}
    for key in checkpoint.tensors:
        if key.parameter in held and key.state not in (WEIGHT, MASTER) and key not in taken:
            check_whole([key.state], key.parameter, f"{type(optimizer).__name__}, as it is made or sharded here,")
            raise CheckpointError(
                f"the checkpoint has {key.state} for {key.parameter}, which {type(optimizer).__name__} has no place for: it is another "
                f"optimizer's ({checkpoint.manifest.optimizer}); `anon-dist ckpt convert --optimizer` changes it"
            )


def _set_scalars(state: dict[str, Any], name: str, checkpoint: Checkpoint) -> None:
    """Step counts and other 0-dim values, in the type and on the device that they have here."""
    for key, value in checkpoint.manifest.scalars.get(name, {}).items():
        present = state.get(key)
        if isinstance(present, Tensor):
            present.fill_(float(value))
        else:
            state[key] = value
