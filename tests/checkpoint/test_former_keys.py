"""Checkpoints of earlier versions, which had other keys for the states of a basis: every reader takes them, and no writer writes them."""

import copy
import pickle
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from former import FORMER, convert_to_former, renamed
from test_frames import Model, saved
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_optimizer_state_dict

from anon_dist import Anon
from anon_dist.checkpoint import CheckpointError, load_sharded, save_sharded
from anon_dist.checkpoint.convert import convert, inspect
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.options import ReadOptions, WriteOptions
from anon_dist.checkpoint.recognise import BASIS_STATES
from anon_dist.checkpoint.schema import Key
from anon_dist.checkpoint.verify import verify
from anon_dist.engines.restore import restore
from anon_dist.optim.frame import FORMER_KEYS

HYPER = {"lr": 0.02, "betas": (0.9, 0.95), "refresh_ratio": 1.3, "beta3": 0.8, "basis": "both", "basis_block": 4}


def begun(steps=0):
    model = Model()
    optimizer = Anon(model.named_parameters(), **HYPER)
    go_on(model, optimizer, 0, steps)
    return model, optimizer


def go_on(model, optimizer, start, stop):
    for t in range(start, stop):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i))
        optimizer.step()
    optimizer.settle()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A file of 7 steps with the present keys, and the weights after 15."""
    model, optimizer = begun(7)
    optimizer.state_dict()
    path = saved(tmp_path_factory.mktemp("former") / "a.pt", model, optimizer)
    go_on(model, optimizer, 7, 15)
    return path, [p.detach().clone() for p in model.parameters()]


def assert_goes_on(model, optimizer, wanted):
    go_on(model, optimizer, 7, 15)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), wanted, strict=True))
    assert not {key for own in optimizer.state_dict()["state"].values() for key in own} & set(FORMER_KEYS)


def test_the_table():
    assert {new: old for old, new in FORMER_KEYS.items()} == FORMER
    assert set(FORMER) == set(BASIS_STATES)


FORMATS = {
    "file": ("consolidated", {"keyed": "index"}),
    "accelerate's file": ("consolidated", {"layout": "accelerate"}),
    "canonical": ("canonical", {}),
    "dcp": ("dcp", {"world_size": 2}),
    "accelerate's dcp": ("dcp", {"world_size": 2, "layout": "accelerate"}),
    "torchtitan's dcp": ("dcp", {"world_size": 2, "layout": "torchtitan"}),
    "zero0": ("zero0", {"precision": "float32"}),
    "zero3": ("zero3", {"world_size": 1}),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_and_goes_on_to_the_bit(kind, source, tmp_path):
    path, wanted = source
    (to, options), names = FORMATS[kind], ReadOptions(names_in_model_order=True)
    old = tmp_path / "old"
    convert_to_former(path, old, to, WriteOptions(**options))
    held = b"".join(file.read_bytes() for file in ([old] if old.is_file() else old.rglob("*")) if file.is_file())
    assert b"row_cov" in held
    assert b"covariance_rows" not in held
    assert verify(path, old, names) == []
    model, optimizer = Model(), None
    optimizer = Anon(model.named_parameters(), **HYPER)
    optimizer.init_state()
    restore(model, optimizer, open_checkpoint(old, names))
    assert_goes_on(model, optimizer, wanted)
    shown = inspect(old)["states"]
    assert any(key.startswith("basis_rows") for key in shown)
    assert not any(key.startswith(tuple(FORMER_KEYS)) for key in shown)
    convert(old, tmp_path / "new", "consolidated", read=names)
    written = torch.load(tmp_path / "new")["optimizer"]["state"]
    assert set(FORMER) <= set(written["wide"])
    assert not set(FORMER_KEYS) & set(written["wide"])


def test_states_and_pickles_go_on_to_the_bit(source):
    path, wanted = source
    found = torch.load(path)
    old = {**found["optimizer"], "state": renamed(found["optimizer"]["state"])}
    model = Model()
    model.load_state_dict(found["model"])
    optimizer = Anon(model.named_parameters(), **HYPER)
    optimizer.load_state_dict(copy.deepcopy(old))
    pair = pickle.loads(pickle.dumps((model, optimizer)))
    assert_goes_on(model, optimizer, wanted)
    for p, own in pair[1].state.items():
        pair[1].state[p] = renamed(own)
    assert_goes_on(*pickle.loads(pickle.dumps(pair)), wanted)
    old["state"][0]["basis_rows"] = old["state"][0]["row_basis"]
    with pytest.raises(ValueError, match=r"has \[.*'row_basis'.*\] where Anon's"):
        optimizer.load_state_dict(old)


def test_another_optimizers_state_of_such_a_name_keeps_it(tmp_path):
    state = {0: {"step": 3, "exp_avg": torch.ones(2, 2), "column_basis": torch.eye(2)}}
    torch.save({"optimizer": {"state": state, "param_groups": [{"lr": 0.1, "params": [0]}]}}, tmp_path / "a.pt")
    named = ReadOptions(names=["w"])
    for to in ("dcp", "canonical"):
        convert(tmp_path / "a.pt", tmp_path / to, to, read=named)
        assert Key("w", "column_basis") in open_checkpoint(tmp_path / to).tensors


def test_torchs_distributed_checkpoints(source, tmp_path):
    """Loaded by the training; and by a script with torch alone, after a conversion, which the errors name."""
    path, wanted = source
    convert_to_former(path, tmp_path / "old", "dcp", WriteOptions(world_size=2))
    model, optimizer = begun()
    load_sharded(tmp_path / "old", model, optimizer)
    assert_goes_on(model, optimizer, wanted)
    (tmp_path / "written").mkdir()
    save_sharded(tmp_path / "written", model, optimizer)
    assert b"row_cov" not in (tmp_path / "written" / ".metadata").read_bytes()
    model, optimizer = begun()
    optimizer.init_state()
    weights, states = get_state_dict(model, optimizer)
    with pytest.raises(dcp.api.CheckpointException, match=r"Missing key in checkpoint state_dict: .*basis_columns"):
        dcp.load({"model": weights, "optimizer": states}, checkpoint_id=tmp_path / "old")
    convert(tmp_path / "old", tmp_path / "new", "dcp")
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=tmp_path / "new")
    set_optimizer_state_dict(model, optimizer, states)
    assert_goes_on(model, optimizer, wanted)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    _, states = get_state_dict(model, optimizer, options=flat)
    former = {re.sub(r"\w+$", lambda m: FORMER.get(m[0], m[0]), key): value for key, value in states.items()}
    with pytest.raises(ValueError, match=r"no basis_columns of parameter 0 .*ckpt convert SRC DST --to dcp"):
        set_optimizer_state_dict(model, optimizer, former, options=flat)


def test_both_names_at_once_are_refused(source, tmp_path):
    """Neither is taken for the other."""
    found = torch.load(source[0])
    found["optimizer"]["state"][0]["row_basis"] = torch.zeros(4, 4)
    torch.save(found, tmp_path / "both.pt")
    model, optimizer = begun()
    optimizer.init_state()
    checkpoint = open_checkpoint(tmp_path / "both.pt", ReadOptions(names_in_model_order=True))
    with pytest.raises(CheckpointError, match="the checkpoint has row_basis for square"):
        restore(model, optimizer, checkpoint)
