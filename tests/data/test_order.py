"""The order is a permutation per epoch, the same from wherever one starts, and looks random."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anon_dist.data import SampleOrder


@pytest.mark.parametrize("n", [*range(1, 20), 255, 256, 257, 1000, 4095, 4096, 4097, 100_003])
def test_each_epoch_is_a_permutation(n):
    order = SampleOrder(n, seed=3)
    for epoch in (0, 1, 1_000_000):
        assert np.array_equal(np.sort(order(np.arange(n) + epoch * n)), np.arange(n))


@given(n=st.integers(1, 2**48), seed=st.integers(0, 2**63 - 1), positions=st.lists(st.integers(0, 2**52), max_size=20))
def test_a_position_alone_determines_its_sample(n, seed, positions):
    order = SampleOrder(n, seed)
    together = order(np.array(positions, np.int64))
    assert together.dtype == np.int64
    assert np.all((together >= 0) & (together < n))
    assert together.tolist() == [int(SampleOrder(n, seed)(np.array([p]))[0]) for p in positions]


def test_epochs_and_seeds_differ():
    n = 1000
    orders = [SampleOrder(n, seed)(np.arange(n) + epoch * n) for seed in (0, 1) for epoch in (0, 1, 2)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            # Two random permutations agree in one place on average.
            assert (a == b).sum() < 10


def test_all_orders_of_a_few_samples_are_equally_likely():
    epochs = 6000
    order = SampleOrder(3, seed=5)(np.arange(3 * epochs)).reshape(epochs, 3)
    _, counts = np.unique(order, axis=0, return_counts=True)
    assert len(counts) == 6
    chi2 = ((counts - epochs / 6) ** 2 / (epochs / 6)).sum()
    assert chi2 < 20.5  # the 99.9th percentile of five degrees of freedom


def test_places_are_uniform_and_neighbours_unrelated():
    n, bins = 50_000, 50
    order = SampleOrder(n, seed=11)(np.arange(n))
    table = np.histogram2d(np.arange(n), order, bins=bins)[0]
    chi2 = ((table - n / bins**2) ** 2 / (n / bins**2)).sum()
    freedom = (bins - 1) ** 2
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02


def test_sequential_and_shape():
    positions = np.arange(12).reshape(3, 4)
    assert np.array_equal(SampleOrder(5, 0, shuffle=False)(positions), positions % 5)
    assert SampleOrder(5, 0)(positions).shape == (3, 4)


PINNED = [841, 935, 832, 241, 490, 540]


def test_the_order_never_changes():
    """Runs that are under way depend on it."""
    assert SampleOrder(1000, 42)(np.array([0, 1, 2, 999, 1000, 123_456])).tolist() == PINNED


@pytest.mark.parametrize(("n", "seed"), [(0, 0), (2**48 + 1, 0), (5, -1), (5, 2**63)])
def test_arguments_out_of_range(n, seed):
    with pytest.raises(ValueError, match="SampleOrder"):
        SampleOrder(n, seed)


def test_negative_position():
    with pytest.raises(ValueError, match="count from 0"):
        SampleOrder(5, 0)(np.array([-1]))
