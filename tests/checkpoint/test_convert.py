"""Checkpoints of plain torch code through every format and back, bit for bit, and into the engines' own loaders."""

import itertools
import json
import random
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import OPTIMIZERS, assert_equal, assert_same, fresh, groups_of, step, trained
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from anon_dist.checkpoint import CheckpointError, cli, load_sharded, save_sharded
from anon_dist.checkpoint.convert import convert, inspect
from anon_dist.checkpoint.copy import write_files
from anon_dist.checkpoint.formats import open_checkpoint, plan
from anon_dist.checkpoint.names import assign
from anon_dist.checkpoint.options import AnonOptions, ReadOptions, WriteOptions
from anon_dist.checkpoint.schema import EXTRA, WEIGHT, Key
from anon_dist.checkpoint.verify import verify

KINDS = list(OPTIMIZERS)
TARGETS = {
    "canonical": ("canonical", {}),
    "consolidated": ("consolidated", {}),
    "by-index": ("consolidated", {"keyed": "index"}),
    "dcp": ("dcp", {"world_size": 3}),
    "accelerate": ("dcp", {"world_size": 2, "layout": "accelerate"}),
    "torchtitan": ("dcp", {"world_size": 5, "layout": "torchtitan"}),
}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def to(source, target, name, **options):
    kind, own = TARGETS.get(name, (name, {}))
    convert(source, target, kind, WriteOptions(**{**own, **options}))
    return target


def save_script(path, kind):
    """What a training script saves."""
    model, optimizer = trained(kind)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "iteration": 3,
            "note": ("tuple", 1, {2: None}),
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    return {kind: save_script(folder / f"{kind}.pt", kind) for kind in KINDS}


PAIRS = [("anon", a, b) for a, b in itertools.product(TARGETS, TARGETS)]
PAIRS += [(kind, a, b) for kind in KINDS[1:] for a, b in itertools.pairwise([*TARGETS, "canonical"])]


@pytest.mark.parametrize(("kind", "a", "b"), PAIRS)
def test_every_pair(scripts, tmp_path, kind, a, b):
    """Script → a → b → script: what torch's own loader then has is what it had."""
    if kind == "shampoo" and {a, b} & {"dcp", "accelerate", "torchtitan"}:
        pytest.skip("torch's distributed checkpoints do not keep integer keys; see test_nested_states_in_dcp")
    first = to(scripts[kind], tmp_path / "a", a)
    second = to(first, tmp_path / "b", b)
    assert verify(scripts[kind], second) == []
    original = torch.load(scripts[kind])
    loaded = torch.load(to(second, tmp_path / "c", "by-index"), weights_only=True)
    assert_equal(loaded["optimizer"], original["optimizer"], "optimizer")
    if "accelerate" not in (a, b):
        for key in ("scheduler", "rng", "iteration", "note"):
            assert_equal(loaded[key], original[key], key)
    if kind != "shampoo":  # torch's loader casts its states to the parameter's dtype
        model, optimizer = trained(kind)
        other, reference = fresh(kind)
        other.load_state_dict(loaded["model"])
        reference.load_state_dict(loaded["optimizer"])
        for _ in range(2):
            step(model, optimizer, 9)
            step(other, reference, 9)
        assert_same(model, optimizer, other, reference)


