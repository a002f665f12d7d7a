"""Matrices in bases of their own: against the float64 reference, and what a user relies on."""

import copy
import itertools
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from anon_dist.optim import STATE_KEYS, Anon, ReferenceAnon, basis, frame
from anon_dist.optim.frame import BASIS_KEYS

LM = {"lr": 0.02, "betas": (0.9, 0.95), "refresh_ratio": 1.3, "beta3": 0.8, "weight_decay": 0.1}


def gradients(shape, steps, seed=0):
    """Noise whose rows and columns are mixed, so that there is a basis to be found; of full rank in `shape`'s larger side's blocks."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.empty(shape)[0].numel()
    left, right = (torch.randn(n, n, generator=generator) / n**0.5 + torch.eye(n) for n in (shape[0], columns))
    with basis.true_float32(torch.device("cpu")):  # the same gradients at any precision
        return [(left @ torch.randn(shape[0], columns, generator=generator) @ right).view(shape) for _ in range(steps)]


def stepped(shape, steps=30, seed=0, dtype=torch.float32, noise=(0.0, 0), **hyper):
    """Parameter and optimizer after some steps. `noise`: by how much gradients are changed, relative to each element, and a seed."""
    random = torch.Generator().manual_seed(noise[1])
    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = Anon([p], **{**LM, **hyper})
    for grad in gradients(shape, steps, seed):
        p.grad = grad.to(dtype)
        if noise[0]:
            p.grad *= 1 + noise[0] * torch.randn(shape, generator=random, dtype=dtype)
        optimizer.step()
    optimizer.settle()
    return p, optimizer


# -- the arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "block"), [(12, 4), (13, 4), (3, 3), (1, 1), (7, 5)])
@pytest.mark.parametrize("side", ["columns", "rows"])
def test_turns_are_products_with_the_whole_matrix(n, block, side):
    x = torch.randn((5, n) if side == "columns" else (n, 5), dtype=torch.float64)
    blocked = torch.zeros(n, block, dtype=torch.float64)
    whole = torch.zeros(n, n, dtype=torch.float64)
    for where, part in basis.squares(blocked):
        q, _ = torch.linalg.qr(torch.randn(part.shape, dtype=torch.float64))
        part.copy_(q)
        whole[where, where] = torch.block_diag(*q)
    turned = basis.turn(x, blocked, side)
    torch.testing.assert_close(turned, x @ whole if side == "columns" else whole.T @ x)
    torch.testing.assert_close(basis.turn(turned, blocked, side, back=True), x)
    outer = x.T @ x if side == "columns" else x @ x.T
    for where, c in basis.squares(basis.covariance(x, block, side)):
        inside = torch.block_diag(*torch.ones_like(c)) > 0
        torch.testing.assert_close(torch.block_diag(*c)[inside], outer[where, where][inside])
    for where, c in basis.squares(basis.transposed(blocked)):
        torch.testing.assert_close(torch.block_diag(*c), whole[where, where].T)


def test_a_basis_comes_to_the_eigenvectors_and_stays_orthogonal():
    torch.manual_seed(0)
    n, q = 24, basis.identity(24, 24)
    wanted, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    sizes = torch.logspace(0, -2, n, dtype=torch.float64)
    c = torch.zeros(n, n)
    for _ in range(300):
        x = torch.randn(4 * n, n, dtype=torch.float64) * sizes @ wanted.T
        turned = basis.turn(x, q, "columns")
        turning, c = basis.rotation(c, basis.covariance(turned, n, "columns"), 0.9)
        q, c = basis.renewed(q, turning).float(), c.float()
    assert (q.double().T @ q.double() - torch.eye(n)).abs().max() < 1e-6
    assert ((q.double().T @ wanted).abs().diagonal() > 0.9).all()


def test_both_factorisations_are_one():
    torch.manual_seed(0)
    x = torch.randn(3, 300, 64, dtype=torch.float64) * torch.logspace(0, -6, 64, dtype=torch.float64)
    mixed, _ = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))
    for c in (x.mT @ x, mixed @ (x.mT @ x) @ mixed.T, torch.eye(64, dtype=torch.float64).expand(2, -1, -1)):
        c = c / basis._mean_eigenvalue(c) + basis.RIDGE * torch.eye(64, dtype=torch.float64)
        torch.testing.assert_close(basis.by_cholesky(c), basis._orthogonal(c), rtol=0, atol=1e-9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_blocks_without_a_usable_covariance_stay(bad):
    latest = torch.eye(8).repeat(2, 1) + 0.1
    latest[3] = bad
    if bad == 0.0:
        latest[:8] = 0.0
    turning, c = basis.rotation(basis.identity(16, 8), latest, 0.5)
    assert torch.equal(turning[:8], torch.eye(8, dtype=torch.float64))
    assert torch.equal(c[:8], torch.eye(8, dtype=torch.float64))
    assert not torch.equal(turning[8:], torch.eye(8, dtype=torch.float64))
    assert turning.isfinite().all()
    assert c.isfinite().all()


# -- against the reference --------------------------------------------------------------------------------------------

hyperparameters = st.fixed_dictionaries(
    {
        "basis": st.sampled_from(["columns", "rows", "both"]),
        "basis_block": st.sampled_from([1, 4, 6, 128]),
        "gamma": st.sampled_from([-0.5, 0.0, 0.1, 0.5, 1.0, 1.3]),
        "refresh_ratio": st.sampled_from([1.05, 1.3, 2.0]),
        "beta3": st.sampled_from([0.0, 0.5, 0.93]),
        "max_interval": st.sampled_from([None, 1, 5]),
        "window": st.sampled_from([None, "auto", 3]),
        "update_clip": st.sampled_from([None, 1.0]),
        "nesterov": st.booleans(),
        "maximize": st.booleans(),
        "weight_decay": st.sampled_from([0.0, 0.1]),
    }
)


@settings(max_examples=60, deadline=None)
@given(hyper=hyperparameters, shape=st.sampled_from([(12, 12), (14, 8), (13, 13)]), seed=st.integers(0, 1 << 20))
def test_whole_runs_agree_in_float64(hyper, shape, seed):
    """The reference keeps whole matrices, and the covariance where the parameter lives."""
    p, optimizer = stepped(shape, 40, seed, torch.float64, **hyper, state_dtype="float64")
    reference = ReferenceAnon(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), **{**LM, **hyper})
    for grad in gradients(shape, 40, seed):
        reference.step(grad)
    assert (p.detach() - reference.theta).abs().max() < 1e-6
    for side, own in (("columns", reference.right), ("rows", reference.left)):
        if own is not None:
            stored = torch.block_diag(*(b for _, q in basis.squares(optimizer.state[p][f"basis_{side}"]) for b in q))
            assert (stored - own.q).abs().max() < 1e-6


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("which", ["columns", "rows", "both"])
@pytest.mark.parametrize("hyper", [{}, {"nesterov": True, "gamma": 1.2}, {"cautious_decay": True, "update_clip": 1.0}])
def test_float32_agrees(fused, which, hyper):
    hyper = {"basis": which, "basis_block": 8, **hyper}
    p, _ = stepped((24, 24), fused=fused, **hyper)
    reference = ReferenceAnon(torch.randn((24, 24), generator=torch.Generator().manual_seed(0)), **{**LM, **hyper})
    for grad in gradients((24, 24), 30):
        reference.step(grad)
    error = (p.detach() - reference.theta).abs()
    assert error.max() < (2e-5 if "cautious_decay" not in hyper else 5e-3)  # a sign may fall the other way: λ η θ
    assert error.median() < 1e-6


def test_the_identity_is_anon_as_it_is():
    """With blocks of one element, and until the first basis."""
    plain, turned = (stepped((9, 7), basis=b, basis_block=1)[0] for b in (None, "both"))
    torch.testing.assert_close(plain, turned, rtol=0, atol=1e-6)


@pytest.mark.parametrize("states", ["bfloat16", "exp_avg=int8, exp_avg_sq=bfloat16, precond=bfloat16"])
def test_compact_states_are_near(states):
    exact = stepped((32, 32), basis="both", basis_block=16)[0]
    compact, optimizer = stepped((32, 32), basis="both", basis_block=16, state_dtype=states)
    start = torch.randn((32, 32), generator=torch.Generator().manual_seed(0))
    moved = (exact - start).norm()
    assert (compact - exact).norm() < 0.03 * moved
    assert optimizer.state[compact]["exp_avg"].dtype != torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters(dtype):
    exact = stepped((16, 16), basis="columns")[0]
    rounded, optimizer = stepped((16, 16), dtype=dtype, basis="columns", stochastic_rounding=dtype == torch.bfloat16)
    assert (rounded.float() - exact).abs().mean() < 0.02
    assert optimizer.state[rounded]["basis_columns"].dtype == torch.float32


def test_a_tensor_of_more_dimensions_is_its_rows():
    p, _ = stepped((6, 4, 3), basis="both", basis_block=4)
    q = nn.Parameter(torch.randn((6, 4, 3), generator=torch.Generator().manual_seed(0)).flatten(1))
    optimizer = Anon([q], **LM, basis="both", basis_block=4)
    for grad in gradients((6, 4, 3), 30):
        q.grad = grad.flatten(1)
        optimizer.step()
    torch.testing.assert_close(p.flatten(1), q, rtol=0, atol=0)


# -- what steps do with it --------------------------------------------------------------------------------------------


def test_a_scale_a_flag_and_tensors_for_lr():
    """As in the plain step: the gradient is divided, and a step that is none changes nothing."""
    p, plain = stepped((12, 12), 5, basis="both", basis_block=4)
    q, told = stepped((12, 12), 5, basis="both", basis_block=4)
    told.param_groups[0]["lr"] = torch.tensor(LM["lr"])
    for t, grad in enumerate(gradients((12, 12), 8, 3)):
        told.grad_scale, told.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        if t == 4:
            told.found_inf = torch.tensor(1.0)
            before = copy.deepcopy((q.data, told.state_dict()))
        p.grad, q.grad = grad, grad * 8.0
        told.step()
        if t == 4:
            assert torch.equal(q.data, before[0])
            after = told.state_dict()["state"][0]
            assert all(torch.equal(after[k], x) for k, x in before[1]["state"][0].items())
            continue
        plain.step()
    del told.grad_scale, told.found_inf
    torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [None, False])
def test_a_scale_far_from_one_is_divided_out_first(fused):
    ends = []
    for exponent in (0, 65, 100, -100):
        p = nn.Parameter(torch.linspace(-1, 1, 96).view(12, 8))
        optimizer = Anon([p], lr=0.01, betas=(0.9, 0.95), refresh_ratio=1.5, basis="both", fused=fused)
        for t in range(9):
            p.grad = torch.randn(12, 8, generator=torch.Generator().manual_seed(t)) * 2.0**exponent
            optimizer.grad_scale = torch.tensor([2.0**exponent])
            optimizer.step()
        ends.append(p)
    assert all(torch.equal(ends[0], end) for end in ends)


def test_split_steps_are_the_same_bits():
    runs = []
    for split in (False, True):
        params = [nn.Parameter(torch.randn(12, 12, generator=torch.Generator().manual_seed(i))) for i in range(3)]
        optimizer = Anon(params, **LM, basis="both", basis_block=4)
        for t in range(12):
            for i, p in enumerate(params):
                p.grad = gradients((12, 12), 1, 10 * t + i)[0]
            if split:
                for part in optimizer.split_step([params[:1], params[2:]]):
                    part()
            else:
                optimizer.step()
        runs.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


def test_many_matrices_at_once_are_the_same_bits_as_one_by_one():
    shapes = [(8, 8), (30, 8), (8, 30), (64, 64)]
    together = [nn.Parameter(torch.ones(s)) for s in shapes]
    optimizer = Anon(together, **LM, basis="both", basis_block=8)
    alone = [nn.Parameter(torch.ones(s)) for s in shapes]
    others = [Anon([p], **LM, basis="both", basis_block=8) for p in alone]
    for t in range(10):
        for i, (p, q) in enumerate(zip(together, alone, strict=True)):
            p.grad = gradients(p.shape, 1, 10 * t + i)[0]
            q.grad = p.grad.clone()
        for each in (optimizer, *others):
            each.step()
    assert all(torch.equal(p, q) for p, q in zip(together, alone, strict=True))


def test_reduced_precision_of_products_elsewhere_does_not_matter():
    exact = stepped((32, 32), basis="both")[0]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        asked = torch.backends.mkldnn.matmul.fp32_precision
        assert torch.equal(stepped((32, 32), basis="both")[0], exact)
        assert torch.backends.mkldnn.matmul.fp32_precision == asked
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_spike_of_the_gradient_does_not_take_over_the_basis():
    """A thousand times as large a gradient in one window moves the basis by no more than another gradient would."""
    bases = []
    for spike in (1.0, 1000.0):
        p = nn.Parameter(torch.zeros(16, 16))
        optimizer = Anon([p], **{**LM, "betas": (0.0, 0.95), "max_interval": 2}, basis="columns")
        for t, grad in enumerate(gradients((16, 16), 40)):
            p.grad = grad * (spike if t == 20 else 1.0)
            optimizer.step()
        optimizer.settle()
        bases.append(optimizer.state[p])
    cosines = (bases[0]["basis_columns"].T @ bases[1]["basis_columns"]).abs().diagonal()
    assert (cosines > 0.999).all()
    torch.testing.assert_close(bases[0]["covariance_columns"], bases[1]["covariance_columns"], rtol=0, atol=0.02)


@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_rounding_becomes_0_and_nothing_else(side, dtype):
    """Each element against the norm of its vector in its block, whichever vectors are looked at."""
    torch.manual_seed(0)
    shape, unit = (300, 70), 8 * torch.finfo(dtype).eps
    few = torch.rand(shape, dtype=dtype) < 0.01
    for x in (
        torch.randn(shape, dtype=dtype),
        torch.where(few, 0.9 * unit, 1.0) * torch.randn(shape, dtype=dtype).sign(),
        torch.randn(shape, dtype=dtype) * (torch.rand(300, 1) < 0.3),
        torch.randn(shape, dtype=dtype) * torch.logspace(0, -9, 70, dtype=dtype),
        torch.randn(shape, dtype=dtype) * 1e-22,
    ):
        given = x if side == "columns" else x.mT.contiguous()
        found = basis.turn(given, basis.identity(70, 32), side, denoise=True)
        found = found if side == "columns" else found.mT
        for part, kept in zip(x.split(32, 1), found.split(32, 1), strict=True):
            noise = unit * torch.linalg.vector_norm(part, dim=1, keepdim=True)
            assert torch.equal(kept, torch.where(part.abs() < noise, 0.0, part))


@pytest.mark.parametrize("which", ["columns", "rows", "both"])
def test_an_infinite_gradient_is_seen(which):
    p, optimizer = stepped((8, 8), 9, basis=which, update_clip=1.0)
    p.grad = torch.ones(8, 8)
    p.grad[2, 3] = torch.inf
    optimizer.step()
    assert p.isnan()[2, 3]


def test_directions_without_gradient_are_left_alone():
    """A gradient that is 0 along one direction, up to rounding, moves nothing along it, though the direction is no coordinate."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(32, 16))
    optimizer = Anon([p], **{**LM, "weight_decay": 0.0}, basis="columns")
    still = nn.functional.normalize(torch.randn(16, dtype=torch.float64), dim=0)
    for t in range(120):
        if t == 60:  # by then the basis has it
            before = p.detach().clone()
        grad = torch.randn(32, 16, dtype=torch.float64)
        p.grad = (grad - (grad @ still)[:, None] * still).float()
        optimizer.step()
    moved = (p.detach() - before).double()
    assert (moved @ still).abs().max() < 1e-4 * moved.abs().max()


