"""States and parameters in fewer bits: how they are rounded, that both paths round alike, and that nothing of it is lost on the way."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from anon_dist import Anon
from anon_dist.optim import STATE_KEYS, ReferenceAnon
from anon_dist.optim.backends import cpu
from anon_dist.optim.plan import StepPlan, Variant
from anon_dist.optim.rounding import (
    BLOCK,
    EXP_AVG,
    EXP_AVG_SQ,
    THETA,
    decode_blocks,
    encode_blocks,
    exponents_for,
    salt_of,
    to_bfloat16_stochastically,
)
from anon_dist.optim.state import EXPONENTS, decoded

LM = {"betas": (0.9, 0.95), "refresh_ratio": 1.1, "beta3": 0.8, "weight_decay": 0.1, "lr": 0.01}
EIGHT_BITS = {"exp_avg": "int8", "exp_avg_sq": "bfloat16", "precond": "bfloat16"}
COMPACT = ["bfloat16", {"precond": "bfloat16"}, {"exp_avg_sq": "bfloat16", "precond": "bfloat16"}, EIGHT_BITS]


def wide(count, seed=0):
    """Numbers of every magnitude, and zeros, subnormals and what is not finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * torch.exp2(
        torch.randint(-140, 120, (count,), generator=generator).float()
    )
    edges = [0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan]
    x[: len(edges)] = torch.tensor(edges)
    return x


def bits(t):
    return t.contiguous().view(torch.int16 if t.element_size() == 2 else torch.int8)


def taken(x, dtype, step=7, stochastic=True):
    """What the kernel makes of x on its way to an exp_avg of this dtype: (exp_avg, exponents)."""
    m, ones = torch.zeros(len(x), dtype=dtype), torch.ones(len(x))
    exponents = [exponents_for(x)] if dtype == torch.int8 else None
    values = {"lr": 0.0, "weight_decay": 0.0, "beta1": 0.0, "beta2": 0.0, "clip": None}
    plan = StepPlan(step=step, variant=Variant.PLAIN, stochastic=frozenset({"m"} if stochastic else ()), **values)
    cpu.run(([ones.clone()], [x], [m], [ones.clone()], [ones]), [plan], exponents)
    return m, *(exponents or [])


# -- rounding ---------------------------------------------------------------------------------------------------------


def test_stochastic_rounding_is_to_a_neighbour_and_right_in_the_mean():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    rounds = torch.stack([to_bfloat16_stochastically(x, salt_of(t, EXP_AVG)).double() for t in range(400)])
    unit = torch.exp2(x.double().abs().log2().floor() - 7)
    assert ((rounds - x).abs() < unit).all()
    # The mean of 400 rounds has a standard deviation of at most unit / 40; over elements and rounds together 1600 times less variance.
    error = (rounds - x).mean(0) / unit
    assert error.abs().max() < 5 / 40
    assert error.mean().abs() < 5 / 40 / 4000**0.5
    # and rounding to nearest would show
    assert ((x.bfloat16().double() - x) / unit).abs().max() > 0.49


def test_hashes_of_steps_roles_and_neighbours_are_unrelated():
    x = 1.0 + torch.arange(1 << 15) * 2.0**-23
    ups = torch.stack(
        [
            (to_bfloat16_stochastically(x, salt_of(t, role)) > x).double()
            for t, role in itertools.product(range(20), (THETA, EXP_AVG, EXP_AVG_SQ))
        ]
    )
    chance = (x.double() - 1.0) * 2**7
    residual = (ups - chance) / (chance * (1 - chance)).clamp(min=1e-3).sqrt()
    correlation = torch.corrcoef(residual)
    assert (correlation - torch.eye(len(ups))).abs().max() < 6 / (1 << 15) ** 0.5
    assert (residual[:, 1:] * residual[:, :-1]).mean().abs() < 6 / residual.numel() ** 0.5


def test_what_bfloat16_holds_stays():
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    kept = to_bfloat16_stochastically(every.float(), 12345)
    assert torch.equal(kept.nan_to_num(nan=-1.0), every.nan_to_num(nan=-1.0))


