"""States of Anon that are not of their parameter's shape: carried whole, begun, left, and refused where rows are cut off."""

import copy
import itertools

import pytest
import torch
from test_semantics import Live as _Live
from torch import nn

from anon_dist import Anon
from anon_dist.checkpoint import CheckpointError, cli
from anon_dist.checkpoint.convert import convert, inspect
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.optimizers.semantics import to_adamw, to_anon
from anon_dist.checkpoint.options import AdamWOptions, AnonOptions, WriteOptions
from anon_dist.checkpoint.recognise import BASIS_STATES
from anon_dist.checkpoint.schema import Key, Manifest, ParamGroup, TensorInfo
from anon_dist.checkpoint.torchfiles import rank_local
from anon_dist.checkpoint.verify import verify
from anon_dist.checkpoint.zero.flat import Cut
from anon_dist.engines import zero_restore
from anon_dist.engines.restore import restore

BLOCK = 4
SHAPES = {"square": (4, 4), "wide": (6, 10), "tall": (9, 3), "kernel": (5, 3, 2), "vector": (7,)}
"""The square's bases have its own shape; the others' last blocks are smaller."""


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


def side_state(n, orthogonal):
    """Basis and covariance of a side, as blocks one below the other; and the whole of the basis, in float64."""
    blocks = [orthogonal(min(BLOCK, n - start)) for start in range(0, n, BLOCK)]
    basis = torch.zeros(n, min(BLOCK, n))
    for i, block in enumerate(blocks):
        basis[i * BLOCK : i * BLOCK + len(block), : len(block)] = block
    return basis, torch.randn_like(basis), torch.block_diag(*blocks).double()


def random_orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n))[0]


def permutation(n):
    return torch.eye(n)[torch.randperm(n)]


def made(basis="both", gamma=1.0, orthogonal=random_orthogonal, steps=7):
    """A model and its Anon after a few steps, as if a basis had been there: states by hand. And the bases, whole."""
    torch.manual_seed(1)
    model = Model()
    optimizer = Anon(model.named_parameters(), lr=1e-2, gamma=gamma, betas=(0.9, 0.95), refresh_ratio=1.5)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    wholes = {}
    for name, p in model.named_parameters():
        m, n = p.shape[0], p.numel() // p.shape[0]
        wholes[name] = torch.eye(m).double(), torch.eye(n).double()
        if p.dim() < 2 or basis is None:
            continue
        state, left, right = optimizer.state[p], *wholes[name]
        if basis in ("columns", "both"):
            state["basis_columns"], state["covariance_columns"], right = side_state(n, orthogonal)
        if basis in ("rows", "both"):
            state["basis_rows"], state["covariance_rows"], left = side_state(m, orthogonal)
        wholes[name] = left, right
    optimizer.param_groups[0].update(basis=basis, basis_block=BLOCK, nesterov=True, cautious_decay=False)
    return model, optimizer, wholes


def saved(path, model, optimizer):
    states = {i: dict(optimizer.state[p]) for i, p in enumerate(model.parameters())}
    groups = [{**g, "params": list(range(len(SHAPES)))} for g in optimizer.param_groups]
    torch.save({"model": model.state_dict(), "optimizer": {"state": states, "param_groups": groups}}, path)
    return path


class Live(_Live):
    """With the names of this file's parameters."""

    def __init__(self, optimizer):
        import test_semantics

        before, test_semantics.SHAPES = test_semantics.SHAPES, SHAPES
        try:
            super().__init__(optimizer)
        finally:
            test_semantics.SHAPES = before