# -- which sides, and the state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "which", "keys"),
    [
        ((4, 6), "columns", {"columns"}),
        ((4, 6), "rows", {"rows"}),
        ((4, 6), "both", {"columns", "rows"}),
        ((7,), "both", set()),
        ((), "both", set()),
        ((200, 4), "both", {"columns"}),  # 50 rows to a column: an embedding's tokens
        ((5, 1), "columns", set()),
        ((2, 3, 5), "both", {"columns", "rows"}),
    ],
)
def test_which_sides_are_turned(shape, which, keys):
    p, other = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(2, 2))
    optimizer = Anon([p, other], basis=which, basis_block=4)
    optimizer.init_state()
    found = {key for key in optimizer.state[p] if key not in STATE_KEYS}
    assert found == {f"{what}_{side}" for side in keys for what in ("basis", "covariance")}
    for key in found:
        side = p[0].numel() if key.endswith("columns") else p.shape[0]
        assert optimizer.state[p][key].shape == (side, min(4, side))


@pytest.mark.parametrize("where", [3, 8])
@pytest.mark.parametrize("states", ["float32", "exp_avg=int8, exp_avg_sq=bfloat16, precond=bfloat16"])
def test_a_loaded_state_goes_on_to_the_bit(where, states, tmp_path):
    hyper = {**LM, "basis": "both", "basis_block": 4, "state_dtype": states, "window": "auto", "nesterov": True}
    p = nn.Parameter(torch.randn(12, 10))
    optimizer = Anon([p], **hyper)
    for t, grad in enumerate(gradients((12, 10), 20)):
        if t == where:
            torch.save((p.data, optimizer.state_dict()), tmp_path / "saved.pt")
        p.grad = grad
        optimizer.step()
    weights, saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    q = nn.Parameter(weights)
    resumed = Anon([q], state_dtype=states)
    resumed.load_state_dict(saved)
    for grad in gradients((12, 10), 20)[where:]:
        q.grad = grad
        resumed.step()
    assert torch.equal(p, q)
    a, b = copy.deepcopy(optimizer).state_dict(), resumed.state_dict()
    assert all(torch.equal(x, b["state"][0][k]) for k, x in a["state"][0].items())


