"""Model and optimizer as a torch distributed checkpoint (DCP): every rank writes its shards, any number of ranks reads them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from anon_dist.agreement import Group, describe
from anon_dist.checkpoint.dcp.linking import LinkingWriter, Links
from anon_dist.checkpoint.dcp.load import Planner, Reader
from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.together import on_every_rank
from anon_dist.exits import may_pass

_HYPERPARAMETER = re.compile(r"(optimizer\.param_groups\.\d+\.)\w+$")


def save_sharded(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write `{"model": …, "optimizer": …}` into an existing folder; every rank must call it. The files are synced to disk."""
    save_state(folder, sharded_state(model, optimizer))


def load_sharded(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Restore, in place, what `save_sharded` wrote; on any number of ranks.

    Raises:
        CheckpointError: the checkpoint is of another model or optimizer, or its files are damaged.
    """
    state = sharded_state(model, optimizer)
    load_state(folder, state, type(optimizer).__name__)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def save_state(folder: Path, state: dict[str, Any], group: Group = None, links: Links | None = None) -> None:
    """Write a nested dictionary of (sharded) tensors and values; ranks may hold different keys. The files are synced to disk.

    Args:
        group: see `agreement.agree`.
        links: of the run's earlier checkpoints, with which this one may share files. It is to be told when this one has got its place.

    Raises:
        CheckpointError: a rank could not write its files; on every rank.
    """
    _say_nothing_of_single_processes()
    try:
        save(state, storage_writer=LinkingWriter(folder, links or Links()), process_group=group)
    except CheckpointException as error:  # which is no Exception
        rank, (reason, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"rank {rank}: {describe(reason)}") from error


def load_state(folder: Path, state: dict[str, Any], optimizer: str, elsewhere: Collection[str] = ()) -> None:
    """Fill `state`, in place, from what `save_state` wrote.

    DCP leaves out, without a word, what only one side has. Here that is an error; but hyperparameters that the checkpoint's version did not
    have yet keep their present values.

    Args:
        optimizer: name of the present optimizer, for messages.
        elsewhere: flat keys of the checkpoint that other ranks load.

    Raises:
        CheckpointError: a key is on one side only, or a value would run code; `DamagedCheckpoint` where a file is not as it was
            written, in which case `state` has been filled in part. On every rank.
    """
    with on_every_rank():
        reader = Reader(folder)
        wanted = set(flatten_state_dict(state)[0]) | set(elsewhere)
        parts = {key.partition(".")[0] for key in wanted}  # a script may keep its schedule beside them
        saved = {key for key in reader.read_metadata().state_dict_metadata if key.partition(".")[0] in parts}
        # Of a group that is there: a group that is not would keep the present hyperparameters as if its state had been made with them.
        new = {key for key in wanted - saved if (of := _HYPERPARAMETER.match(key)) and of[1] + "params" in saved}
        if any(key.startswith("optimizer.state.") for key in wanted ^ saved):
            new = set()  # another optimizer's
        _compare(folder, saved, wanted - new, optimizer)
    _say_nothing_of_single_processes()
    try:
        load(state, storage_reader=reader, planner=Planner(allow_partial_load=bool(new)))
    except (Exception, CheckpointException) as error:  # the latter is no Exception, and raised on every rank
        found: list[BaseException] = [e for e, *_ in getattr(error, "failures", {}).values()] or [error]
        reason = next((e for e in found if isinstance(e, CheckpointError)), None)
        if reason is not None:
            raise type(reason)(str(reason)) from error
        raise may_pass(
            CheckpointError(
                f"{folder} cannot be loaded: {found[0]}. If it is not of another model, it is damaged; take an earlier one "
                "(--resume FOLDER)"
            )
        ) from error


def sharded_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """`{"model": …, "optimizer": …}`, by parameter name; the tensors are the live ones, or this rank's parts of them.

    FSDP1 makes new ones, and gathers all states of a parameter in one dtype: there bfloat16 states beside float32 ones come as float32.
    """
    if hasattr(optimizer, "init_state"):
        optimizer.init_state()
    flattens = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    with _in_one_dtype(optimizer) if flattens else nullcontext():
        model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


@contextmanager
def _in_one_dtype(optimizer: Optimizer) -> Iterator[None]:
    """Within it `state_dict` has all floating states of a parameter in the widest of their dtypes."""
    of_class = optimizer.state_dict

    def state_dict() -> dict[str, Any]:
        found = of_class()
        return {**found, "state": {index: _widened(state) for index, state in found["state"].items()}}

    optimizer.state_dict = state_dict  # type: ignore[method-assign]
    try:
        yield
    finally:
        del optimizer.state_dict


def _widened(state: dict[str, Any]) -> dict[str, Any]:
    floating = {k: x for k, x in state.items() if isinstance(x, torch.Tensor) and x.dim() and x.is_floating_point()}
    widest = max((x.dtype for x in floating.values()), key=lambda dtype: dtype.itemsize, default=None)
    return {**state, **{key: x.to(widest) for key, x in floating.items()}}


def _compare(folder: Path, saved: set[str], wanted: set[str], optimizer: str) -> None:
    """Every key on both sides, or an error that says what kind of thing is missing."""
    missing, extra = sorted(wanted - saved), sorted(saved - wanted)
    if not missing and not extra:
        return
    kinds = {"missing": missing, "unexpected": extra}
    if all(_HYPERPARAMETER.match(k) for k in missing + extra):
        raise CheckpointError(
            f"{folder} was written with other param groups: {_some(kinds)}. Resume with the groups it was written with"
        )
    if not any(k.startswith("model.") for k in missing + extra):
        raise CheckpointError(
            f"{folder} holds another optimizer's state than {optimizer}'s: {_some(kinds)}. Resume with the optimizer "
            "that wrote it, convert it (anon-dist ckpt convert --optimizer), or start a new run"
        )
    raise CheckpointError(
        f"{folder} is of another model: {_some(kinds)}. Resume with the model configuration it was written with"
    )


def _some(kinds: dict[str, list[str]]) -> str:
    return "; ".join(f"{len(keys)} {kind}, such as {keys[0]}" for kind, keys in kinds.items() if keys)


def _say_nothing_of_single_processes() -> None:
    """DCP warns that it is used without a process group, which is what a single process is. For good: saves have threads of their own.
    Each time: a `catch_warnings` around the last time has ended that."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized, assuming")
