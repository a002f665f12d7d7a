"""Anon against the float64 reference, step by step from equal state."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anon_dist.optim import STATE_KEYS, Anon, ReferenceAnon

UNIT = 2.0**-24
# A result of float32 products and sums carries the rounding of each coefficient, each product and each sum: at most 4 units of the
# summed magnitudes. The preconditioner is computed in float64 and rounded once.
UNITS, ULPS = 4, 1

hyperparameters = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-3, 0.3]),
        "betas": st.tuples(st.sampled_from([0.0, 0.9, 0.99]), st.sampled_from([0.0, 0.5, 0.95, 0.999])),
        "eps": st.sampled_from([1e-16, 1e-8, 1e-3]),
        "gamma": st.one_of(st.floats(-4, 4), st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "refresh_ratio": st.sampled_from([1.05, 1.1, 1.5, 2.0, 3.0]),
        "beta3": st.sampled_from([0.0, 0.5, 0.8]),
        "update_clip": st.sampled_from([None, 1.0, 0.01]),
        "window": st.sampled_from([None, "auto", 1, 3, 7]),
        "hold_silent": st.booleans(),
        "maximize": st.booleans(),
        "nesterov": st.booleans(),
        "cautious_decay": st.booleans(),
        "max_interval": st.sampled_from([None, 1, 4]),
    }
)
new_gammas = st.dictionaries(
    st.integers(0, 19), st.one_of(st.floats(-3, 3), st.sampled_from([-1.0, 0.0, 1e-9, 0.5, 1.0])), max_size=4
)
"""Step → γ that is set before it."""
shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)


def copy_state(optimizer, p, reference):
    """Give the reference the optimizer's parameter and state, exactly."""
    state = optimizer.state[p]
    reference.theta = p.detach().double().clone()
    reference.m, reference.s, reference.v = (state[k].double().clone() for k in STATE_KEYS[1:])
    reference.skip_to(int(state["step"]))


def assert_close(actual, expected, magnitude, what):
    error = (actual.double() - expected).abs()
    assert (error <= UNITS * UNIT * magnitude + 2.0**-140).all(), (
        f"{what}: {(error / magnitude).max() / UNIT:.2f} units"
    )


def moved_by(reference, m, g):
    """v times the mean that θ moves by, of these m and g: their values or their magnitudes."""
    beta1, weight = reference.beta1, 1 - reference.beta1**reference.t
    if reference.nesterov:
        m, weight = beta1 * m + (1 - beta1) * g, 1 - beta1 ** (reference.t + 1)
    return reference.v * m / weight


def but_clipped(reference, magnitude, g):
    """The magnitudes of what an update is summed from, no more than the clip where rounding could not undo the clipping."""
    clip = reference.update_clip
    if clip is None:
        return magnitude
    update = moved_by(reference, reference.m, -g if reference.maximize else g).abs()
    return torch.where(update - 16 * UNIT * magnitude > clip, clip * (1 + 8 * UNIT), magnitude)


def undecided(reference, magnitude, g, theta):
    """What decay adds where rounding decides whether it does: where the update is as small as its own rounding."""
    if not reference.cautious:
        return 0.0
    update = moved_by(reference, reference.m, -g if reference.maximize else g).abs()
    unclear = (update <= 16 * UNIT * magnitude) | (update * theta < 2.0**-120)
    return unclear * reference.lr * reference.weight_decay * theta


def assert_one_step_agrees(optimizer, p, reference, grad):
    old = {k: optimizer.state[p][k].double().abs().clone() for k in STATE_KEYS[1:]}
    theta = p.detach().double().abs()
    p.grad = grad.to(p.dtype)
    optimizer.step()
    reference.step(p.grad)
    g, state = p.grad.double().abs(), optimizer.state[p]
    beta1, beta2 = reference.beta1, reference.beta2
    assert int(state["step"]) == reference.t
    assert_close(
        state["exp_avg"], reference.m, beta1 * old["exp_avg"] + 2 * (1 - beta1) * (g + old["exp_avg"]), "exp_avg"
    )
    assert_close(state["exp_avg_sq"], reference.s, beta2 * old["exp_avg_sq"] + (1 - beta2) * g * g, "exp_avg_sq")
    # The preconditioner is made from the second moment as rounded: 4 units of it are up to 2 |γ| in v.
    v_units = ULPS * 2 + UNITS * abs(reference.gamma)
    assert ((state["precond"].double() / reference.v - 1).abs() <= v_units * UNIT).all()
    size = moved_by(reference, beta1 * old["exp_avg"] + 2 * (1 - beta1) * (g + old["exp_avg"]), 2 * g)
    step = but_clipped(reference, size, p.grad.double())
    unclear = undecided(reference, size, p.grad.double(), theta) / (UNITS * UNIT)
    assert_close(p.detach(), reference.theta, theta + reference.lr * step * (1 + v_units) + unclear, "theta")