def test_other_states_are_refused():
    _p, optimizer = stepped((8, 8), basis="columns", basis_block=4)
    saved = optimizer.state_dict()
    for spoil, words in (
        (lambda s: s["state"][0].pop("covariance_columns"), "of another basis"),
        (lambda s: s["param_groups"][0].update(basis="both"), "of another basis"),
        (lambda s: s["param_groups"][0].update(basis_block=2), "basis_block"),
        (lambda s: s["state"][0].update(basis_columns=torch.eye(8)), "basis_columns of parameter 0"),
        (lambda s: s["state"][0].pop("precond"), "another optimizer's"),
    ):
        wrong = copy.deepcopy(saved)
        spoil(wrong)
        with pytest.raises(ValueError, match=words):
            Anon([nn.Parameter(torch.zeros(8, 8))]).load_state_dict(wrong)


def spoilt(state, how):
    """In the smaller last block of a basis, or of a covariance, of 4 blocks and one of 2."""
    q, c = state["basis_rows"], state["covariance_rows"]
    last, padding = (slice(16, None), slice(0, 2)), (17, 3)
    match how:
        case "doubled":
            q[last] *= 2.0
        case "zero":
            q[last] = 0.0
        case "NaN":
            q[last] = torch.nan
        case "mirrored":  # orthogonal, too
            q[last] *= -1.0
        case "rounded":
            q[last] *= 1.0 + 1e-4
        case "padded":
            q[padding] = 1.0
        case "covariance NaN":
            c[16, 1] = torch.nan
        case "covariance negative":
            c[16, 0] = -1e-2 * c[16, 0]
        case "covariance negative by rounding":
            c[16, 0] = -1e-5 * c[17, 1]
        case "covariance padded":
            c[padding] = 1.0
        case "covariance zero":  # as before the first refresh
            c.zero_()


