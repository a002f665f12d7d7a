"""The GPU kernel, on a GPU: `pytest tests/optim/gpu_cases.py`. Or in Triton's interpreter, on CPU tensors: with TRITON_INTERPRET=1, as
`test_gpu_kernel.py` runs this file."""

import dataclasses
import itertools
import os
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_kernels import STEP, UNIT, clones, cpu_run, or_nan, some_lists
from test_reference import copy_state, hyperparameters, moved_by, new_gammas, set_gamma, undecided
from torch import nn

from anon_dist import Anon
from anon_dist.optim import STATE_KEYS, ReferenceAnon, rounding
from anon_dist.optim.backends import choice, cpu, gpu
from anon_dist.optim.backends.gpu_layout import ALIGNMENT
from anon_dist.optim.plan import ROLES, StepPlan, Variant

VARIANTS = PLAIN, ACCUMULATE, REFRESH = tuple(Variant)
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def run(lists, exponents=None, **options):
    """`gpu.run` on CPU tensors: on a GPU, on copies there that lie as far from multiples of 16 bytes, and are copied back."""
    there = tuple([on_device(t) for t in x] for x in lists)
    scales = None if exponents is None else [on_device(e) for e in exponents]
    gpu.run(there, [StepPlan(**options)] * len(there[0]), scales)
    for theirs, mine in zip([*there, scales or ()], [*lists, exponents or ()], strict=True):
        for source, target in zip(theirs, mine, strict=True):
            if source is not target:
                target.copy_(source)


def on_device(t):
    if INTERPRETED:
        return t
    shift = t.data_ptr() % ALIGNMENT // t.element_size()
    storage = torch.empty(t.numel() + shift, dtype=t.dtype, device=DEVICE)
    moved = storage.as_strided(t.shape, t.stride(), shift)
    return moved.copy_(t)


def assert_same_bits(a, b):
    """NaN is NaN, whatever its sign and payload."""
    for x, y in zip(a, b, strict=True):
        for t, u in zip(x, y, strict=True):
            t, u = t.cpu(), u.cpu()
            bits = BITS[t.element_size()]
            same = t.contiguous().view(bits) == u.contiguous().view(bits)
            assert (same | (t.isnan() & u.isnan())).all()


LENGTHS = (1, 7, 0, 1023, 1024, 1025, 2500)


def odd_lists(lengths=LENGTHS, special=True):
    """Several parameters; the tensors of each lie at other offsets from multiples of 16 bytes."""
    lists = tuple([] for _ in range(5))
    for i, length in enumerate(lengths):
        for role, (members, (t,)) in enumerate(zip(lists, some_lists(length, seed=i), strict=True)):
            shift = (i * role) % 4
            members.append(shifted(t, shift))
    if special:
        values = [torch.nan, torch.inf, -torch.inf, 1e30, -1e-30, 0.0]
        lists[1][-1][40:46] = torch.tensor(values)
        lists[3][-1][60:63] = torch.tensor([3e38, torch.inf, 1e-45])
    return lists


def shifted(t, by):
    storage = torch.empty(t.numel() + by, dtype=t.dtype)
    storage[by:].copy_(t)
    return storage[by:]


def in_dtypes(lists, dtypes):
    return tuple([t.to(d, copy=True) for t in x] for x, d in zip(lists, dtypes, strict=True))


@pytest.fixture(scope="module")
def as_on_gpu():
    """In the interpreter, CPU tensors are taken for the GPU's."""
    if not INTERPRETED:
        gpu.check()  # its launches are not a test's
        yield
        return
    patch = pytest.MonkeyPatch()
    patch.setattr(gpu, "obstacle", lambda lists: None)
    patch.setattr(gpu, "check", lambda: None)
    patch.setattr(choice, "kernel_for", lambda device: gpu)
    yield
    patch.undo()