def set_gamma(optimizer, reference, gamma):
    optimizer.param_groups[0]["gamma"] = reference.gamma = gamma
    if reference.t == 0:
        reference.v_gamma = gamma


@pytest.mark.parametrize("fused", [False, True])
@settings(max_examples=120, deadline=None)
@given(
    hyper=hyperparameters,
    edits=new_gammas,
    shape=shapes,
    seed=st.integers(0, 1 << 20),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
)
def test_each_step_agrees(fused, hyper, edits, shape, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(shape, generator=generator))
    reference = ReferenceAnon(p, **hyper)
    with (
        pytest.warns(UserWarning, match="hold_silent")
        if hyper["gamma"] < 0 and not hyper["hold_silent"] and hyper["eps"] < 1e-10
        else _quiet()
    ):
        optimizer = Anon([p], **hyper, fused=fused)
    optimizer.init_state()
    for t in range(20):
        copy_state(optimizer, p, reference)
        set_gamma(optimizer, reference, edits.get(t, reference.gamma))
        grad = scale * torch.randn(shape, generator=generator)
        grad[torch.rand(shape, generator=generator) < 0.2] = 0.0
        assert_one_step_agrees(optimizer, p, reference, grad)


@settings(max_examples=40, deadline=None)
@given(hyper=hyperparameters, edits=new_gammas, seed=st.integers(0, 1 << 20), keep=st.floats(0.1, 1.0))
def test_whole_run_agrees_in_float64(hyper, edits, seed, keep):
    """With float64 parameters and state nothing but the order of operations differs, over 80 steps and with gradients missing."""
    generator = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(4, 5, generator=generator, dtype=torch.float64))
    reference = ReferenceAnon(p, **hyper)
    with _quiet(ignore=True):
        optimizer = Anon([p], **hyper, state_dtype=torch.float64)
    for t in range(80):
        p.grad = None
        set_gamma(optimizer, reference, edits.get(t / 4, reference.gamma))  # spread over the run
        if torch.rand((), generator=generator) < keep:
            p.grad = torch.randn(4, 5, generator=generator, dtype=torch.float64)
            reference.step(p.grad)
        optimizer.step()
    torch.testing.assert_close(p.detach(), reference.theta, rtol=1e-9, atol=1e-9 * float(reference.theta.abs().max()))
    if reference.t:
        torch.testing.assert_close(optimizer.state[p]["precond"], reference.v, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("state_dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("fused", [False, None])
def test_low_precision_parameters_are_updated_in_float32(dtype, state_dtype, fused):
    """The stored result is the exact one rounded once to the parameter's dtype (a tie may fall the other way)."""
    p = nn.Parameter(torch.randn(63, 63).to(dtype))
    hyper = {"lr": 0.01, "betas": (0.9, 0.95), "refresh_ratio": 1.1, "update_clip": 1.0, "weight_decay": 0.1}
    optimizer = Anon([p], **hyper, state_dtype=state_dtype, fused=fused)
    optimizer.init_state()
    reference = ReferenceAnon(p, **hyper)
    for _ in range(10):
        copy_state(optimizer, p, reference)
        p.grad = torch.randn(63, 63).to(dtype)
        optimizer.step()
        reference.step(p.grad)
        assert {optimizer.state[p][k].dtype for k in STATE_KEYS[1:]} == {getattr(torch, state_dtype)}
        # The step uses the momentum before it is rounded to the state's dtype, as it uses the reference's.
        spacing = torch.finfo(dtype).eps * reference.theta.abs().clamp(min=torch.finfo(dtype).smallest_normal)
        rounding = UNITS * 4 * UNIT * (reference.theta.abs() + 0.011 * 1.01)
        assert ((p.detach().double() - reference.theta).abs() <= 0.5 * spacing + rounding).all()


def test_gamma_zero_is_debiased_momentum_sgd():
    p, q = nn.Parameter(torch.randn(50)), torch.zeros(50, dtype=torch.float64)
    q.copy_(p.detach())
    optimizer = Anon([p], lr=0.1, betas=(0.9, 0.999), gamma=0.0)
    m = torch.zeros(50, dtype=torch.float64)
    for t in range(1, 40):
        p.grad = torch.randn(50) * 10 ** float(torch.randn(()))
        optimizer.step()
        m = 0.9 * m + 0.1 * p.grad.double()
        q -= 0.1 * m / (1 - 0.9**t)
        assert (optimizer.state[p]["precond"] == 1.0).all()
    torch.testing.assert_close(p.detach().double(), q, rtol=1e-5, atol=1e-5 * float(q.abs().max()))


def run(window, gradients, **hyper):
    p = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = Anon([p], betas=(0.9, 0.95), window=window, **hyper)
    for grad in gradients:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach(), optimizer.state[p]["precond"]


def test_auto_window_agrees_where_gradients_keep_their_scale():
    """β2 = 0.95, ρ = 2: the window of 325 steps leaves steps out from t = 513 on."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(200, generator=generator) for _ in range(2048)]
    (full, v_full), (windowed, v_windowed) = run(None, gradients), run("auto", gradients)
    torch.testing.assert_close(v_windowed, v_full, rtol=4e-7, atol=0.0)
    torch.testing.assert_close(windowed, full, rtol=1e-5, atol=1e-6)


def test_auto_window_stays_within_its_bound_where_they_do_not():
    """|Δσ| ≤ 2^-24 · max g² / (1 − β2^age); here for coordinates active before the window and silent inside it."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(200, generator=generator) * (100.0 if t < 1024 - 325 else 0.0) for t in range(1024)]
    # β3 = 0: v² is then 1 / σ of the last refresh alone
    (_, v_full), (_, v_windowed) = (run(w, gradients, beta3=0.0, lr=0.0) for w in (None, "auto"))
    largest = max(float(g.abs().max()) for g in gradients) ** 2
    age = 325
    bound = 2.0**-24 * largest / (1 - 0.95**age)
    difference = (v_full.double() ** -2 - v_windowed.double() ** -2).abs()
    assert (difference <= bound).all()
    assert (v_windowed > 10 * v_full).all()  # and it is what the documentation warns of


@pytest.mark.parametrize("state_dtype", ["float32", "float64"])
def test_hold_silent_keeps_the_preconditioner_of_silent_coordinates(state_dtype):
    """At γ = −1 a zero gradient at the first refresh leaves v at 1e-8 of normal; held, it stays neutral until the first gradient."""
    speeds = {}
    for hold in (False, True):
        with _quiet(ignore=True):
            p = nn.Parameter(torch.zeros(2))
            optimizer = Anon([p], gamma=-1.0, betas=(0.9, 0.95), hold_silent=hold, state_dtype=state_dtype)
        for t in range(1, 40):
            p.grad = torch.tensor([1.0, 0.0 if t < 20 else 1.0])
            optimizer.step()
        speeds[hold] = optimizer.state[p]["precond"].tolist()
    assert speeds[True][0] == speeds[False][0]
    assert speeds[False][1] < 1e-6
    assert speeds[True] == pytest.approx([1.0, 1.0], rel=0.05)  # the silent steps still count in its first mean


@pytest.mark.parametrize("gamma", [-4.0, -2.5, 3.0, 4.0])
def test_silent_coordinates_stay_finite_at_large_gamma(gamma):
    """ε = 1e-16: ε^3 and ε^−2.5 leave float32's range; d is clamped to it."""
    p = nn.Parameter(torch.zeros(3))
    with _quiet(ignore=True):
        optimizer = Anon([p], gamma=gamma)
    for _ in range(10):
        p.grad = torch.tensor([0.0, 1e-18, 1.0])
        optimizer.step()
    v = optimizer.state[p]["precond"]
    assert torch.isfinite(v).all()
    assert (v > 0).all()
    assert torch.isfinite(p).all()


@pytest.mark.parametrize("clip", [None, 1.0])
def test_update_clip_bounds_a_waking_coordinate(clip):
    """DESIGN's example: g = 0, 0, 1e-4 at ε = 1e-16 moves by thousands of normal steps, unless clipped."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = Anon([p], lr=1.0, update_clip=clip)
    for g in (0.0, 0.0, 1e-4):
        p.grad = torch.tensor([g])
        optimizer.step()
    moved = abs(float(p.detach()))
    assert moved == pytest.approx(1.0) if clip else moved > 3000


class _quiet:  # noqa: N801 - stands where pytest.warns would
    """No expectation about warnings; `ignore` drops them."""

    def __init__(self, ignore=False):
        self.ignore = ignore

    def __enter__(self):
        import warnings

        self.catch = warnings.catch_warnings()
        self.catch.__enter__()
        warnings.simplefilter("ignore" if self.ignore else "error")

    def __exit__(self, *exc):
        self.catch.__exit__(*exc)


def test_reference_is_the_paper():
    """The reference itself, against the paper's algorithm in scalar arithmetic: a_k = 2^k, β3 = 1/2."""
    grads = [math.sin(3 * t) for t in range(1, 40)]
    theta, m, s, v, d, k, last = 0.5, 0.0, 0.0, None, None, 0, 0
    reference = ReferenceAnon(torch.tensor(0.5), lr=0.01, gamma=0.7)
    for t, g in enumerate(grads, 1):
        m = 0.9 * m + 0.1 * g
        s = 0.999 * s + 0.001 * g * g
        if t == 2**k:
            sigma = s / (1 - 0.999 ** (t - last)) + 1e-16
            d = sigma**0.7 if k == 0 else (d + sigma**0.7) / 2
            v, s, last, k = d**-0.5, 0.0, t, k + 1
        theta -= 0.01 * v * m / (1 - 0.9**t)
        reference.step(torch.tensor(g, dtype=torch.float64))
    assert float(reference.theta) == pytest.approx(theta, rel=1e-12)