ORTHOGONAL, NEGATIVE = (
    "basis_rows of parameter 0 .* is not orthogonal",
    "covariance_rows of parameter 0 .* is no covariance",
)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        *((how, ORTHOGONAL) for how in ("doubled", "zero", "NaN", "padded")),
        *((f"covariance {how}", NEGATIVE) for how in ("NaN", "negative", "padded")),
        *((how, None) for how in ("mirrored", "rounded", "covariance negative by rounding", "covariance zero")),
    ],
)
def test_damaged_bases_are_warned_of(how, said):
    """By Anon's own loading, by torch's, which gives whole state dicts, and by copies."""
    torch.manual_seed(0)
    model = nn.Linear(10, 18, bias=False)
    optimizer = Anon(model.named_parameters(), **LM, basis="both", basis_block=4)
    for grad in gradients((18, 10), 8):
        model.weight.grad = grad
        optimizer.step()
    own, whole = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    spoilt(own["state"][0], how)
    spoilt(whole["state"]["weight"], how)
    ways = (
        lambda: optimizer.load_state_dict(own),
        lambda: set_optimizer_state_dict(model, optimizer, whole),
        lambda: copy.deepcopy(optimizer),
    )
    for load in ways:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            load()
        found = [str(w.message) for w in told if "in the loaded state" in str(w.message)]
        assert bool(found) == (said is not None)
        assert not found or re.match(f"Anon: in the loaded state {said}.*Load another checkpoint; or", found[0])
        assert len(found) < 2