# -- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_bits_are_those_of_the_cpu_kernel(variant):
    for gamma, ratio, clip, hold, maximize, keep in (
        (0.7, 1.0, None, False, False, 0.8),
        (1.0, 1.0, 0.5, True, True, 0.0),
        (0.0, 1.0, 1e-3, False, True, 0.5),
        (-2.0, 1.0, None, True, False, 0.3),
        (4.0, 1.0, 1.0, False, False, 0.0),
        (0.7, 1.25, None, False, False, 0.8),
        (1.0, -2.0, 0.5, True, False, 0.5),
        (0.0, 0.0, None, True, False, 0.0),
        (-2.0, 200.0, None, True, False, 0.3),
        (-2.0, -2000.0, None, True, False, 0.0),
    ):
        options = {**STEP, "gamma": gamma, "clip": clip, "hold_silent": hold, "maximize": maximize, "keep_d": keep}
        options["gamma_ratio"] = ratio
        lists = odd_lists()
        expected = clones(lists)
        cpu_run(expected, variant=variant, **options)
        run(lists, variant=variant, **options)
        assert_same_bits(lists, expected)


@pytest.mark.parametrize("gamma", [-100.0, -4.0, -0.01, 0.0, 1e-3, 0.5, 1.0, 4.0, 30.0])
def test_the_bits_of_powers_over_the_whole_range(gamma):
    s = torch.cat([torch.logspace(-44, 38, 2001), torch.tensor([0.0, torch.inf, 3e38, 1.0, 0.5, 1e-45])])
    for eps in (1e-16, 1e-310, 1e-3):
        options = {**STEP, "beta2": 0.5, "debias_s": 0.5, "gamma": gamma, "eps": eps, "variant": REFRESH}
        lists = tuple([x] for x in (torch.ones_like(s), torch.zeros_like(s), torch.ones_like(s), s, torch.ones_like(s)))
        lists, expected = clones(lists), clones(lists)
        run(lists, **options)
        cpu_run(expected, **options)
        assert_same_bits(lists, expected)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hyper=hyperparameters, edits=new_gammas, seed=st.integers(0, 1 << 20))
def test_each_step_is_within_its_bounds(as_on_gpu, hyper, edits, seed):
    """m, s and θ to 2 units of rounding (2^-23) of the summed magnitudes, and θ to what m brings besides; v to 4 in its last place."""
    generator = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(61, generator=generator).to(DEVICE))
    reference = ReferenceAnon(p, **hyper)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = Anon([p], **hyper, fused=True)
    optimizer.init_state()
    for t in range(5):
        copy_state(optimizer, p, reference)
        set_gamma(optimizer, reference, edits.get(t, reference.gamma))
        old = {k: v.double().clone() for k, v in optimizer.state[p].items()}
        theta = p.detach().double().abs()
        grad = torch.randn(61, generator=generator) * (torch.rand(61, generator=generator) > 0.2)
        p.grad = grad.to(DEVICE)
        optimizer.step()
        reference.step(p.grad)
        g, state, beta1, beta2 = p.grad.double().abs(), optimizer.state[p], reference.beta1, reference.beta2
        m_size = beta1 * old["exp_avg"].abs() + (1 - beta1) * g
        s_size = beta2 * old["exp_avg_sq"] + (1 - beta2) * g * g
        size = moved_by(reference, m_size, g)
        step_size, unclear = reference.lr * size, undecided(reference, size, p.grad.double(), theta) / UNIT
        for actual, expected, bound in (
            (state["exp_avg"], reference.m, 4 * m_size),
            (state["exp_avg_sq"], reference.s, 4 * s_size),
            (p.detach(), reference.theta, 4 * (theta + step_size) + 4 * step_size + unclear),
            (state["precond"], reference.v, 8 * reference.v),
        ):
            assert ((actual.double() - expected).abs() <= UNIT * bound + 2.0**-148).all()


