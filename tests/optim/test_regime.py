"""A group's regime: one conversion of γ for rebase, edits and loads, which knows what the preconditioner's dtype can carry."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from anon_dist import Anon
from anon_dist.optim import ReferenceAnon
from anon_dist.optim.plan import Variant
from anon_dist.optim.regime import HISTORY, Regime

HYPER = {"lr": 0.01, "betas": (0.9, 0.95), "refresh_ratio": 1.5, "update_clip": 1.0}


def stepped(steps=6, n=400, **hyper):
    p = nn.Parameter(torch.linspace(-1, 1, n))
    optimizer = Anon([p], **{**HYPER, **hyper})
    for t in range(steps):
        p.grad = torch.randn(n, generator=torch.Generator().manual_seed(t)) * torch.logspace(-3, 3, n)
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize(("state_dtype", "most"), [("float32", 256.0), ("bfloat16", 4.0)])
def test_rebase_converts_what_the_dtype_can_carry_and_refuses_the_rest(state_dtype, most):
    """Against the same powers in float64: v' = v^(γ'/γ), off by no more than the rounding of v times γ'/γ."""
    for new in (0.004, 0.001 * most, -0.001 * most):
        p, optimizer = stepped(gamma=0.001, state_dtype=state_dtype)
        exact = stepped(gamma=0.001, state_dtype="float64")[1].state.popitem()[1]["precond"]
        optimizer.rebase(gamma=new)
        unit = {"float32": 2.0**-23, "bfloat16": 2.0**-7}[state_dtype]
        v = optimizer.state[p]["precond"].double()
        torch.testing.assert_close(v, exact ** (new / 0.001), rtol=2.5 * unit * max(1.0, abs(new) / 0.001), atol=0.0)
    p, optimizer = stepped(gamma=0.001, state_dtype=state_dtype)
    before = optimizer.state[p]["precond"].clone(), dict(optimizer.param_groups[0])
    with pytest.raises(
        ValueError, match=rf"at once .* a preconditioner in {state_dtype} carries .* factor of {most:g}"
    ):
        optimizer.rebase(gamma=1.0)
    assert torch.equal(optimizer.state[p]["precond"], before[0])
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == {
        k: v for k, v in before[1].items() if k != "params"
    }


@pytest.mark.parametrize("fused", [True, False])
def test_an_edit_beyond_what_bfloat16_carries_starts_from_the_gradients(fused):
    """The refresh of the turn is then as the first: d = σ^γ'."""
    (p, optimizer), (q, other) = (
        stepped(5, gamma=gamma, beta3=beta3, state_dtype="bfloat16", fused=fused)
        for gamma, beta3 in ((0.001, 0.5), (1.0, 0.0))
    )
    optimizer.param_groups[0]["gamma"] = 1.0
    for t in range(5, 12):
        for x, o in ((p, optimizer), (q, other)):
            x.grad = torch.randn(400, generator=torch.Generator().manual_seed(t))
            o.step()
        if Regime(optimizer.param_groups[0]).gamma_in_force == 1.0:
            break
    assert t < 11
    assert torch.equal(optimizer.state[p]["precond"], other.state[q]["precond"])


def test_a_bfloat16_preconditioner_follows_small_changes():
    """σ creeps up by 0.5% a refresh at β3 = 0.9: to the nearest, d would stand still. Over many elements the mean follows float64's."""
    n = 4096
    p = nn.Parameter(torch.zeros(n))
    hyper = {"lr": 0.0, "betas": (0.9, 0.0), "refresh_ratio": 1.0001, "beta3": 0.9}
    optimizer, reference = Anon([p], **hyper, state_dtype={"precond": "bfloat16"}), ReferenceAnon(p, **hyper)
    spread = torch.logspace(-1, 1, n)
    for t in range(120):
        p.grad = spread * 1.0025**t
        optimizer.step()
        reference.step(p.grad)
    moved = (reference.v * spread.double()).mean()
    assert float(moved) < 0.8
    assert float((optimizer.state[p]["precond"].double() / reference.v).mean()) == pytest.approx(1.0, abs=0.005)


