"""Anon as a torch optimizer: state, checkpoints, groups, hyperparameters, dispatch."""

import copy
import io
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from anon_dist import Anon
from anon_dist.optim import STATE_KEYS, update

LM = {"betas": (0.9, 0.95), "refresh_ratio": 1.1, "beta3": 0.8, "update_clip": 1.0, "weight_decay": 0.1}


def make(shape=(7, 5), seed=0, dtype=torch.float32, **hyper):
    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))
    return p, Anon([p], **{**LM, **hyper})


def gradient(p, t):
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 + t)).to(p.dtype)


def run(p, optimizer, steps):
    for t in steps:
        p.grad = gradient(p, t)
        optimizer.step()


def assert_same_bits(p, optimizer, q, other):
    assert torch.equal(p, q)
    for key in STATE_KEYS:
        assert torch.equal(optimizer.state[p][key], other.state[q][key]), key


# -- state ------------------------------------------------------------------------------------------------------------


def test_no_state_at_construction_and_init_state_is_idempotent():
    p, optimizer = make()
    assert len(optimizer.state) == 0
    optimizer.init_state()
    run(p, optimizer, range(3))
    before = {k: v.clone() for k, v in optimizer.state[p].items()}
    optimizer.init_state()
    assert set(optimizer.state[p]) == set(STATE_KEYS)
    assert all(torch.equal(optimizer.state[p][k], before[k]) for k in STATE_KEYS)


def test_init_state_follows_swapped_parameters():
    """FSDP2 and DeepSpeed replace the parameters in the groups: the old ones' state must go."""
    _p, optimizer = make()
    optimizer.init_state()
    q = nn.Parameter(torch.randn(3))
    optimizer.param_groups[0]["params"] = [q]
    optimizer.init_state()
    assert set(optimizer.state) == {q}
    run(q, optimizer, range(2))
    assert int(optimizer.state[q]["step"]) == 2


def test_state_of_parameters_that_are_absent_for_a_while():
    """DeepSpeed steps one group, or one sub-group, at a time: a step keeps the others' state, and only `init_state` drops it."""
    p, q = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
    together, apart = (
        Anon([nn.Parameter(p.detach().clone()), nn.Parameter(q.detach().clone())], **LM),
        Anon([p, q], **LM),
    )
    for t in range(12):
        for x, y in zip(together.param_groups[0]["params"], (p, q), strict=True):
            x.grad = y.grad = gradient(p, t)
        together.step()
        for x in (p, q):
            apart.param_groups[0]["params"] = [x]
            apart.step()
    for x, y in zip(together.param_groups[0]["params"], (p, q), strict=True):
        assert_same_bits(x, together, y, apart)
    apart.init_state()
    assert set(apart.state) == {q}


def test_frozen_parameters_have_no_state_until_they_train():
    p, q = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3), requires_grad=False)
    optimizer = Anon([p, q])
    optimizer.init_state()
    assert set(optimizer.state) == {p}
    q.requires_grad_()
    run(q, optimizer, range(1))
    assert set(optimizer.state) == {p, q}


def test_a_step_without_any_gradient_says_so_and_allocates_nothing():
    """What an optimizer sees whose parameters were replaced in the model and not in its groups: their state would stay for nothing."""
    p, optimizer = make()
    with pytest.warns(UserWarning, match=r"found no gradient in any parameter.*fully_shard"):
        optimizer.step()
    assert len(optimizer.state) == 0
    run(p, optimizer, range(2))
    assert int(optimizer.state[p]["step"]) == 2


def test_step_is_torchs_convention():
    p, optimizer = make()
    run(p, optimizer, range(3))
    step = optimizer.state[p]["step"]
    assert (step.dtype, step.dim(), step.device.type, float(step)) == (torch.float32, 0, "cpu", 3.0)


@pytest.mark.parametrize("read", [lambda model, o: o.state_dict(), lambda model, o: get_optimizer_state_dict(model, o)])
def test_reading_the_state_before_the_first_step_takes_no_step(read):
    """torch's checkpoint library steps an optimizer it finds without state; that would consume the refresh at t = 1."""
    model = nn.Linear(4, 3)
    optimizer = Anon(model.parameters(), **LM)
    weight = model.weight.detach().clone()
    states = read(model, optimizer)["state"]
    assert all(float(s["step"]) == 0 and (s["precond"] == 1).all() for s in states.values())
    assert len(states) == 2
    assert torch.equal(model.weight, weight)


