"""torch's first FSDP, which flattens the parameters of a block into one: for runs that have it already; FSDP2 is its successor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecision
from torch.optim import Optimizer

from anon_dist.checkpoint.schema import Checkpoint
from anon_dist.engines.base import Write
from anon_dist.engines.check import StateBytes, state_bytes_of_ranks
from anon_dist.engines.grads import global_norm
from anon_dist.engines.materialize import materialize
from anon_dist.engines.replicas import Copy, copies_of
from anon_dist.engines.torch_native import TorchEngine


def fsdp1_plugin(bf16: bool) -> FullyShardedDataParallelPlugin:
    """accelerate's FSDP1 settings that a run here needs.

    The parameters keep their identity (`use_orig_params`): flattened ones would lose their param groups. Ranks start with the same
    weights, so nothing is sent at the start, which on CPUs fails ("no available devices found").
    """
    policy = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else None
    return FullyShardedDataParallelPlugin(
        fsdp_version=1,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        mixed_precision_policy=policy,
        use_orig_params=True,
        sync_module_states=False,
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )


class Fsdp1Engine(TorchEngine):
    """See `base.Engine`. On a rank a parameter is the 1-D part of it that lies in the rank's share of the block, often none of it."""

    def __init__(
        self,
        name: str,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sharded_sums: bool,
        weights: Checkpoint | None = None,
    ) -> None:
        """`sharded_sums`, `weights`: see `start.wrap`. A block is built whole, and cut before the next one is."""
        if weights is not None:
            names = {p: name for name, p in model.named_parameters()}

            def build(module: nn.Module) -> nn.Module:
                for p in module.parameters(recurse=False):
                    if p.is_meta:
                        materialize(model, weights, torch.device("cpu"), only=names[p])
                return module

            accelerator.state.fsdp_plugin.param_init_fn = build
        with _quiet():
            super().__init__(name, accelerator, model, optimizer, sharded_sums=sharded_sums)

    def _norm(self) -> Tensor:
        square = global_norm(self._parameters).to(self._accelerator.device).square()
        dist.all_reduce(square)
        return square.sqrt()

    def state_bytes(self) -> StateBytes:
        """See `base.Engine`. The whole is the sum over ranks."""
        return state_bytes_of_ranks(self.optimizer, self._accelerator.device)

    def copies(self) -> Iterator[Copy]:
        """See `base.Engine`. The buffers: of all else each rank has a part of its own."""
        buffers = {id(buffer) for buffer in self.model.buffers()}
        return (copy for copy in copies_of(self.model) if id(copy.tensor) in buffers)

    def capture(self, copied: bool) -> Write:
        """See `base.Engine`."""
        with _quiet():
            return super().capture(copied)

    def load(self, folder: Path) -> None:
        """See `base.Engine`."""
        with _quiet():
            super().load(folder)

    def full_weights(self) -> dict[str, Tensor]:
        """See `base.Engine`."""
        # On a CPU "offloading to the CPU" is no copy, and FSDP1 frees what it points to: a segmentation fault (torch 2.13).
        offload = self._accelerator.device.type != "cpu"
        with _quiet():
            options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
            weights: dict[str, Any] = get_model_state_dict(self.model, options=options)
        if not self._accelerator.is_main_process:
            return {}
        return {name: weights.pop(name).to("cpu", torch.float32) for name in list(weights)}


def _quiet() -> warnings.catch_warnings:
    """Without torch's announcements, at each call, that FSDP1 is deprecated."""
    return warnings.catch_warnings(action="ignore", category=FutureWarning)