@pytest.mark.parametrize("shape", [(4, 128), (2, 70)])
def test_the_bases_of_any_run_are_none_that_are_damaged(shape):
    """With fewer vectors than directions the covariance is singular, and rounding leaves negative eigenvalues."""
    p = nn.Parameter(torch.zeros(shape))
    optimizer = Anon([p], lr=0.1, betas=(0.0, 0.9), beta3=0.0, max_interval=1, basis="both", basis_block=64)
    least = 0.0
    for t in range(60):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(t)) * torch.logspace(0, -8, shape[1])
        optimizer.step()
        optimizer.settle()
        state = optimizer.state[p]
        assert all(basis.is_basis(state[f"basis_{side}"]) for side in ("rows", "columns"))
        assert all(basis.is_covariance(state[f"covariance_{side}"]) for side in ("rows", "columns"))
        least = min(least, *(float(c.diagonal(0, 1, 2).min()) for _, c in basis.squares(state["covariance_columns"])))
    assert least < 0.0


@pytest.mark.parametrize("shape", [(16, 5), (5, 24), (8, 40), (40, 3), (12, 12)])
def test_float32_is_as_far_from_float64_as_float64_is_from_itself_with_rounded_gradients(shape):
    """Fewer rows than columns leave directions almost without momentum, and what they are is sensitive: not our rounding alone."""
    hyper = {"basis": "both", "nesterov": True, "refresh_ratio": 1.03, "beta3": 0.5, "weight_decay": 0.0, "steps": 20}
    moved = {}
    for seed in range(3):
        begin = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
        exact = stepped(shape, seed=seed, dtype=torch.float64, **hyper)[0] - begin
        single = stepped(shape, seed=seed, **hyper)[0] - begin
        perturbed = [
            stepped(shape, seed=seed, dtype=torch.float64, noise=(2**-24, draw), **hyper)[0] - begin
            for draw in range(3)
        ]
        apart = [float(((x - exact).norm() / exact.norm()).detach()) for x in (single, *perturbed)]
        moved[seed] = apart[0], max(apart[1:])
    assert all(of_float32 < 1e-6 + 4 * of_noise for of_float32, of_noise in moved.values()), moved


