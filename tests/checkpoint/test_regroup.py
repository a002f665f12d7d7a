"""Checkpoints into optimizers whose param groups are cut otherwise, against torch's own loaders and schedules."""

import copy
import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import Net, step
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.lr_scheduler import LambdaLR, LinearLR, SequentialLR, StepLR

from anon_dist import Anon
from anon_dist.checkpoint import CheckpointError
from anon_dist.checkpoint.convert import convert, inspect
from anon_dist.checkpoint.options import AnonOptions, WriteOptions
from anon_dist.checkpoint.regroup import Group, read_groups
from anon_dist.cli import main
from anon_dist.optim import param_groups

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:Anon. the loaded state brings")
STEPS = 3


def schedule_of(optimizer):
    """One of a function for each group, after one that keeps a start rate."""
    parts = [LinearLR(optimizer, 0.5, total_iters=2), LambdaLR(optimizer, lambda s: 0.9**s)]
    return SequentialLR(optimizer, parts, milestones=[2])


def trained(groups, made=torch.optim.AdamW):
    """A model, its optimizer and schedule after some steps."""
    torch.manual_seed(0)
    model = Net()
    optimizer = made(groups(model), lr=1e-2)
    schedule = schedule_of(optimizer)
    for i in range(STEPS):
        step(model, optimizer, i)
        schedule.step()
    return model, optimizer, schedule


def one_group(model):
    return [{"params": [(n, p) for n, p in model.named_parameters() if p.requires_grad], "weight_decay": 0.2}]


def save(folder, form, model, optimizer, schedule):
    """What a script saves: one file, or a distributed checkpoint."""
    path = folder / f"source-{form}"
    weights, state = get_state_dict(model, optimizer)
    if form == "file":
        weights, state = model.state_dict(), optimizer.state_dict()
        torch.save({"model": weights, "optimizer": state, "schedule": schedule.state_dict()}, path)
    else:
        dcp.save({"model": weights, "optimizer": state, "schedule": schedule.state_dict()}, checkpoint_id=path)
    return path


