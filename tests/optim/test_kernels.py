"""The CPU kernel: its rounding, its independence of where an element lies, its cache, and when it is chosen."""

import ctypes
import itertools
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reference import but_clipped, copy_state, hyperparameters, moved_by, new_gammas, set_gamma, undecided
from torch import nn

from anon_dist import Anon
from anon_dist.optim import STATE_KEYS, ReferenceAnon
from anon_dist.optim.backends import build, choice, cpu
from anon_dist.optim.plan import StepPlan, Variant
from anon_dist.optim.rounding import EXP_AVG, EXP_AVG_SQ, salt_of, to_bfloat16_stochastically

UNIT = 2.0**-24
LM = {"betas": (0.9, 0.95), "refresh_ratio": 1.1, "beta3": 0.8, "update_clip": 1.0, "weight_decay": 0.1}
STEP = {
    "lr": 0.01,
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.1,
    "step": 7,
    "debias_s": 0.3,
    "keep_d": 0.8,
    "gamma": 0.7,
    "eps": 1e-16,
    "clip": None,
    "hold_silent": False,
    "maximize": False,
}
PLAIN, ACCUMULATE, REFRESH = Variant
BITS = {2: torch.int16, 4: torch.int32}


def some_lists(length, seed=0):
    """θ, g, m, s, v of one parameter; a few of them zero or subnormal."""
    generator = torch.Generator().manual_seed(seed)
    theta, g, m, s, v = (torch.randn(length, generator=generator) for _ in range(5))
    g[::5], s[::10], g[3::11], s[7::13] = 0.0, 0.0, 1e-40, 1e-42
    return [theta], [g], [m], [s.abs()], [v.abs() + 0.01]


def cpu_run(lists, exponents=None, **values):
    """The kernel, with the same plan for all parameters."""
    cpu.run(lists, [StepPlan(**values)] * len(lists[0]), exponents)


def clones(lists):
    return tuple([t.clone() for t in x] for x in lists)


def assert_same_bits(a, b):
    for x, y in zip(a, b, strict=True):
        for t, u in zip(x, y, strict=True):
            bits = BITS[t.element_size()]
            assert torch.equal(t.contiguous().view(-1).view(bits), u.contiguous().view(-1).view(bits))


# -- rounding ---------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(hyper=hyperparameters, edits=new_gammas, length=st.sampled_from([1, 7, 8, 9, 250]), seed=st.integers(0, 1 << 20))
def test_each_step_is_within_its_bounds(hyper, edits, length, seed):
    """m and s to 4 · 2^-24 of the summed magnitudes, θ to as much and what m brings, v to 1 unit in its last place."""
    generator = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(length, generator=generator))
    reference = ReferenceAnon(p, **hyper)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = Anon([p], **hyper, fused=True)
    optimizer.init_state()
    for t in range(20):
        copy_state(optimizer, p, reference)
        set_gamma(optimizer, reference, edits.get(t, reference.gamma))
        old = {k: v.double().clone() for k, v in optimizer.state[p].items()}
        theta = p.detach().double().abs()
        p.grad = torch.randn(length, generator=generator) * (torch.rand(length, generator=generator) > 0.2)
        optimizer.step()
        reference.step(p.grad)
        g, state, beta1, beta2 = p.grad.double().abs(), optimizer.state[p], reference.beta1, reference.beta2
        m_size = beta1 * old["exp_avg"].abs() + (1 - beta1) * g
        s_size = beta2 * old["exp_avg_sq"] + (1 - beta2) * g * g
        size = moved_by(reference, m_size, g)
        step_size = reference.lr * but_clipped(reference, size, p.grad.double())
        unclear = undecided(reference, size, p.grad.double(), theta) / UNIT
        for actual, expected, bound in (
            (state["exp_avg"], reference.m, 4 * m_size),
            (state["exp_avg_sq"], reference.s, 4 * s_size),
            (p.detach(), reference.theta, 4 * (theta + step_size) + 4 * step_size + unclear),
            (state["precond"], reference.v, 2 * reference.v),
        ):
            assert ((actual.double() - expected).abs() <= UNIT * bound + 2.0**-148).all()


