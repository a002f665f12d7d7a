"""What the command line says, as cells; and what it may not say."""

import inspect
import re
from fractions import Fraction
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anon_dist.sweep.grid import ANON_ONLY, Grid, parse_axes, parse_axis, parse_seeds
from anon_dist.train.config import parsing as c

BASE = c.Config(optim=c.OptimConfig(gamma=0.75))


@settings(deadline=None, max_examples=40)
@given(
    st.decimals(-75, 75, places=2),  # γ's ends are -100 and 100
    st.decimals("-0.5", "0.5", places=3).filter(lambda x: x != 0),
    st.integers(0, 50),
)
def test_a_range_has_both_ends_and_no_rounding(first, step, count):
    text = f"optim.gamma={first}:{first + step * count}:{step}"
    expected = [float(Fraction(first) + i * Fraction(step)) for i in range(count + 1)]
    assert parse_axis(text, BASE) == ("optim.gamma", expected)


@settings(deadline=None, max_examples=40)
@given(st.floats(1e-8, 1.0), st.floats(1.5, 1e6), st.integers(2, 20))
def test_a_logarithmic_range_has_both_ends_and_equal_ratios(first, ratio, count):
    _, values = parse_axis(f"optim.lr=log:{first}:{first * ratio}:{count}", BASE)
    assert (values[0], values[-1]) == (first, first * ratio)
    assert all(b / a == pytest.approx(ratio ** (1 / (count - 1)), rel=1e-3) for a, b in pairwise(values))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optim.gamma=-0.5:1.5:0.25", [-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]),
        ("optim.lr=log:1e-3:1e-2:3", [1e-3, 3.162e-3, 1e-2]),
        ("optim.lr=1e-3,3e-3,1e-2", [1e-3, 3e-3, 1e-2]),
        ("optim.gamma=0,1:2:0.5,2.0", [0.0, 1.0, 1.5, 2.0]),
        ("optim.betas=[0.9,0.95],[0.9, 0.99]", [(0.9, 0.95), (0.9, 0.99)]),
        ("optim.window=auto,None,64", ["auto", None, 64]),
        ("optim.hold_silent=true,false", [True, False]),
        ("schedule.decay=cosine,wsd", ["cosine", "wsd"]),
        ("train.steps=100:300:100", [100, 200, 300]),
        ('optim.gamma_by_name={"*wte*": 0.5, "*ln_*": 0},{}', [{"*wte*": 0.5, "*ln_*": 0.0}, {}]),
        ("optim.gamma_schedule={0: 0.5, 100: 1},{0: 1}", [{0: 0.5, 100: 1.0}, {0: 1.0}]),
    ],
)
def test_values(text, values):
    found = parse_axis(text, BASE)[1]
    assert found == values
    assert list(map(type, found)) == list(map(type, values))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["lr=1e-3"], r"unknown field 'lr'; did you mean 'optim\.lr'"),
        (["optim.gama=1"], r"did you mean 'optim\.gamma'"),
        (["optim.gamma"], "expected FIELD=VALUES"),
        (["optim.gamma=a"], "'optim.gamma' must be a finite number ≥ -100 and ≤ 100, not 'a'"),
        (["optim.gamma=1,,2"], "a value is empty"),
        (["optim.betas=[0.9,0.95"], "a bracket is open"),
        (["optim.gamma=0:1"], "'0:1' is no range"),
        (["optim.gamma=0:1:nan"], "is no range"),
        (["optim.gamma=0:1:0.3"], "steps over its end; both ends count: end at 0.9"),
        (["optim.gamma=0:1:-0.5"], "change the sign"),
        (["optim.gamma=0:1:0"], "change the sign"),
        (["optim.gamma=0:1:1e-9"], "take a larger step"),
        (["optim.lr=log:0:1:3"], "a > 0"),
        (["optim.lr=log:1e-3:1:1"], "whole n from 2"),
        (["optim.gamma_schedule={0: 0.5,{0: 1}"], "a bracket is open"),
        (["optim.gamma_schedule={a: 1}"], "'optim.gamma_schedule' must be a mapping from a whole number"),
        (["optim.gamma_schedule={0: 0.5, 100: 1}"], r"set optim\.match to a checkpoint"),
        (["train.steps=1.5"], "'train.steps' must be a whole number"),
        (["schedule.decay=cosin"], "one of cosine, linear, wsd, constant"),
        (["train.seed=1,2"], "use --seeds"),
        (["optim.name=anon,adamw"], "use --baseline"),
        (["optim.lr=1e-3", "optim.lr=1e-2"], r"optim\.lr comes twice"),
        (["optim.lr=1e-3,-1"], r"lr=1e-3,-1: 'optim\.lr' must be a finite number ≥ 0 and ≤ 1e\+06, not -1"),
        (["optim.refresh_ratio=1.0"], "refresh_ratio' must be a finite number > 1"),
        (["optim.betas=[0.9,1.0]"], r"2 values, each a finite number ≥ 0 and < 1, not \[0\.9, 1\.0\]"),
        (["train.steps=50"], "warmup_steps = 100 leaves nothing of train.steps = 50"),
        (["train.micro_batch=5"], "not a multiple"),
        (["model.width=100", "model.heads=3"], "not a multiple of model.heads"),
    ],
)
def test_errors_name_the_field_and_what_it_takes(texts, message):
    with pytest.raises(c.ConfigError, match=message):
        Grid(parse_axes(texts, BASE), [0]).cells(BASE)