@pytest.mark.parametrize("kind", ["anon", "adamw", "lion"])
@pytest.mark.parametrize("ranks", [1, 3, 8, 40])
def test_torch_loads_what_is_written(scripts, tmp_path, kind, ranks):
    """dcp.load with a template, and our own, which refuses keys that are too many or missing."""
    target = to(scripts[kind], tmp_path / "dcp", "dcp", world_size=ranks)
    assert len(list(target.glob("__*_0.distcp"))) == ranks
    model, optimizer = trained(kind)
    other, reference = trained(kind, steps=1)
    model_state, optimizer_state = get_state_dict(other, reference)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, storage_reader=dcp.FileSystemReader(target))
    set_state_dict(other, reference, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert_same(model, optimizer, other, reference)
    other, reference = trained(kind, steps=1)
    load_sharded(target, other, reference)
    assert_same(model, optimizer, other, reference)


def test_what_torch_writes_is_read(tmp_path):
    """Our own save, and plain `dcp.save` under other names and deeper."""
    model, optimizer = trained("anon")
    (tmp_path / "ours").mkdir()
    save_sharded(tmp_path / "ours", model, optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    app = {"app": {"model": model_state, "optim": optimizer_state}, "extra": {"tokens_seen": 5}}
    dcp.save(app, storage_writer=dcp.FileSystemWriter(tmp_path / "app"))
    assert verify(tmp_path / "ours", tmp_path / "app") == []
    found = open_checkpoint(tmp_path / "app").manifest
    assert found.optimizer == "Anon"
    assert found.step == 3
    assert found.extras["extra"] == {"tokens_seen": 5}
    assert {tuple(g.members) for g in found.groups} == {tuple(g["params"]) for g in optimizer_state["param_groups"]}


def test_safetensors_pieces_are_read(tmp_path):
    from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat

    model, _ = trained("adamw")
    weights = {k: v for k, v in model.state_dict().items() if v.ndim and k != "head.weight"}
    writer = FileSystemWriter(tmp_path / "st", serialization_format=SerializationFormat.SAFETENSORS)
    dcp.save({"model": weights}, storage_writer=writer)
    found = open_checkpoint(tmp_path / "st")
    for name, value in weights.items():
        assert torch.equal(found.read(Key(name, WEIGHT), 0, value.numel()), value.flatten())


def test_torchtitans_keys(scripts, tmp_path):
    """Bare model keys and `optimizer.state.NAME.KEY`, as its loader's template has them (`flatten_optimizer_state_dict`)."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    target = to(scripts["adamw"], tmp_path / "titan", "torchtitan")
    optimizer = trained("adamw")[1]
    other, reference = trained("adamw", steps=1)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    template = {**other.state_dict(), "optimizer": get_optimizer_state_dict(other, reference, options=options)}
    keys = set(dcp.FileSystemReader(target).read_metadata().state_dict_metadata)
    assert {f"optimizer.{k}" for k in template["optimizer"]} <= keys
    assert "inner.0.weight" in keys
    dcp.load(template, storage_reader=dcp.FileSystemReader(target))
    other.load_state_dict({k: v for k, v in template.items() if k != "optimizer"})
    set_state_dict(other, reference, model_state_dict={}, optim_state_dict=template["optimizer"], options=StateDictOptions(
        flatten_optimizer_state_dict=True, strict=False
    ))  # fmt: skip
    assert_equal(optimizer.state_dict()["state"], reference.state_dict()["state"], "state")


def test_accelerates_folders(scripts, tmp_path):
    """The folders that accelerate's FSDP loader names, loaded as it does; `load_state` itself is in `dcp_cases.py`."""
    target = to(scripts["adamw"], tmp_path / "acc", "accelerate")
    assert {p.name for p in target.iterdir()} >= {"pytorch_model_fsdp_0", "optimizer_0"}
    other, reference = trained("adamw", steps=1)
    model_state, optimizer_state = get_state_dict(other, reference)
    for part, state in (
        ("pytorch_model_fsdp_0", {"model": model_state}),
        ("optimizer_0", {"optimizer": optimizer_state}),
    ):
        dcp.load(state, storage_reader=dcp.FileSystemReader(target / part), planner=dcp.DefaultLoadPlanner())
    set_state_dict(other, reference, model_state_dict=model_state, optim_state_dict=optimizer_state)
    model, optimizer = trained("adamw")
    assert_same(model, optimizer, other, reference)


def test_accelerates_folder_is_read(tmp_path):
    """`Accelerator.save_state` without sharding: model.safetensors, optimizer.bin, scheduler.bin, random states."""
    from accelerate.checkpointing import save_accelerator_state

    model, optimizer = trained("adamw")
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    random.seed(3)
    (tmp_path / "acc").mkdir()
    save_accelerator_state(
        tmp_path / "acc", [model.state_dict()], [optimizer], [schedule], [], 0, 7, safe_serialization=False
    )
    found = open_checkpoint(tmp_path / "acc").manifest
    assert found.optimizer == "AdamW"
    assert found.extras["lr_scheduler"]["step_size"] == 2
    assert found.extras["rng"][0]["python"] == random.getstate()
    to(tmp_path / "acc", tmp_path / "canonical", "canonical")
    to(tmp_path / "canonical", tmp_path / "fsdp", "accelerate", world_size=2)
    original = torch.load(tmp_path / "acc" / "random_states_0.pkl", weights_only=False)
    again = torch.load(tmp_path / "fsdp" / "random_states_0.pkl", weights_only=False)
    assert again["random_state"] == original["random_state"]
    assert torch.equal(again["torch_manual_seed"], original["torch_manual_seed"])
    assert np.array_equal(again["numpy_random_seed"][1], original["numpy_random_seed"][1])
    assert torch.load(tmp_path / "fsdp" / "scheduler.bin") == torch.load(tmp_path / "acc" / "scheduler.bin")


def test_the_random_states_and_progress_of_a_run_arrive(tmp_path):
    from anon_dist.train.inputs import randomness

    model, optimizer = trained("anon")
    run = tmp_path / "step-00000003"
    run.mkdir()
    save_sharded(run, model, optimizer)
    randomness.seed(1, 0, 3)
    randomness.save(run, 0)
    progress = {"format": 1, "step": 3, "data": {"samples": 12}, "world_size": 1, "model": {"model_type": "gpt2"}}
    (run / "trainer.json").write_text(json.dumps(progress))
    first = to(run, tmp_path / "a", "consolidated")
    second = to(to(first, tmp_path / "b", "canonical"), tmp_path / "c", "dcp", world_size=2)
    arrived = json.loads((second / "trainer.json").read_text())
    assert arrived.pop("xxh3")["checksums.json"]
    assert arrived == {**progress, "world_size": 2}
    expected = torch.get_rng_state(), random.getstate()
    randomness.seed(2, 0, 0)
    assert randomness.load(second, 0)
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert random.getstate() == expected[1]
    to(first, tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == {"model_type": "gpt2"}


def test_weights_alone(scripts, tmp_path):
    """Hugging Face's files, and back; tied weights once."""
    target = to(scripts["adamw"], tmp_path / "hf", "hf")
    weights = trained("adamw")[0].state_dict()
    found = load_file(target / "model.safetensors")
    assert set(weights) - set(found) == {"head.weight"}
    for name, value in found.items():
        assert torch.equal(value, weights[name]), name
    again = torch.load(to(target, tmp_path / "w.pt", "consolidated"))
    assert_equal(dict(again["model"]), found, "weights")
    assert inspect(target)["optimizer"] is None


def test_nested_states_in_dcp(scripts, tmp_path):
    """DCP makes strings of integer keys, as torch's own saving does; nothing else changes."""
    target = to(scripts["shampoo"], tmp_path / "dcp", "dcp", world_size=2)
    assert verify(scripts["shampoo"], target) == []
    back = torch.load(to(target, tmp_path / "c", "by-index"))["optimizer"]["state"]
    expected = trained("shampoo")[1].state_dict()["state"]
    for i, state in expected.items():
        assert_equal({int(k): v for k, v in back[i].get("factors", {}).items()}, state["factors"], f"{i}.factors")
        assert_equal(
            {k: v for k, v in back[i].items() if k != "factors"},
            {k: v for k, v in state.items() if k != "factors"},
            str(i),
        )


def test_a_moving_average_is_streamed(tmp_path):
    """Large tensors among the extras are not held in memory, and come back where they were."""
    average = {"layer": torch.randn(1025, 1025), "small": torch.ones(3)}
    model = torch.nn.Linear(2, 2)
    torch.save({"model": model.state_dict(), "ema": {"decay": 0.99, "shadow": average}}, tmp_path / "a.pt")
    for name in ("canonical", "dcp", "torchtitan"):
        target = to(tmp_path / "a.pt", tmp_path / name, name)
        checkpoint = open_checkpoint(target)
        if name != "dcp":
            assert Key("ema.shadow.layer", EXTRA) in checkpoint.tensors
        back = torch.load(to(target, tmp_path / f"{name}.pt", "consolidated"))
        assert_equal(back["ema"], {"decay": 0.99, "shadow": average}, "ema")


# -- names -------------------------------------------------------------------------------------------------------------


def test_ambiguous_numbers_ask_for_names(tmp_path):
    """Two groups over equal shapes: any guess might be wrong."""
    model = torch.nn.Sequential(*[torch.nn.Linear(4, 4, bias=False) for _ in range(3)])
    p = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": [p[1]]}, {"params": [p[0], p[2]], "lr": 1.0}])
    for q in p:
        q.grad = torch.randn(4, 4)
    optimizer.step()
    path = tmp_path / "a.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    for in_order in (False, True):  # which fits in two ways, too
        with pytest.raises(CheckpointError, match=r"a.pt: .* in more than one way.*Give --names FILE"):
            open_checkpoint(path, ReadOptions(names_in_model_order=in_order))
    found = open_checkpoint(path, ReadOptions(names=["1.weight", "0.weight", "2.weight"]))
    assert [g.members for g in found.manifest.groups] == [["1.weight"], ["0.weight", "2.weight"]]
    assert torch.equal(found.read(Key("1.weight", "exp_avg"), 0, 16), optimizer.state[p[1]]["exp_avg"].flatten())
    with pytest.raises(CheckpointError, match="--names has 1 names for 3"):
        open_checkpoint(path, ReadOptions(names=["1.weight"]))


def test_the_order_of_safetensors_is_not_the_models(tmp_path):
    """They sort by name: what fits in that order may still be wrong."""
    from safetensors.torch import save_file

    model = torch.nn.ModuleDict({"z": torch.nn.Linear(4, 4), "a": torch.nn.Linear(4, 4)})
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
    with pytest.raises(CheckpointError, match=r"optimizer.bin: .* in more than one way. Give --names FILE"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"optimizer.bin: .* has lost its order. Give --names FILE"):
        open_checkpoint(tmp_path, ReadOptions(names_in_model_order=True))
    found = open_checkpoint(tmp_path, ReadOptions(names=[n for n, _ in model.named_parameters()]))
    expected = optimizer.state[model["z"].weight]["exp_avg"]
    assert torch.equal(found.read(Key("z.weight", "exp_avg"), 0, 16), expected.flatten())


def test_the_models_order_is_no_evidence(tmp_path):
    """minGPT's optimizer is made from sorted names: h.0, h.1, h.10, h.11, h.2, …, which fits the model's order as well."""
    model = torch.nn.ModuleDict({"h": torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(12))})
    named = sorted(model.named_parameters())
    named = [(n, p) for n, p in named if p.ndim > 1] + [(n, p) for n, p in named if p.ndim == 1]
    decayed, plain = [p for _, p in named[:12]], [p for _, p in named[12:]]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}])
    for _, p in named:
        p.grad = torch.randn_like(p)
    optimizer.step()
    path, names = tmp_path / "a.pt", tmp_path / "names"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"more than one way. Give --names .* --names-in-model-order says so"):
        open_checkpoint(path)
    with pytest.raises(SystemExit, match="more than one way"):
        cli.run("convert", [str(path), str(tmp_path / "b.pt"), "--to", "consolidated"])
    names.write_text("\n".join(n for n, _ in named))
    for more in ([], ["--keyed", "index"]):
        cli.run(
            "convert",
            [str(path), str(tmp_path / "b.pt"), "--to=consolidated", "--overwrite", f"--names={names}", *more],
        )
        cli.run("convert", [str(tmp_path / "b.pt"), str(tmp_path / "c.pt"), "--to=consolidated", "--overwrite"])
        states = torch.load(tmp_path / "c.pt")["optimizer"]["state"]
        assert all(torch.equal(states[n]["exp_avg"], optimizer.state[p]["exp_avg"]) for n, p in named)
    cli.run("convert", [str(path), str(tmp_path / "d.pt"), "--to", "consolidated", "--names-in-model-order"])
    states = torch.load(tmp_path / "d.pt")["optimizer"]["state"]
    own = [[n for n, p in model.named_parameters() if p.ndim == d] for d in (2, 1)]
    assert list(states) == [*own[0], *own[1]]  # what was said is done