def by_name(model, optimizer):
    names = {p: n for n, p in model.named_parameters()}
    return {names[p]: state for p, state in optimizer.state.items()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder, run = tmp_path_factory.mktemp("sources"), trained(one_group)
    return {form: save(folder, form, *run) for form in ("file", "dcp")}, run


@pytest.mark.parametrize("form", ["file", "dcp"])
@pytest.mark.parametrize("to", ["dcp", "consolidated"])
def test_one_group_of_adamw_goes_on_in_the_groups_of_a_script_with_anon(sources, tmp_path, form, to):
    """Whose loader is torch's: it goes by the number of a group, and in a file by that of a parameter."""
    (paths, (model, adamw, _)), target = sources, tmp_path / "new" / "folder"
    keyed = WriteOptions(keyed="index")
    notes = convert(paths[form], target, to, keyed, optimizer=AnonOptions(), groups="decay")
    assert "7 parameters are in 2 param groups now, of 4 (weight_decay 0.0) and 3 (weight_decay 0.2)" in notes
    other = Net()
    optimizer = Anon(param_groups(other, weight_decay=0.1), lr=7.0)
    again = schedule_of(optimizer)
    if to == "dcp":
        weights, state = get_state_dict(other, optimizer)
        saved = {"model": weights, "optimizer": state, "schedule": again.state_dict()}
        dcp.load(saved, checkpoint_id=target)
        set_state_dict(other, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    else:
        saved = torch.load(target, weights_only=True)
        other.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    again.load_state_dict(saved["schedule"])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.2]
    found, wanted = by_name(other, optimizer), by_name(model, adamw)
    assert found.keys() == wanted.keys()
    for name, before in wanted.items():
        assert torch.equal(found[name]["exp_avg"], before["exp_avg"]), name
        assert float(found[name]["step"]) == STEPS
    rates = []
    for _ in range(2):
        step(other, optimizer, 9)
        again.step()
        rates += [g["lr"] for g in optimizer.param_groups]
    assert rates == pytest.approx([1e-2 * 0.9**s for s in (2, 2, 3, 3)])


def test_adamw_goes_on_in_a_script_whose_embeddings_have_no_basis(tmp_path):
    """Its next step is the one that it has without any basis, which begins at the identity."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"tokens": nn.Embedding(8, 6), "up": nn.Linear(6, 10), "head": nn.Linear(10, 8, bias=False)})
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    steps = [{n: torch.randn_like(p) for n, p in model.named_parameters()} for _ in range(5)]

    def take(module, by, taken):
        for gradients in taken:
            for name, p in module.named_parameters():
                p.grad = gradients[name].clone()
            by.step()

    take(model, optimizer, steps[:4])
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "adamw")
    content = [
        {"params": ["tokens.*", "head.*"], "basis": None},
        {"params": ["*.weight"]},
        {"params": ["*.bias"], "weight_decay": 0.0},
    ]
    (tmp_path / "groups.json").write_text(json.dumps(content))
    words = ["--to", "dcp", "--optimizer", "anon", "--groups", str(tmp_path / "groups.json")]
    found = {}
    for basis in ("both", None):
        turned = ["--anon.basis", "both"] if basis else []
        main(["ckpt", "convert", str(tmp_path / "adamw"), str(tmp_path / str(basis)), *words, *turned])
        other = copy.deepcopy(model)
        anon = Anon(param_groups(other, basis="both"), lr=7.0)
        anon.rebase(basis=None) if basis is None else None
        weights, state = get_state_dict(other, anon)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / str(basis))
        set_state_dict(other, anon, model_state_dict=weights, optim_state_dict=state)
        assert [g["basis"] for g in anon.param_groups] == [None, basis, basis]
        states = {n: {k for k in anon.state[p] if "basis" in k} for n, p in other.named_parameters()}
        assert states["up.weight"] == ({"basis_columns", "basis_rows"} if basis else set())
        assert not states["tokens.weight"] | states["head.weight"] | states["up.bias"]
        take(other, anon, steps[4:])
        found[basis] = dict(other.named_parameters())
    for name, p in found["both"].items():
        assert torch.allclose(p, found[None][name], rtol=0, atol=1e-6), name
    with pytest.raises(SystemExit, match="a basis can be given where AdamW's state becomes Anon's"):
        main(["ckpt", "convert", str(tmp_path / "both"), str(tmp_path / "again"), *words[:2], *words[4:]])


def test_groups_are_named_by_a_file_and_put_together(tmp_path):
    """Two groups of Anon into one, and into three; the order in a group is the model's."""
    model, anon, schedule = trained(lambda m: param_groups(m, 0.1), Anon)
    source = save(tmp_path, "dcp", model, anon, schedule)
    files = {"one": [{"params": ["*"], "weight_decay": 0.3}]}
    files["three"] = [{"params": ["module.scale"]}, {"params": ["module.*.bias"]}, {"params": ["module.*"]}]
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        words = ["--to", "canonical", "--groups", str(tmp_path / f"{name}.json")]
        if name == "three":  # *.bias leaves the norm's weight, a vector, to the matrices
            with pytest.raises(
                SystemExit, match=r"^error: --groups: .* 0 and 1 .* weight_decay = 0.0 and 0.1; say which"
            ):
                main(["ckpt", "convert", str(source), str(tmp_path / name), *words])
            content[2]["weight_decay"] = 0.1
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        main(["ckpt", "convert", str(source), str(tmp_path / name), *words])
    assert [(g["parameters"], g["weight_decay"]) for g in inspect(tmp_path / "one")["groups"]] == [(7, 0.3)]
    found = [(g["parameters"], g["weight_decay"]) for g in inspect(tmp_path / "three")["groups"]]
    assert found == [(1, 0.0), (2, 0.0), (4, 0.1)]
    state = torch.load(_consolidated(tmp_path / "one"), weights_only=True)["optimizer"]
    order = [n for n, p in model.named_parameters() if p.requires_grad]
    assert [tuple(state["state"][i]["exp_avg"].shape) for i in range(7)] == [
        tuple(dict(model.named_parameters())[n].shape) for n in order
    ]


def _consolidated(folder):
    convert(folder, folder.with_suffix(".pt"), "consolidated", WriteOptions(keyed="index"))
    return folder.with_suffix(".pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nowhere", "--groups nowhere is neither 'decay' nor a file"),
        ("[", "cannot be read: Expecting value"),
        ("{}", "is not a list such as"),
        ('[{"weight_decay": 0.1}]', "group 0 needs params, a list of names or patterns"),
        ('[{"params": ["*"], "lr": 1}]', "group 0 has lr; only params, weight_decay and basis can be given"),
        ('[{"params": ["*"], "basis": "all"}]', "group 0: basis must be null, 'columns', 'rows', 'both', not 'all'"),
        ('[{"params": ["*"], "basis": null}]', "a basis can be given where AdamW's state becomes Anon's"),
        ('[{"params": ["*"], "weight_decay": -1}]', "weight_decay must be a number ≥ 0, not -1"),
        ('[{"params": ["*.weight"]}]', "scale is in none of the groups"),
        ('[{"params": ["*"]}, {"params": ["wte"]}]', "'wte' matches no parameter of the optimizer"),
        ('[{"params": ["*"]}, {"params": ["sc*"]}]', "group 1 is left empty"),
    ],
)
def test_mistakes_are_a_line(sources, tmp_path, content, message):
    path = tmp_path / "groups.json"
    path.write_text(content)
    given = content if content == "nowhere" else str(path)
    with pytest.raises(SystemExit) as ended:
        main(["ckpt", "convert", str(sources[0]["file"]), str(tmp_path / "x"), "--to", "dcp", "--groups", given])
    assert message in str(ended.value)
    assert "\n" not in str(ended.value)
    assert not (tmp_path / "x").exists()