@pytest.mark.parametrize("salt", [None, salt_of(3, EXP_AVG)])
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, 5000])
def test_blocks_of_8_bits(salt, length):
    x = wide(5000)[:length]
    codes, exponents = encode_blocks(x, salt)
    values = decode_blocks(codes, exponents)
    assert codes.shape == x.shape
    assert exponents.shape == (-(-length // BLOCK),)
    # within a unit of the block's scale, half of one to nearest; what is not finite spoils itself only
    unit = torch.exp2(exponents.double() - 133).repeat_interleave(BLOCK)[:length]
    finite = x.isfinite() & (x.abs() < 3.38e38)
    assert ((values.double() - x.double()).abs() <= unit * (0.5 if salt is None else 1.0))[finite].all()
    assert torch.equal(values.isnan(), ~x.isfinite())
    # no coarser than needed: 7 bits of the largest
    largest = torch.where(x.isfinite(), x.double().abs(), 0.0)
    for block, e in zip(largest.split(BLOCK), exponents.tolist(), strict=True):
        assert e == 0 or block.max() > 63.5 * 2.0 ** (e - 133)
    # bfloat16 holds the values, and encoding them again finds them, however it rounds
    assert torch.equal(values.bfloat16().float().nan_to_num(nan=-1), values.nan_to_num(nan=-1))
    for again in (None, salt_of(9, EXP_AVG)):
        assert torch.equal(decode_blocks(*encode_blocks(values, again)).nan_to_num(nan=-1), values.nan_to_num(nan=-1))


def test_the_kernel_rounds_as_torch_does():
    """The same bits from the same float32 numbers, on both paths."""
    x = wide(100_003) + 0.0  # the kernel's sum has no -0
    for step in (1, 7, 123456):
        salt = salt_of(step, EXP_AVG)
        (m,) = taken(x, torch.bfloat16, step)
        rounded = to_bfloat16_stochastically(x, salt)
        assert torch.equal(m.isnan(), rounded.isnan())
        assert torch.equal(bits(m)[~m.isnan()], bits(rounded)[~m.isnan()])
        codes, exponents = taken(x, torch.int8, step)
        expected = encode_blocks(x, salt)
        assert torch.equal(codes, expected[0])
        assert torch.equal(exponents, expected[1])
    for found, expected in zip(taken(x, torch.int8, stochastic=False), encode_blocks(x), strict=True):
        assert torch.equal(found, expected)


# -- steps ------------------------------------------------------------------------------------------------------------


def unit_of(state, key):
    """The distance between neighbours in what a state is stored in, at least."""
    if key == "exp_avg" and EXPONENTS in state:
        scale = torch.exp2(state[EXPONENTS].double() - 133)
        return scale.repeat_interleave(BLOCK)[: state[key].numel()].view(state[key].shape)
    t = state[key]
    return t.double().abs().clamp(min=1e-30) * torch.finfo(t.dtype).eps


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("state_dtype", COMPACT)
def test_each_step_is_the_references_but_for_one_rounding(state_dtype, fused):
    """From the stored state; θ sees the mean and the preconditioner before they are rounded."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(61, 53, generator=generator))
    optimizer = Anon([p], **LM, window=5, state_dtype=state_dtype, fused=fused)
    optimizer.init_state()
    reference = ReferenceAnon(p, **LM, window=5)
    for _ in range(30):
        before = decoded(optimizer.state[p])
        reference.m, reference.s, reference.v = (before[k].double().clone() for k in STATE_KEYS[1:])
        reference.theta = p.detach().double().clone()
        p.grad = torch.randn(61, 53, generator=generator)
        optimizer.step()
        reference.step(p.grad)
        state = optimizer.state[p]
        values = decoded(state)
        for key, expected in zip(STATE_KEYS[1:], (reference.m, reference.s, reference.v), strict=True):
            assert ((values[key].double() - expected).abs() <= 1.01 * unit_of(state, key) + 1e-6).all()
        torch.testing.assert_close(p.detach().double(), reference.theta, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_bits_do_not_depend_on_the_cut(fused):
    """Of stochastically rounded parameters and states; of 8 bits where the cut is between blocks."""

    def run(cuts, state_dtype):
        generator = torch.Generator().manual_seed(3)
        start, gradients = torch.randn(1000, generator=generator), torch.randn(20, 1000, generator=generator)
        parts = [nn.Parameter(start[a:b].bfloat16()) for a, b in itertools.pairwise(cuts)]
        optimizer = Anon(parts, **LM, state_dtype=state_dtype, fused=fused, stochastic_rounding=True)
        for g in gradients:
            for p, (a, b) in zip(parts, itertools.pairwise(cuts), strict=True):
                p.grad = g[a:b].bfloat16()
            optimizer.step()
        states = [decoded(optimizer.state[p]) for p in parts]
        return [torch.cat([p.detach() for p in parts]), *(torch.cat([s[k] for s in states]) for k in STATE_KEYS[1:])]

    for state_dtype, cuts in (("bfloat16", (0, 1, 130, 131, 999, 1000)), (EIGHT_BITS, (0, 32, 320, 1000))):
        for whole, pieces in zip(run((0, 1000), state_dtype), run(cuts, state_dtype), strict=True):
            assert torch.equal(bits(whole), bits(pieces))


@pytest.mark.parametrize("fused", [False, True])
def test_small_updates_of_bfloat16_parameters_count(fused):
    """Each is 1/8 of a unit in the last place: none moves a parameter that is rounded to nearest, all do in the mean.

    Each step starts from the same 64 numbers: 16,384 independent draws, four standard deviations of whose mean are 8%.
    """
    moved = {}
    for stochastic in (False, True):
        p = nn.Parameter(1.5 + torch.arange(64) * 2.0**-7).to(torch.bfloat16).detach().requires_grad_()
        before = p.detach().double().clone()
        optimizer = Anon([p], lr=2.0**-10, gamma=0.0, betas=(0.0, 0.5), fused=fused, stochastic_rounding=stochastic)
        moved[stochastic] = 0.0
        for _ in range(256):
            p.grad = torch.ones_like(p)
            optimizer.step()
            moved[stochastic] += float((before - p.detach().double()).mean())
            p.data.copy_(before)
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(256 * 2.0**-10, rel=0.08)


@pytest.mark.parametrize("fused", [False, True])
def test_any_strides(fused):
    """Blocks are counted in row-major order, whatever order a parameter lies in."""
    p, q = nn.Parameter(torch.randn(40, 50).t()), nn.Parameter(torch.empty(50, 40))
    q.data.copy_(p)
    one, other = (Anon([x], **LM, state_dtype=EIGHT_BITS, fused=fused) for x in (p, q))
    for _ in range(10):
        g = torch.randn(50, 40)
        p.grad, q.grad = g.t().contiguous().t(), g
        one.step()
        other.step()
    assert torch.equal(p, q)
    assert torch.equal(decoded(one.state[p])["exp_avg"], decoded(other.state[q])["exp_avg"])


# -- bytes, state dicts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state_dtype", "at_most"),
    [
        (None, 12.1),
        ({"precond": "bfloat16", "exp_avg_sq": "bfloat16"}, 8.1),
        ("bfloat16", 6.1),
        (EIGHT_BITS, 5.2),
    ],
)
def test_bytes_per_parameter(state_dtype, at_most):
    p = nn.Parameter(torch.randn(333, 100))
    optimizer = Anon([p], **LM, state_dtype=state_dtype)
    optimizer.init_state()
    assert sum(t.nbytes for t in optimizer.state[p].values()) / p.numel() <= at_most


@pytest.mark.parametrize("state_dtype", COMPACT)
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_a_resumed_run_goes_on_with_the_same_bits(state_dtype, way):
    def steps(p, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(12):
            p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    p = nn.Parameter(torch.randn(37, 21))
    optimizer = Anon([p], **LM, state_dtype=state_dtype)
    steps(p, optimizer, 1)
    if way == "state_dict":
        q = nn.Parameter(p.detach().clone())
        resumed = Anon([q], lr=1.0, state_dtype=state_dtype)
        saved = copy.deepcopy(optimizer.state_dict())
        assert set(saved["state"][0]) == set(STATE_KEYS)
        resumed.load_state_dict(saved)
    else:
        held = (p, optimizer)
        q, resumed = copy.deepcopy(held) if way == "deepcopy" else pickle.loads(pickle.dumps(held))
    steps(p, optimizer, 2)
    steps(q, resumed, 2)
    assert torch.equal(p, q)
    for key in STATE_KEYS:
        assert torch.equal(decoded(optimizer.state[p])[key], decoded(resumed.state[q])[key])
    assert {k: v.dtype for k, v in optimizer.state[p].items()} == {k: v.dtype for k, v in resumed.state[q].items()}


def test_8_bit_momentum_goes_through_torchs_flattened_state_dict():
    """torch gives {} there for what a flattened state dict lacks and the optimizer has."""
    torch.manual_seed(0)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    net = nn.Linear(40, 3)
    optimizer = Anon(net.parameters(), **LM, state_dtype=EIGHT_BITS)
    other_net = copy.deepcopy(net)
    other = Anon(other_net.parameters(), **LM, state_dtype=EIGHT_BITS)
    for t in range(12):
        if t == 6:
            saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
            set_optimizer_state_dict(other_net, other, saved, options=options)
            other_net.load_state_dict(net.state_dict())
        for one, o in ((net, optimizer), (other_net, other)):
            for i, p in enumerate(one.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(2 * t + i))
            o.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other_net.parameters(), strict=True))


def test_codes_without_their_exponents_are_refused():
    p = nn.Parameter(torch.randn(40))
    optimizer = Anon([p], **LM, state_dtype=EIGHT_BITS)
    optimizer.init_state()
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = optimizer.state[p]["exp_avg"]
    with pytest.raises(ValueError, match="exp_avg of parameter 0 is int8, and the exponents"):
        Anon([p], **LM).load_state_dict(saved)