# -- saving and loading -----------------------------------------------------------------------------------------------

# ρ = 1.1: refreshes at 57, 63, 70, 77; ρ = 2, window 5: it opens at 28 for the refresh at 32 and closes until 60.
EDGES = [
    *[({"refresh_ratio": 2.0, "beta3": 0.5}, t) for t in (1, 2, 3, 4, 7, 8, 9, 31, 32, 33)],
    *[({"refresh_ratio": 2.0, "window": 5}, t) for t in (27, 28, 29, 31, 32, 33, 59, 60)],
    *[({"window": 4}, t) for t in (62, 63, 64, 66, 67)],
    ({"window": "auto"}, 40),
]


@pytest.mark.parametrize(("hyper", "at"), EDGES)
@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, None), (torch.float32, False), (torch.bfloat16, None)])
def test_resume_is_bit_exact(hyper, at, dtype, fused):
    p, optimizer = make(dtype=dtype, fused=fused, **hyper)
    run(p, optimizer, range(at))
    file = io.BytesIO()
    torch.save({"model": p.detach().clone(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    q, resumed = make(dtype=dtype)  # with other hyperparameters, which the checkpoint's replace
    q.data.copy_(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    run(p, optimizer, range(at, at + 40))
    run(q, resumed, range(at, at + 40))
    assert_same_bits(p, optimizer, q, resumed)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("extra", [{}, {"fused": True}, {"capturable": True}])
def test_state_dtypes_survive_a_load(state_dtype, extra):
    """torch would cast the states to the parameter's bfloat16, and move `step` to its device for a fused group."""
    p, optimizer = make(dtype=torch.bfloat16, state_dtype=state_dtype)
    run(p, optimizer, range(5))
    states = optimizer.state_dict()
    states["param_groups"][0].update(extra)
    q, resumed = make(dtype=torch.bfloat16, state_dtype=state_dtype)
    seen = []
    resumed.register_load_state_dict_pre_hook(lambda o, d: seen.append(d["state"][0]["exp_avg"].dtype))
    resumed.register_load_state_dict_post_hook(lambda o: seen.append(o.state[q]["exp_avg"].dtype))
    resumed.load_state_dict(states)
    wanted = getattr(torch, state_dtype)
    assert seen == [wanted, wanted]
    assert {resumed.state[q][k].dtype for k in STATE_KEYS[1:]} == {wanted}
    assert resumed.state[q]["step"].device.type == "cpu"


def test_a_loaded_state_takes_the_dtypes_of_whoever_loads_it_and_brings_the_rest():
    """What it brings is said in one line: all but learning rates, which change at each step."""
    p, optimizer = make(betas=(0.9, 0.99), weight_decay=0.2, window=None)
    run(p, optimizer, range(5))
    q, resumed = make(state_dtype="exp_avg=int8, precond=bfloat16", weight_decay=0.2, window=7, lr=5.0)
    with pytest.warns(UserWarning, match="^Anon: the loaded state brings") as warned:
        resumed.load_state_dict(optimizer.state_dict())
    (said,) = [str(w.message) for w in warned]
    assert r"betas (0.9, 0.99), not (0.9, 0.95); window None, not 7. Set yours after loading" in said
    assert "\n" not in said
    dtypes = [resumed.state[q][k].dtype for k in STATE_KEYS[1:]]
    assert dtypes == [torch.int8, torch.float32, torch.bfloat16]
    assert torch.equal(resumed.state[q]["precond"], optimizer.state[p]["precond"].bfloat16())
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    with warnings.catch_warnings(action="error"):
        resumed.load_state_dict(resumed.state_dict())
        copy.deepcopy(resumed)


def test_copies_and_pickles():
    p, optimizer = make()
    run(p, optimizer, range(5))
    holder = copy.deepcopy({"p": p, "optimizer": optimizer})
    q, other = holder["p"], holder["optimizer"]
    run(p, optimizer, range(5, 20))
    run(q, other, range(5, 20))
    assert_same_bits(p, optimizer, q, other)


def test_loading_a_state_dict_of_an_older_version_takes_defaults_for_what_it_lacks():
    p, optimizer = make()
    run(p, optimizer, range(5))
    states = optimizer.state_dict()
    for key in ("hold_silent", "history"):
        del states["param_groups"][0][key]
    q, other = make()
    other.load_state_dict(states)
    run(q, other, range(5, 9))
    assert other.param_groups[0]["hold_silent"] is False


def test_a_gap_in_the_loaded_state_is_said():
    p, q = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    optimizer = Anon([("a", p), ("b", q)], **LM)
    p.grad = q.grad = gradient(p, 0)
    optimizer.step()
    states = copy.deepcopy(optimizer.state_dict())
    del states["state"][1]
    with pytest.warns(UserWarning, match=r"nothing for parameter 1 \(b\)"):
        optimizer.load_state_dict(states)


def test_another_optimizers_state_is_refused_and_nothing_changes():
    p, optimizer = make()
    run(p, optimizer, range(2))
    adam = torch.optim.AdamW([p])
    adam.step()
    before, groups = (
        copy.deepcopy(optimizer.state_dict()["state"]),
        copy.deepcopy(optimizer.state_dict()["param_groups"]),
    )
    with pytest.raises(
        ValueError,
        match=r"parameter 0 has \['exp_avg', 'exp_avg_sq', 'step'\].*another optimizer's.*convert .* --optimizer anon",
    ):
        optimizer.load_state_dict(adam.state_dict())
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"] == groups


def test_a_state_of_another_shape_is_refused():
    p, optimizer = make()
    run(p, optimizer, range(2))
    _, other = make(shape=(5, 7))
    with pytest.raises(
        ValueError, match=r"exp_avg of parameter 0 is a Tensor\(7, 5\), but the parameter is a Parameter\(5, 7\)"
    ):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        *(
            ("step", torch.tensor(x), "step of parameter 0 is .*an integer from 0 to 16777215")
            for x in (-1.0, 2.5, 1e9)
        ),
        *(("step", torch.tensor(x), "step of parameter 0 is .*an integer") for x in (math.nan, math.inf, 2.0**24)),
        *(("step", x, "step of parameter 0 is .*an integer") for x in ("x", None, torch.ones(2), torch.tensor(1j))),
        ("exp_avg", torch.ones(7, 5, dtype=torch.int64), "exp_avg of parameter 0 is int64, and should be dense"),
        ("precond", torch.ones(7, 5, dtype=torch.bool), "precond of parameter 0 is bool"),
        ("exp_avg_sq", torch.ones(7, 5, dtype=torch.complex64), "exp_avg_sq of parameter 0 is complex64"),
        ("exp_avg", torch.ones(7, 5).to_sparse(), "exp_avg of parameter 0 is sparse_coo"),
    ],
)
def test_damaged_states_are_refused_and_nothing_changes(key, value, said):
    p, optimizer = make()
    run(p, optimizer, range(3))
    good = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(good)
    bad["state"][0][key] = value
    bad["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match=f"^Anon: {said}.*afresh"):
        optimizer.load_state_dict(bad)
    torch.testing.assert_close(optimizer.state_dict()["state"], good["state"], rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"] == good["param_groups"]
    good["state"][0]["step"] = torch.tensor(3)  # as other libraries keep it
    optimizer.load_state_dict(good)
    run(p, optimizer, range(3, 5))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("precond", 0.0, "precond of parameter 1 .* is not positive, and 1 more are not right"),
        ("precond", math.nan, "precond of parameter 1 .* is not positive, and 1 more are not right"),
        ("exp_avg_sq", -1.0, "exp_avg_sq of parameter 1 .* is negative or no number, and 1 more are not right"),
    ],
)
def test_values_that_no_step_makes_are_warned_of_once(key, value, said):
    params = [(name, nn.Parameter(torch.ones(3))) for name in "abc"]
    optimizer = Anon(params, **LM)
    for _, p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(copy.deepcopy(state))
    for i in (1, 2):
        state["state"][i][key][2] = value
    with pytest.warns(UserWarning, match=f"Anon: in the loaded state some of {said}") as told:
        optimizer.load_state_dict(state)
    assert len(told) == 1


# -- groups and hyperparameters ---------------------------------------------------------------------------------------


def test_groups_have_their_own_hyperparameters():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Anon([{"params": [a], "gamma": 0.0}, {"params": [b], "gamma": 2.0, "refresh_ratio": 1.1}], lr=0.1)
    other = Anon([a2 := nn.Parameter(torch.ones(3))], lr=0.1, gamma=2.0, refresh_ratio=1.1)
    for t in range(20):
        a.grad = b.grad = a2.grad = gradient(a, t)
        optimizer.step()
        other.step()
    assert torch.equal(b, a2)
    assert (optimizer.state[a]["precond"] == 1).all()
    assert [g["gamma"] for g in optimizer.state_dict()["param_groups"]] == [0.0, 2.0]


BAD = [
    ({"lr": -1.0}, r"lr must be a finite number ≥ 0"),
    ({"lr": float("nan")}, r"lr must be a finite number ≥ 0"),
    ({"lr": float("inf")}, r"lr must be a finite number ≥ 0"),
    ({"lr": torch.tensor(-0.1)}, r"lr must be a finite number ≥ 0"),
    ({"lr": torch.ones(2)}, r"lr must be a number or a tensor of one element"),
    ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0, 1\)"),
    ({"betas": (0.9, -0.1)}, r"betas\[1\] must be in \[0, 1\)"),
    ({"betas": (0.9, float("nan"))}, r"betas\[1\] must be in \[0, 1\)"),
    ({"betas": 0.9}, r"betas must be a pair"),
    ({"eps": 0.0}, r"eps must be a finite number > 0"),
    ({"eps": -1e-8}, r"eps must be a finite number > 0"),
    ({"gamma": float("nan")}, r"gamma must be a finite real number"),
    ({"gamma": float("inf")}, r"gamma must be a finite real number"),
    ({"weight_decay": -0.1}, r"weight_decay must be a finite number ≥ 0"),
    ({"refresh_ratio": 1.0}, r"refresh_ratio must be a finite number > 1"),
    ({"refresh_ratio": float("nan")}, r"refresh_ratio must be a finite number > 1"),
    ({"beta3": 1.0}, r"beta3 must be in \[0, 1\)"),
    ({"update_clip": 0.0}, r"update_clip must be None or a finite number > 0"),
    ({"window": 0}, r"window must be None, 'auto' or an integer ≥ 1"),
    ({"window": "always"}, r"window must be None, 'auto' or an integer ≥ 1"),
    ({"window": 2.5}, r"window must be None, 'auto' or an integer ≥ 1"),
    ({"state_dtype": torch.int8}, r"state_dtype must be float32, float64 or bfloat16, or these by state"),
    ({"state_dtype": {"precond": "int8"}}, r"state_dtype must be .*not 'precond=int8'"),
    ({"state_dtype": {"exp_avg": torch.float16}}, r"state_dtype must be .*not 'exp_avg=float16'"),
    ({"state_dtype": "momentum=bfloat16"}, r"state_dtype must be .*not 'momentum=bfloat16'"),
    ({"state_dtype": "exp_avg="}, r"state_dtype must be .*not 'exp_avg='"),
    ({"stochastic_rounding": 1}, r"stochastic_rounding must be True or False, not 1"),
]


@pytest.mark.parametrize(("hyper", "message"), BAD)
def test_arguments_out_of_range_are_named(hyper, message):
    with pytest.raises(ValueError, match=message):
        make(**hyper)
    _p, optimizer = make()
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **hyper})
    assert len(optimizer.param_groups) == 1


