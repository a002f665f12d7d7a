"""γ that is edited between steps: it takes effect at a refresh, for all of a group's parameters, and survives a checkpoint anywhere.

The arithmetic is compared with the float64 reference, step by step, in `test_reference.py`, `test_kernels.py` and `gpu_cases.py`.
"""

import copy
import io
import json
import warnings

import pytest
import torch
from torch import nn

from anon_dist import Anon
from anon_dist.optim import STATE_KEYS, ReferenceAnon
from anon_dist.optim.regime import HISTORY

LM = {"betas": (0.9, 0.95), "refresh_ratio": 2.0, "beta3": 0.8, "update_clip": 1.0, "weight_decay": 0.1}
LEN = 7


def make(**hyper):
    p = nn.Parameter(torch.linspace(-1, 1, LEN))
    return p, Anon([p], **{**LM, **hyper})


def gradient(p, t):
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 + t))


def run(p, optimizer, steps, schedule=None):
    for t in steps:
        if schedule:
            optimizer.param_groups[0]["gamma"] = schedule(t)
        p.grad = gradient(p, t)
        optimizer.step()


def rising(t):
    return 0.2 + 0.03 * t


def assert_same_bits(p, optimizer, q, other):
    assert torch.equal(p, q)
    for key in STATE_KEYS:
        assert torch.equal(optimizer.state[p][key], other.state[q][key]), key


def test_nothing_changes_before_the_refresh():
    """ρ = 2: refreshes at 8 and 16. An edit before step 9 that is taken back before step 16 leaves no trace."""
    (p, optimizer), (q, other) = make(), make()
    run(p, optimizer, range(8))
    run(q, other, range(8))
    optimizer.param_groups[0]["gamma"] = 0.5
    run(p, optimizer, range(8, 15))
    run(q, other, range(8, 15))
    assert_same_bits(p, optimizer, q, other)
    untouched = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["gamma"] = 1.0
    run(p, optimizer, range(15, 40))
    run(q, other, range(15, 40))
    assert_same_bits(p, optimizer, q, other)
    assert optimizer.param_groups[0][HISTORY] == other.param_groups[0][HISTORY] == untouched["param_groups"][0][HISTORY]


def test_an_edit_below_zero_warns_once_for_each_group():
    """As the constructor and `rebase` do; a schedule sets γ anew before each step."""
    params = [nn.Parameter(torch.linspace(-1, 1, LEN)) for _ in range(3)]
    optimizer = Anon([{"params": [params[0]]}, {"params": [params[1]]}, {"params": [params[2]], "hold_silent": True}])

    def steps(gammas):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for t, gamma in enumerate(gammas):
                for p in params:
                    p.grad = gradient(p, t)
                for group in optimizer.param_groups:
                    group["gamma"] = gamma
                optimizer.step()
        return [str(w.message) for w in found]

    assert steps([0.5, 0.1]) == []
    found = steps([-0.1, -0.2, -0.2, -0.3])
    assert len(found) == 2
    assert all("at gamma = -0.1 and" in text and "hold_silent=True" in text for text in found)
    assert steps([0.5, -0.5]) == []
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer = copy.deepcopy(optimizer)
    params = [group["params"][0] for group in optimizer.param_groups]
    assert steps([-0.6]) == []
    optimizer.param_groups[2]["hold_silent"] = False
    assert len(steps([-0.7])) == 1


