"""Optimizers that number their parameters: what needs no names, what is said where they are wanted, and names that come twice."""

import json
import zipfile

import pytest
import torch
from checkpoints import trained
from safetensors.torch import load_file, save_file
from torch import nn

from anon_dist.checkpoint import CheckpointError, cli
from anon_dist.checkpoint.convert import convert, inspect
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.layouts.hf import INDEX
from anon_dist.checkpoint.options import ReadOptions
from anon_dist.checkpoint.schema import Key
from anon_dist.checkpoint.verify import verify


class Odd(nn.Module):
    """Blocks that are alike, buffers of a matrix's shape (one of a known name), a frozen part, a tied head."""

    def __init__(self, blocks=2):
        super().__init__()
        self.embedding = nn.Embedding(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(blocks))
        self.register_buffer("rotation", torch.randn(4, 4))
        self.register_buffer("inv_freq", torch.randn(4, 4))
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.embedding.weight


def stepped(model, parameters=None):
    optimizer = torch.optim.AdamW(parameters or [p for p in model.parameters() if p.requires_grad])
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


@pytest.fixture
def numbered(tmp_path):
    torch.manual_seed(0)
    model = Odd()
    optimizer = stepped(model)
    path = tmp_path / "a.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return model, optimizer, path


def test_a_look_needs_no_names(numbered, capsys):
    path = numbered[2]
    with pytest.raises(CheckpointError, match="Give --names FILE"):
        open_checkpoint(path)
    found = inspect(path)
    assert (found["optimizer"], found["step"], found["parameters"], found["frozen"]) == ("AdamW", 1, 5, 0)
    assert found["states"]["exp_avg (float32)"] == {"tensors": 3, "elements": 48, "bytes": 192}
    assert [(g["parameters"], g["elements"], g["lr"]) for g in found["groups"]] == [(3, 48, 1e-3)]
    assert any("called by their numbers here, #0, #1, …" in n and "in more than one way" in n for n in found["notes"])
    cli.run("inspect", [str(path)])
    shown = capsys.readouterr().out
    assert "called by their numbers" in " ".join(shown.split())
    json.dumps(found)


def test_the_weights_alone_need_no_names(numbered, tmp_path):
    model, _, path = numbered
    notes = convert(path, tmp_path / "hf", "hf")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert written.keys() == model.state_dict().keys() - {"head.weight"}
    assert all(torch.equal(written[name], model.state_dict()[name]) for name in written)
    assert any("by their numbers" in note for note in notes)
    with pytest.raises(CheckpointError, match="Give --names FILE"):
        convert(path, tmp_path / "dcp", "dcp")


@pytest.mark.parametrize("wrapper", ["none", "unfused", "flat"])
def test_neither_does_deepspeeds_stage_0(tmp_path, wrapper):
    """In float32 it numbers its parameters; the wrappers' masters are alike where weights are."""
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3)))
    for layer in model:
        nn.init.constant_(layer.weight, 0.5)
    optimizer = stepped(nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3)))).state_dict()
    masters = [torch.full((3, 3), 0.5) for _ in range(3)]
    if wrapper == "unfused":
        optimizer = {"optimizer_state_dict": optimizer, "fp32_groups": [masters], "cur_scale": 1.0}
    elif wrapper == "flat":
        state = {"step": 1, "exp_avg": torch.rand(27), "exp_avg_sq": torch.rand(27)}
        inner = {"state": {0: state}, "param_groups": [{"lr": 1.0, "params": [0]}]}
        optimizer = {"optimizer_state_dict": inner, "fp32_groups_flat": [torch.full((27,), 0.5)], "cur_scale": 1.0}
    saved = {"module": model.state_dict(), "optimizer": optimizer, "dp_world_size": 1, "global_steps": 4}
    (tmp_path / "ds").mkdir()
    torch.save(saved, tmp_path / "ds" / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="--names FILE"):
        open_checkpoint(tmp_path / "ds")
    found = inspect(tmp_path / "ds")
    assert found["states"]["exp_avg (float32)"]["elements"] == 27
    assert (found["step"], found["frozen"]) == (4, 0)
    assert any("by their numbers" in note for note in found["notes"])
    convert(tmp_path / "ds", tmp_path / "hf", "hf")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert {n: t.tolist() for n, t in written.items()} == {n: t.tolist() for n, t in model.state_dict().items()}


# -- what is said ------------------------------------------------------------------------------------------------------


def said(path, **options):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, ReadOptions(**options))
    return str(caught.value)


def test_buffers_frozen_and_tied_entries_are_not_called_parameters(numbered, tmp_path):
    """inv_freq is known to be a buffer; rotation and frozen.weight may be anything, and the head is tied."""
    _, _, path = numbered
    beside = "the 5 tensors of the model beside it, of which 2 are frozen, a buffer, or tied to another"
    assert f"numbers its 3 parameters, and their states fit {beside}, in more than one way. Give" in said(path)
    in_order = said(path, names_in_model_order=True)
    assert f"{beside}, in more than one way, also if each group has the model's order. Give" in in_order
    assert "--names-in-model-order says so" not in in_order
    content = torch.load(path)
    copies = {name: value.clone() for name, value in content["model"].items()}  # the tie is lost
    torch.save({**content, "model": copies}, tmp_path / "b.pt")
    assert "the 6 tensors of the model beside it, of which 3 are frozen" in said(tmp_path / "b.pt")