def test_a_plan_says_all_of_a_step():
    _, optimizer = stepped(0, gamma=0.7, beta3=0.8, weight_decay=0.1, refresh_ratio=2.0, window=2, hold_silent=True)
    regime = Regime(optimizer.param_groups[0])
    plans = [regime.plan(t) for t in range(1, 9)]
    kinds = {Variant.PLAIN: ".", Variant.ACCUMULATE: "a", Variant.REFRESH: "R"}
    assert "".join(kinds[plan.variant] for plan in plans) == "RRaR..aR"
    assert [plan.keep_d for plan in plans if plan.variant == Variant.REFRESH] == [0.0, 0.8, 0.8, 0.8]
    last = plans[-1]
    assert (last.step, last.gamma, last.gamma_ratio, last.clip, last.hold_silent) == (8, 0.7, 1.0, 1.0, False)
    assert last.debias_s == pytest.approx(1 - 0.95**2)
    assert last.debias_m == 1 - 0.9**8


@pytest.mark.parametrize(("turned_at", "made_with"), [(5, 0.25), (4, 0.5)])
def test_histories_of_earlier_versions_are_read(turned_at, made_with):
    """Where a group had been shown in parts, they name the step that a change of γ had come with, and the γ before it: that of the
    parameters that had not taken this step yet. β3 = 0.5 mixes the old preconditioner in, as it is at the new γ."""
    p, optimizer = stepped(4, gamma=0.5, state_dtype="float64", fused=False)
    state = copy.deepcopy(optimizer.state_dict())
    (record,) = json.loads(state["param_groups"][0][HISTORY])
    assert record == {"since": 0, "gamma": 0.5, "refresh_ratio": 1.5, "beta2": 0.95, "beta3": 0.5, "window": None}
    state["param_groups"][0][HISTORY] = json.dumps([{**record, "turned_at": turned_at, "gamma_before": 0.25}])
    optimizer.load_state_dict(state)
    assert Regime(optimizer.param_groups[0]).plan(5).variant == Variant.REFRESH
    old = optimizer.state[p]["precond"] ** (0.5 / made_with)
    p.grad = torch.ones(400, dtype=torch.float32)
    s = 0.95 * optimizer.state[p]["exp_avg_sq"] + 0.05
    optimizer.step()
    sigma = s / (1 - 0.95 ** (5 - 3)) + 1e-16
    torch.testing.assert_close(optimizer.state[p]["precond"], (0.5 * old**-2 + 0.5 * sigma**0.5) ** -0.5)
    assert json.loads(optimizer.param_groups[0][HISTORY]) == [record]


def test_the_history_grows_by_what_the_schedule_depends_on():
    """A rebase of γ or β3 at each step leaves one record, and the bits are those of a run without a history of it."""
    p, optimizer = stepped(0)
    q, other = stepped(0)
    for t in range(60):
        for x, o in ((p, optimizer), (q, other)):
            x.grad = torch.randn(400, generator=torch.Generator().manual_seed(t))
            if x is p:
                o.rebase(beta3=0.5 + t / 200, gamma=1.0)
            else:
                o.param_groups[0]["beta3"] = 0.5 + t / 200
                (record,) = json.loads(o.param_groups[0][HISTORY])
                o.param_groups[0][HISTORY] = json.dumps([{**record, "beta3": 0.5 + t / 200}])
            o.step()
    assert torch.equal(p, q)
    assert len(json.loads(optimizer.param_groups[0][HISTORY])) == 1
    optimizer.rebase(refresh_ratio=1.2)
    optimizer.rebase(window=7)
    assert [r["since"] for r in json.loads(optimizer.param_groups[0][HISTORY])] == [0, 60]


def test_a_history_with_a_record_for_each_change_is_read():
    """As earlier versions wrote them, whatever the change was."""
    p, optimizer = stepped(9, window=2)
    q, other = stepped(9, window=2)
    state = copy.deepcopy(optimizer.state_dict())
    (record,) = json.loads(state["param_groups"][0][HISTORY])
    long = [{**record, "since": t, "beta3": 0.5, "gamma": 0.5 + t / 8} for t in range(5)]
    state["param_groups"][0][HISTORY] = json.dumps([*long[:4], {**record, "since": 8}])
    optimizer.load_state_dict(state)
    for t in range(9, 40):
        for x, o in ((p, optimizer), (q, other)):
            x.grad = torch.randn(400, generator=torch.Generator().manual_seed(t))
            o.step()
    assert torch.equal(p, q)