def test_a_rank_without_rows_has_bases_that_are_fine():
    assert basis.is_basis(torch.zeros(0, 4))
    assert basis.is_covariance(torch.zeros(0, 4))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_which_blocks_lie_on_one_rank(ranks):
    """As torch cuts: `chunk`."""
    for n in range(1, 30):
        shards = {int(i): rank for rank, shard in enumerate(torch.arange(n).chunk(ranks)) for i in shard}
        for block in range(1, 32):
            whole = all(len({shards[i] for i in range(s, min(s + block, n))}) == 1 for s in range(0, n, block))
            found = frame.Cut((n, 50), "rows", (ranks,)).fits(block)
            assert found == whole or (
                whole and n % ranks
            )  # with fewer shards than ranks some that would do are refused


def test_a_refused_block_comes_with_one_that_fits_the_whole_group():
    def refusal(shapes, block=128, ranks=4):
        cuts = [frame.Cut(shape, "rows", (ranks,)) for shape in shapes]
        with pytest.raises(RuntimeError) as told:
            frame.check_cut(cuts[0], block, lambda: cuts)
        return str(told.value), cuts

    for shapes, fitting in (
        ([(64, 9)], 16),
        ([(64, 9), (32, 9)], 8),
        ([(96, 9), (512, 9)], 8),
        ([(48, 9), (1, 9)], 12),
    ):
        said, cuts = refusal(shapes)
        assert f"basis_block={fitting} would fit" in said
        assert all(cut.fits(fitting) for cut in cuts[: len(shapes)] if cut.shape[0] > 1)
    assert (
        "no basis_block fits (4, 9): basis=None in a param group of their own" in refusal([(64, 9), (4, 9), (32, 9)])[0]
    )
    assert "nor do blocks fit those of shape (32, 9), (4, 9)" in refusal([(64, 9), (4, 9), (32, 9)])[0]
    assert "basis_block=5 would fit" in refusal([(10, 3)], block=3, ranks=2)[0]  # larger than what was asked for
    said, _ = refusal([(64, 9), (36, 9)])
    assert (
        "no basis_block fits all of its param group (9 for (36, 9), 16 for (64, 9)): param groups of their own" in said
    )


def test_bad_arguments():
    p = nn.Parameter(torch.zeros(4, 4))
    for wrong in (
        {"basis": "column"},
        {"basis": True},
        {"basis_block": 0},
        {"basis_block": 2.0},
        {"max_interval": 0},
        {"nesterov": 1},
    ):
        with pytest.raises(ValueError, match=f"Anon: {next(iter(wrong))} must be"):
            Anon([p], **wrong)


def test_a_flat_parameter_in_place_of_matrices_is_refused():
    p = nn.Parameter(torch.zeros(100_000))
    optimizer = Anon([p], basis="columns")
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="DeepSpeed and FSDP1 cut matrices"):
        optimizer.step()
    q = nn.Parameter(torch.zeros(10))
    q.grad = torch.ones_like(q)
    with pytest.warns(UserWarning, match="this optimizer has none"):
        Anon([q], basis="columns").step()


