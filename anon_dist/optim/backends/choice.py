"""Which backend takes a step: what the group asks for, what the tensors allow, and what all ranks can do.

A kernel gives other bits than `foreach`. Replicas must not drift apart, so all ranks take a kernel, or none does. Ranks can differ in one
thing alone: whether they can build the kernel.

At an optimizer's first step the ranks agree. A collective would wait for ever for a rank that never steps. So they use the key-value store
with which the process group was set up:

- Each rank that can build the kernel adds itself to a count, once. The rank that makes the count complete writes "fused".
- A rank that cannot build it, or that has waited for `AGREEMENT_SECONDS`, writes "foreach".
- The first word that was written stands. All ranks follow it, and no later step asks again.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from anon_dist.optim.backends import cpu, foreach, gpu
from anon_dist.optim.backends.build import BuildError
from anon_dist.optim.backends.layout import Addresses, Lists
from anon_dist.optim.plan import StepPlan

AGREEMENT_SECONDS = 60.0
"""How long the first step waits for the other ranks' first step."""

Group = Mapping[str, Any]

Backend = Callable[[Lists, list[StepPlan], list[Tensor] | None, "Addresses | None"], None]
"""The function with which a backend steps some parameters, in place. Its arguments: lists by role (`layout.Lists`), a plan for each
parameter, the exponents of an int8 m's blocks, and the tensors' addresses if they are known."""


def is_automatic(group: Group) -> bool:
    """Whether the group leaves the choice to us. As in torch, `foreach=True` or `False` asks for torch's operations."""
    return group["fused"] is None and group["foreach"] is None


def kernel_for(device: torch.device) -> ModuleType:
    """The module, `cpu` or `gpu`, whose kernel could take tensors of this device."""
    return gpu if device.type == "cuda" else cpu


def kinds(groups: Iterable[Group]) -> set[str]:
    """The types of device on which a kernel could be chosen for these groups.

    A group without parameters on this rank counts too, since other ranks may have some of it: with the type that they would usually have.
    """
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    found = {g["params"][0].device.type if g["params"] else usual for g in groups if is_automatic(g)}
    return found & {"cpu", "cuda"}


def choose(lists: Lists, group: Group, agreed: bool) -> Backend:
    """The backend that takes these lists.

    Args:
        agreed: what `agree()` said, for groups that leave the choice to us.

    Raises:
        RuntimeError: the group has `fused=True` and it is not possible.
    """
    torch_alone: Backend = partial(foreach.run, together=group["foreach"])
    if not group["fused"] and not (agreed and is_automatic(group)):
        return torch_alone
    device = lists[0][0].device
    kernel = kernel_for(device)
    reason = "torch.compile traces this step" if torch.compiler.is_compiling() else kernel.obstacle(lists)
    if group["fused"] and reason is None:
        reason = _why_not_built({device.type})
    if group["fused"] and reason is not None:
        raise RuntimeError(
            f"Anon: fused=True is not possible: {reason}. It takes float32, bfloat16 and float16, on the CPU, where it needs a C "
            "compiler, and on NVIDIA GPUs, where it needs Triton; fused=None uses it where it can"
        )
    return torch_alone if reason is not None else kernel.run


def agree(kinds: set[str]) -> bool:
    """Whether all ranks can use the kernels for their `kinds` of device.

    It waits until all ranks have come to their first step, at most `AGREEMENT_SECONDS`. It warns if the answer is no.
    """
    reason = _why_not_built(kinds)
    if reason is not None:
        _warn(f"the fused kernel is not available, the slower foreach path is used: {reason}")
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return reason is None
    try:
        verdict = _ask_store(_get_default_store(), dist.get_rank(), dist.get_world_size(), able=reason is None)
    except Exception as error:  # a store may lack an operation (torch's fake one) or have gone with its host
        verdict, reason = False, f"{type(error).__name__}: {error}"
        _warn(f"the ranks could not agree on the fused kernel, the slower foreach path is used: {reason}")
    if not verdict and reason is None:
        _warn(
            "the fused kernel is not used, since another rank cannot build it or did not reach its first step within "
            f"{AGREEMENT_SECONDS:.0f} s. Where ranks step on their own, give Anon fused=True or fused=False"
        )
    return verdict


def _ask_store(store: Store, rank: int, ranks: int, able: bool) -> bool:
    store = PrefixStore("anon_dist/fused", store)
    if not able:
        store.compare_set("verdict", "", "foreach")
    if store.add(f"rank{rank}", 1) == 1 and store.add("arrived", 1) == ranks:
        store.compare_set("verdict", "", "fused")
    deadline = time.monotonic() + AGREEMENT_SECONDS
    while not store.check(["verdict"]):  # not `wait`, which would keep other threads from using the store
        if time.monotonic() > deadline:
            store.compare_set("verdict", "", "foreach")
        time.sleep(0.002)
    return bytes(store.get("verdict")) == b"fused"


def _why_not_built(kinds: Iterable[str]) -> str | None:
    """Why the kernels for these types of device cannot be built here; None: they can."""
    try:
        for kind in kinds:
            (gpu if kind == "cuda" else cpu).check()
    except BuildError as error:
        return str(error)
    return None


@lru_cache
def _warn(message: str) -> None:
    """Warn; of the same message once in a process."""
    warnings.warn(f"Anon: {message}", stacklevel=4)
