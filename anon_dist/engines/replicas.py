"""Replicas of weights and optimizer states, compared bit for bit across ranks by a fingerprint of each tensor.

Under DDP all ranks hold the same weights, under HSDP the replicas of a shard, under tensor parallelism what is not split. Each computes its
own copy's updates from the same gradients, and nothing ever brings copies together again that a bad bit of memory, say, has parted.

A fingerprint is a sum, modulo 2⁶⁴, of words of 8 bytes, each times an odd number that its position determines. One flipped bit always
changes it: a power of two times an odd number is not 0 modulo 2⁶⁴. Other places change it too; NaN is a pattern of bits like others.
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from anon_dist.checkpoint.names import unwrapped
from anon_dist.engines.comparison import named
from anon_dist.engines.errors import EngineError

ROW = 1 << 14
"""Words to a row, whose factors are used again for the next: 128 KB, which stay in a CPU's cache."""
CPU_ROWS, ROWS = 1, 512
"""Rows that a CPU, and that an accelerator, takes at once."""
HALF = 0x5851F42D4C957F2D
"""Odd, and so are a half and a quarter of the numbers next to it: flips in both halves of a word keep apart."""
SHOWN = 3
"""Of more tensors than this, the rest is counted only."""


class ReplicasDifferError(EngineError):
    """Copies of a tensor that must be the same are not; the message says which, and on which ranks."""


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """0-dim int64, on the tensor's device; the same for the same bits in the same order, whatever the device. Does not wait for it.

    Args:
        tensor: of any shape and dtype; read in pieces, with at most 64 MB of temporaries (but it is copied if it is not contiguous).
    """
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    rows = CPU_ROWS if tensor.device.type == "cpu" else ROWS
    factors, whole = _factors(ROW, tensor.device), len(flat) // (8 * ROW)
    sums = []
    for row, end in pairwise([*range(0, whole, rows), whole]):
        words = _words(flat[8 * ROW * row : 8 * ROW * end]).view(-1, ROW)
        sums.append(_summed(words, factors))
    rest = _words(flat[8 * ROW * whole :])
    sums.append(_summed(rest, factors[: len(rest)]).view(1))
    return (torch.cat(sums) * _odd_numbers(1, whole + 2, tensor.device)).sum()


def _words(flat: Tensor) -> Tensor:
    """Bytes as int64, filled up with zeros; a copy if they are not aligned."""
    if len(flat) % 8:
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)])
    elif flat.storage_offset() % 8:
        flat = flat.clone()
    return flat.view(torch.int64)


def _summed(words: Tensor, factors: Tensor) -> Tensor:
    """Sum over the last dimension of words times factors. Upper halves count once more as lower ones, times HALF: else two flips of the
    highest bit, whose product with any odd number is the same, would cancel."""
    mixed = torch.add(words, words >> 32, alpha=HALF)
    mixed *= factors
    return mixed.sum(-1)


@lru_cache(maxsize=8)
def _factors(count: int, device: torch.device) -> Tensor:
    return _odd_numbers(1 << 40, (1 << 40) + count, device)


def _odd_numbers(start: int, end: int, device: torch.device) -> Tensor:
    """(end - start,) int64, one for each position, that look random."""
    mixed = torch.arange(start, end, device=device) * -7046029254386353131
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    return (mixed ^ (mixed >> 32)) | 1


class Copy(NamedTuple):
    """A tensor of which other ranks may hold copies."""

    name: str
    tensor: Tensor
    laid_out_as: Tensor
    """A DTensor says which part of it this rank has; if it is none, the tensor is whole."""


def copies_of(model: nn.Module) -> Iterator[Copy]:
    """Parameters and buffers of a model, by the names they have without wrappers."""
    found = [*model.named_parameters(), *model.named_buffers()]
    plain = unwrapped([name for name, _ in found])
    for name, tensor in found:
        yield Copy(plain[name], tensor, tensor)


def states_of(optimizer: torch.optim.Optimizer, names: Mapping[Any, str]) -> Iterator[Copy]:
    """The optimizer's tensors, of each parameter that has a name: laid out as the parameter is, but for bases, which say it themselves."""
    for p, state in optimizer.state.items():
        for key, value in state.items() if p in names else ():
            if isinstance(value, Tensor):
                yield Copy(f"{key} of {names[p]}", value, value if isinstance(value, DTensor) else p)


