"""Models whose parameters are on torch's meta device until an engine has cut them: then each rank fills the elements that it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from anon_dist.checkpoint.names import unwrapped
from anon_dist.checkpoint.schema import WEIGHT, Checkpoint, Key
from anon_dist.engines.restore import Ranges


def is_meta(model: nn.Module) -> bool:
    """Whether parameters have no storage yet."""
    return any(p.is_meta for p in model.parameters())


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, moved there; of one on the meta device the buffers."""
    moved: nn.Module = model._apply(lambda x: x if x.is_meta else x.to(device))
    return moved


@torch.no_grad()
def materialize(model: nn.Module, weights: Checkpoint, device: torch.device, only: str | None = None) -> None:
    """Give the parameters storage on the device, for the elements that this rank keeps, and the values that `weights` has for them.

    Args:
        model: whole, or as FSDP2 and tensor parallelism have cut it. Parameters stay the objects that they are, for optimizers and ties.
        weights: by parameter name, float32 or what it was stored in.
        only: the name of one parameter.

    Raises:
        CheckpointError: they cannot be read.
    """
    names = list(dict(model.named_parameters()))
    plain, ranges = unwrapped(names), Ranges(model)
    for name, p in list(model.named_parameters()):
        if only not in (None, name):
            continue
        local = p.to_local() if isinstance(p, DTensor) else p
        real = torch.empty(local.shape, dtype=local.dtype, device=device)
        ranges.fill(real, weights, Key(plain[name], WEIGHT), p)
        _put(p, real)
    if isinstance(model, FSDPModule):
        model._apply(
            lambda x: x
        )  # FSDP2 takes note of new tensors, pads and pins them: now, and not in the first forward pass


def _put(p: nn.Parameter, real: Tensor) -> None:
    """Real elements in place of a meta parameter's, which stays the same object."""
    made: Any = real
    if isinstance(p, DTensor):
        made = DTensor.from_local(real, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
    torch.utils.swap_tensors(p, nn.Parameter(made, requires_grad=p.requires_grad))


@contextmanager
def told_apart(model: nn.Module) -> Iterator[None]:
    """A block in which meta parameters have addresses, by which accelerate finds the optimizer's parameters once FSDP2 has cut them."""
    parameters = [p for p in model.parameters() if p.is_meta]
    for i, p in enumerate(parameters, start=1):
        p.data_ptr = partial(int, i)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for p in parameters:
            p.__dict__.pop("data_ptr", None)