def whole(checkpoint, name, state):
    """A state, put together of uneven ranges."""
    info = checkpoint.tensors[Key(name, state)]
    cuts = sorted({0, info.numel // 5, info.numel // 2 + 1, info.numel})
    parts = [checkpoint.read(Key(name, state), *ab) for ab in itertools.pairwise(cuts)]
    return torch.cat(parts).view(info.shape)


# -- carried -----------------------------------------------------------------------------------------------------------


def test_they_are_carried_bit_for_bit(tmp_path):
    model, optimizer, _ = made()
    last = first = saved(tmp_path / "a.pt", model, optimizer)
    for i, (to, options) in enumerate(
        [
            ("canonical", {}),
            ("dcp", {"world_size": 3}),
            ("consolidated", {"keyed": "index"}),
            ("dcp", {"world_size": 2, "layout": "accelerate"}),
            ("dcp", {"world_size": 4, "layout": "torchtitan"}),
            ("zero0", {"precision": "float32"}),
            ("consolidated", {}),
        ]
    ):
        convert(last, tmp_path / f"{i}", to, WriteOptions(**options))
        last = tmp_path / f"{i}"
    assert verify(first, last) == []
    again = torch.load(last)["optimizer"]
    for name, p in model.named_parameters():
        assert again["state"][name].keys() == optimizer.state[p].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(again["state"][name][key], value), (name, key)
            assert again["state"][name][key].dtype == value.dtype
    group = again["param_groups"][0]
    assert (group["basis"], group["basis_block"], group["nesterov"]) == ("both", BLOCK, True)
    shown = inspect(last)
    assert shown["optimizer"] == "Anon"
    assert shown["states"]["basis_rows (float32)"]["elements"] == (4 + 6 + 5) * 4 + 9 * 4
    alone = torch.load(first)["optimizer"]
    alone["state"] = {i: dict(reversed(own.items())) for i, own in alone["state"].items()}
    torch.save(alone, tmp_path / "alone.pt")
    assert inspect(tmp_path / "alone.pt")["groups"][0]["elements"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("to", "basis"), [("zero1", "columns"), ("zero2", "both"), ("zero3", "rows"), ("universal", "columns")]
)
def test_where_rows_are_cut_off_they_are_refused(tmp_path, to, basis):
    """Also when loss is allowed: what would be left is of another frame. And the remedy is one."""
    model, optimizer, _ = made(basis)
    source = saved(tmp_path / "a.pt", model, optimizer)
    for loss in (False, True):
        with pytest.raises(
            CheckpointError, match=r"square has basis_(rows|columns), .*--optimizer anon --anon.drop-basis"
        ):
            convert(source, tmp_path / "b", to, WriteOptions(world_size=2, allow_loss=loss))
    cli.run("convert", [str(source), str(tmp_path / "b"), f"--to={to}", "--optimizer=anon", "--anon.drop-basis"])
    found = open_checkpoint(tmp_path / "b")
    assert not {key.state for key in found.tensors} & set(BASIS_STATES)
    assert found.manifest.groups[0].hyperparameters["basis"] is None


def test_into_a_live_optimizer(tmp_path):
    """By the loader of engines of torch alone; and what it says where one side has a basis and the other has not."""
    model, optimizer, _ = made()
    source = open_checkpoint(saved(tmp_path / "a.pt", model, optimizer))
    other, theirs, _ = made(orthogonal=permutation, steps=2)
    restore(other, theirs, source)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[p].keys() == theirs.state[q].keys()
        assert all(torch.equal(value, theirs.state[q][key]) for key, value in optimizer.state[p].items())
    plain, without, _ = made(None)
    with pytest.raises(CheckpointError, match=r"square has basis_columns, .*--anon.drop-basis"):
        restore(plain, without, source)
    with pytest.raises(CheckpointError, match=r"no basis_columns for square: it was written without a basis.*rebase"):
        restore(other, theirs, open_checkpoint(saved(tmp_path / "b.pt", plain, without)))


def test_into_an_engines_flat_buffers(tmp_path):
    """What ZeRO's stages 1 and 2 step is refused; stage 0 has each parameter whole, stage 3 whole rows, and bases one after the other."""
    model, optimizer, _ = made("columns")
    source = zero_restore._Source(open_checkpoint(saved(tmp_path / "a.pt", model, optimizer)), model)
    for layout in (rank_local.FLAT, rank_local.WHOLE, rank_local.ALIGNED):
        part = zero_restore.Held(torch.zeros(16), ["square"], [16], [Cut(0, 0, 16, 0)], 0, layout)
        with pytest.raises(CheckpointError, match=r"square has basis_columns, .* flat buffers .*--anon.drop-basis"):
            zero_restore._state({}, part, source)
    alone = zero_restore.Held(model.wide.detach(), ["wide"], [60], [Cut(0, 0, 60, 0)], 0)
    filled, expected = zero_restore._state({}, alone, source), optimizer.state[model.wide]
    assert all(torch.equal(filled[key], value) for key, value in expected.items())
    cuts = [Cut(0, 0, 16, 0), Cut(1, 0, 60, 16)]
    shares = zero_restore.Held(torch.zeros(76), ["square", "wide"], [16, 60], cuts, 0, rank_local.SHARDS)
    filled = zero_restore._state({}, shares, source)
    for key, value in filled.items():
        both = [optimizer.state[p][key].reshape(-1) for p in (model.square, model.wide)]
        assert torch.equal(value.view(-1), both[0] if key == "step" else torch.cat(both)), key


# -- left --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["columns", "rows", "both"])
@pytest.mark.parametrize("gamma", [1.0, 0.5, -1.5, 0.125, 0.0])
def test_a_basis_is_left_as_the_formulas_say(basis, gamma):
    """Against whole matrices in float64: m = Q_L m' Q_Rᵀ, and the diagonals of what is diagonal in the basis."""
    model, optimizer, wholes = made(basis, gamma)
    found = to_anon(Live(optimizer), AnonOptions(drop_basis=True))
    assert not {key.state for key in found.tensors} & set(BASIS_STATES)
    assert any("exp_avg_sq and precond are an approximation" in note for note in found.manifest.notes)
    for name, p in model.named_parameters():
        state, (left, right) = optimizer.state[p], wholes[name]
        m, s, v = (state[key].double().flatten(1) if p.dim() > 1 else state[key].double()[:, None]
                   for key in ("exp_avg", "exp_avg_sq", "precond"))  # fmt: skip
        close = {"rtol": 2e-6, "atol": 1e-7}
        torch.testing.assert_close(whole(found, name, "exp_avg"), (left @ m @ right.T).view(p.shape).float(), **close)
        spread = torch.einsum("ik,jl,kl->ij", left**2, right**2, s).view(p.shape).float()
        torch.testing.assert_close(whole(found, name, "exp_avg_sq"), spread, **close)
        exponent = -2 / gamma if abs(gamma) >= 0.25 else -2.0
        sigma = torch.einsum("ik,jl,kl->ij", left**2, right**2, v**exponent).view(p.shape)
        expected = state["precond"] if gamma == 0.0 else (sigma ** (1 / exponent)).float()
        torch.testing.assert_close(whole(found, name, "precond"), expected, rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("gamma", [1.0, -0.7, 0.1])
def test_a_basis_that_only_permutes_is_left_without_a_trace(gamma):
    """No approximation then: the states, permuted by hand, come back; and so AdamW's are those of the optimizer without."""
    _, plain, _ = made(None, gamma)
    _, turned, wholes = made("both", gamma, permutation)
    for p, name in zip(turned.param_groups[0]["params"], SHAPES, strict=True):
        left, right = wholes[name]
        for key in ("exp_avg", "exp_avg_sq", "precond"):
            own = turned.state[p][key]
            own.copy_((left.float().T @ own.flatten(1) @ right.float()).view(own.shape) if own.dim() > 1 else own)
    back = to_anon(Live(turned), AnonOptions(drop_basis=True))
    pairs = [(back, Live(plain), ("exp_avg", "exp_avg_sq", "precond"))]
    adamw = [to_adamw(Live(o)) for o in (turned, plain)]
    pairs.append((*adamw, ("exp_avg", "exp_avg_sq")))
    for one, two, states in pairs:
        assert {key for key in one.tensors if key.state != "weight"} == {k for k in two.tensors if k.state != "weight"}
        for name in SHAPES:
            for state in states:
                torch.testing.assert_close(whole(one, name, state), whole(two, name, state), rtol=3e-6, atol=0.0)
    groups = [c.manifest.groups[0].hyperparameters for c in adamw]
    assert groups[0] == {**groups[1], "lr": pytest.approx(groups[1]["lr"]), "weight_decay": groups[1]["weight_decay"]}
    assert not {"basis", "basis_block", "nesterov", "cautious_decay", "max_interval"} & set(groups[0])
    said = " ".join(adamw[0].manifest.notes)
    assert "are an approximation" in said
    assert "basis = both, nesterov = True" in said


def test_the_next_step_of_adamw_has_anons_direction():
    """Gradients with a scale for each row and each column of the basis, which the diagonal knows in part."""
    _, optimizer, _ = made("columns")
    found = to_adamw(Live(optimizer), AdamWOptions())
    for name in SHAPES:
        info = found.tensors[Key(name, "exp_avg_sq")]
        assert info.shape == SHAPES[name]
        assert bool((whole(found, name, "exp_avg_sq") > 0).all())


def test_what_cannot_be_left():
    _, optimizer, _ = made("rows")
    state = optimizer.state[optimizer.param_groups[0]["params"][1]]
    state["basis_rows"] = state["basis_rows"][:5]
    with pytest.raises(CheckpointError, match=r"wide: basis_rows has shape \(5, 4\), and 6 rows are to be turned"):
        to_adamw(Live(optimizer))
    for options in (AnonOptions(gamma=0.5), AnonOptions(gamma=0.5, drop_basis=True), AnonOptions(basis="rows")):
        with pytest.raises(CheckpointError, match="is Anon's already, and of --anon"):
            to_anon(Live(optimizer), options)
    _, plain, _ = made(None)
    assert "there is no basis to drop" in to_anon(Live(plain), AnonOptions(drop_basis=True)).manifest.notes
    with pytest.raises(CheckpointError, match="AdamW, which has no basis to drop"):
        to_anon(to_adamw(Live(plain)), AnonOptions(drop_basis=True))


# -- begun -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["columns", "rows", "both"])
def test_adamw_begins_with_a_basis_in_which_nothing_is_turned(tmp_path, basis):
    torch.manual_seed(0)
    model = Model()
    adamw = torch.optim.AdamW(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    adamw.step()
    live = Live(copy.deepcopy(adamw))
    plain, found = to_anon(live), to_anon(live, AnonOptions(basis=basis, basis_block=BLOCK, nesterov=True))
    group = found.manifest.groups[0].hyperparameters
    assert (group["basis"], group["basis_block"], group["nesterov"]) == (basis, BLOCK, True)
    wanted = {}
    for name, shape in SHAPES.items():
        if len(shape) > 1:
            sides = {"columns": shape[1:], "rows": shape[:1]}
            for side in [k for k in sides if basis in ("both", k)]:
                n = sides[side].numel() if isinstance(sides[side], torch.Size) else torch.Size(sides[side]).numel()
                eye, _, _ = side_state(n, torch.eye)
                wanted[Key(name, f"basis_{side}")], wanted[Key(name, f"covariance_{side}")] = eye, torch.zeros_like(eye)
    assert found.tensors.keys() == plain.tensors.keys() | wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(whole(found, *key), value), key
    torch.save({"model": model.state_dict(), "optimizer": adamw.state_dict()}, tmp_path / "a.pt")
    anon = AnonOptions(basis=basis, basis_block=BLOCK)
    convert(tmp_path / "a.pt", tmp_path / "b", "dcp", WriteOptions(world_size=2), optimizer=anon)
    written = open_checkpoint(tmp_path / "b")
    assert all(torch.equal(whole(written, *key), value) for key, value in wanted.items())
    back = to_anon(written, AnonOptions(drop_basis=True))
    for key in plain.tensors:
        assert torch.equal(whole(back, *key), whole(plain, *key)), key


def test_an_embeddings_rows_are_not_turned():
    """They stand for tokens: more than 16 to a column, as in the optimizer."""
    p = nn.Parameter(torch.randn(65, 4))
    adamw = torch.optim.AdamW([p])
    p.grad = torch.randn_like(p)
    adamw.step()
    live = _Live.__new__(_Live)
    state = adamw.state[p]
    live._tensors = {Key("wte", k): state[k] for k in ("exp_avg", "exp_avg_sq")}
    live.tensors = {k: TensorInfo(tuple(v.shape), v.dtype) for k, v in live._tensors.items()}
    groups = [ParamGroup(["wte"], {k: v for k, v in adamw.param_groups[0].items() if k != "params"})]
    live.manifest = Manifest("live", 1, "AdamW", groups, {"wte": {"step": state["step"]}}, ["wte"])
    found = to_anon(live, AnonOptions(basis="both", basis_block=2))
    assert {k.state for k in found.tensors if k.state in BASIS_STATES} == {"basis_columns", "covariance_columns"}
