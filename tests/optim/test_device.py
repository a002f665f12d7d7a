"""What a step takes from the device without the host looking: a scale of the gradients, and whether it is taken at all."""

import itertools

import pytest
import torch
from torch import nn

from anon_dist import Anon
from anon_dist.optim import STATE_KEYS, ReferenceAnon
from anon_dist.optim.backends import cpu, foreach
from anon_dist.optim.plan import StepPlan, Variant

HYPER = {"lr": 0.01, "betas": (0.9, 0.95), "refresh_ratio": 1.5, "update_clip": 1.0, "weight_decay": 0.1, "window": 3}


def make(**hyper):
    params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 300)]
    return params, Anon(params, **{**HYPER, **hyper})


def give(params, t, scale=1.0):
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + i)) * scale


def assert_same(a, b, exact=True):
    (params, optimizer), (others, other) = a, b
    for p, q in zip(params, others, strict=True):
        for x, y in ((p, q), *((optimizer.state[p][k], other.state[q][k]) for k in STATE_KEYS)):
            assert torch.equal(x, y) if exact else torch.allclose(x, y, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [True, False])
def test_the_gradient_is_divided_by_the_scale_in_the_step(fused):
    """By a power of two: the bits of a step on the divided gradient; by another number: its values. The gradient stays as it is."""
    for scale, exact in ((256.0, True), (3.7, False)):
        mine, theirs = make(fused=fused), make(fused=fused)
        for t in range(12):
            give(mine[0], t, scale)
            give(theirs[0], t, scale)
            before = [p.grad.clone() for p in mine[0]]
            for p in theirs[0]:
                p.grad.div_(scale)
            mine[1].grad_scale = torch.tensor(scale)
            mine[1].step()
            theirs[1].step()
            assert all(torch.equal(p.grad, g) for p, g in zip(mine[0], before, strict=True))
        assert_same(mine, theirs, exact)