def check_replicas(copies: Iterable[Copy], device: torch.device) -> None:
    """Compare the copies that ranks hold of the same tensor, or of the same shard of it. Every rank must call it.

    It sends one small tensor: 16 bytes for each tensor that has copies. Nothing is read where each rank has a shard of its own.

    Args:
        copies: the same names, shapes and dtypes on every rank.
        device: on which the ranks exchange tensors.

    Raises:
        ReplicasDifferError: naming tensors and ranks; the ranks named are those with the rarer bits.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    compared = [copy for copy in copies if _may_have_copies(copy.laid_out_as)]
    _check_same_tensors(compared, device)
    if not compared:
        return
    mine = torch.stack([_part_and_bits(copy, device) for copy in compared])
    found = torch.empty(dist.get_world_size(), *mine.shape, dtype=torch.int64, device=device)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the former from torch 2.13 on
    gather(found.view(-1), mine.view(-1))
    if bool((found == found[0]).all()):
        return
    if differing := list(_differing([copy.name for copy in compared], found.tolist())):
        hosts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname())
        shown = "; ".join(f"{name} {_apart(ranks, dict(enumerate(hosts)))}" for name, ranks in differing[:SHOWN])
        raise ReplicasDifferError(f"{shown}{f'; and {more} more' if (more := len(differing) - SHOWN) > 0 else ''}")


def _may_have_copies(tensor: Tensor) -> bool:
    """Whether ranks may hold the same part of it: not if each of all ranks has a shard of its own."""
    if not isinstance(tensor, DTensor):
        return True
    sharded = all(not placement.is_replicate() for placement in tensor.placements)
    return not (sharded and tensor.device_mesh.size() == dist.get_world_size())


def _part_and_bits(copy: Copy, device: torch.device) -> Tensor:
    """(2,) int64: which part of the tensor this rank has, and its fingerprint."""
    part, owner = 0, copy.laid_out_as
    if isinstance(owner, DTensor):
        at: Sequence[int] = owner.device_mesh.get_coordinate() or []
        part = _digest([i for i, placement in zip(at, owner.placements, strict=False) if not placement.is_replicate()])
    own = copy.tensor.to_local() if isinstance(copy.tensor, DTensor) else copy.tensor
    return torch.stack([torch.tensor(part, device=device), fingerprint(own).to(device)])


def _digest(value: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "little", signed=True)


def _check_same_tensors(compared: list[Copy], device: torch.device) -> None:
    """Names and shapes must be alike, or the ranks would send each other tensors of different sizes."""
    texts = [f"{copy.name} {tuple(copy.laid_out_as.shape)} {copy.tensor.dtype}" for copy in compared]
    digest = _digest(texts)
    ends = torch.tensor([digest, ~digest], device=device)  # ~x falls where x rises, and cannot overflow
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    if int(ends[0]) == ~int(ends[1]):
        return
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, (socket.gethostname(), texts))
    held_by = Counter(text for _, texts in by_rank for text in texts)
    if not (
        odd := min((t for t, count in held_by.items() if count < len(by_rank)), key=held_by.__getitem__, default="")
    ):
        raise ReplicasDifferError("ranks have their tensors in different orders")
    holders = [rank for rank, (_, texts) in enumerate(by_rank) if odd in texts]
    hosts = {rank: host for rank, (host, _) in enumerate(by_rank)}
    raise ReplicasDifferError(f"{odd} is on {named(holders, hosts)} only, of {len(by_rank)}")


def _differing(names: list[str], by_rank: list[list[list[int]]]) -> Iterator[tuple[str, list[list[int]]]]:
    """Names of tensors with parts of which ranks have different copies, and the sets of ranks that have the same.

    Args:
        by_rank: for each rank and tensor, part and fingerprint.
    """
    for index, name in enumerate(names):
        holders: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for rank, values in enumerate(by_rank):
            part, bits = values[index]
            holders[part][bits].append(rank)
        yield from ((name, list(by_bits.values())) for by_bits in holders.values() if len(by_bits) > 1)


def _apart(sets: list[list[int]], hosts: Mapping[int, str]) -> str:
    """In words, which ranks differ from which."""
    most = max(sets, key=len)
    if sum(len(ranks) == len(most) for ranks in sets) > 1:
        return "differs between " + " and ".join(named(ranks, hosts) for ranks in sets[:SHOWN])
    odd = sorted(rank for ranks in sets if ranks is not most for rank in ranks)
    return f"on {named(odd, hosts)} differs from that on {named(most, {})}"