def test_matrices_that_the_basis_leaves_alone_are_no_flat_parameters():
    """Long vectors beside them, too."""
    tall, long, plain = (nn.Parameter(torch.zeros(s)) for s in ((5000, 200), (10_000,), (5000, 200)))
    for groups in ([tall, long], [{"params": [plain], "basis": None}, {"params": [long]}]):
        optimizer = Anon(groups, basis="rows")
        for p in (tall, long, plain):
            p.grad = torch.ones_like(p)
        with pytest.warns(UserWarning, match=r"turns none of this optimizer's matrices, of .* \(5000, 200\)") as told:
            optimizer.step()
        assert len(told) == 1
    assert all((p < 0).all() for p in (tall, long, plain))


def test_an_edited_basis_is_refused_and_rebase_named():
    p, optimizer = stepped((8, 8), basis=None)
    optimizer.param_groups[0]["basis"] = "columns"
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"rebase\(basis='columns', group=0\)"):
        optimizer.step()
    optimizer.param_groups[0]["basis"] = None
    optimizer.param_groups[0]["basis_block"] = 4  # means nothing without a basis
    optimizer.step()


def test_a_basis_set_before_the_first_step():
    p = nn.Parameter(torch.randn(8, 8))
    optimizer = Anon([p], **LM)
    optimizer.init_state()
    optimizer.param_groups[0].update(basis="columns", basis_block=4)
    for grad in gradients((8, 8), 3):
        p.grad = grad
        optimizer.step()
    assert optimizer.state[p]["basis_columns"].shape == (8, 4)


def test_rebase_to_a_basis_and_back():
    """The step after it is the one that would have been; back again, the momentum is exact, and the preconditioner as large as it was."""
    grads = gradients((16, 16), 60)
    p, optimizer = stepped((16, 16), 20)
    q, plain = stepped((16, 16), 20)
    optimizer.rebase(basis="both", basis_block=8)
    p.grad = q.grad = grads[0]
    optimizer.step(), plain.step()
    torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    for grad in grads[1:]:
        p.grad = q.grad = grad
        optimizer.step(), plain.step()
    exp_avg = plain.state[q]["exp_avg"]
    assert (optimizer.state[p]["exp_avg"] - exp_avg).abs().max() > 0.01
    optimizer.rebase(basis=None)
    assert set(optimizer.state[p]) == set(STATE_KEYS)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], exp_avg, rtol=0, atol=1e-5)
    ratio = (optimizer.state[p]["precond"] / plain.state[q]["precond"]).log()
    assert ratio.mean().abs() < 0.05
    assert ratio.std() < 0.3
    p.grad = grads[0]
    optimizer.step()


def test_rebase_to_other_blocks():
    p, optimizer = stepped((16, 12), 20, basis="columns", basis_block=4)
    kept = optimizer.state[p]["basis_columns"].clone()
    optimizer.rebase(basis="both")
    assert torch.equal(optimizer.state[p]["basis_columns"], kept)
    assert torch.equal(optimizer.state[p]["basis_rows"], basis.identity(16, 4))
    optimizer.rebase(basis_block=6)
    assert torch.equal(optimizer.state[p]["basis_columns"], basis.identity(12, 6))
    for grad in gradients((16, 12), 5):
        p.grad = grad
        optimizer.step()
    assert p.isfinite().all()


def test_groups_have_their_own():
    shapes = [(8, 8), (8, 8), (8,)]
    params = [nn.Parameter(torch.randn(s)) for s in shapes]
    groups = [
        {"params": params[:1], "basis": "both"},
        {"params": params[1:2]},
        {"params": params[2:], "basis": "columns"},
    ]
    optimizer = Anon(groups, **LM, basis_block=4)
    for p in params:
        p.grad = torch.randn(p.shape)
    optimizer.step()
    found = [{key for key in optimizer.state[p] if key in BASIS_KEYS} for p in params]
    assert [len(f) for f in found] == [4, 0, 0]


def test_a_long_vector_alone_is_no_flattened_matrix():
    """ZeroRedundancyOptimizer may leave a rank nothing but a bias; DeepSpeed's flat tensors are no nn.Parameter."""
    bias = nn.Parameter(torch.ones(9000))
    optimizer = Anon([bias], **LM, basis="columns")
    bias.grad = torch.ones(9000)
    with pytest.warns(UserWarning, match="has none"):
        optimizer.step()
    flattened = torch.ones(9000, requires_grad=True)
    flattened.grad = torch.ones(9000)
    with pytest.raises(RuntimeError, match="a flat parameter of 9000 elements"):
        Anon([{"params": []}, {"params": [flattened]}], **LM, basis="columns").step()
    Anon([{"params": []}, {"params": [flattened], "basis": None}], **LM, basis="columns").step()


