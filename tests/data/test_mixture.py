"""Which source a position reads, counted position by position in whole numbers."""

from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anon_dist.data import Mixture
from anon_dist.data.samples import mixture
from anon_dist.data.samples.mixture import rates_of

RATES = st.lists(st.integers(1, 60), min_size=1, max_size=9)


def blocks_of(positions):
    """Small ones, so that a test goes over many borders."""
    return mock.patch.object(mixture, "LEAST_BLOCK", positions)


def counted(source, sources):
    """(n + 1, sources): how many of the first 0, 1, …, n positions read each."""
    return np.concatenate([np.zeros((1, sources), np.int64), (source[:, None] == np.arange(sources)).cumsum(0)])


@settings(max_examples=60, deadline=None)
@given(rates=RATES, start=st.integers(0, 10**13), seed=st.integers(0, 99))
def test_counts_are_exact_to_one_over_every_beginning(rates, start, seed):
    total = sum(rates)
    with blocks_of(16):
        whole = Mixture(rates)
        length = 2 * whole.block + 9
        source, number = whole(np.arange(length))
        counts = counted(source, len(rates))
        n = np.arange(length + 1)[:, None]
        assert (abs(total * counts - n * np.array(rates)) < total).all()
        assert np.array_equal(number, counts[np.arange(length), source])  # each of a source's samples once, in order

        there = np.random.default_rng(seed).permutation(length)[:50]  # another object, from anywhere, in any order
        assert [x.tolist() for x in Mixture(rates)(there)] == [source[there].tolist(), number[there].tolist()]
        assert [Mixture(rates).counts(p) for p in there[:3].tolist()] == counts[there[:3]].tolist()

        begun = np.array([whole.counts(start)])  # far away: still within one of the share, and consecutive
        far, numbers = whole(start + np.arange(60))
        assert (abs(total * begun.astype(object) - start * np.array(rates, object)) < total).all()
        assert np.array_equal(numbers, (begun + counted(far, len(rates)))[np.arange(60), far])
        assert whole.counts(start + 60) == (begun + counted(far, len(rates)))[-1].tolist()


@settings(max_examples=40, deadline=None)
@given(rates=st.lists(st.integers(1, 10**6), min_size=2, max_size=2), start=st.integers(0, 10**12))
def test_two_sources_are_exact_to_one_over_every_stretch(rates, start):
    counts = counted(Mixture(rates)(start + np.arange(400))[0], 2)[:, 0]
    for length in (1, 2, 3, 10, 77, 300):
        over = counts[length:] - counts[:-length]
        assert (abs(sum(rates) * over - length * rates[0]) <= sum(rates)).all()


def test_what_positions_read_is_pinned():
    """Runs in progress depend on it."""
    positions = np.arange(4090, 4102)  # over the end of a block
    source, number = Mixture([7, 3])(positions)
    assert source.tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1]
    assert number.tolist() == [2863, 1227, 2864, 2865, 2866, 1228, 2867, 2868, 1229, 2869, 2870, 1230]
    source, number = Mixture([5, 3, 2])(positions)
    assert source.tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1]
    assert number.tolist() == [2045, 1227, 2046, 818, 2047, 1228, 2048, 1229, 2049, 819, 2050, 1230]


def test_a_rare_source():
    found = Mixture([9999, 1, 10000])
    source, number = found(np.arange(found.block - 50_000, found.block + 50_000))
    places = np.flatnonzero(source == 1)
    assert len(places) == 5
    assert np.diff(number[places]).tolist() == [1] * 4


def test_rates_are_the_shares():
    assert rates_of([Fraction("0.7"), Fraction("0.3")]) == [7, 3]
    odd = [Fraction(1, 3), Fraction(123_456_789, 10**9 + 7), Fraction(1, 7)]
    rates = rates_of(odd)
    assert sum(rates) <= mixture.LARGEST
    for share, rate in zip(odd, rates, strict=True):
        assert abs(share / sum(odd) - Fraction(rate, sum(rates))) < Fraction(1, 1 << 28)


@pytest.mark.parametrize("rates", [[], [0, 1], [1, -1], [1 << 20, 1], [1 << 30, 1 << 30, 1]])
def test_what_is_no_mixture(rates):
    with pytest.raises(ValueError, match="Mixture: "):
        Mixture(rates)
    with pytest.raises(ValueError, match="count from 0"):
        Mixture([1, 2, 3])(np.array([-1]))