@pytest.mark.parametrize("fused", [True, False])
def test_an_infinite_scale_is_a_gradient_of_zero(fused):
    """With Nesterov too, where the update is then β1 m, and not m."""
    mine, theirs = make(fused=fused, nesterov=True), make(fused=fused, nesterov=True)
    for t in range(6):
        give(mine[0], t)
        give(theirs[0], t)
        if t == 5:
            mine[1].grad_scale = torch.tensor(torch.inf)
            for p in theirs[0]:
                p.grad.zero_()
        mine[1].step()
        theirs[1].step()
    assert_same(mine, theirs)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("exponent", [65, 100, 123, -100])
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_scale_far_from_one_is_divided_out_before_the_gradient_is_squared(fused, exponent, nesterov):
    """Against float64, with steps of all three kinds."""
    values = {**HYPER, "nesterov": nesterov}
    p = nn.Parameter(torch.linspace(-1, 1, 300))
    reference, optimizer = ReferenceAnon(p, **values), Anon([p], fused=fused, **values)
    for t in range(20):
        scale = (1.0, 1.3, 0.7, 1.49, 1.51)[t % 5] * 2.0**exponent
        p.grad = torch.randn(300, generator=torch.Generator().manual_seed(t)) * scale
        optimizer.grad_scale = torch.tensor(scale)
        reference.step(p.grad.double() / float(optimizer.grad_scale))
        optimizer.step()
        state = optimizer.state[p]
        for mine, theirs in ((p, reference.theta), (state["exp_avg_sq"], reference.s), (state["precond"], reference.v)):
            torch.testing.assert_close(mine.detach().double(), theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_scale_of_zero_or_no_number_spoils_the_step_and_raises_nothing(fused, nesterov):
    for scale in (0.0, -0.0, torch.nan):
        params, optimizer = make(fused=fused, nesterov=nesterov)
        for t in range(3):
            give(params, t)
            params[0].grad[0] = 0.0
            optimizer.grad_scale = torch.tensor(scale if t == 1 else 1.0)
            optimizer.step()
        assert all(p.isnan().all() for p in params)


def test_torchs_scaler_may_double_its_scale_for_long():
    """As it does for AdamW: until float32 overflows, which halves it."""
    ends = {}
    for name, make_one in (("Anon", lambda params: Anon(params, **HYPER)), ("AdamW", torch.optim.AdamW)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        optimizer = make_one(model.parameters(), **({"lr": 0.01, "fused": True} if name == "AdamW" else {}))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
        x = torch.randn(64, 8)
        for _ in range(400):
            loss = (model(x) - x[:, :1] * x[:, 1:2]).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        ends[name] = loss.item(), scaler.get_scale()
    assert all(loss < 1e-3 for loss, _ in ends.values()), ends
    assert all(scale > 2.0**110 for _, scale in ends.values()), ends


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("values", [{}, {"update_clip": None}, {"nesterov": True}, {"betas": (0.0, 0.95)}])
def test_an_infinite_gradient_spoils_its_element_and_no_other(fused, values):
    """A clip makes no step of it: an infinite m would move the element by the clip in every step to come."""
    for t in range(5, 8):  # a plain, an accumulating and a refreshing step
        p = nn.Parameter(torch.ones(70))
        optimizer = Anon([p], fused=fused, **{**HYPER, "refresh_ratio": 1.6, "window": 2, **values})
        reference = ReferenceAnon(p, **{**HYPER, "refresh_ratio": 1.6, "window": 2, **values})
        for step in range(t + 1):
            p.grad = torch.linspace(-1, 1, 70)
            if step == t:
                p.grad[3], p.grad[68] = torch.inf, -torch.inf
            optimizer.step()
            reference.step(p.grad)
        assert p.isnan().nonzero().flatten().tolist() == [3, 68]
        assert torch.equal(p.isnan(), reference.theta.isnan())


@pytest.mark.parametrize("fused", [True, False])
def test_what_overflows_from_a_finite_mean_is_clipped(fused):
    p = nn.Parameter(torch.zeros(4))
    optimizer = Anon([p], fused=fused, lr=1.0, update_clip=0.5)
    p.grad = torch.tensor([1.0, -1.0, 0.0, 1.0])
    optimizer.step()
    optimizer.state[p]["exp_avg"].copy_(torch.tensor([1e30, -1e30, 0.0, 0.0]))
    optimizer.state[p]["precond"].fill_(2.0**63)
    optimizer.param_groups[0]["refresh_ratio"] = 2.0
    before = p.detach().clone()
    p.grad = torch.zeros(4)
    optimizer.state[p]["step"].fill_(2)  # the next step is plain
    optimizer.step()
    assert torch.equal(before - p, torch.tensor([0.5, -0.5, 0.0, 0.0]))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_is_not_taken_leaves_no_trace(fused, late, monkeypatch):
    """`late`: as on a GPU, where the host learns of it at the next step, or when somebody asks."""
    mine, theirs = make(fused=fused), make(fused=fused)
    if late:
        monkeypatch.setattr("anon_dist.optim.scaling.known_to_the_host", lambda flag: False)
    for t in range(12):
        give(theirs[0], t)
        theirs[1].step()
        for skipped in (True, False) if t % 3 == 0 else (False,):
            give(mine[0], t)
            if skipped:
                mine[0][0].grad[2] = torch.inf
            mine[1].found_inf = torch.tensor(float(skipped))
            mine[1].step()
            assert mine[1].next_gammas() == [1.0]
        mine[1].settle()
        assert_same(mine, theirs)
    assert {float(s["step"]) for s in mine[1].state_dict()["state"].values()} == {12.0}


def test_torchs_grad_scaler_drives_it():
    mine, theirs = make(), make()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for t in range(10):
        give(theirs[0], t)
        if t != 4:
            theirs[1].step()
        scaler.scale(torch.zeros(()))  # makes the scale
        give(mine[0], t, 1024.0)
        if t == 4:
            mine[0][1].grad[7] = torch.nan
        scaler.step(mine[1])
        scaler.update()
        scaler._scale.fill_(1024.0)
        assert not hasattr(mine[1], "grad_scale")
        assert not hasattr(mine[1], "found_inf")
    assert_same(mine, theirs)


@pytest.mark.parametrize("variant", list(Variant))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update_is_handed_back(variant, dtype):
    """θ becomes clip(v · m̂), by every backend, on a gradient and into a tensor that are no parameter's; m, s and v are as ever."""
    generator = torch.Generator().manual_seed(0)
    g, m, s, v = (torch.randn(3, 700, generator=generator) for _ in range(4))
    states = [[m.to(dtype)], [s.abs().to(dtype)], [v.abs().add(0.1).to(dtype)]]
    values = {"step": 5, "variant": variant, "beta1": 0.9, "beta2": 0.95, "clip": 0.8}
    values |= {"debias_s": 0.3, "keep_d": 0.5, "gamma": 0.7}
    plan = StepPlan(lr=0.3, weight_decay=0.1, **values)
    for run in (cpu.run, foreach.run):
        applied = [[torch.zeros(3, 700)], [g.clone()], *([t.clone() for t in x] for x in states)]
        handed = [[torch.full((3, 700), 9.0)], [g.clone()], *([t.clone() for t in x] for x in states)]
        run(tuple(applied), [StepPlan(lr=1.0, weight_decay=0.0, **values)])
        run(tuple(handed), [plan.handing_back()])
        torch.testing.assert_close(handed[0][0], -applied[0][0], rtol=1e-6, atol=1e-7)
        assert float(handed[0][0].abs().max()) <= 0.8 * (1 + 1e-6)
        for a, b in zip(applied[2:], handed[2:], strict=True):
            assert torch.equal(a[0], b[0])


def test_parameters_at_many_steps_are_one_call(monkeypatch):
    """Half of the gradients are missing at random: the counts spread, and the kernel takes them all together; bits as one by one."""
    calls = []
    original = cpu.run
    monkeypatch.setattr(cpu, "run", lambda *args: (calls.append(len(args[1])), original(*args))[1])
    generator = torch.Generator().manual_seed(3)
    together, apart = ([nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(20)] for _ in range(2))
    one, several = Anon(together, **HYPER), [Anon([p], **HYPER) for p in apart]
    for t in range(40):
        there = torch.rand(20, generator=generator) < 0.5
        for i, (p, q) in enumerate(zip(together, apart, strict=True)):
            g = torch.randn(7, generator=torch.Generator().manual_seed(100 * t + i))
            p.grad, q.grad = (g if there[i] else None), (g.clone() if there[i] else None)
        calls.clear()
        one.step()
        assert calls == [int(there.sum())]
        for optimizer, q in zip(several, apart, strict=True):
            if q.grad is not None:
                optimizer.step()
    for (p, q, optimizer), k in itertools.product(zip(together, apart, several, strict=True), STATE_KEYS):
        assert torch.equal(p, q)
        assert torch.equal(one.state[p][k], optimizer.state[q][k])


def test_a_captured_step_is_refused(monkeypatch):
    params, optimizer = make()
    give(params, 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        optimizer.step()
    assert not len(optimizer.state)


def test_asking_for_the_truth_of_the_state_allocates_nothing():
    """torch's checkpoints ask before parameters may be sharded; told no, they would take a step on zero gradients."""
    _, optimizer = make()
    assert optimizer.state
    assert len(optimizer.state) == 0
    assert len(optimizer.state_dict()["state"]) == 2