def test_shapes_that_are_all_different_need_no_names(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4, bias=False), torch.nn.Linear(4, 5))
    p = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([{"params": [p["2.bias"], p["0.weight"]]}, {"params": [p["1.weight"], p["0.bias"]]}])
    for q in model.parameters():
        q.grad = torch.randn_like(q)
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    found = open_checkpoint(tmp_path / "a.pt").manifest
    assert [g.members for g in found.groups] == [["2.bias", "0.weight"], ["1.weight", "0.bias"]]
    assert found.frozen == ["2.weight"]


def test_only_what_is_certain_is_named():
    """Against all assignments, tried one by one."""
    generator = random.Random(0)
    outcomes = set()
    for _ in range(300):
        count, spare = generator.randint(1, 4), generator.randint(0, 1)
        model = [f"p{i}" for i in range(count + spare)]
        fitting = {i: {n for n in model if generator.random() < 0.5} for i in range(count)}
        right = [
            names for names in itertools.permutations(model, count) if all(n in fitting[i] for i, n in enumerate(names))
        ]
        outcomes.add(min(len(right), 2))
        if len(right) == 1:
            assert assign([range(count)], fitting, model, "here") == dict(enumerate(right[0]))
        else:
            with pytest.raises(CheckpointError, match="in more than one way" if right else "here: "):
                assign([range(count)], fitting, model, "here")
    assert outcomes == {0, 1, 2}


