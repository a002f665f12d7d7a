"""The global gradient norm and clipping, whatever the parameters' sharding.

torch's `clip_grad_norm_` stacks DTensors, which fails where parameters live on two meshes (tensor parallelism over part of the model, with
FSDP2). Here each kind of sharding is summed locally and reduced over the mesh dimensions that shard it: one scalar each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of every gradient that exists."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return [g.to_local() if isinstance(g, DTensor) else g for g in grads]


@torch.no_grad()
def global_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, the same on every rank: 0-dim float64, on their device, which is not waited for.

    Raises:
        ValueError: a gradient is a pending sum (`Partial`) over ranks.
    """
    by_sharding: dict[tuple[DeviceMesh, tuple[int, ...]] | None, list[Tensor]] = defaultdict(list)
    for grad in (p.grad for p in parameters if p.grad is not None):
        if not isinstance(grad, DTensor):
            by_sharding[None].append(grad)
            continue
        if any(placement.is_partial() for placement in grad.placements):
            raise ValueError(f"a gradient is a pending sum over ranks, {grad.placements}; redistribute it first")
        # Not isinstance(…, Shard): FSDP2 over tensor parallelism shards with torch's _StridedShard, which is none.
        sharded = tuple(i for i, placement in enumerate(grad.placements) if not placement.is_replicate())
        by_sharding[(grad.device_mesh, sharded)].append(grad.to_local())
    total = torch.zeros((), dtype=torch.float64)
    for sharding, grads in by_sharding.items():
        squares = square_sum(grads)
        if sharding is not None:
            mesh, dims = sharding
            for dim in dims:
                dist.all_reduce(squares, group=mesh.get_group(dim))
        total = total.to(squares.device, non_blocking=True) + squares
    return total.sqrt()


@torch.no_grad()
def scale_gradients(parameters: Iterable[Tensor], factor: float) -> None:
    """Multiply every gradient, in place and without communication."""
    if grads := local_gradients(parameters):
        torch._foreach_mul_(grads, factor)


ROW = 4096
"""Elements that are summed in float32 on a CPU, before float64 takes over."""


def square_sum(tensors: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements, 0-dim float64 on their device. Relative error about 1e-8, at the speed of one reading.

    On CPUs torch's float32 norm adds up one element after the other: it is 4e-4 off at 10M elements (torch 2.13), and says another thing
    for each sharding.
    """
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).double().square().sum()
    norms = []
    for flat in (tensor.reshape(-1) for tensor in tensors):
        even = flat.numel() // ROW * ROW
        norms.append(torch.linalg.vector_norm(flat[:even].view(-1, ROW), dim=1, dtype=torch.float32))
        norms.append(torch.linalg.vector_norm(flat[even:], dtype=torch.float32).view(1))
    return torch.cat(norms).double().square().sum()
