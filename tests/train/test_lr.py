"""The learning rate's shape."""

import itertools

import pytest

from anon_dist.train.config.lr import lr_factor
from anon_dist.train.config.parsing import ScheduleConfig


def shape(**changes):
    return [
        lr_factor(t, 100, ScheduleConfig(**{"warmup_steps": 10, "min_ratio": 0.1, **changes})) for t in range(1, 101)
    ]


def test_warm_up_is_linear_and_ends_at_the_peak():
    assert shape()[:10] == pytest.approx([t / 10 for t in range(1, 11)])


@pytest.mark.parametrize(("decay", "middle"), [("cosine", 0.55), ("linear", 0.55), ("wsd", 1.0), ("constant", 1.0)])
def test_decay(decay, middle):
    factors = shape(decay=decay)
    assert factors[54] == pytest.approx(middle)
    assert factors[-1] == pytest.approx(1.0 if decay == "constant" else 0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[9:]))


def test_wsd_falls_in_its_last_part_only():
    factors = shape(decay="wsd", decay_fraction=0.3)
    assert factors[69] == 1.0
    assert factors[70] < 1.0
    assert factors[84] == pytest.approx(0.55)


def test_no_warm_up():
    assert shape(warmup_steps=0)[0] == pytest.approx(1.0, abs=1e-3)