def test_recorded_names_are_used(tmp_path):
    """Optimizers built from named_parameters say what they number."""
    model = torch.nn.Sequential(*[torch.nn.Linear(4, 4, bias=False) for _ in range(3)])
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW([{"params": named[1:]}, {"params": named[:1]}])
    for _, p in named:
        p.grad = torch.randn(4, 4)
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    assert [g.members for g in open_checkpoint(tmp_path / "a.pt").manifest.groups] == [
        ["1.weight", "2.weight"],
        ["0.weight"],
    ]


def test_names_that_do_not_fit(tmp_path):
    model, optimizer = trained("adamw")
    for group in optimizer.param_groups:
        del group["param_names"]
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    with pytest.raises(CheckpointError, match=r"numbers its 7 parameters, and no model is beside it"):
        open_checkpoint(tmp_path / "o.pt")
    torch.save({"model": torch.nn.Linear(2, 2).state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"do not fit the 2 tensors of the model beside it"):
        open_checkpoint(tmp_path / "m.pt")
    names = [n for g in groups_of(model) for n, _ in g["params"]]
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "n.pt")
    for wrapper in ("", "module.", "_orig_mod."):
        found = open_checkpoint(tmp_path / "n.pt", ReadOptions(names=[wrapper + n for n in names]))
        assert [m for g in found.manifest.groups for m in g.members] == names
    with pytest.raises(CheckpointError, match=r"--names has inner.0.wieght, and the model beside"):
        open_checkpoint(tmp_path / "n.pt", ReadOptions(names=[n.replace("0.weight", "0.wieght") for n in names]))
    with pytest.raises(CheckpointError, match=r"--names calls parameter \d .*, but its states have shape"):
        open_checkpoint(tmp_path / "n.pt", ReadOptions(names=names[::-1]))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_wrappers_names_are_taken_off(tmp_path, prefix):
    model, optimizer = trained("anon")
    state = {prefix + k: v for k, v in model.state_dict().items()}
    torch.save({"state_dict": state, "optim": optimizer.state_dict()}, tmp_path / "a.pt")
    torch.save({"state_dict": model.state_dict(), "optim": optimizer.state_dict()}, tmp_path / "b.pt")
    assert verify(tmp_path / "a.pt", tmp_path / "b.pt") == []


