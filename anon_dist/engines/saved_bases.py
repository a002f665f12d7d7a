"""Checkpoints of an Anon whose matrices are in bases of their own, loaded where these are others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from anon_dist.checkpoint.dcp.read import DcpFiles
from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.schema import Checkpoint, Key
from anon_dist.checkpoint.together import on_every_rank
from anon_dist.checkpoint.zero.flat import Cut
from anon_dist.engines.bases import allocate
from anon_dist.engines.errors import EngineError
from anon_dist.optim import Anon
from anon_dist.optim.frame import BASIS_KEYS, KEYS
from anon_dist.optim.regime import HISTORY, Regime

REMEDY = (
    "`anon-dist ckpt convert SRC DST --to dcp --optimizer anon --anon.drop-basis` turns matrices back; resume DST, with basis None. "
    "Or go on without a basis (optim.basis None, Anon.rebase(basis=None)) to a next checkpoint under FSDP2, DDP, "
    "ZeroRedundancyOptimizer or DeepSpeed's stage 3"
)
"""How a checkpoint gets rid of its bases."""


@dataclass
class SavedGroup:
    """What a checkpoint says of a param group."""

    members: set[str]
    basis: str | None
    block: int

    @classmethod
    def of(cls, members: Iterable[str], values: Mapping[str, Any]) -> SavedGroup:
        """By its hyperparameters; a checkpoint that is older than bases has none."""
        return cls(set(members), values.get("basis"), int(values.get("basis_block") or 128))


def groups_of(checkpoint: Checkpoint) -> list[SavedGroup]:
    """Of an opened checkpoint."""
    return [SavedGroup.of(group.members, group.hyperparameters) for group in checkpoint.manifest.groups]


def groups_in(folder: Path) -> list[SavedGroup]:
    """Of a checkpoint that `checkpoint.save_sharded` wrote, without opening all of it. Every rank must call it.

    Raises:
        CheckpointError: it cannot be read; on every rank.
    """
    with on_every_rank():
        files, found = DcpFiles(folder), list[SavedGroup]()
        places = {key for key, _ in files.places}
        while (start := f"optimizer.param_groups.{len(found)}.") + "params" in places:
            keys = ("params", "basis", "basis_block")
            values = {key: files.value(files.place(start + key, ())) for key in keys if start + key in places}
            found.append(SavedGroup.of(values.pop("params"), values))
    return found


def take_over(engine: str, optimizer: Optimizer, names: Mapping[Any, str], saved: list[SavedGroup]) -> bool:
    """Give the groups of an optimizer that is about to be loaded the bases that the checkpoint was written with, so that its states find
    their places; `Anon.rebase` goes on to others. Its own states are made anew where there is a basis on either side.

    Args:
        engine: its name.
        names: names of the parameters.

    Returns:
        Whether the checkpoint's param groups are the present ones. Where they are not, `restore` gives each group what its members had.

    Raises:
        CheckpointError: a matrix has a basis there, and can have none under this engine.
        EngineError: blocks of the checkpoint's basis would lie across shards here.
    """
    own = [{names[p] for p in group["params"]} for group in optimizer.param_groups]
    alike = len(own) == len(saved) and all(a <= b.members for a, b in zip(own, saved, strict=True))
    if not isinstance(optimizer, Anon):
        return alike
    turned = any(group.basis for group in saved)
    if turned and engine == "fsdp1":
        raise CheckpointError(
            f"the checkpoint has matrices in bases of their own, which {engine} cannot hold: {REMEDY}"
        )
    turned |= any(group["basis"] for group in optimizer.param_groups)
    if not turned:
        return alike
    for group, members in zip(optimizer.param_groups, own, strict=True):
        source = next((s for s in saved if members & s.members), None)
        if source is not None:
            group["basis"], group["basis_block"] = source.basis, source.block
            group[HISTORY] = Regime(group).fresh()
    optimizer.state.clear()
    try:
        allocate(optimizer)
    except EngineError as error:
        bases = sorted({group.basis for group in saved if group.basis})
        raise EngineError(
            f"the checkpoint's basis ({', '.join(bases)}) is loaded before it becomes another, and does not fit here: {error}. Or go "
            "on with the basis that you want in one process, or on ranks that the checkpoint's fits, to a next checkpoint, and here from "
            "that"
        ) from None
    return alike


def refuse_saved(engine: str, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that has bases, where they have no place.

    Raises:
        CheckpointError: it has.
    """
    key = next((key for key in checkpoint.tensors if key.state in BASIS_KEYS), None)
    if key is not None:
        raise CheckpointError(
            f"the checkpoint has a basis of {key.parameter} ({key.state}), which {engine} cannot hold: {REMEDY}"
        )


def laid(
    checkpoint: Checkpoint, names: Sequence[str], sizes: Sequence[int], cuts: Iterable[Cut], *, whole: bool
) -> dict[str, Tensor]:
    """A checkpoint's bases of the matrices in a tensor that the optimizer steps, as `optim.flat` has them.

    Args:
        names: the members of the tensor, as the checkpoint calls them.
        sizes: elements of each, unsharded.
        cuts: what of them lies in the tensor here. Of columns a rank has all of the basis, of rows that of its rows.
        whole: the tensor is one parameter, in its own shape.
    """
    found: dict[str, Tensor] = {}
    for key in BASIS_KEYS:
        pieces = []
        for cut in cuts:
            if (info := checkpoint.tensors.get(Key(names[cut.member], key))) is None:
                continue
            start, stop = 0, info.numel
            if key in KEYS["rows"]:
                columns = sizes[cut.member] // info.shape[0]
                start, stop = (info.shape[1] * (end // columns) for end in (cut.start, cut.stop))
            values = checkpoint.read(Key(names[cut.member], key), start, stop)
            pieces.append(values.view(info.shape) if whole else values)
        if pieces:
            found[key] = torch.cat(pieces).clone()
    return found


def without_basis(group: dict[str, Any]) -> dict[str, Any]:
    """A present group's hyperparameters, for what a checkpoint lacks: one that is older than bases has none."""
    return {k: v for k, v in group.items() if k != HISTORY} | ({"basis": None} if "basis" in group else {})