@pytest.mark.parametrize("gamma", [-100.0, -4.0, -1.0, -0.01, 0.0, 1e-3, 0.5, 1.0, 2.0, 4.0, 30.0])
@pytest.mark.parametrize("eps", [1e-16, 1e-310, 1e-3])
def test_powers_over_the_whole_range(gamma, eps):
    """σ from the smallest to the largest, and infinite: as torch's in float64."""
    s = torch.cat([torch.logspace(-44, 38, 4001), torch.tensor([0.0, torch.inf, 3e38, 1.0, 0.5, 1e-45])])
    v, zero = torch.ones_like(s), torch.zeros_like(s)
    cpu_run(
        ([zero.clone()], [zero], [zero.clone()], [s.clone()], [v]),
        **{**STEP, "beta2": 0.5, "debias_s": 0.5, "keep_d": 0.0, "gamma": gamma, "eps": eps, "variant": REFRESH},
    )
    sigma = s.double() + eps
    exact = (gamma * sigma.log()).exp().clamp(2.0**-126, 2.0**127) if gamma else torch.ones_like(sigma)
    torch.testing.assert_close(v.double(), exact.rsqrt(), rtol=1.0001 * UNIT, atol=0.0)


def test_nothing_but_nan_gives_nan():
    """A gradient that is not a number spoils its own element only; one that overflows when squared does not spoil it."""
    for fused in (False, True):
        p = nn.Parameter(torch.ones(4))
        optimizer = Anon([p], fused=fused, **LM)
        for _ in range(3):
            p.grad = torch.tensor([1.0, torch.nan, 1e25, 1e-30])
            optimizer.step()
        assert p.isnan().tolist() == [False, True, False, False]
        assert optimizer.state[p]["precond"].isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("variant", [PLAIN, ACCUMULATE, REFRESH])
def test_every_combination_of_dtypes(variant):
    """As the same values in float32, and the results then rounded by torch; m and s in bfloat16 stochastically."""
    all_lists = some_lists(4097)
    wide, narrow = (torch.float32, torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)
    for dtypes in itertools.product(wide, wide, narrow, narrow, narrow):
        stored = tuple([t.to(d, copy=True) for t in x] for x, d in zip(all_lists, dtypes, strict=True))
        expected = tuple([t.to(torch.float32, copy=True) for t in x] for x in stored)
        cpu_run(stored, variant=variant, stochastic=frozenset({"m", "s"}), **STEP)
        cpu_run(expected, variant=variant, **STEP)
        rounded = [[t.to(d) for t in x] for x, d in zip(expected, dtypes, strict=True)]
        for role, salt, changed in ((2, EXP_AVG, True), (3, EXP_AVG_SQ, variant != PLAIN)):
            if dtypes[role] == torch.bfloat16 and changed:
                rounded[role] = [to_bfloat16_stochastically(t, salt_of(STEP["step"], salt)) for t in expected[role]]
        assert_same_bits(stored, rounded)


def or_nan(x):
    """An infinite m is no update."""
    return torch.where(x.isfinite(), x, torch.nan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_torchs(dtype):
    """Every value there and back; and from float32 to the nearest, subnormals, ties, overflow and NaN included."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    edges = every.float()
    middles = (edges.double() + edges.double().roll(1)) / 2
    values = torch.cat([edges, middles.float(), middles.float() * (1 + 2.0**-23), torch.randn(1 << 16) * 1e-6])
    values = torch.cat([values, torch.tensor([65519.996, 65520.0, 3.4e38, torch.inf, -torch.inf, torch.nan])])
    options = {**STEP, "lr": 1.0, "beta1": 0.0, "weight_decay": 0.0, "variant": PLAIN}
    # θ = 0 − v m with v = 1 and m = g
    theta, ones = torch.zeros(len(values), dtype=dtype), torch.ones(len(values))
    cpu_run(([theta], [values.clone()], [ones.clone()], [ones], [ones]), **options)
    assert_same_bits([[theta.nan_to_num(nan=-1.0)]], [[(0.0 - or_nan(values)).to(dtype).nan_to_num(nan=-1.0)]])
    theta, zeros, ones = torch.zeros(len(every)), torch.zeros(len(every)), torch.ones(len(every))
    cpu_run(([theta], [every], [zeros], [ones], [ones]), **options)
    assert torch.equal(theta.nan_to_num(nan=-1.0), (0.0 - or_nan(edges)).nan_to_num(nan=-1.0))


# -- bits do not depend on where an element lies --------------------------------------------------------------------------


@pytest.fixture
def threads():
    """Set the number of threads; it is set back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("variant", [PLAIN, ACCUMULATE, REFRESH])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 63 * 63, 4097, 10**6 + 3])
def test_threads_pieces_and_alignment(variant, length, threads):
    lists = some_lists(length)
    threads(1)
    expected = clones(lists)
    cpu_run(expected, variant=variant, **STEP)
    for count in (2, 3, 5):
        threads(count)
        whole = clones(lists)
        cpu_run(whole, variant=variant, **STEP)
        assert_same_bits(whole, expected)
    cuts = sorted({0, length, *(c for c in (1, 2, 5, 13, 64, 100, 1023, 1025, 70001) if c < length)})
    for shift in (0, 1, 3):  # each tensor at another offset from its allocation
        pieces = tuple(
            [_shifted(x[0][a:b], shift + i) for a, b in itertools.pairwise(cuts)] for i, x in enumerate(lists)
        )
        cpu_run(pieces, variant=variant, **STEP)
        assert_same_bits([[torch.cat(x)] for x in pieces], expected)


