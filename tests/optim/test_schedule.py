"""The schedule against the definitions, counted step by step."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anon_dist.optim.schedule import Phase, Schedule, window_length


def test_ratio_two_is_the_papers_powers_of_two():
    assert Schedule((Phase(0, 2.0, 0.999, None),)).refreshes(1 << 20) == [1 << k for k in range(21)]


def test_ratio_is_taken_at_its_decimal_value():
    """170 · 1.1 is 187; in binary floating point it is a little more, and its ceiling 188."""
    refreshes = Schedule((Phase(0, 1.1, 0.95, None),)).refreshes(200)
    assert refreshes[-3:] == [154, 170, 187]


@pytest.mark.parametrize(("beta2", "steps"), [(0.95, 325), (0.99, 1656), (0.999, 16628), (0.0, 1)])
def test_auto_window(beta2, steps):
    assert window_length("auto", beta2) == steps
    assert beta2**steps <= 2.0**-24


@settings(deadline=None)
@given(
    ratio=st.sampled_from([1.001, 1.05, 1.1, 1.25, 1.5, 2, 2.0, 3.7, 10.0]),
    beta2=st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.999]),
    window=st.one_of(st.none(), st.just("auto"), st.integers(1, 50)),
)
def test_plans_follow_the_definition(ratio, beta2, window):
    plan = Schedule((Phase(0, ratio, beta2, window),)).at
    a, previous, k = 1, 0, 0
    length = window_length(window, beta2) or math.inf
    for t in range(1, 400):
        p = plan(t)
        assert p.accumulate == (a - t < length)
        assert p.refresh == (t == a)
        assert p.first == (t == 1)
        if p.refresh:
            age = min(length, a - previous)
            assert p.debias == pytest.approx(1 - beta2**age, rel=1e-12)
            previous, a, k = a, max(a + 1, math.ceil(Fraction(str(ratio)) * a)), k + 1


@settings(deadline=None)
@given(
    first=st.tuples(st.sampled_from([1.1, 2.0]), st.sampled_from([0.9, 0.99]), st.sampled_from([None, 5, 20])),
    second=st.tuples(st.sampled_from([1.05, 1.5, 3.0]), st.sampled_from([0.5, 0.95]), st.sampled_from([None, 3, 40])),
    since=st.integers(1, 120),
)
def test_change_of_phase_keeps_the_weight_of_what_was_accumulated(first, second, since):
    """The debiasing factor is the exact weight in s of the accumulated gradients: s of constant g² = 1, divided by it, is 1."""
    plan = Schedule((Phase(0, *first), Phase(since, *second))).at
    s, refreshes = 0.0, []
    for t in range(1, 600):
        p = plan(t)
        assert p.beta2 == (first if t <= since else second)[1]
        if p.accumulate:
            s = p.beta2 * s + (1 - p.beta2)
        if p.refresh:
            assert s / p.debias == pytest.approx(1.0, rel=1e-9)
            s = 0.0
            refreshes.append(t)
    before = Schedule((Phase(0, *first),)).refreshes(since)
    assert refreshes[: len(before)] == before
    ratio = Fraction(str(second[0]))
    after = refreshes[len(before) + 1 :]  # the first refresh after the change may wait for its window
    assert all(b == max(a + 1, math.ceil(ratio * a)) for a, b in itertools.pairwise(after))


@pytest.mark.parametrize("since", [None, 150, 151, 152, 153])
@pytest.mark.parametrize("longest", [1, 4, 30])
@pytest.mark.parametrize("window", [None, 64])  # of all steps
def test_the_longest_interval(longest, window, since):
    """Refreshes that are as far apart as they may be are computed; asked in any order, and past a change of phase."""
    phases = (Phase(0, 1.05, 0.9, window, longest), *(() if since is None else (Phase(since, 1.05, 0.9, window, 7),)))
    a, refreshes = 1, []
    while a <= 3000:
        refreshes.append(a)
        following = min(max(a + 1, math.ceil(Fraction("1.05") * a)), a + longest)
        if since is not None and following > since:
            following = max(since + 1, min(max(a + 1, math.ceil(Fraction("1.05") * a)), a + 7))
        a = following
    schedule = Schedule(phases)
    assert schedule.refreshes(3000) == refreshes
    asked = [*range(2990, 0, -13), *range(1, 400)]
    assert [schedule.at(t).refresh for t in asked] == [t in refreshes for t in asked]
    assert [Schedule(phases).at(t) for t in asked[:20]] == [schedule.at(t) for t in asked[:20]]


def test_a_late_step_is_found_at_once():
    schedule = Schedule((Phase(0, 1.03, 0.95, 64, 4),))
    assert [schedule.at(10**9 + i).refresh for i in range(4)].count(True) == 1
    assert len(schedule._stretches) < 200


def test_denser_refreshes_start_at_once():
    """At step 600 of ρ = 2 the next refresh would be 1024; with ρ = 1.1 from the last one, 512, it is overdue."""
    schedule = Schedule((Phase(0, 2.0, 0.9, None), Phase(600, 1.1, 0.9, None)))
    assert schedule.refreshes(700)[-3:] == [512, 601, 662]


def test_refresh_waits_for_the_window():
    """At step 600 nothing has been accumulated since 512 (the window of 100 opens at 925): 601 would refresh from one step."""
    schedule = Schedule((Phase(0, 2.0, 0.9, 100), Phase(600, 1.1, 0.9, 100)))
    assert schedule.refreshes(800)[-2:] == [700, 770]
    assert not any(schedule.at(t).accumulate for t in range(513, 601))
    assert all(schedule.at(t).accumulate for t in range(601, 701))


def test_bad_arguments():
    with pytest.raises(ValueError, match="count from 1"):
        Schedule((Phase(0, 2.0, 0.9, None),)).at(0)
    with pytest.raises(ValueError, match="start at step 0"):
        Schedule((Phase(3, 2.0, 0.9, None),))