def test_plain_steps_do_not_touch_the_second_moment():
    for dtype in (torch.float32, torch.bfloat16):
        lists = odd_lists(special=False)
        for s in lists[3]:
            s.fill_(torch.nan)
        lists = in_dtypes(lists, [torch.float32] * 3 + [dtype, torch.float32])
        before, addresses = clones(lists), [s.data_ptr() for s in lists[3]]
        for s in lists[3]:
            s.view(BITS[s.element_size()]).sub_(1)  # another NaN than any arithmetic makes
        poisoned = clones(lists)[3]
        run(lists, variant=PLAIN, **STEP)
        assert [s.data_ptr() for s in lists[3]] == addresses
        for s, p in zip(lists[3], poisoned, strict=True):
            assert torch.equal(s.view(BITS[s.element_size()]), p.view(BITS[s.element_size()]))
        assert not any(t.isnan().any() for x in (lists[0], lists[2], lists[4]) for t in x)
        assert not any(torch.equal(t, u) for t, u in zip(lists[0], before[0], strict=True) if t.numel())


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_give_the_bits_of_the_whole(variant):
    for dtype in (torch.float32, torch.bfloat16):
        lists = in_dtypes(some_lists(2201), [dtype] * 5)
        cuts = [0, 1, 5, 100, 1100, 2201]
        for shift in (0, 1):
            pieces = tuple(
                [shifted(x[0][a:b], shift + i) for a, b in itertools.pairwise(cuts)] for i, x in enumerate(lists)
            )
            whole = clones(lists)
            for tensors in (pieces, whole):
                run(tensors, variant=variant, stochastic=frozenset({"theta", "m", "s"}), **STEP)
            assert_same_bits([[torch.cat(x)] for x in pieces], whole)