def _shifted(t, by):
    storage = torch.empty(t.numel() + by)
    storage[by:].copy_(t)
    return storage[by:]


def test_flush_to_zero_of_the_calling_thread_does_not_decide(threads):
    """It is set in one thread only: elements would depend on which thread takes them."""
    lists, expected = some_lists(4097), some_lists(4097)
    cpu_run(expected, variant=ACCUMULATE, **STEP)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        cpu_run(lists, variant=ACCUMULATE, **STEP)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(lists, expected)


def test_any_strides():
    """Gradients laid out otherwise than the parameter, parameters with gaps between their elements, transposed ones, empty ones."""
    shapes = [(6, 4), (3, 0), (2, 3, 5, 7), ()]
    expected = [nn.Parameter(torch.randn(s)) for s in shapes]
    base = torch.randn(6, 8)
    base[:, ::2] = expected[0].detach()
    params = [
        nn.Parameter(base[:, ::2]),
        nn.Parameter(torch.randn(3, 0)),
        nn.Parameter(expected[2].detach().to(memory_format=torch.channels_last)),
        nn.Parameter(expected[3].detach().clone()),
    ]
    gaps = base[:, 1::2].clone()
    optimizers = Anon(expected, fused=True, **LM), Anon(params, fused=True, **LM)
    for t in range(12):
        for i, (p, q) in enumerate(zip(expected, params, strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i))
            q.grad = p.grad.mT.contiguous().mT if p.dim() == 2 and t % 2 else p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(expected, params, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(optimizers[0].state[p][k], optimizers[1].state[q][k]) for k in STATE_KEYS)
    assert torch.equal(base[:, 1::2], gaps)