@pytest.mark.parametrize("text", ["0", "", "-1", "a", "1,b", "1.5"])
def test_seeds_that_are_none(text):
    with pytest.raises(c.ConfigError, match="--seeds"):
        parse_seeds(text)


def test_seeds():
    assert [parse_seeds(t) for t in ("3", "0,4,7", "4,", "1,1")] == [[0, 1, 2], [0, 4, 7], [4], [1]]


def test_cells_are_all_combinations_and_the_baseline_leaves_out_what_means_nothing_to_it():
    axes = parse_axes(["optim.gamma=0,1", "optim.lr=1e-3,1e-2", "optim.weight_decay=0,0.1", "optim.eps=1e-12"], BASE)
    cells = Grid(axes, [0, 5], baseline=True, baseline_lr=[2e-3]).cells(BASE)
    anon = [(*c.settings.values(), c.seed) for c in cells if c.optimizer == "anon"]
    assert sorted(anon) == sorted(product([0.0, 1.0], [1e-3, 1e-2], [0.0, 0.1], [1e-12], [0, 5]))
    adamw = [c for c in cells if c.optimizer == "adamw"]
    wanted = [{"optim.weight_decay": w, "optim.lr": 2e-3} for w in (0.0, 0.1)]
    assert [dict(c.settings) for c in adamw] == wanted * 2
    assert len({c.name for c in cells}) == len(cells)
    assert all(len(c.name) < 120 for c in cells)
    config = adamw[-1].config(c.Config(optim=c.OptimConfig(eps=1e-16)))
    assert (config.optim.name, config.optim.eps, config.train.seed, config.data.seed) == ("adamw", None, 5, 5)


def test_a_factor_is_the_change_of_a_whole_unit():
    grid = Grid(parse_axes(["optim.gamma=0,1"], BASE), [0], factor=lambda gamma, clip: 50.0 if gamma == 0 else 1.0)
    base = c.Config(optim=c.OptimConfig(lr=1e-3, weight_decay=0.1, update_clip=2.0))
    for cell, factor in zip(grid.cells(base), (50.0, 1.0), strict=True):
        o = cell.config(base).optim
        assert (o.lr, o.weight_decay, o.update_clip) == pytest.approx((1e-3 * factor, 0.1 / factor, 2.0 / factor))


def test_the_fields_of_anon_alone_are_those_that_the_configuration_marks():
    marked = re.findall(r'^    (\w+): .*\n    """\(Anon\)', inspect.getsource(c.OptimConfig), re.MULTILINE)
    assert [f"optim.{name}" for name in marked] == list(ANON_ONLY)