def test_inspect_says_what_it_is(scripts):
    found = inspect(scripts["anon"])
    assert (found["format"], found["optimizer"], found["step"]) == ("consolidated", "Anon", 3)
    assert (found["parameters"], found["frozen"], found["buffers"]) == (8, 1, 3)
    assert found["tied"] == {"head.weight": "embedding.weight"}
    assert [g["parameters"] for g in found["groups"]] == [3, 4]
    assert inspect(scripts["adamw"])["optimizer"] == "AdamW"
    assert inspect(scripts["lion"])["optimizer"] == "Lion"
    assert re.match(r"unknown \(.*momentum", inspect(scripts["shampoo"])["optimizer"])
    json.dumps(inspect(scripts["shampoo"]))


def test_zero_redundancy_optimizers_whole_state(tmp_path):
    """ZeroRedundancyOptimizer, consolidated: numbered like any other."""
    import torch.distributed as dist
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, plain = trained("adamw")
            zero = ZeroRedundancyOptimizer([dict(g) for g in plain.param_groups], torch.optim.AdamW, lr=1e-2)
            step(model, zero, 0)
            zero.consolidate_state_dict()
        torch.save({"model": model.state_dict(), "optimizer": zero.state_dict()}, tmp_path / "a.pt")
    finally:
        dist.destroy_process_group()
    target = to(tmp_path / "a.pt", tmp_path / "dcp", "dcp")
    other, reference = trained("adamw", steps=1)
    load_sharded(target, other, reference)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert_equal(dict(zero.optim.state.get(p, {})), dict(reference.state.get(q, {})), "state")