def test_missing_gradients_keep_bases_where_they_are():
    params = [nn.Parameter(torch.randn(8, 8)) for _ in range(2)]
    optimizer = Anon(params, **LM, basis="both", basis_block=4)
    for t, grad in enumerate(gradients((8, 8), 12)):
        params[0].grad, params[1].grad = grad, grad if t % 3 == 0 else None
        before = params[1].detach().clone()
        optimizer.step()
        assert torch.equal(before, params[1]) == (t % 3 != 0)
    assert [int(optimizer.state[p]["step"]) for p in params] == [12, 4]


def test_other_strides():
    """A transposed parameter, and one whose gradient is laid out otherwise."""
    plain = stepped((12, 9), basis="both", basis_block=4)[0]
    start = torch.randn((12, 9), generator=torch.Generator().manual_seed(0))
    for p, transposed in itertools.product((start.clone(), start.T.contiguous().T), (False, True)):
        p = nn.Parameter(p.clone(memory_format=torch.preserve_format))
        optimizer = Anon([p], **LM, basis="both", basis_block=4)
        for grad in gradients((12, 9), 30):
            p.grad = grad.T.contiguous().T if transposed else grad
            optimizer.step()
        torch.testing.assert_close(p, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "then"),
    [(None, "columns"), ("columns", None), ("columns", "rows"), ("both", "columns"), ("both", None)],
)
def test_an_edited_basis_is_refused_and_taken_over_as_the_refusal_says(first, then):
    grads = gradients((12, 10), 9)
    ends = []
    for edited in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(12, 10))
        optimizer = Anon([p], **LM, basis=first, basis_block=4)
        for t, p.grad in enumerate(grads):
            if t == 5 and edited:
                optimizer.param_groups[0]["basis"] = then
                with pytest.raises(RuntimeError, match=r"call optimizer\.rebase\(basis="):
                    optimizer.step()
            if t == 5:
                optimizer.rebase(basis=then)
            optimizer.step()
        ends.append((p, optimizer.state_dict()["state"][0]))
        Anon([nn.Parameter(p.detach().clone())]).load_state_dict(optimizer.state_dict())
    (p, state), (q, other) = ends
    assert torch.equal(p, q)
    assert state.keys() == other.keys()
    assert all(torch.equal(x, other[key]) for key, x in state.items())


def test_a_convolution_in_channels_last_takes_on_a_basis():
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(6, 3, 2, 2).to(memory_format=layout))
        optimizer = Anon([p], **LM)
        for t, grad in enumerate(gradients((6, 3, 2, 2), 8)):
            if t == 3:
                optimizer.rebase(basis="columns")
            p.grad = grad.to(memory_format=layout)
            optimizer.step()
        optimizer.settle()
        ends.append((p.detach().contiguous(), optimizer.state[p]["exp_avg"].contiguous()))
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_a_basis_is_set_after_a_first_step_that_was_skipped():
    p, q = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))
    optimizer = Anon([p, q], **LM)
    p.grad, q.grad = torch.randn(6, 4), torch.randn(6)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    optimizer.found_inf = None
    optimizer.param_groups[0]["basis"] = "columns"
    optimizer.step()
    optimizer.settle()
    assert optimizer.state[p]["basis_columns"].shape == (4, 4)
    assert int(optimizer.state[p]["step"]) == int(optimizer.state[q]["step"]) == 1


@pytest.mark.parametrize(("side", "most"), [(None, 1.0), ("columns", 4.0), ("both", 16.0)])
def test_the_clip_bounds_the_turned_update(side, most):
    """A single weight may move further, by the root of the block's size with each side that has a basis."""
    hyper = {"lr": 1.0, "update_clip": 1.0, "weight_decay": 0.0, "basis": side, "basis_block": 16}
    p, optimizer = stepped((32, 32), **hyper)
    before = p.detach().clone()
    p.grad = torch.zeros(32, 32).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(1e4))
    optimizer.step()
    moved = (p.detach() - before).abs().max().item()
    assert moved <= most + 1e-4
    assert side is None or moved > 1.5


def test_settled_state_is_what_is_saved():
    p, optimizer = stepped((8, 8), basis="columns", max_interval=1)
    p.grad = gradients((8, 8), 1)[0]
    optimizer.step()
    before = optimizer.state[p]["basis_columns"].clone()
    optimizer.settle()
    settled = optimizer.state[p]["basis_columns"].clone()
    assert not torch.equal(before, settled)
    torch.testing.assert_close(optimizer.state_dict()["state"][0]["basis_columns"], settled, rtol=0, atol=0)