def test_next_gammas_is_what_the_next_update_is_made_with():
    p, optimizer = make()
    seen = []
    for t in range(20):
        optimizer.param_groups[0]["gamma"] = rising(t)
        seen += optimizer.next_gammas()
        run(p, optimizer, [t])
        assert json.loads(optimizer.param_groups[0][HISTORY])[-1]["gamma"] == seen[-1]
    last_refresh = [0, 1, 1, 3, 3, 3, 3, 7, 7, 7, 7, 7, 7, 7, 7, 15, 15, 15, 15, 15]
    assert seen == [rising(t) for t in last_refresh]
    assert len(json.loads(optimizer.param_groups[0][HISTORY])) == 1  # a schedule does not make it grow


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("old", "new"), [(-1.0, -0.5), (0.5, -1.0), (-1.0, 0.0), (0.0, -1.0), (-0.1, -1.0), (0.1, -1.0)]
)
def test_silent_coordinates_that_are_held_are_at_the_new_gamma(old, new, state_dtype, fused):
    """One that was never active stays neutral, v = 1, from γ > 0 at σ = ε; one that was keeps its σ: v = σ^(−γ'/2). From γ = 0 nothing is
    known: neutral. From γ = ±0.1 bfloat16 carries too little for the others, which start from their gradients: the held have nothing
    else."""
    p, optimizer = make(gamma=old, hold_silent=True, state_dtype=state_dtype, fused=fused, beta3=0.0)
    for t in range(16):
        p.grad = gradient(p, t)
        p.grad[0] = 0.0
        p.grad[1] = 1e-2 if t < 8 else 0.0
        optimizer.param_groups[0]["gamma"] = new if t >= 8 else old
        optimizer.step()
    v = optimizer.state[p]["precond"].double()
    rounding = {"float32": 1e-6, "bfloat16": 2.0**-7}[state_dtype] * (1.0 + abs(new / old) if old else 1.0)
    assert float(v[0]) == pytest.approx(1e-16 ** (-new / 2) if old > 0.0 else 1.0, rel=rounding)
    assert float(v[1]) == pytest.approx(1e-4 ** (-new / 2) if old else 1.0, rel=rounding)


@pytest.mark.parametrize("fused", [True, False])
def test_held_coordinates_go_on_beyond_what_float32_carries_for_the_others(fused):
    """|γ'/γ| = 500. The others' d is σ^γ' alone, as if β3 were 0 there."""
    p, optimizer = make(gamma=-0.002, hold_silent=True, fused=fused)
    q, other = make(gamma=-1.0, hold_silent=True, fused=fused, beta3=0.0)
    reference = ReferenceAnon(p, **LM, gamma=-0.002, hold_silent=True)
    for t in range(16):
        g = gradient(p, t)
        g[1] = 1e-2 if t < 8 else 0.0
        optimizer.param_groups[0]["gamma"] = reference.gamma = -1.0 if t >= 8 else -0.002
        for x, o in ((p, optimizer), (q, other)):
            x.grad = g.clone()
            o.step()
        reference.step(g)
    v = optimizer.state[p]["precond"]
    torch.testing.assert_close(v.double(), reference.v, rtol=500 * 2.0**-23, atol=0.0)
    assert float(v[1]) == pytest.approx(1e-2, rel=500 * 2.0**-23)
    torch.testing.assert_close(v[2:], other.state[q]["precond"][2:], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("gamma", [5e-324, -5e-324])
def test_held_coordinates_at_a_gamma_that_is_next_to_zero_are_neutral(gamma):
    p, optimizer = make(gamma=gamma, hold_silent=True)
    p.grad = torch.ones(LEN)
    optimizer.step()
    optimizer.param_groups[0]["gamma"] = -4.0
    p.grad = torch.zeros(LEN)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["precond"], torch.ones(LEN))


@pytest.mark.parametrize("fused", [True, False])
def test_nothing_is_held_above_zero(fused):
    """A coordinate that was silent in the first step only would stay neutral, far from its σ^(−γ/2), for a thousand steps."""
    (p, optimizer), (q, other) = (make(gamma=1.0, hold_silent=hold, fused=fused) for hold in (True, False))
    for t in range(12):
        p.grad = gradient(p, t)
        if t == 0:
            p.grad[:3] = 0.0
        q.grad = p.grad.clone()
        optimizer.step()
        other.step()
    assert_same_bits(p, optimizer, q, other)


def test_from_zero_the_refresh_is_as_the_first():
    """β3 keeps nothing of v = 1: d = σ^γ'."""
    (p, optimizer), (q, other) = make(gamma=0.0), make(gamma=0.5, beta3=0.0)
    run(p, optimizer, range(16), lambda t: 0.5 if t >= 8 else 0.0)
    run(q, other, range(16))
    torch.testing.assert_close(optimizer.state[p]["precond"], other.state[q]["precond"], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "exp_avg=int8, exp_avg_sq=bfloat16, precond=bfloat16"])
