"""The engines that torch brings: one process, DDP, FSDP2, HSDP. The optimizer's parameters are the model's own, whole or DTensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from anon_dist.agreement import Group
from anon_dist.checkpoint import load_sharded
from anon_dist.checkpoint.dcp.linking import Links
from anon_dist.checkpoint.dcp.sharded import save_state, sharded_state
from anon_dist.checkpoint.keeping.staging import Copies
from anon_dist.checkpoint.schema import Checkpoint
from anon_dist.engines.base import Veto, Write, never, set_learning_rates, settle
from anon_dist.engines.bases import allocate
from anon_dist.engines.check import StateBytes, check_optimizer, state_bytes
from anon_dist.engines.grads import global_norm, scale_gradients
from anon_dist.engines.materialize import materialize, told_apart
from anon_dist.engines.overlap import OverlappedStep
from anon_dist.engines.replicas import Copy, copies_of, states_of
from anon_dist.engines.restore import check_present, opened, parameter_order, restore
from anon_dist.engines.saved_bases import groups_in, groups_of, take_over
from anon_dist.optim import Anon


class TorchEngine:
    """Model and optimizer as `Accelerator.prepare` wraps them. See `base.Engine`."""

    _overlapped: OverlappedStep | None = None
    _sharded_sums = False
    _copies: Copies | None = None

    def __init__(
        self,
        name: str,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        overlap: bool = False,
        sharded_sums: bool = False,
        weights: Checkpoint | None = None,
    ) -> None:
        """`overlap`: step in the background (see `overlap`). `sharded_sums`, `weights`: of FSDP, see `start.wrap`."""
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self._order = parameter_order(model, optimizer)
        self.name, self._accelerator, self._sharded_sums = name, accelerator, sharded_sums
        with told_apart(model):
            self.model, prepared = accelerator.prepare(model, optimizer)
        lay_out(self.model)
        if weights is not None:
            offload = isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
            materialize(self.model, weights, torch.device("cpu") if offload else accelerator.device)
        check_optimizer(prepared, self.model, type(optimizer), groups)
        self.optimizer: Optimizer = prepared.optimizer
        allocate(self.optimizer)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._overlapped = OverlappedStep(self.model, self.optimizer) if overlap else None

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """See `base.Engine`. DDP decides in the forward pass whether the backward pass reduces gradients, FSDP in the backward pass."""
        return contextlib.nullcontext() if last or self._sharded_sums else self._accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `base.Engine`."""
        if self._sharded_sums and isinstance(self.model, FSDPModule):
            self.model.set_requires_all_reduce(last)  # hsdp: the replicas' sums can wait, sharded as they are
        with self.micro_batch(last):
            loss.backward()

    def step(self, lr: float | Sequence[float], clip: float | None, veto: Veto = never) -> Tensor:
        """See `base.Engine`. An optimizer that reads a scale and a flag from the device is told there; of another the host waits."""
        norm = self._norm()
        none = veto(norm)
        if _reads_from_device(self.optimizer):
            with _told(self.optimizer, norm, clip, none):
                self._step_optimizer(lr)
        elif math.isfinite(known := float(norm)) and not bool(none):
            if clip is not None and known > clip:
                scale_gradients(self._parameters, clip / known)
            self._step_optimizer(lr)
        for p in self._parameters:
            p.grad = None
        return norm

    def _norm(self) -> Tensor:
        return global_norm(self._parameters)

    def _step_optimizer(self, lr: float | Sequence[float]) -> None:
        set_learning_rates(self.optimizer.param_groups, lr)
        (self._overlapped or self.optimizer).step()

    def _wait(self) -> None:
        if self._overlapped is not None:
            self._overlapped.wait()

    def whole_optimizer(self) -> AbstractContextManager[Optimizer]:
        """See `base.Engine`."""
        self._wait()
        return contextlib.nullcontext(self.optimizer)

    def state_bytes(self) -> StateBytes:
        """See `base.Engine`."""
        return state_bytes(self.optimizer)

    def copies(self) -> Iterator[Copy]:
        """See `base.Engine`."""
        self._wait()
        settle(self.optimizer)
        yield from copies_of(self.model)
        yield from states_of(self.optimizer, {copy.tensor: copy.name for copy in copies_of(self.model)})

    def capture(self, copied: bool) -> Write:
        """See `base.Engine`. Written in torch's distributed checkpoint format, which all engines of this module share."""
        self._wait()
        settle(self.optimizer)
        return self._written(self._state(), copied)

    def _state(self) -> dict[str, Any]:
        return sharded_state(self.model, self.optimizer)

    def _written(self, state: dict[str, Any], copied: bool) -> Write:
        if copied:
            self._copies = self._copies or Copies()
            state = self._copies(state)
        return partial(_write, state)

    def save(self, folder: Path) -> None:
        """See `base.Engine`."""
        self.capture(copied=False)(folder)

    def load(self, folder: Path) -> None:
        """See `base.Engine`. What another engine wrote is converted as it is read."""
        self._wait()
        check_present(folder)
        names, ours = {copy.tensor: copy.name for copy in copies_of(self.model)}, (folder / ".metadata").exists()
        if ours and take_over(self.name, self.optimizer, names, groups_in(folder)):
            load_sharded(folder, self.model, self.optimizer)
            return
        with opened(folder, self._order) as checkpoint:
            take_over(self.name, self.optimizer, names, groups_of(checkpoint))
            restore(self.model, self.optimizer, checkpoint)

    def full_weights(self) -> dict[str, Tensor]:
        """See `base.Engine`."""
        return full_weights(self.model)