def test_what_differs_is_not_put_together(tmp_path):
    """Learning rates, and a schedule that is of other groups."""
    model, adamw, schedule = trained(
        lambda m: [{**g, "lr": r} for g, r in zip(param_groups(m), (1e-2, 5e-3), strict=True)]
    )
    source, whole = save(tmp_path, "dcp", model, adamw, schedule), (Group(("*",), 0.1),)
    with pytest.raises(
        CheckpointError, match=r"param groups 0 and 1 cannot be in one group, as they have lr = 0.009.* and 0.0045"
    ):
        convert(source, tmp_path / "x", "dcp", groups=whole)
    with pytest.raises(SystemExit, match="--groups has no effect with --to hf"):
        main(["ckpt", "convert", str(source), str(tmp_path / "x"), "--to", "hf", "--groups", "decay"])
    odd = StepLR(torch.optim.AdamW([torch.zeros(1)]), 1).state_dict()
    weights, state = get_state_dict(model, adamw)
    dcp.save({"model": weights, "optimizer": state, "other": odd}, checkpoint_id=tmp_path / "odd")
    with pytest.raises(
        CheckpointError, match="the schedule other has 1 entries in base_lrs, and the optimizer 2 param groups"
    ):
        convert(tmp_path / "odd", tmp_path / "x", "dcp", groups="decay")
    assert read_groups("decay") == "decay"


def test_a_run_without_a_schedule_goes_on_in_a_script_with_one(tmp_path):
    """Which asks for the rate that its schedule began with."""
    torch.manual_seed(0)
    model = Net()
    adamw = torch.optim.AdamW(one_group(model), lr=1e-2)
    step(model, adamw, 0)
    torch.save({"model": model.state_dict(), "optimizer": adamw.state_dict()}, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "new", "dcp", optimizer=AnonOptions(), groups="decay")
    other = Net()
    optimizer = Anon(param_groups(other, weight_decay=0.1), lr=7.0)
    schedule = StepLR(optimizer, 1)
    weights, state = get_state_dict(other, optimizer)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=tmp_path / "new")
    set_state_dict(other, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    step(other, optimizer, 1)
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1e-3, 1e-3])
