"""accelerate's sharded folders without DCP (`use_dcp=False`, FSDP2): each rank's shards, as DTensors pickled into files of its own.

pytorch_model_fsdp_0_rank{r}.bin, optimizer_0_rank{r}.bin: state dictionaries by name. No DTensor is built and no process group needed:
the classes are read as inert stand-ins (their attributes are data), and torch says where a rank's shard lies.

Source: accelerate/utils/fsdp_utils.py, save_fsdp_model and save_fsdp_optimizer; torch/distributed/tensor/_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from anon_dist.checkpoint.beside import read_beside
from anon_dist.checkpoint.boxes import Box, Boxes
from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.layouts.statedict import interpret
from anon_dist.checkpoint.options import ReadOptions
from anon_dist.checkpoint.schema import Checkpoint
from anon_dist.checkpoint.torchfiles.pickles import ForbiddenClass, StandIn
from anon_dist.checkpoint.torchfiles.torchfile import open_torch

_FILES = {"model": "pytorch_model_fsdp_0_rank", "optimizer": "optimizer_0_rank"}
_INERT = {
    "torch.distributed.device_mesh": ("DeviceMesh",),
    "torch.distributed._mesh_layout": ("_MeshLayout", "_FlatLayout"),
    "torch.distributed.tensor._dtensor_spec": ("DTensorSpec", "ShardOrderEntry", "TensorMeta"),
    "torch.distributed.tensor.placement_types": ("Shard", "Replicate", "Partial", "_StridedShard"),
}


class _DTensor:
    """Stands for the class in the pickle."""


@dataclass(frozen=True)
class _Piece:
    """A DTensor of one rank: its own elements, and what its specification says of the whole."""

    local: Tensor
    spec: Any

    def own(self) -> Tensor:
        """For `Box`."""
        return self.local


def _wrapper(*arguments: Any) -> Any:
    """For `_rebuild_wrapper_subclass`: what it makes is empty, and its state has the contents."""
    return arguments


def _rebuild(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """For `_rebuild_from_type_v2`, of DTensors alone."""
    if function is not _wrapper or kind is not _DTensor:
        raise ForbiddenClass(f"torch._tensor._rebuild_from_type_v2 of {kind}")
    own = {k: v for part in (state if isinstance(state, tuple) else (state,)) for k, v in (part or {}).items()}
    return _Piece(own["_local_tensor"], own["_spec"])  # in slots: of a tuple's second part


_BY_NAME: dict[tuple[str, str], Any] = {
    ("torch.distributed.tensor", "DTensor"): _DTensor,
    ("torch._utils", "_rebuild_wrapper_subclass"): _wrapper,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild,
    **{
        (module, name): type(name, (StandIn,), {"__module__": module, "__qualname__": name})
        for module, names in _INERT.items()
        for name in names
    },
}


def detect(path: Path) -> bool:
    """A folder with a file for each rank."""
    return path.is_dir() and any(any(path.glob(f"{stem}*.bin")) for stem in _FILES.values())


def open_rank_files(path: Path, options: ReadOptions) -> Checkpoint:
    """See `formats.Format`.

    Raises:
        CheckpointError: a rank's file is missing or damaged, or shards lie as they are not read here; naming it.
    """
    tree, ranks = {}, 0
    for part, stem in _FILES.items():
        files = {
            int(m[1]): p
            for p in path.glob(f"{stem}*.bin")
            if (m := re.fullmatch(r"_rank(\d+)", p.stem.removeprefix(stem[:-5])))
        }
        if not files:
            continue
        if missing := sorted(set(range(max(files) + 1)) - set(files)):
            raise CheckpointError(
                f"{path / f'{stem}{missing[0]}.bin'} is missing; a complete checkpoint has every rank's"
            )
        held = [
            open_torch(files[rank], also=lambda module, name: _BY_NAME.get((module, name)), advice=False)
            for rank in sorted(files)
        ]
        tree[part] = _merged(held, f"{path}/{stem}*.bin")
        ranks = max(ranks, len(files))
    return interpret(tree, str(path), options, read_beside(path, options.unsafe), format="rank_files", world_size=ranks)


def _merged(held: list[Any], where: str) -> Any:
    """What the ranks hold, as one value; DTensors as the whole tensors they are pieces of."""
    first = held[0]
    if any(type(value) is not type(first) for value in held):
        raise CheckpointError(
            f"{where}: the ranks have different things there: {', '.join(type(v).__name__ for v in held)}"
        )
    if isinstance(first, Mapping):
        if odd := next((key for value in held for key in {*first} ^ {*value}), None):
            raise CheckpointError(f"{where}: not every rank has {odd}")
        return {key: _merged([value[key] for value in held], f"{where}: {key}") for key in first}
    if isinstance(first, _Piece):
        return _whole(held, where)
    alike = [torch.equal(v, first) if isinstance(first, Tensor) else v == first for v in held]
    if not all(alike):
        raise CheckpointError(f"{where} is not sharded, and rank {alike.index(False)} has another than rank 0")
    return first


def _whole(pieces: list[_Piece], where: str) -> Boxes:
    shape = tuple(int(n) for n in pieces[0].spec.tensor_meta._arguments[0])
    boxes: dict[tuple[int, ...], Box] = {}
    for rank, piece in enumerate(pieces):
        placements = [_placement(p, where) for p in piece.spec.placements]
        grid, at = _coordinate(piece.spec.mesh, rank, where, len(pieces))
        local, offsets = _compute_local_shape_and_global_offset(shape, grid, at, placements)
        if tuple(local) != tuple(piece.local.shape):
            raise CheckpointError(f"{where}: rank {rank} has {tuple(piece.local.shape)} where {tuple(local)} should be")
        if piece.local.numel():
            boxes.setdefault(tuple(offsets), Box(tuple(offsets), tuple(local), piece.own))
    try:
        return Boxes(shape, pieces[0].local.dtype, list(boxes.values()))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}; a rank's part is missing") from None


def _placement(saved: Any, where: str) -> Any:
    kind = type(saved).__qualname__
    if kind == "Replicate":
        return Replicate()
    if kind != "Shard":
        raise CheckpointError(
            f"{where} is laid out as {kind} (tensor parallelism), which is not read from rank files: save with use_dcp=True"
        )
    return Shard(int(vars(saved).get("dim", next(iter(saved._arguments), 0))))


def _coordinate(mesh: Any, rank: int, where: str, count: int) -> tuple[list[int], list[int]]:
    """The mesh's shape, and the rank's place in it."""
    known = vars(mesh)
    if "_layout" not in known or "_rank_map" not in known:
        raise CheckpointError(
            f"{where}: a DeviceMesh of another version of torch, which is not read here: save with use_dcp=True"
        )
    axes = []
    for axis in known["_layout"].axes:
        sizes, strides = (a if isinstance(a, tuple) else (a,) for a in (axis.shape, axis.stride))
        axes.append([sum(i * s for i, s in zip(at, strides, strict=True)) for at in product(*map(range, sizes))])
    ranks = known["_rank_map"].tolist()
    if len(ranks) != count:
        raise CheckpointError(f"{where}: there are files of {count} ranks, and {len(ranks)} wrote it")
    grid = [len(axis) for axis in axes]
    for at in product(*map(range, grid)):
        if ranks[sum(axis[i] for axis, i in zip(axes, at, strict=True))] == rank:
            return grid, list(at)
    raise CheckpointError(f"{where}: rank {rank} is not in the mesh of ranks {ranks}")