def test_gradients_and_parameters_that_are_not_supported():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        Anon(embedding.parameters()).step()
    with pytest.raises(TypeError, match="complex"):
        Anon([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


def test_a_step_that_raises_has_changed_nothing():
    p, q = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    optimizer = Anon([{"params": [p]}, {"params": [q]}], **LM)
    for t in range(3):
        p.grad = q.grad = gradient(p, t)
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"]), p.detach().clone()
    q.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,))
    with pytest.raises(RuntimeError, match="parameter 0 of param group 1 has a sparse gradient"):
        optimizer.step()
    q.grad = gradient(p, 3)
    optimizer.param_groups[1]["beta3"] = 0.3
    with pytest.raises(RuntimeError, match="beta3 of param group 1"):
        optimizer.step()
    torch.testing.assert_close(optimizer.state_dict()["state"], before[0], rtol=0, atol=0)
    assert torch.equal(p, before[1])


@pytest.mark.parametrize(
    ("name", "value"), [("eps", -1.0), ("update_clip", -1.0), ("weight_decay", -3.0), ("lr", math.nan)]
)
def test_values_set_during_a_run_are_checked(name, value):
    p, optimizer = make()
    run(p, optimizer, range(3))
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name} must be"):
        run(p, optimizer, [3])


def test_numbers_of_numpy_become_plain_ones():
    """A numpy scalar in a param group could be saved, and not be loaded with weights_only."""
    p, optimizer = make(
        lr=np.float32(0.1),
        gamma=np.float64(0.5),
        window=np.int64(5),
        maximize=np.bool_(True),
        betas=[np.float64(0.9), 0.95],
    )
    group = optimizer.param_groups[0]
    assert (group["lr"], group["gamma"], group["window"], group["maximize"], group["betas"]) == (
        0.1,
        0.5,
        5,
        True,
        (0.9, 0.95),
    )
    run(p, optimizer, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    torch.load(file, weights_only=True)


def test_the_step_counter_stays_on_the_cpu_and_does_not_run_out_silently():
    with torch.device("meta"):
        p, optimizer = nn.Parameter(torch.zeros(2, device="cpu")), None
        optimizer = Anon([p])
        optimizer.init_state()
    run(p, optimizer, range(2))
    optimizer.state[p]["step"].fill_(2.0**24 - 1)
    with pytest.raises(RuntimeError, match="cannot count past"):
        run(p, optimizer, [2])


def test_huge_gradients_at_gamma_zero():
    p, optimizer = make(gamma=0.0)
    p.grad = torch.full_like(p, 1e25)
    optimizer.step()
    assert torch.isfinite(p).all()


def test_negative_gamma_warns_about_silent_coordinates():
    with pytest.warns(UserWarning, match="hold_silent=True or a larger eps"):
        make(gamma=-1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(gamma=-1.0, hold_silent=True)
        make(gamma=-1.0, eps=1e-8)


@pytest.mark.parametrize("change", [{"refresh_ratio": 2.0}, {"beta3": 0.5}, {"betas": (0.9, 0.99)}, {"window": 10}])
def test_hyperparameters_of_the_state_do_not_change_silently(change):
    p, optimizer = make()
    optimizer.param_groups[0].update(change)  # before the first step anything goes
    run(p, optimizer, range(3))
    p, optimizer = make()
    run(p, optimizer, range(3))
    optimizer.param_groups[0].update(change)
    with pytest.raises(RuntimeError, match=r"was changed from .* call optimizer.rebase"):
        run(p, optimizer, range(3, 4))
    p, optimizer = make()
    run(p, optimizer, range(3))
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.0, update_clip=None, eps=1e-8)
    run(p, optimizer, range(3, 4))


def test_rebase_converts_the_preconditioner():
    """Away from refreshes v is (σ^γ)^(−1/2) of one σ: at another γ it is what that optimizer would have, with β3 = 0."""
    p, optimizer = make(gamma=1.0, beta3=0.0, refresh_ratio=2.0)
    q, other = make(gamma=0.5, beta3=0.0, refresh_ratio=2.0)
    run(p, optimizer, range(20))
    run(q, other, range(20))
    optimizer.rebase(gamma=0.5)
    torch.testing.assert_close(optimizer.state[p]["precond"], other.state[q]["precond"], rtol=1e-6, atol=0)
    p.data.copy_(q)
    run(p, optimizer, range(20, 50))
    run(q, other, range(20, 50))
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_rebase_after_an_edit_converts_too():
    """It must convert from the γ on record, not from the edited one."""
    p, optimizer = make(gamma=1.0, refresh_ratio=2.0)
    run(p, optimizer, range(5))
    v = optimizer.state[p]["precond"].clone()
    optimizer.param_groups[0].update(gamma=0.5, beta3=0.5)
    with pytest.raises(RuntimeError, match=r"call optimizer.rebase\(beta3=0.5, group=0\)"):
        run(p, optimizer, [5])
    with pytest.raises(RuntimeError, match="beta3 of param group 0 was changed"):
        optimizer.rebase(gamma=0.5)
    optimizer.rebase(beta3=0.5)  # the edited γ waits for its refresh
    assert torch.equal(optimizer.state[p]["precond"], v)
    assert optimizer.next_gammas() == [1.0]
    optimizer.rebase(gamma=0.5)
    torch.testing.assert_close(optimizer.state[p]["precond"], v.sqrt())
    assert optimizer.next_gammas() == [0.5]
    run(p, optimizer, [5])


def test_rebase_survives_a_checkpoint():
    p, optimizer = make(refresh_ratio=2.0)
    run(p, optimizer, range(20))
    optimizer.rebase(refresh_ratio=1.1, beta2=0.9, beta3=0.5, window=6)
    run(p, optimizer, range(20, 25))
    q, resumed = make()
    q.data.copy_(p)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(p, optimizer, range(25, 90))
    run(q, resumed, range(25, 90))
    assert_same_bits(p, optimizer, q, resumed)


def test_rebase_refuses_what_is_not_defined():
    p, optimizer = make(gamma=0.0)
    optimizer.rebase(gamma=0.5)  # no step was taken
    optimizer.rebase(gamma=0.0)
    run(p, optimizer, range(3))
    with pytest.raises(ValueError, match=r"cannot be changed from 0\.0 to 0\.5 at once .* v = 1 says nothing"):
        optimizer.rebase(gamma=0.5)
    with pytest.raises(ValueError, match="refresh_ratio must be"):
        optimizer.rebase(refresh_ratio=1.0)
    run(p, optimizer, range(3, 6))


def test_rebase_names_the_groups_that_there_are():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Anon([{"params": [p]}, {"params": [q]}])
    for group in (7, -3, "0"):
        with pytest.raises(
            ValueError, match=r"rebase\(group=.*the number of param groups is 2; give an index from 0 to 1"
        ):
            optimizer.rebase(gamma=0.5, group=group)
    assert [group["gamma"] for group in optimizer.param_groups] == [1.0, 1.0]
    optimizer.rebase(gamma=0.5, group=1)
    assert [group["gamma"] for group in optimizer.param_groups] == [1.0, 0.5]


def test_rebase_warns_about_silent_coordinates():
    _, optimizer = make(gamma=1.0)
    with pytest.warns(UserWarning, match="hold_silent=True or a larger eps") as found:
        optimizer.rebase(gamma=-1.0)
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.rebase(beta3=0.9)
        optimizer.param_groups[0]["hold_silent"] = True
        optimizer.rebase(gamma=-0.5)


@pytest.mark.parametrize("edited", ["float32", {"precond": "bfloat16"}, {"exp_avg": "int8", "precond": "bfloat16"}])
def test_state_dtypes_are_those_of_the_state(edited):
    """Before the first step a group's may be edited; later the state would not follow, so that is refused, until it is loaded again. What
    a change of γ may be goes by the dtype of the preconditioner."""
    p, optimizer = make(state_dtype="bfloat16", gamma=0.1)
    optimizer.init_state()
    optimizer.param_groups[0]["state_dtype"] = "float64"
    run(p, optimizer, range(1))
    assert optimizer.state[p]["precond"].dtype == torch.float64
    p, optimizer = make(state_dtype="bfloat16", gamma=0.1)
    run(p, optimizer, range(3))
    optimizer.param_groups[0]["state_dtype"] = edited
    before = p.detach().clone()
    for act in (lambda: run(p, optimizer, [3]), lambda: optimizer.rebase(gamma=1.0)):
        with pytest.raises(RuntimeError, match=r"state_dtype of param group 0 was changed to .* is in bfloat16"):
            act()
    assert torch.equal(p, before)
    optimizer.load_state_dict(optimizer.state_dict())
    if edited == "float32":
        optimizer.rebase(gamma=1.0)
    else:
        with pytest.raises(ValueError, match="bfloat16 carries a change of gamma by a factor of 4"):
            optimizer.rebase(gamma=1.0)
    run(p, optimizer, range(3, 9))


def test_learning_rate_as_a_tensor_and_schedulers():
    p, optimizer = make(lr=torch.tensor(0.01))
    q, other = make(lr=float(torch.tensor(0.01)))
    for o in (optimizer, other):
        o.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(o, 30)
    for t in range(10):
        run(p, optimizer, [t])
        run(q, other, [t])
        optimizer.scheduler.step()
        other.scheduler.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert not torch.equal(p, make()[0])


def test_learning_rate_tensor_on_the_device_of_the_parameters():
    """A learning rate that is a tensor when it reaches the update is used as one, never read by the host."""
    theta, v, m = [torch.ones(4)], [torch.full((4,), 2.0)], [torch.full((4,), 3.0)]
    update.apply_update(theta, v, m, lr=torch.tensor(0.5), debias=0.5, clip=None)
    assert torch.equal(theta[0], torch.full((4,), -5.0))


def test_closure_and_maximize():
    p, optimizer = make(maximize=True, weight_decay=0.0)
    q, other = make(weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert float(loss) == pytest.approx(float((q.detach() ** 2).sum()))
    q.grad = -2 * q.detach()
    other.step()
    assert torch.equal(p, q)


# -- dispatch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_bits_do_not_depend_on_where_a_parameter_is_cut(fused):
    """Shards of any length and alignment give the bits of the whole: γ's powers and all."""
    whole, optimizer = make(shape=(997,), gamma=0.7, window="auto", fused=fused)
    cuts = [0, 1, 2, 5, 8, 15, 31, 64, 100, 228, 229, 500, 996, 997]
    shards = [nn.Parameter(whole.detach()[a:b].clone()) for a, b in itertools.pairwise(cuts)]
    # a view that starts at an odd address, too
    shards.append(nn.Parameter(torch.empty(998)[1:]))
    shards[-1].data.copy_(whole.detach())
    sharded = Anon(shards, gamma=0.7, window="auto", fused=fused, **LM)
    for t in range(60):
        run(whole, optimizer, [t])
        for (a, b), shard in zip([*itertools.pairwise(cuts), (0, 997)], shards, strict=True):
            shard.grad = whole.grad[a:b].clone()
        sharded.step()
    assert torch.equal(torch.cat([s.detach() for s in shards[:-1]]), whole)
    assert torch.equal(shards[-1], whole)
    assert torch.equal(torch.cat([sharded.state[s]["precond"] for s in shards[:-1]]), optimizer.state[whole]["precond"])


@pytest.mark.parametrize("hyper", [{}, {"update_clip": None}, {"gamma": 0.5, "window": 4}])
def test_foreach_gives_the_same_bits(hyper):
    shapes = [(63, 63), (1,), (), (0,), (5, 0), (128,), (3, 4, 5)]
    params = {
        f: [nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i))) for i, s in enumerate(shapes)]
        for f in (True, False)
    }
    optimizers = {f: Anon(ps, **{**LM, **hyper}, foreach=f) for f, ps in params.items()}
    for t in range(30):
        for f, ps in params.items():
            for i, p in enumerate(ps):
                p.grad = gradient(p, 100 * t + i) if (t + i) % 3 else None  # so that step counts differ
            optimizers[f].step()
    for a, b in zip(params[True], params[False], strict=True):
        assert_same_bits(a, optimizers[True], b, optimizers[False])