def test_names_given_for_factored_states(tmp_path):
    """Adafactor's rows and columns of a square matrix have one shape, which is not the matrix's."""
    model = torch.nn.Linear(8, 8)
    matrix = {"step": 3, "exp_avg_sq_row": torch.rand(8), "exp_avg_sq_col": torch.rand(8)}
    optimizer = {
        "state": {0: matrix, 1: {"step": 3, "exp_avg_sq": torch.rand(8)}},
        "param_groups": [{"params": [0, 1]}],
    }
    torch.save({"model": model.state_dict(), "optimizer": optimizer}, tmp_path / "a.pt")
    found = open_checkpoint(tmp_path / "a.pt", ReadOptions(names=["weight", "bias"]))
    assert torch.equal(found.read(Key("weight", "exp_avg_sq_row"), 0, 8), matrix["exp_avg_sq_row"])


def test_arrays_among_the_extras_are_compared(tmp_path):
    model = torch.nn.Linear(2, 2).state_dict()
    for name, array in (("a", [1, 2]), ("b", [1, 2]), ("c", [1, 3])):
        torch.save({"model": model, "curve": np.array(array), "best": {"at": np.array([])}}, tmp_path / f"{name}.pt")
    assert verify(tmp_path / "a.pt", tmp_path / "b.pt") == []
    assert [d.what for d in verify(tmp_path / "a.pt", tmp_path / "c.pt")] == ["extra curve"]


def test_a_lost_schedule_is_a_difference(scripts, tmp_path):
    script = torch.load(scripts["adamw"])
    del script["scheduler"]
    torch.save(script, tmp_path / "a.pt")
    assert verify(scripts["adamw"], tmp_path / "a.pt") == [("extra scheduler", "only in A")]
    assert verify(tmp_path / "a.pt", scripts["adamw"]) == [("extra scheduler", "only in B")]