def _write(state: dict[str, Any], folder: Path, group: Group = None, links: Links | None = None) -> None:
    """See `base.Write`."""
    save_state(folder, state, group, links)


def _reads_from_device(optimizer: Optimizer) -> bool:
    """Whether its step takes `grad_scale` and `found_inf`; torch's do so only where every group is `fused`."""
    fused = getattr(optimizer, "_step_supports_amp_scaling", False) and all(g["fused"] for g in optimizer.param_groups)
    return isinstance(optimizer, Anon) or fused


@contextlib.contextmanager
def _told(optimizer: Any, norm: Tensor, clip: float | None, none: Tensor) -> Iterator[None]:
    """A block in which the optimizer's step divides gradients so that their norm is at most `clip`, and is none if it is not finite or
    `none` is true.

    By the attributes through which torch's GradScaler talks to fused optimizers; float32, as these want it.
    """
    optimizer.found_inf = norm.isfinite().logical_not().logical_or(none).float()
    optimizer.grad_scale = (
        (norm / clip).clamp(min=1.0).float() if clip is not None else torch.ones_like(optimizer.found_inf)
    )
    try:
        yield
    finally:
        del optimizer.grad_scale, optimizer.found_inf


def lay_out(model: nn.Module) -> None:
    """Have DDP, on CPUs, keep gradients from the first step on where it will keep them.

    It lays them out anew after its first step, by the order in which they came; and where they lie decides in which order those of three
    ranks and more are summed. The first step after a resume would have other bits than the same step of a run that went on.
    """
    if not isinstance(model, DistributedDataParallel) or model.device_type != "cpu":
        return
    # A sum of two has one order, and DDP's own layout overlaps more of it with the backward pass.
    if dist.get_world_size(model.process_group) > 2:
        model.reducer._push_all_rebuilt_params()  # of the first forward pass


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """See `base.Engine`. Gathered one by one: besides the result, a rank has one whole parameter at a time."""
    first, once = not dist.is_initialized() or dist.get_rank() == 0, {copy.name for copy in copies_of(model)}
    weights = {}
    for name, value in get_model_state_dict(model).items():
        if name in once:  # of tied ones one
            whole = _whole(value)
            if first:
                weights[name] = whole.to("cpu", torch.float32)
            del whole  # before the next one
    return weights


def _whole(value: Any) -> Tensor:
    """A parameter or buffer, gathered if it is shared out among ranks; every rank must call it."""
    if not isinstance(value, DTensor):
        return torch.as_tensor(value)
    there: Any = value.detach().to(value.device_mesh.device_type)  # which it has left, where it is offloaded
    whole: Tensor = there.full_tensor()
    return whole