@pytest.mark.parametrize("at", [0, 1, 6, 7, 8, 9, 14, 15, 16, 17])
def test_resume_is_bit_exact(at, state_dtype):
    p, optimizer = make(state_dtype=state_dtype)
    run(p, optimizer, range(at), rising)
    file = io.BytesIO()
    torch.save({"model": p.detach().clone(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    q, resumed = make(state_dtype=state_dtype)
    q.data.copy_(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    run(p, optimizer, range(at, at + 40), rising)
    run(q, resumed, range(at, at + 40), rising)
    assert_same_bits(p, optimizer, q, resumed)
    q, constant = make(state_dtype=state_dtype)
    run(q, constant, range(at + 40))
    assert not torch.equal(p, q)


def missing(name, t):
    """`often` gets a gradient in every step, `rare` in two of three, `late` from step 12 on."""
    return (name == "rare" and t % 3 == 0) or (name == "late" and t < 12)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("fused", [None, False])
def test_parameters_that_are_behind_turn_with_the_group(fused, foreach):
    """Against the reference: converted at once where the group's foremost parameter is refreshed, so that one lr fits all."""
    if fused is None and foreach is False:
        fused = True
    names = ("often", "rare", "late")
    hyper = {**LM, "refresh_ratio": 1.3, "gamma": rising(0)}
    params = {name: nn.Parameter(torch.linspace(-1, 1, LEN).double()) for name in names}
    kinds = {"fused": False, "foreach": foreach, "state_dtype": "float64"}
    if fused:  # in float32
        params = {name: nn.Parameter(p.detach().float()) for name, p in params.items()}
        kinds = {"fused": True}
    optimizer = Anon(params.values(), **hyper, **kinds)
    references = {name: ReferenceAnon(p, **hyper) for name, p in params.items()}
    for t in range(60):
        optimizer.param_groups[0]["gamma"] = rising(t)
        (gamma,) = optimizer.next_gammas()
        for i, (name, p) in enumerate(params.items()):
            reference, p.grad = references[name], None
            grad = gradient(p, 10 * t + i).to(p.dtype)
            refreshed = not missing(name, t) and reference.t + 1 == reference.next_refresh
            if reference.t and not refreshed:
                reference.v = reference.v ** (gamma / reference.v_gamma)
            if not refreshed:
                reference.v_gamma = gamma
            reference.gamma = gamma
            if not missing(name, t):
                p.grad = grad
                reference.step(grad)
        optimizer.step()
        tolerance = 1e-5 if fused else 1e-10
        for name, p in params.items():
            torch.testing.assert_close(p.detach().double(), references[name].theta, rtol=tolerance, atol=tolerance)
            if references[name].t:
                v = optimizer.state[p]["precond"].double()
                torch.testing.assert_close(v, references[name].v, rtol=tolerance, atol=0.0)


def in_parts(optimizer, parts):
    """A step of a group that is shown in parts."""
    (group,) = optimizer.param_groups
    whole = group["params"]
    for part in parts:
        group["params"] = part
        optimizer.step()
    group["params"] = whole


@pytest.mark.parametrize("late_comes", ["after", "before"])
def test_a_late_parameter_is_converted_as_often_as_gamma_changes_while_it_is_hidden(late_comes):
    """ρ = 2. γ changes with step 8 of the foremost, while the late one is hidden. If it starts afterwards, its preconditioner is of the
    new γ at its own step 8 too; if it has started before, it is converted when it is shown, though that is its step 5."""
    hyper = {**LM, "gamma": 0.5}
    late, often = (nn.Parameter(torch.linspace(-1, 1, LEN).double()) for _ in range(2))
    optimizer = Anon([late, often], **hyper, state_dtype="float64", fused=False)
    reference = ReferenceAnon(late, **hyper)
    starts = {"after": 9, "before": 4}[late_comes]
    for t in range(30):
        if t == 7:
            optimizer.param_groups[0]["gamma"] = 1.5
        often.grad, late.grad = gradient(often, t).double(), None
        if t >= starts:
            late.grad = gradient(late, 100 + t).double()
            if t == 8 and late_comes == "before":  # its step 5 is no refresh: beside it
                reference.v = reference.v**3.0
            reference.gamma = 1.5 if t >= 8 else 0.5
            if t >= 8:
                reference.v_gamma = 1.5
            reference.step(late.grad)
        in_parts(optimizer, ([late], [often]))
        if t >= starts:
            torch.testing.assert_close(optimizer.state[late]["precond"], reference.v, rtol=1e-10, atol=0.0)
            torch.testing.assert_close(late.detach(), reference.theta, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("how", ["saved", "copied"])
def test_what_is_hidden_is_converted_before_the_state_goes_elsewhere(how):
    p, q = (nn.Parameter(torch.linspace(-1, 1, LEN)) for _ in range(2))
    optimizer = Anon([p, q], **LM, gamma=0.5)
    for t in range(8):
        optimizer.param_groups[0]["gamma"] = 1.0 if t == 7 else 0.5
        p.grad, q.grad = gradient(p, t), gradient(q, t) if t < 5 else None
        in_parts(optimizer, ([q], [p]))
    v = optimizer.state[q]["precond"].clone()
    copied = copy.deepcopy(optimizer) if how == "copied" else None
    state = copied.state[copied.param_groups[0]["params"][1]] if copied else optimizer.state_dict()["state"][1]
    torch.testing.assert_close(state["precond"], v**2.0)


def test_what_is_hidden_and_cannot_be_converted_is_refused():
    """γ = 0 is left while a parameter is hidden that had no gradient in this step and the one before."""
    p, q = (nn.Parameter(torch.linspace(-1, 1, LEN)) for _ in range(2))
    optimizer = Anon([p, q], **LM, gamma=0.0)

    def take(t, missing=()):
        p.grad, q.grad = gradient(p, t), None if t in missing else gradient(q, t)
        in_parts(optimizer, ([p], [q]))

    for t in range(7):
        take(t, missing=(6,))
    optimizer.param_groups[0]["gamma"] = 0.5
    with pytest.raises(
        RuntimeError, match=r"gamma of param group 0 was changed from 0\.0 to 0\.5, and 1 of its parameters"
    ):
        take(7)
    optimizer.param_groups[0].update(gamma=0.0, params=[p, q])
    take(7)  # p's step 8 and q's step 7
    optimizer.param_groups[0]["gamma"] = 0.5
    for t in range(8, 15):
        take(t)
    with pytest.raises(RuntimeError, match="1 of its parameters"):  # p's step 16
        take(15)


def test_parameters_that_are_behind_cannot_leave_zero():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Anon([p, q], gamma=0.0, **LM)
    for t in range(7):
        p.grad, q.grad = gradient(p, t), gradient(p, t) if t < 5 else None
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"]), p.detach().clone(), optimizer.param_groups[0][HISTORY]
    optimizer.param_groups[0]["gamma"] = 0.5
    with pytest.raises(
        RuntimeError, match=r"gamma of param group 0 was changed from 0\.0 to 0\.5, and 1 of its parameters"
    ):
        optimizer.step()
    torch.testing.assert_close(optimizer.state_dict()["state"], before[0], rtol=0, atol=0)
    assert torch.equal(p, before[1])
    assert optimizer.param_groups[0][HISTORY] == before[2]
    optimizer.param_groups[0]["gamma"] = 0.0
    optimizer.step()


def test_a_step_in_parts_gives_the_same_bits():
    whole, parts = ([nn.Parameter(torch.linspace(-1, 1, n)) for n in (3, 8)] for _ in range(2))
    optimizers = Anon(whole, **LM), Anon(parts, **LM)
    for t in range(20):
        for params, optimizer in zip((whole, parts), optimizers, strict=True):
            optimizer.param_groups[0]["gamma"] = rising(t)
            for i, p in enumerate(params):
                p.grad = gradient(p, 10 * t + i) if i or t % 5 else None
        optimizers[0].step()
        for part in optimizers[1].split_step([[parts[1]], [parts[0]]]):
            part()
    for p, q in zip(whole, parts, strict=True):
        assert_same_bits(p, optimizers[0], q, optimizers[1])


def test_a_group_that_is_shown_in_parts_gives_the_same_bits():
    """As DeepSpeed's stage 3 steps it: the second part takes the step after γ has come into force with the first."""
    whole, apart = ([nn.Parameter(torch.linspace(-1, 1, n)) for n in (3, 8)] for _ in range(2))
    together, optimizer = Anon(whole, **LM), Anon(apart, **LM)
    optimizer.init_state()
    for t in range(40):
        for i, (p, q) in enumerate(zip(whole, apart, strict=True)):
            p.grad = q.grad = gradient(p, 10 * t + i)
        together.param_groups[0]["gamma"] = optimizer.param_groups[0]["gamma"] = rising(t)
        together.step()
        for q in apart:
            optimizer.param_groups[0]["params"] = [q]
            optimizer.step()
        optimizer.param_groups[0]["params"] = apart
        if t == 20:  # a checkpoint between steps
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(whole, apart, strict=True):
        assert_same_bits(p, together, q, optimizer)