@pytest.mark.parametrize("named", ["scheduler", "schedule", "cosine"])
def test_the_schedule_reaches_deepspeed_under_any_name(tmp_path, named):
    """Scripts mostly say `scheduler`, the README `schedule`; DeepSpeed would begin its own anew, with the first step's rate."""
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.named_parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t)).state_dict()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), named: schedule}, tmp_path / "a.pt")
    for name in ("zero0", "zero2", "zero3", "universal"):
        files = list(to(tmp_path / "a.pt", tmp_path / name, name, world_size=2).rglob("*_model_states.pt"))
        assert files
        assert all(torch.load(f, weights_only=False)["lr_scheduler"] == schedule for f in files)


def test_a_schedule_stays_where_a_script_looks_for_it(tmp_path):
    """In the DCP folder, as the README's snippet has it; `dcp.load` is the judge."""

    def made():
        model, optimizer = trained("adamw", steps=1)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)

    def tree(model, optimizer, schedule):
        weights, states = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": states, "schedule": schedule}

    model, optimizer, schedule = made()
    for i in range(3):
        step(model, optimizer, i)
        schedule.step()
    dcp.save(tree(model, optimizer, schedule), checkpoint_id=tmp_path / "a")
    to(to(tmp_path / "a", tmp_path / "b", "canonical"), tmp_path / "c", "dcp", world_size=2)
    assert verify(tmp_path / "a", tmp_path / "c") == []
    other, reference, later = made()
    saved = tree(other, reference, later)
    dcp.load(saved, checkpoint_id=tmp_path / "c")
    set_state_dict(other, reference, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    assert_same(model, optimizer, other, reference)
    assert_equal(later.state_dict(), schedule.state_dict(), "schedule")
    convert(tmp_path / "a", tmp_path / "d", "dcp", optimizer=AnonOptions(gamma=0.5))
    found = open_checkpoint(tmp_path / "d").manifest
    rates = [g.hyperparameters["lr"] / h["lr"] for g, h in zip(found.groups, optimizer.param_groups, strict=True)]
    assert found.extras["schedule"]["base_lrs"] == pytest.approx(
        [f * x for f, x in zip(rates, schedule.base_lrs, strict=True)]
    )
    assert "schedule" in found.inside


@pytest.mark.parametrize("name", ["zero1", "zero2", "universal"])
def test_clipping_is_left_to_the_engine_where_it_is_not_known(scripts, tmp_path, name):
    """DeepSpeed takes the norm to clip to over from the file: 0 would switch its clipping off."""
    target = to(scripts["adamw"], tmp_path / "ds", name, allow_loss=True)
    files = [*target.rglob("*_optim_states.pt"), *target.rglob("optimizer_state.pt")]
    assert files
    for file in files:
        found = torch.load(file, weights_only=False)
        assert "clip_grad" not in found.get("optimizer_state_dict", {})
        assert "clip_grad" not in found


@pytest.mark.parametrize("name", ["consolidated", "dcp", "accelerate", "torchtitan"])
def test_the_training_step_survives_formats_without_a_place_for_it(scripts, tmp_path, name):
    """Of optimizers that do not count; DeepSpeed would go on from step 0."""
    script = torch.load(scripts["lion"])
    del script["iteration"]
    torch.save(script, tmp_path / "lion.pt")
    assert inspect(tmp_path / "lion.pt")["step"] is None
    counted, canonical = open_checkpoint(tmp_path / "lion.pt"), tmp_path / "canonical"
    counted.manifest.step = 7
    write_files(plan(counted, "canonical", WriteOptions()), counted, None, canonical, quiet=True)
    assert inspect(to(canonical, tmp_path / "there", name))["step"] == 7


def test_a_parameter_without_dimensions(tmp_path):
    """Its states have none either, and are no less its states: DeepSpeed lays them flat, and another optimizer's are made of them."""
    model = torch.nn.Linear(3, 3)
    model.scale = torch.nn.Parameter(torch.tensor(0.5))
    optimizer = torch.optim.AdamW(model.named_parameters())
    (model(torch.ones(3)).square().sum() * model.scale).backward()
    optimizer.step()
    path = tmp_path / "a.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    for name in ("zero0", "zero1", "zero3", "universal", "dcp", "canonical"):
        target = to(path, tmp_path / name, name)
        assert verify(path, target) == []
        assert verify(path, to(target, tmp_path / f"{name}.pt", "consolidated")) == []
    assert (
        optimizer.state[model.scale]["exp_avg"]
        == torch.load(tmp_path / "zero3.pt")["optimizer"]["state"]["scale"]["exp_avg"]
    )
    convert(path, tmp_path / "anon.pt", "consolidated", optimizer=AnonOptions())
    states = torch.load(tmp_path / "anon.pt")["optimizer"]["state"]
    assert states["scale"].keys() == states["weight"].keys()
    assert states["scale"]["precond"].shape == ()


@pytest.mark.parametrize(
    "both", [lambda a, b: {"optimizer": [a, b]}, lambda a, b: {"optimizer_g": a, "optimizer_d": b}]
)
def test_several_optimizers_are_carried_and_said_to_be(tmp_path, both):
    model = torch.nn.Linear(3, 3)
    states = [torch.optim.SGD([p], momentum=0.9).state_dict() for p in model.parameters()]
    torch.save({"model": model.state_dict(), **both(*states)}, tmp_path / "a.pt")
    notes = convert(tmp_path / "a.pt", tmp_path / "dcp", "dcp")
    assert any("optimizer" in note and "among the extras" in note for note in notes)
    back = torch.load(to(tmp_path / "dcp", tmp_path / "b.pt", "consolidated"))
    assert_equal({k: v for k, v in back.items() if k != "model"}, both(*states), "optimizers")


def test_a_scripts_own_classes_are_carried_and_never_run(tmp_path):
    """argparse's namespace, and a dataclass and an object of the script's `__main__`: by value, inert."""
    script = tmp_path / "script.py"
    script.write_text(
        "import argparse, sys, torch\n"
        "from dataclasses import dataclass\n"
        "open(sys.argv[0] + '.ran', 'a').write('x')\n"
        "@dataclass\nclass Config:\n    width: int\n    rates: list\n"
        "class Loud:\n    def __setstate__(self, state):\n        open('ran', 'w').close()\n        self.__dict__ = state\n"
        "loud = Loud()\nloud.tokens = torch.arange(3)\n"
        "for name, width in (('a', 3), ('b', 3), ('c', 4)):\n"
        "    args = argparse.Namespace(width=width, lr=[0.1], inner=argparse.Namespace(x=1))\n"
        "    saved = {'model': torch.nn.Linear(2, 2).state_dict(), 'args': args, 'config': Config(width, [1]), 'loud': loud}\n"
        "    saved['model'] = {k: torch.ones_like(v) for k, v in saved['model'].items()}\n"
        "    torch.save(saved, sys.argv[1] + '/' + name + '.pt')\n"
        "again = torch.load(sys.argv[2], weights_only=False) if len(sys.argv) > 2 else saved\n"
        "assert again['config'] == Config(4, [1]) and again['args'] == args, again\n"
        "assert type(again['loud']) is Loud and again['loud'].tokens.tolist() == [0, 1, 2]\n"
    )
    subprocess.run([sys.executable, script, tmp_path], check=True, cwd=tmp_path)
    assert verify(tmp_path / "a.pt", tmp_path / "b.pt") == []
    assert {d.what for d in verify(tmp_path / "a.pt", tmp_path / "c.pt")} == {"extra args", "extra config"}
    for name in ("canonical", "dcp", "torchtitan"):
        target = to(tmp_path / "c.pt", tmp_path / name, name)
        assert verify(tmp_path / "c.pt", target) == []
    back = to(target, tmp_path / "back.pt", "consolidated")
    assert not (tmp_path / "ran").exists()
    subprocess.run([sys.executable, script, tmp_path, back], check=True, cwd=tmp_path)  # its own loader
    assert (tmp_path / "ran").exists()