# -- storage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_combination_of_dtypes(variant):
    lists = odd_lists((1030,), special=True)
    wide = torch.float32, torch.bfloat16, torch.float16
    states = ((torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.bfloat16, torch.float32, torch.bfloat16))
    for theta, g, state in itertools.product(wide, wide, states):
        dtypes = (theta, g, *state)
        stored = in_dtypes(lists, dtypes)
        expected = clones(stored)
        run(stored, variant=variant, **STEP)
        cpu_run(expected, variant=variant, **STEP)
        assert_same_bits(stored, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_torchs(dtype):
    """Over the whole range there and back, and to the nearest in between."""
    every = torch.arange(-(1 << 15), 1 << 15, 7).to(torch.int16).view(dtype)
    edges = every.float()
    above = (every.view(torch.int16) + 1).view(dtype)
    middles = ((edges.double() + above.double()) / 2).float()  # ties
    values = torch.cat([edges, middles, middles * (1 + 2.0**-23), torch.tensor([65519.996, 65520.0, 3.4e38])])
    options = {**STEP, "lr": 1.0, "beta1": 0.0, "weight_decay": 0.0, "variant": PLAIN}
    theta, ones = torch.zeros(len(values), dtype=dtype), torch.ones(len(values))
    run(([theta], [values.clone()], [ones.clone()], [ones], [ones]), **options)  # θ = 0 − g
    assert_same_bits([[theta]], [[(0.0 - or_nan(values)).to(dtype)]])
    theta, ones = torch.zeros(len(every)), torch.ones(len(every))
    run(([theta], [every], [ones.clone()], [ones], [ones]), **options)
    assert_same_bits([[theta]], [[0.0 - or_nan(edges)]])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("step", [1, 77, (1 << 24) - 1])
def test_stochastic_rounding_is_that_of_rounding_py(variant, step):
    kept = {"theta": rounding.THETA, "m": rounding.EXP_AVG, "s": rounding.EXP_AVG_SQ, "v": rounding.PRECOND}
    roles = {name: (ROLES.index(name), role) for name, role in kept.items()}
    lengths = (1, 7, 0, 1025) if INTERPRETED else LENGTHS
    for chosen in (set(roles), {"m"}, {"theta", "s"}, {"v"}):
        stored = in_dtypes(odd_lists(lengths), [torch.bfloat16] * 5)
        expected = in_dtypes(stored, [torch.float32] * 5)
        run(stored, variant=variant, stochastic=frozenset(chosen), **{**STEP, "step": step})
        cpu_run(expected, variant=variant, **{**STEP, "step": step})
        rounded = list(in_dtypes(expected, [torch.bfloat16] * 5))
        for i, role in (roles[name] for name in chosen):
            if variant == REFRESH or (i != 4 and (i != 3 or variant != PLAIN)):
                salt = rounding.salt_of(step, role)
                rounded[i] = [rounding.to_bfloat16_stochastically(t, salt) for t in expected[i]]
        assert_same_bits(stored, rounded)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stochastic", [frozenset(), frozenset({"m"})])
def test_8_bit_momentum_is_that_of_rounding_py(variant, stochastic):
    for scale in (1.0, 1e-42, 1e-38, 1e37):
        lists = odd_lists((5, 31, 32, 33, 0, 1024, 1500), special=scale == 1.0)
        m = [t * scale for t in lists[2]]
        g = [t * scale for t in lists[1]] if scale != 1.0 else lists[1]
        codes, exponents = map(list, zip(*(rounding.encode_blocks(t) for t in m), strict=True))
        wide = lists[0], g, [rounding.decode_blocks(*x) for x in zip(codes, exponents, strict=True)], *lists[3:]
        expected, stored = clones(wide), (*clones((lists[0], g)), codes, *clones(lists[3:]))
        cpu_run(expected, variant=variant, **STEP)
        run(stored, variant=variant, stochastic=stochastic, exponents=exponents, **STEP)
        salt = rounding.salt_of(STEP["step"], rounding.EXP_AVG) if stochastic else None
        encoded = [rounding.encode_blocks(t, salt) for t in expected[2]]
        assert_same_bits(stored, (*expected[:2], [x[0] for x in encoded], *expected[3:]))
        assert_same_bits([exponents], [[x[1] for x in encoded]])


def test_8_bit_blocks_are_in_row_major_order_whatever_the_strides():
    shape = (2, 3, 5, 7)
    flat = some_lists(210)
    lists = tuple([x[0].view(shape)] for x in flat)
    codes, exponents = rounding.encode_blocks(lists[2][0])
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        own = tuple([t.clone(memory_format=layout)] for (t,) in (*lists[:2], [codes], *lists[3:]))
        scales = exponents.clone()
        run(own, variant=ACCUMULATE, exponents=[scales], **STEP)
        results.append((*own, [scales]))
    assert_same_bits(*results)


def test_any_strides(as_on_gpu):
    """Gradients laid out otherwise than the parameter, parameters with gaps between their elements, empty and 0-dimensional ones."""
    hyper = {"betas": (0.9, 0.95), "refresh_ratio": 1.1, "weight_decay": 0.1, "fused": True}
    tensors = [torch.randn(shape, device=DEVICE) for shape in ((6, 4), (3, 0), (2, 3, 5, 7), ())]
    base = torch.zeros(6, 8, device=DEVICE)
    base[:, ::2] = tensors[0]
    params = [base[:, ::2], tensors[1], tensors[2].to(memory_format=torch.channels_last), tensors[3].clone()]
    params, expected = [nn.Parameter(t) for t in params], [nn.Parameter(t.clone()) for t in tensors]
    optimizers = Anon(params, **hyper), Anon(expected, **hyper)
    for t in range(5):
        for i, (p, q) in enumerate(zip(params, expected, strict=True)):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(100 * t + i)).to(DEVICE)
            p.grad = q.grad.mT.contiguous().mT if q.dim() == 2 else q.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(optimizers[0].state[p][k], optimizers[1].state[q][k]) for k in STATE_KEYS)
    assert (base[:, 1::2] == 0).all()


# -- launches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """The launches that were made: variant, table, chunks."""
    seen = []
    tables, chunks, launch = gpu._table, gpu._chunks, gpu._launch

    def noted(lists, plans, *rest):
        seen.append([plans[0].variant])
        launch(lists, plans, *rest)

    monkeypatch.setattr(gpu, "_table", lambda *args: (seen[-1].append(tables(*args)), seen[-1][-1])[1])
    monkeypatch.setattr(gpu, "_chunks", lambda *args: (seen[-1].append(chunks(*args)), seen[-1][-1])[1])
    monkeypatch.setattr(gpu, "_launch", noted)
    return seen


def test_one_launch_a_bucket_and_tables_are_sent_once(as_on_gpu, launched):
    params = [nn.Parameter(torch.ones(n, device=DEVICE)) for n in (3, 1500, 8)]
    optimizer = Anon(params, window=2)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(16):
        optimizer.step()
    names = {PLAIN: ".", ACCUMULATE: "a", REFRESH: "R"}
    assert "".join(names[variant] for variant, *_ in launched) == "RRaR..aR......aR"
    assert len({id(table) for _, _, table in launched}) == len({id(chunks) for _, chunks, _ in launched}) == 1
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert launched[-1][2] is not launched[0][2]
    assert launched[-1][1] is launched[0][1]


