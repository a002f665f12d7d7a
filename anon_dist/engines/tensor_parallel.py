"""FSDP2 over tensor parallelism, for Llama-like shapes: matrices are split within groups of ranks, and all is sharded across the groups.

Ranks form a grid (data, tensor); neighbouring ranks, which should share a node, split matrices between them and read the same samples.
What is not split (norms, and tied embeddings) is computed alike by all ranks of a group.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.optim import Optimizer

from anon_dist.checkpoint.schema import Checkpoint
from anon_dist.engines.bases import allocate
from anon_dist.engines.check import check_optimizer
from anon_dist.engines.errors import EngineError
from anon_dist.engines.materialize import materialize, on_device
from anon_dist.engines.restore import parameter_order
from anon_dist.engines.torch_native import TorchEngine

BLOCK_PLAN: dict[str, type[ColwiseParallel] | type[RowwiseParallel]] = {
    "self_attn.q_proj": ColwiseParallel,
    "self_attn.k_proj": ColwiseParallel,
    "self_attn.v_proj": ColwiseParallel,
    "self_attn.o_proj": RowwiseParallel,
    "mlp.gate_proj": ColwiseParallel,
    "mlp.up_proj": ColwiseParallel,
    "mlp.down_proj": RowwiseParallel,
}
"""How a Llama block is split: by heads, and by the hidden units of its MLP (Megatron-LM, arXiv 1909.08053, section 3)."""

SPLIT: dict[str, int | None] = {"llama": None, "qwen3": 2, "gemma3_text": 1}
"""Model types whose blocks are split so, and the dimension of heads where queries and keys are normed: the weight of such a norm is
the same on all ranks of a group, and its gradient the sum over their heads."""


class TensorParallelEngine(TorchEngine):
    """See `base.Engine`. The checkpoint is the one that `TorchEngine` writes."""

    def __init__(
        self,
        name: str,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        ranks: int,
        *,
        sharded_sums: bool,
        weights: Checkpoint | None = None,
    ) -> None:
        """`ranks`: in a group that splits matrices. `sharded_sums`, `weights`: see `start.wrap`.

        Raises:
            EngineError: the model's blocks are none that are split here, or its sizes do not divide by `ranks`.
        """
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self._order = parameter_order(model, optimizer)
        names = {p: name for name, p in model.named_parameters()}
        members = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        self.name, self._accelerator = f"{name}+tp{ranks}", accelerator
        self.model = on_device(model, accelerator.device)
        self._sharded_sums = sharded_sums
        world = accelerator.num_processes
        mesh = init_device_mesh(accelerator.device.type, (world // ranks, ranks), mesh_dim_names=("data", "tensor"))
        _split(model, mesh["tensor"])
        _shard(model, mesh["data"], accelerator.mixed_precision == "bf16")
        if weights is not None:
            materialize(model, weights, accelerator.device)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        current = dict(model.named_parameters())
        for group, held in zip(optimizer.param_groups, members, strict=True):
            group["params"] = [current[name] for name in held]
        self.optimizer = optimizer
        check_optimizer(optimizer, model, type(optimizer), groups)
        allocate(optimizer)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """See `base.Engine`."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `base.Engine`."""
        self.model.set_requires_gradient_sync(last or self._sharded_sums)
        loss.backward()


def _split(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split the matrices over the mesh, in place."""
    config: Any = model.config
    if config.model_type not in SPLIT:
        raise EngineError(
            f"train.tensor_parallel splits {', '.join(SPLIT)}, and this model is a {type(model).__name__}; set model.family to llama, or "
            "train.tensor_parallel to 1"
        )
    sizes = {
        "attention heads": config.num_attention_heads,
        "key-value heads": config.num_key_value_heads,
        "MLP width": config.intermediate_size,
    }
    for what, size in sizes.items():
        if size % mesh.size():
            raise EngineError(f"train.tensor_parallel = {mesh.size()} does not divide the model's {size} {what}")
    plan: dict[str, ParallelStyle] = {name: style() for name, style in BLOCK_PLAN.items()}
    if (heads := SPLIT[config.model_type]) is not None:
        for norm in ("self_attn.q_norm", "self_attn.k_norm"):
            plan[norm] = SequenceParallel(sequence_dim=heads, use_local_output=True)
    for layer in model.model.layers:  # type: ignore[union-attr]
        parallelize_module(layer, mesh, plan)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:  # type: ignore[operator]
        vocabulary = {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "lm_head": ColwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(model, mesh, vocabulary)


def _shard(model: nn.Module, mesh: DeviceMesh, bf16: bool) -> None:
    """FSDP2 over the mesh, a group per block."""
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    )
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
