"""Copies of a state in host memory, which a save writes while the training goes on; the buffers of one are used again by the next."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import Shard, ShardedTensor  # type: ignore[attr-defined]
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.tensor import DTensor


class Stager(Protocol):
    """What copies a state."""

    def __call__(self, state: Any) -> Any:
        """A nested dictionary of tensors (sharded ones, too) and values, as it is now, on the CPU; until the next call."""


class Copies:
    """See `Stager`. A tensor's copy is made once for each place in the dictionary, and filled again as long as it fits.

    torch's own stager takes three times as long for 740 small DTensors, whose layouts it copies each time.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[Any, ...], Any] = {}
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, state: Any) -> Any:
        """See `Stager`."""
        before, self._copies = self._copies, {}
        with torch.no_grad():
            copied = self._copied(state, (), before)
            for target, source in self._pairs:
                target.copy_(source, non_blocking=True)
        self._pairs = []
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copied

    def _copied(self, value: Any, path: tuple[Any, ...], before: dict[tuple[Any, ...], Any]) -> Any:
        if isinstance(value, dict):
            return {key: self._copied(inner, (*path, key), before) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copied(inner, (*path, i), before) for i, inner in enumerate(value))
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        last = before.get(path)
        self._copies[path] = last if _alike(last, value) else _empty(value)
        self._pairs += zip(_locals(self._copies[path]), _locals(value), strict=True)
        return self._copies[path]


def _locals(tensor: Tensor) -> list[Tensor]:
    """What this rank holds of a tensor."""
    if isinstance(tensor, DTensor):
        return [tensor._local_tensor]
    return [shard.tensor for shard in tensor.local_shards()] if isinstance(tensor, ShardedTensor) else [tensor.detach()]


def _alike(last: Any, tensor: Tensor) -> bool:
    """Whether a copy that was made before can be filled with a tensor."""
    if last is None or (last.shape, last.dtype) != (tensor.shape, tensor.dtype):
        return False
    if isinstance(tensor, DTensor) != isinstance(last, DTensor):
        return False
    if isinstance(tensor, ShardedTensor):
        return isinstance(last, ShardedTensor) and last.metadata() == tensor.metadata()
    return not isinstance(tensor, DTensor) or tensor._spec == last._spec


def _empty(tensor: Tensor) -> Tensor:
    """Room for a copy, of the same layout."""
    if isinstance(tensor, DTensor):
        local, spec = _room(tensor._local_tensor), tensor._spec
        return DTensor.from_local(
            local, spec.mesh, spec.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    if isinstance(tensor, ShardedTensor):
        shards = [Shard(_room(shard.tensor), shard.metadata) for shard in tensor.local_shards()]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            shards, tensor.metadata(), tensor._process_group
        )
    return _room(tensor.detach())


def _room(tensor: Tensor) -> Tensor:
    pinned = torch.cuda.is_available() and tensor.nbytes >= _PINNED
    return torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)


_PINNED = 1 << 16
"""Bytes of a tensor from which on its copy is in pinned memory, where there is a GPU."""


class Storages:
    """See `Stager`. Of any objects; tensors that share a storage do so in the copy, and take as little room in a file of `torch.save`."""

    def __init__(self) -> None:
        self._on_device = torch.cuda.is_available()
        self._stager = StateDictStager(pin_memory=self._on_device, pin_memory_min_bytes=_PINNED)

    def __call__(self, state: Any) -> Any:
        """See `Stager`."""
        copied = self._stager.stage(state, non_blocking=self._on_device)
        if self._on_device:
            torch.cuda.current_stream().synchronize()
        return copied


def uncopied(state: Any) -> Any:
    """In place of a `Stager`, for a save during which nothing changes."""
    return state