@pytest.mark.parametrize("fused", [False, True])
def test_strides_are_kept_and_do_not_matter(fused):
    p = nn.Parameter(torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last))
    q = nn.Parameter(p.detach().contiguous())
    optimizer, other = Anon([p], fused=fused, **LM), Anon([q], fused=fused, **LM)
    run(p, optimizer, range(12))
    run(q, other, range(12))
    assert optimizer.state[p]["exp_avg"].stride() == p.stride()
    assert_same_bits(p, optimizer, q, other)


def test_refresh_in_pieces_gives_the_same_bits(monkeypatch):
    p, optimizer = make(shape=(37, 5, 2), fused=False)
    q, other = make(shape=(37, 5, 2), fused=False)
    run(p, optimizer, range(12))
    monkeypatch.setattr(update, "REFRESH_ELEMENTS", 64)
    run(q, other, range(12))
    assert_same_bits(p, optimizer, q, other)


def test_asking_for_the_state_of_a_parameter_without_one_changes_nothing():
    """torch's `state` is a defaultdict: the question leaves an empty entry."""
    p, frozen = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4), requires_grad=False)
    optimizer = Anon([p, frozen], lr=0.1)
    assert optimizer.state[frozen].get("step") is None
    assert optimizer.state[p].get("step") is None
    assert optimizer.next_gammas() == [1.0]
    p.grad = torch.ones(4)
    optimizer.step()
    optimizer.rebase(beta3=0.9)
    saved = optimizer.state_dict()
    assert list(saved["state"]) == [0]
    other = Anon([nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4), requires_grad=False)], lr=0.1)
    other.load_state_dict(saved)
    optimizer.step()


