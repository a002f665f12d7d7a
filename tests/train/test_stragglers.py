"""Which rank is said to be slow, in simulated work: noise alone names nobody, and noise keeps nobody from being named."""

from itertools import pairwise

import numpy as np
import pytest

from anon_dist.train.health.stragglers import Stragglers

EVERY = (1, 10, 25, 100)
STEP = 0.15


def lines(work, every, hosts=None):
    """Said of work (steps, ranks), in seconds, where every so many steps are recorded: the step, and the line."""
    steps, ranks = work.shape
    watch = Stragglers()
    watch._hosts = hosts or ["node"] * ranks
    said = []
    for i, record in enumerate(work.reshape(steps // every, every, ranks).mean(axis=1), start=1):
        found = watch.read([*record.tolist(), *[0.0] * ranks], every)[1]
        if found is not None:
            said.append((i * every, found))
    return said


def noisy(ranks, spread, steps, seed):
    """Lognormal; `spread` is the standard deviation of one step's work, of its mean."""
    sigma = np.sqrt(np.log1p(spread**2))
    return STEP * np.random.default_rng(seed).lognormal(-(sigma**2) / 2, sigma, (steps, ranks))


@pytest.mark.parametrize("every", EVERY)
def test_ranks_that_are_evenly_noisy_are_not_named(every):
    """20% from step to step, 8 ranks, 10 runs of 10,000 steps: less than one line a run."""
    assert sum(len(lines(noisy(8, 0.2, 10_000, seed), every)) for seed in range(10)) < 10


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("ranks", [2, 8])
def test_a_rank_that_is_slower_by_15_percent_is_named(every, ranks):
    """Under noise of 10%, by which another is the slowest in about half of the steps: as soon as 100 steps, and two records, are seen; and
    again after as many."""
    for seed in range(20):
        work = noisy(ranks, 0.1, 800, seed)
        work[:, 1] *= 1.15
        said = lines(work, every)
        assert all(line.startswith("rank 1 on node was the slowest over the last ") for _, line in said)
        steps = [step for step, _ in said]
        assert steps[0] <= max(150, 2 * every)
        assert all(later - earlier >= 100 for earlier, later in pairwise(steps))
        assert len(steps) >= 800 // max(150, 2 * every)


@pytest.mark.parametrize("every", EVERY)
def test_one_slow_step_names_nobody(every):
    work = noisy(4, 0.02, 1000, 0)
    work[505, 2] = 100 * STEP
    assert lines(work, every) == []


def test_a_rank_that_becomes_slow_is_named_soon_and_no_more_when_it_is_not():
    work = noisy(2, 0.1, 1200, 0)
    work[400:600, 1] += 0.05
    for every in (1, 10):
        first, *more = [step for step, _ in lines(work, every)]
        assert 450 < first <= 500
        assert all(step < 650 for step in more)


def test_of_several_hosts_the_host_is_named():
    work = noisy(6, 0.1, 200, 0)
    work[:, 3] *= 1.3
    ((step, line),) = lines(work[:150], 10, ["a", "a", "b", "b", "c", "c"])
    assert step == 100
    assert line.startswith("b was the slowest over the last 100 steps: 0.19")
    assert ", the others 0.1" in line
