"""How DeepSpeed cuts parameters into the flat buffers that its ranks hold; arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

ALIGNMENT = 2
"""Flat buffers of stages 1 and 2 are padded to a multiple of this times the ranks (`nccl_start_alignment_factor`)."""


class Cut(NamedTuple):
    """Elements [start, stop) of a member of a group, which a rank holds at `offset` of its buffer."""

    member: int
    start: int
    stop: int
    offset: int


def group_cuts(sizes: Sequence[int], gaps: Sequence[int], partition: int, rank: int) -> list[Cut]:
    """What one rank holds of a group of stages 1 and 2: the members lie one after the other, cut at multiples of `partition`.

    Source: deepspeed/runtime/zero/stage_1_and_2.py, `flatten_dense_tensors_aligned` and `get_data_parallel_partitions`.

    Args:
        sizes: elements of each member, in the buffer's order.
        gaps: padding after each member (`parameter_alignment`).
        partition: elements of one rank.
    """
    cuts, begin, low, high = [], 0, rank * partition, (rank + 1) * partition
    for member, (size, gap) in enumerate(zip(sizes, gaps, strict=True)):
        first, last = max(begin, low), min(begin + size, high)
        if first < last:
            cuts.append(Cut(member, first - begin, last - begin, first - low))
        begin += size + gap
    return cuts


def whole_members(cuts: Sequence[Cut], sizes: Sequence[int]) -> tuple[list[Cut], int]:
    """The members of which a rank has a part, whole and one after the other, and the elements of all.

    So DeepSpeed's Muon keeps its momentum at stages 1 and 2 where the optimizer is not offloaded: a step needs whole matrices.

    Source: deepspeed/runtime/zero/stage_1_and_2.py, `_muon_momentum_buffer` and `_get_flat_partition_unpadded`.
    """
    found, offset = [], 0
    for cut in cuts:
        found.append(Cut(cut.member, 0, sizes[cut.member], offset))
        offset += sizes[cut.member]
    return found, offset


def group_partition(total: int, world_size: int) -> int:
    """Elements of one rank's part of a group of stages 1 and 2, padding included."""
    unit = ALIGNMENT * world_size
    return -(-total // unit) * ALIGNMENT


def shard_cuts(sizes: Sequence[int], world_size: int, rank: int) -> list[Cut]:
    """What one rank holds of a sub-group of stage 3: an equal share of every member, padded at the end.

    Source: deepspeed/utils/zero_to_fp32.py, `_zero3_merge_trainable_params`, and partition_parameters.py, `_partition_param`.
    """
    cuts, offset = [], 0
    for member, size in enumerate(sizes):
        share = shard(size, world_size)
        first, last = min(size, rank * share), min(size, (rank + 1) * share)
        if first < last:
            cuts.append(Cut(member, first, last, offset))
        offset += share
    return cuts


def shard(size: int, world_size: int) -> int:
    """Elements of one rank's share of a parameter of stage 3, padding included."""
    return -(-size // world_size)


def basis_cuts(sizes: Sequence[int], world_size: int, rank: int, *, sharded: bool) -> list[Cut]:
    """What one rank holds of one side's bases of the matrices in a sub-group of stage 3, one after the other; see `optim.flat`.

    Args:
        sizes: elements of each member's basis, 0 where it has none.
        sharded: each rank has an equal part, as of rows; else all of each, as of columns.
    """
    ranks, rank = (world_size, rank) if sharded else (1, 0)
    cuts, offset = [], 0
    for member, size in enumerate(sizes):
        if share := size // ranks:
            cuts.append(Cut(member, rank * share, (rank + 1) * share, offset))
        offset += share
    return cuts


def sub_groups(sizes: Sequence[int], world_size: int, limit: int) -> list[list[int]]:
    """The members of each sub-group that stage 3 makes of a group: each is closed once its share reaches `limit` elements.

    Source: deepspeed/runtime/zero/stage3.py, `_create_fp16_sub_groups`.
    """
    if not sizes:
        return []
    if limit >= sum(shard(size, world_size) for size in sizes):
        return [list(range(len(sizes)))]
    found: list[list[int]] = [[]]
    held = 0
    for member, size in enumerate(sizes):
        found[-1].append(member)
        held += shard(size, world_size)
        if held >= limit and member < len(sizes) - 1:
            found.append([])
            held = 0
    return found


def round_robin(count: int, world_size: int) -> list[int]:
    """Which member lies at each place of a buffer under `round_robin_gradients`.

    Source: deepspeed/runtime/zero/stage_1_and_2.py, `_round_robin_reorder`.
    """
    return [member for first in range(min(world_size, count)) for member in range(first, count, world_size)]


def numel(shape: Sequence[int]) -> int:
    """Elements of a shape, 1 for no dimensions."""
    return math.prod(shape)