@pytest.mark.parametrize("fused", [None, False])
def test_a_gradient_scale_is_a_number_or_a_tensor_of_one_element(fused):
    ends = []
    for scale in (torch.tensor(4.0), torch.tensor([4.0]), 4.0, 4, np.float32(4.0)):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(4))
        optimizer = Anon([p], lr=0.1, fused=fused)
        p.grad, optimizer.grad_scale = torch.ones(4), scale
        for flag in (True, 1.0, np.bool_(True), False):
            optimizer.found_inf = flag
            optimizer.step()
        assert float(optimizer.state[p]["step"]) == 1.0
        ends.append(p)
    assert all(torch.equal(ends[0], end) for end in ends)
    for name in ("grad_scale", "found_inf"):
        for wrong, said in (("4", "'4'"), (torch.ones(2), "a tensor of 2"), ([1.0], r"\[1.0\]")):
            optimizer = Anon([p])
            setattr(optimizer, name, wrong)
            with pytest.raises(
                TypeError, match=f"optimizer.{name} must be a number or a tensor of one element, not {said}"
            ):
                optimizer.step()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")  # torch's
def test_a_parameter_twice_in_a_group_is_refused():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="appears more than once in a param group"):
        Anon([p, q, p])
    optimizer = Anon([p])
    with pytest.raises(ValueError, match="appears more than once in a param group"):
        optimizer.add_param_group({"params": [q, q]})
    assert len(optimizer.param_groups) == 1