def test_autograd_sees_that_the_parameter_changed():
    p = nn.Parameter(torch.ones(3))
    optimizer = Anon([p], fused=True)
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- choice -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not used the kernel yet, with an empty cache; the process goes on with the kernel it had."""
    known = cpu._library()
    cpu._library.cache_clear()
    choice._warn.cache_clear()
    monkeypatch.setenv("ANON_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    yield tmp_path / "cache"
    monkeypatch.undo()
    cpu._library.cache_clear()
    assert isinstance(known, ctypes.CDLL)


def one_step(**hyper):
    p = nn.Parameter(torch.linspace(-1, 1, 9))
    optimizer = Anon([p], **{**LM, **hyper})
    p.grad = torch.linspace(1, 2, 9)
    optimizer.step()
    return p.detach()


@pytest.fixture
def calls(monkeypatch):
    """The plans that the kernel was called with."""
    seen = []
    original = cpu.run

    def run(lists, plans, *rest):
        seen.extend(plans)
        original(lists, plans, *rest)

    monkeypatch.setattr(cpu, "run", run)
    return seen


@pytest.mark.parametrize(
    ("hyper", "chosen"),
    [
        ({}, True),
        ({"fused": True}, True),
        ({"fused": False}, False),
        ({"foreach": True}, False),
        ({"foreach": False}, False),
        ({"foreach": False, "fused": True}, True),
        ({"state_dtype": "bfloat16"}, True),
        ({"state_dtype": "float64"}, False),
    ],
)
def test_when_it_is_chosen(hyper, chosen, calls):
    one_step(**hyper)
    assert len(calls) == chosen


def test_the_variant_follows_the_schedule(calls):
    p = nn.Parameter(torch.ones(3))
    optimizer = Anon([p], window=2)
    for _ in range(16):
        p.grad = torch.ones(3)
        optimizer.step()
    names = {PLAIN: ".", ACCUMULATE: "a", REFRESH: "R"}
    assert "".join(names[c.variant] for c in calls) == "RRaR..aR......aR"
    assert [c.step for c in calls] == list(range(1, 17))


def test_what_is_not_possible_is_said_before_anything_changes():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = Anon([p, q], fused=True)
    p.grad, q.grad = torch.ones(3), torch.ones(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"fused=True is not possible: a tensor is float64\. It takes"):
        optimizer.step()
    assert (p == 1).all()
    with pytest.raises(ValueError, match="fused must be False or None with foreach=True"):
        Anon([p], fused=True, foreach=True)
    with pytest.raises(ValueError, match="fused must be None, True or False"):
        Anon([p], fused="yes")


def test_it_is_a_hyperparameter_that_checkpoints_keep():
    p = nn.Parameter(torch.ones(3))
    optimizer, other = Anon([p], fused=False), Anon([p])
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["fused"] is False
    states = optimizer.state_dict()
    del states["param_groups"][0]["fused"]  # written before there was a kernel
    other = Anon([p])
    other.load_state_dict(states)
    assert other.param_groups[0]["fused"] is None


def test_without_a_compiler_the_foreach_path_and_one_warning(fresh, monkeypatch):
    expected = one_step(fused=False)
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match=r"foreach path is used: no C compiler found \(cc, gcc, clang\)") as caught:
        results = one_step(), one_step()
    assert len(caught) == 1
    assert all(torch.equal(r, expected) for r in results)
    with pytest.raises(RuntimeError, match="fused=True is not possible: no C compiler"):
        one_step(fused=True)


def test_a_compiler_that_fails_is_named(fresh, monkeypatch, tmp_path):
    script = tmp_path / "broken"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo out of order >&2; exit 1; }\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    with pytest.warns(UserWarning, match=r"broken failed: out of order"):
        one_step()
    assert not [f for f in fresh.iterdir() if f.suffix != ".lock"]


def test_a_cache_that_cannot_be_written_is_named(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANON_DIST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="Not a directory"):
        one_step()


# -- the cache --------------------------------------------------------------------------------------------------------

SMALL = "int answer(void) { return 42; }\n"
LOAD = f"""
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("build", {build.__file__!r})
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
print(build.load(Path(sys.argv[1])).answer())
"""


@pytest.fixture
def source(fresh, monkeypatch, tmp_path):
    """A C file, and a compiler that takes its time and writes a line for each run into `compiled`."""
    compiler, log = tmp_path / "slow", tmp_path / "compiled"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || {{ echo run >> {log}; sleep 0.3; }}\nexec {build.find_compiler()} "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    file = tmp_path / "small.c"
    file.write_text(SMALL)
    return file


def test_processes_that_build_at_once_build_once(source, tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", LOAD, str(source)], stdout=subprocess.PIPE, env=os.environ)
        for _ in range(4)
    ]
    assert [p.communicate(timeout=300)[0].strip() for p in processes] == [b"42"] * 4
    assert (tmp_path / "compiled").read_text() == "run\n"


def damage(path: Path, how: str):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    elif how == "emptied":
        content.clear()
    else:
        content[len(content) // 2] ^= 1
    path.unlink()  # what is mapped into this process stays as it is
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "emptied", "a bit flipped"])
def test_a_damaged_library_is_built_again(source, fresh, how):
    assert build.load(source).answer() == 42
    (library,) = fresh.glob("*.so")
    whole = library.read_bytes()
    damage(library, how)
    done = subprocess.run([sys.executable, "-c", LOAD, str(source)], capture_output=True, timeout=300, env=os.environ)
    assert done.stdout.strip() == b"42", done.stderr
    assert len(library.read_bytes()) == len(whole)


def test_another_source_compiler_or_processor_is_another_library(source, fresh, monkeypatch):
    build.load(source)
    monkeypatch.setattr(build, "_cpu", lambda: "another")
    build.load(source)
    source.write_text(SMALL.replace("42", "43"))
    assert build.load(source).answer() == 43
    monkeypatch.delenv("CC")
    build.load(source)
    assert len(list(fresh.glob("*.so"))) == 4


# -- agreement of the ranks -------------------------------------------------------------------------------------------


def ask(store, able):
    """What each rank is told; None for one that does not ask."""
    told = [None] * len(able)

    def rank(i):
        told[i] = choice._ask_store(store, i, len(able), able[i])

    asking = [threading.Thread(target=rank, args=(i,)) for i in range(len(able)) if able[i] is not None]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(timeout=120)
    return told


@pytest.mark.parametrize(
    ("able", "told"),
    [
        ([True, True, True], [True, True, True]),
        ([True, False, True], [False, False, False]),
        ([True, None, True], [False, None, False]),
    ],
)
def test_all_ranks_or_none(able, told, monkeypatch):
    if None in able:
        monkeypatch.setattr(choice, "AGREEMENT_SECONDS", 0.5)  # which is waited out
    store = torch.distributed.HashStore()
    assert ask(store, able) == told
    # a second optimizer, and a rank that comes late, are told the same
    assert ask(store, [True] * 3) == [told[0]] * 3


def test_the_rank_that_comes_last_decides_without_waiting_for_the_limit():
    store = torch.distributed.HashStore()
    early = threading.Thread(target=choice._ask_store, args=(store, 0, 2, True))
    early.start()
    assert choice._ask_store(store, 1, 2, True)
    early.join(timeout=choice.AGREEMENT_SECONDS / 2)
    assert not early.is_alive()