def test_nothing_is_left_over_where_all_are_parameters(tmp_path):
    model = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
    torch.save({"model": model.state_dict(), "optimizer": stepped(model).state_dict()}, tmp_path / "a.pt")
    message = said(tmp_path / "a.pt")
    assert "numbers its 4 parameters, and their states fit the 4 tensors of the model beside it, in more" in message
    assert "--names-in-model-order says so and is enough" in message


def test_groups_that_have_not_the_models_order(tmp_path):
    """Two layers of each of two kinds, in reverse: several assignments, of which none is in order."""
    model = nn.ModuleList([nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False)])
    model += [nn.Linear(4, 5, bias=False), nn.Linear(4, 5, bias=False)]
    optimizer = stepped(model, list(model.parameters())[::-1])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    message = said(tmp_path / "a.pt", names_in_model_order=True)
    assert "in more than one way, none of which has the model's order in each group. Give --names FILE" in message
    assert "also if" not in message


def test_the_names_that_are_asked_for_are_enough(numbered, tmp_path):
    model, optimizer, path = numbered
    names = {p: n for n, p in model.named_parameters()}
    file = tmp_path / "names"
    file.write_text("\n".join(names[p] for g in optimizer.param_groups for p in g["params"]))
    cli.run("convert", [str(path), str(tmp_path / "b.pt"), "--to", "consolidated", "--names", str(file)])
    found = open_checkpoint(tmp_path / "b.pt")
    expected = optimizer.state[model.blocks[1].weight]["exp_avg"].flatten()
    assert torch.equal(found.read(Key("blocks.1.weight", "exp_avg"), 0, 16), expected)
    assert found.manifest.tied == {"head.weight": "embedding.weight"}


# -- twice -------------------------------------------------------------------------------------------------------------


def test_a_name_that_is_given_twice(numbered, tmp_path):
    """Also by two names of one tensor: its states would be the last one's."""
    model, optimizer, path = numbered
    file = tmp_path / "names"
    for names, name in (
        (["blocks.0.weight"] * 2 + ["embedding.weight"], "blocks.0.weight"),
        (["embedding.weight", "blocks.0.weight", "head.weight"], "embedding.weight"),
    ):
        with pytest.raises(CheckpointError, match=f"{name} twice"):
            open_checkpoint(path, ReadOptions(names=names))
        file.write_text("\n".join(names))
        with pytest.raises(SystemExit, match=f"--names.* has {name} twice"):
            cli.run("convert", [str(path), str(tmp_path / "b.pt"), "--to=dcp", f"--names={file}"])
    state = optimizer.state_dict()
    state["param_groups"][0]["param_names"] = names
    torch.save({"model": model.state_dict(), "optimizer": state}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"param_names has embedding.weight twice"):
        open_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "dcp", "--to=canonical"], "--to comes twice"),
        (["--to", "dcp", "--world-size", "2", "--world_size", "4"], "--world_size comes twice"),
        (["--to", "dcp", "--overwrite", "--no-overwrite"], "--overwrite and --no-overwrite contradict each other"),
        (["--to", "zero3", "--buffers", "*.a", "--buffers", "*.b"], "--buffers comes twice"),
        (
            ["--to", "dcp", "--optimizer=anon", "--anon.hold-silent", "--anon.no-hold-silent"],
            "--anon.hold-silent and --anon.no-hold-silent contradict",
        ),
        (["--to", "dcp", "--anon.gamma", "0.5"], "--anon.gamma has no effect without --optimizer anon"),
        (
            ["--to", "dcp", "--optimizer", "anon", "--adamw.eps", "1"],
            "--adamw.eps has no effect without --optimizer adamw",
        ),
        (["--to", "dcp", "--names", "a", "--names-in-model-order"], "--names and --names-in-model-order"),
    ],
)
def test_an_option_that_is_given_twice_or_for_nothing(numbered, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run("convert", [str(numbered[2]), str(tmp_path / "b"), *options])
    assert message in f"{ended.value} {capsys.readouterr().err}"
    assert not (tmp_path / "b").exists()


def test_files_that_hold_a_thing_twice(numbered, tmp_path):
    model, optimizer, path = numbered
    twice = tmp_path / "twice.pt"
    twice.write_bytes(path.read_bytes())
    with zipfile.ZipFile(twice, "a") as archive:
        name = next(n for n in archive.namelist() if n.endswith("data/0"))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(name, b"")
    with pytest.raises(CheckpointError, match="a record is in it twice"):
        open_checkpoint(twice)
    hf = tmp_path / "hf"
    hf.mkdir()
    for i in (1, 2):
        save_file({"w": torch.full((3,), float(i))}, hf / f"model-{i}.safetensors")
    (hf / INDEX).write_text(
        '{"weight_map": {"w": "model-1.safetensors", "v": "model-2.safetensors", "w": "model-2.safetensors"}}'
    )
    with pytest.raises(CheckpointError, match="'w' twice"):
        open_checkpoint(hf)
    (hf / INDEX).write_text('{"weight_map": {"w": "model-1.safetensors", "v": "model-2.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"model-2.safetensors has w, and so has another"):
        open_checkpoint(hf)
    model, optimizer = trained("adamw")
    trainer = tmp_path / "trainer"
    trainer.mkdir()
    torch.save(model.state_dict(), trainer / "model.pt")
    torch.save(optimizer.state_dict(), trainer / "optimizer.pt")
    for file in ("scheduler.pt", "scheduler.bin"):
        torch.save({"last_epoch": 1}, trainer / file)
    with pytest.raises(CheckpointError, match=r"scheduler.pt holds lr_scheduler, and so does another"):
        open_checkpoint(trainer)
    (trainer / "scheduler.bin").unlink()
    assert verify(trainer, trainer) == []