def test_an_argument_that_there_is_not_is_refused_by_name():
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match=r"^Anon: no argument 'gama' \(gamma\?\)$"):
        Anon([p], gama=1.0)
    with pytest.raises(TypeError, match=r"^Anon: no argument 'momentum'$"):
        Anon([p], momentum=0.9)
    for key, near in (("gama", "gamma"), ("weigth_decay", "weight_decay"), ("update_clipp", "update_clip")):
        words = rf"^Anon: in a param group: no argument '{key}' \({near}\?\)$"
        with pytest.raises(TypeError, match=words):
            Anon([{"params": [p], key: 1.0}])
        optimizer = Anon([nn.Parameter(torch.zeros(2))])
        with pytest.raises(TypeError, match=words):
            optimizer.add_param_group({"params": [p], key: 1.0})
        assert len(optimizer.param_groups) == 1
    own = {"params": [p], "name": "a", "lr_scale": 0.5, "weight_decay_mult": 2.0, "initial_lr": 0.1, "max_lr": 1.0}
    group = Anon([own]).param_groups[0]
    assert {key: group[key] for key in own} == own
    adamw = torch.optim.AdamW([p])
    torch.optim.lr_scheduler.OneCycleLR(adamw, 0.1, 10)
    Anon(adamw.param_groups)
