"""Bytes that a rank sends: counted from the collectives that torch is asked for, and what the kernel says was written to sockets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Collective = Literal["all-reduce", "reduce-scatter", "all-gather", "broadcast", "reduce"]
COLLECTIVES: tuple[Collective, ...] = get_args(Collective)


def bytes_sent(collective: Collective, size: float, ranks: int) -> float:
    """What a rank sends, in the mean over ranks, by an algorithm that sends as little as possible (a ring, say).

    An all-reduce is a reduce-scatter and an all-gather: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations" (2009).

    Args:
        size: bytes of the whole tensor: what is reduced, what has been gathered.
    """
    return (2 if collective == "all-reduce" else 1) * size * (ranks - 1) / ranks


class Traffic(TorchDispatchMode):
    """Counts, while it is entered, the collectives of this process's thread, DDP's and autograd's on the CPU among them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Collective] = Counter()
        self.sent: Counter[Collective] = Counter()
        """Bytes, by `bytes_sent`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and (kind := _collective(func.__name__)):
            group = _group(func.namespace, args, kwargs or {})
            if group.size() > 1:
                self.calls[kind] += 1
                self.sent[kind] += round(
                    bytes_sent(kind, _whole(func.namespace, kind, args, group.size()), group.size())
                )
        return func(*args, **(kwargs or {}))


def _collective(name: str) -> Collective | None:
    """By the name of an operator, such as `_allgather_base_` or `all_gather_into_tensor`."""
    plain = name.split(".")[0].replace("_", "")
    names = (kind for kind in COLLECTIVES if plain.startswith(kind.replace("-", "")))
    return None if plain.startswith("waittensor") else next(names, None)


def _group(namespace: str, args: Any, kwargs: dict[str, Any]) -> dist.ProcessGroup:
    """Of a call: functional collectives end with the group's name, the others have it among their arguments."""
    if namespace == "_c10d_functional":
        resolve: Any = vars(distributed_c10d)["_resolve_process_group"]  # torch's own functional collectives use it so
        group: dist.ProcessGroup = resolve(next(a for a in reversed(args) if isinstance(a, str)))
        return group
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value)
    raise RuntimeError("a collective without a process group")


def _whole(namespace: str, kind: Collective, args: Any, ranks: int) -> int:
    """Bytes of the whole tensor of a call."""
    if namespace == "_c10d_functional" and kind == "all-gather":
        return ranks * _bytes(args[0])
    whole = 1 if namespace == "c10d" and kind == "reduce-scatter" else 0  # its output comes first
    return _bytes(args[whole])


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))


def bytes_written() -> int | None:
    """Bytes that this process has written so far by `write` and `writev`, as gloo does to its sockets; None where /proc does not say."""
    path = Path("/proc/self/io")
    if not path.exists():
        return None
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("wchar"))