def test_parameters_at_different_steps_are_taken_in_a_launch_for_each_variant(launched):
    lists = odd_lists()
    variants = [PLAIN, REFRESH, PLAIN, ACCUMULATE, PLAIN, REFRESH, PLAIN]
    plans = [StepPlan(**{**STEP, "step": 3 * i + 1}, variant=variant) for i, variant in enumerate(variants)]
    expected = clones(lists)
    cpu.run(expected, plans)
    there = tuple([on_device(t) for t in x] for x in lists)
    gpu.run(there, plans)
    assert_same_bits(there, expected)
    assert [variant for variant, *_ in launched] == [PLAIN, ACCUMULATE, REFRESH]


def test_a_learning_rate_in_memory_is_read_by_the_kernel():
    for dtype in (torch.float32, torch.float64):
        rate = torch.tensor(0.0123, dtype=dtype, device=DEVICE)
        lists = tuple([on_device(t) for t in x] for x in odd_lists())
        expected = clones(lists)
        gpu.run(lists, [StepPlan(**{**STEP, "lr": rate}, variant=PLAIN)] * len(lists[0]))
        gpu.run(expected, [StepPlan(**{**STEP, "lr": float(rate)}, variant=PLAIN)] * len(lists[0]))
        assert_same_bits(lists, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_scale_and_a_flag_in_memory_are_read_by_the_kernel(variant):
    for dtype in (torch.float32, torch.float64):
        lists, scale = odd_lists(), torch.tensor(3.7, dtype=dtype)
        expected, before = clones(lists), clones(lists)
        cpu_run(expected, variant=variant, grad_scale=scale, **STEP)
        for flag, result in ((1.0, before), (0.0, expected)):
            found_inf = torch.tensor(flag, dtype=dtype, device=DEVICE)
            run(lists, variant=variant, grad_scale=scale.to(DEVICE), found_inf=found_inf, **STEP)
            assert_same_bits(lists, result)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's NumPy, of 0 · inf
def test_a_scale_far_from_one_gives_the_bits_of_the_cpu_kernel(variant):
    for number in (
        2.0**65,
        2.0**100,
        1.49 * 2.0**30,
        1.51 * 2.0**-30,
        2.0**-100,
        -3.0,
        1e-310,
        1e300,
        torch.inf,
        torch.nan,
        0.0,
    ):
        scale = torch.tensor(number, dtype=torch.float64)
        lists = odd_lists((7, 1025))
        for g in lists[1]:
            g.mul_(min(abs(number), 2.0**120)) if number else None
        expected = clones(lists)
        options = {**STEP, "clip": 0.5, "nesterov": number == -3.0}
        cpu_run(expected, variant=variant, grad_scale=scale, **options)
        run(lists, variant=variant, grad_scale=scale.to(DEVICE), **options)
        assert_same_bits(lists, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_update_is_handed_back(variant):
    lists = odd_lists(special=False)
    plan = StepPlan(**{**STEP, "clip": 0.8}, variant=variant)
    expected = clones(lists)
    cpu.run(expected, [plan.handing_back()] * len(lists[0]))
    there = tuple([on_device(t) for t in x] for x in lists)
    gpu.run(there, [plan.handing_back()] * len(lists[0]))
    assert_same_bits(there, expected)


@pytest.mark.parametrize("variant", [PLAIN, ACCUMULATE, REFRESH])
def test_the_trial_notices_a_kernel_that_is_wrong(variant, monkeypatch):
    """Before it is chosen on a GPU, it is compared there with torch's operations."""
    assert gpu.agrees(variant, DEVICE)
    right = gpu.run
    monkeypatch.setattr(gpu, "run", lambda lists, plans: right(lists, [dataclasses.replace(plans[0], lr=0.101)]))
    assert not gpu.agrees(variant, DEVICE)
