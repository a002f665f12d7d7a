"""Tensors in pieces, read by ranges: whatever the boxes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anon_dist.checkpoint import CheckpointError
from anon_dist.checkpoint.boxes import Box, Boxes


def boxes_of(tensor, cuts):
    """Cut along each dimension at these places."""
    found = [((0,) * tensor.ndim, tensor)]
    for dim, places in enumerate(cuts):
        edges = [0, *sorted({p for p in places if 0 < p < tensor.shape[dim]}), tensor.shape[dim]]
        found = [
            ((*offsets[:dim], low, *offsets[dim + 1 :]), piece.narrow(dim, low, high - low))
            for offsets, piece in found
            for low, high in pairwise(edges)
        ]
    return [Box(o, tuple(p.shape), lambda p=p: p.clone()) for o, p in found]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_range_of_any_boxes(data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    cuts = [data.draw(st.lists(st.integers(0, n), max_size=2)) for n in shape]
    boxes = Boxes(shape, tensor.dtype, boxes_of(tensor, cuts))
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    assert torch.equal(boxes.read(start, stop), tensor.flatten()[start:stop])
    pieces = list(boxes.pieces(start, stop))
    assert torch.equal(torch.cat([torch.empty(0, dtype=tensor.dtype), *pieces]), tensor.flatten()[start:stop])


def test_rows_are_views_and_only_what_is_needed_is_loaded():
    tensor, loaded = torch.randn(6, 4), []

    def load(low):
        loaded.append(low)
        return tensor[low : low + 2]

    boxes = Boxes((6, 4), tensor.dtype, [Box((low, 0), (2, 4), lambda low=low: load(low)) for low in (0, 2, 4)])
    assert boxes.read(9, 15).data_ptr() == tensor.flatten()[9:].data_ptr()
    assert loaded == [2]


def test_a_transposed_tensor():
    tensor = torch.arange(12).reshape(3, 4).t()
    assert torch.equal(Boxes.whole(tensor).read(2, 11), tensor.flatten()[2:11])


def test_missing_pieces():
    with pytest.raises(CheckpointError, match="pieces of 8 elements for a tensor of shape"):
        Boxes((3, 4), torch.float32, [Box((0, 0), (2, 4), lambda: torch.zeros(2, 4))])