DAMAGED = [
    ("", "is damaged .Expecting value"),
    ("[", "is damaged"),
    ("[]", "is no list of records"),
    ("{}", "is no list of records"),
    ("[1]", "is no list of records"),
    (None, "is no list of records"),
    (7, "is no list of records"),
    ("[" * 100_000, "is damaged"),
    ({"future": 1, "past": 2}, "was written by a newer version of anon_dist: fields future, past"),
    ({"window": ...}, "fields window are missing"),
    ({"since": 3}, "begin after the steps .3"),
    ({"since": 0.0}, "begin after the steps"),
    ({"since": "0"}, "begin after the steps"),
    ({"turned_at": 1.5}, "begin after the steps"),
    ({"refresh_ratio": 0.5}, "refresh_ratio must be"),
    ({"refresh_ratio": None}, "refresh_ratio must be"),
    ({"beta2": 1.5}, "betas.1. must be"),
    ({"beta3": "x"}, "beta3 must be"),
    ({"gamma": float("nan")}, "gamma must be"),
    ({"gamma_before": float("inf")}, "gamma must be"),
    ({"window": 0}, "window must be"),
    ({"max_interval": -1}, "max_interval must be"),
    ({"basis": "diagonal"}, "basis must be"),
    ({"basis_block": -4}, "basis_block must be"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGED)
def test_a_damaged_history_is_refused_and_nothing_changes(damage, said):
    _, optimizer = stepped(6)
    good = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(good)
    if isinstance(damage, dict):
        (record,) = json.loads(bad["param_groups"][0][HISTORY])
        damage = json.dumps([{k: v for k, v in {**record, **damage}.items() if v is not ...}])
    bad["param_groups"][0] |= {HISTORY: damage, "lr": 7.0}
    bad["state"][0]["exp_avg"].zero_()
    with pytest.raises(ValueError, match=f"^Anon: history of param group 0 .*{said}.*afresh"):
        optimizer.load_state_dict(bad)
    assert optimizer.param_groups[0]["lr"] == 0.01
    torch.testing.assert_close(optimizer.state_dict()["state"], good["state"], rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"] == good["param_groups"]
    optimizer.step()


def test_a_history_that_repeats_a_step_is_refused():
    _, optimizer = stepped(6)
    bad = copy.deepcopy(optimizer.state_dict())
    (record,) = json.loads(bad["param_groups"][0][HISTORY])
    for since in ([0, 3, 3], [0, 3, 2]):
        bad["param_groups"][0][HISTORY] = json.dumps([{**record, "since": t} for t in since])
        with pytest.raises(ValueError, match="should follow each other"):
            optimizer.load_state_dict(bad)


def test_numpy_scalars_in_param_groups_are_numbers():
    """As a scheduler of one's own sets them; a checkpoint then has plain ones."""
    p, optimizer = stepped(3, weight_decay=0.1)
    q, other = stepped(3, weight_decay=0.1)
    optimizer.param_groups[0].update(lr=np.float32(0.02), gamma=np.float64(0.5), weight_decay=np.float16(0.25))
    optimizer.param_groups[0].update(update_clip=np.int64(2), window=np.int64(4) and None)
    other.param_groups[0].update(lr=0.02, gamma=0.5, weight_decay=0.25, update_clip=2)
    assert {type(v).__module__ for v in optimizer.state_dict()["param_groups"][0].values()} == {"builtins"}
    optimizer.param_groups[0].update(lr=np.float32(0.02))
    for t in range(9):
        for x, o in ((p, optimizer), (q, other)):
            x.grad = torch.randn(400, generator=torch.Generator().manual_seed(t))
            o.step()
    assert torch.equal(p, q)
    assert {type(v).__module__ for v in optimizer.state_dict()["param_groups"][0].values()} == {"builtins"}
