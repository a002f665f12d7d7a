"""Folders of transformers' Trainer and of accelerate in one process: converted, and resumed by their own loaders."""

import json
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import assert_equal
from transformers import Trainer, TrainingArguments

from anon_dist import Anon
from anon_dist.checkpoint import CheckpointError
from anon_dist.checkpoint.convert import convert
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.options import AnonOptions, ReadOptions, WriteOptions
from anon_dist.checkpoint.verify import verify

sys.path.insert(0, str(Path(__file__).parents[1] / "users"))
import toy

TRAINER = WriteOptions(layout="trainer")


def trainer(folder, **how):
    """Dropout, so that the random state counts."""
    model = toy.model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    args = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=4, save_steps=3, learning_rate=1e-2, weight_decay=0.1,
        lr_scheduler_type="cosine", warmup_steps=2, logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    return Trainer(model, args, train_dataset=toy.Tokens(), **how)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint of step 3, the run that the Trainer itself resumes from it, and the names of the optimizer's parameters.

    (With dropout the Trainer goes on otherwise than the run that was not interrupted: it draws once more.)
    """
    folder = tmp_path_factory.mktemp("trainer")
    trainer(folder).train()
    run = trainer(folder / "resumed")
    run.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    names = {p: n for n, p in run.model.named_parameters()}
    return run, folder / "checkpoint-3", [names[p] for g in run.optimizer.param_groups for p in g["params"]]


def assert_alike(run, other):
    assert_equal(dict(other.model.state_dict()), dict(run.model.state_dict()), "model")
    a, b = other.optimizer.state_dict(), run.optimizer.state_dict()
    assert_equal(a["state"], b["state"], "state")
    for one, two in zip(a["param_groups"], b["param_groups"], strict=True):
        assert_equal({k: v for k, v in one.items() if k != "param_names"}, two, "group")
    assert_equal(other.lr_scheduler.state_dict(), run.lr_scheduler.state_dict(), "scheduler")
    keep = ("loss", "learning_rate", "grad_norm", "step", "epoch")
    logs = [[{k: v for k, v in line.items() if k in keep} for line in r.state.log_history] for r in (run, other)]
    assert logs[0][:-1] == logs[1][:-1]  # the last one is of times


def test_a_folder_is_resumed_as_it_was_written(whole, tmp_path):
    run, source, names = whole
    with pytest.raises(CheckpointError, match=r"optimizer.pt: .* in more than one way. Give --names FILE"):
        open_checkpoint(source)
    convert(source, tmp_path / "canonical", "canonical", read=ReadOptions(names=names))
    target = tmp_path / "again" / "checkpoint-3"
    target.parent.mkdir()
    convert(tmp_path / "canonical", target, "consolidated", TRAINER)
    assert {p.name for p in target.iterdir()} == {p.name for p in source.iterdir()} - {"generation_config.json"}
    assert verify(tmp_path / "canonical", target) == []
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (source, target)]
    assert states[0] == states[1]
    other = trainer(target.parent)
    other.train(resume_from_checkpoint=str(target))
    assert_alike(run, other)


def test_a_script_is_taken_over(whole, tmp_path):
    """A file of `torch.save`, without a Trainer's record: it computes that from the step."""
    run, source, names = whole
    saved = open_checkpoint(source, ReadOptions(names=names)).manifest.extras
    convert(source, tmp_path / "a.pt", "consolidated", read=ReadOptions(names=names))
    script = {k: v for k, v in torch.load(tmp_path / "a.pt").items() if k in ("model", "optimizer")}
    torch.save({**script, "schedule": saved["lr_scheduler"]}, tmp_path / "b.pt")
    notes = convert(tmp_path / "b.pt", tmp_path / "checkpoint-3", "consolidated", TRAINER)
    assert any("save_steps" in note for note in notes)
    other = trainer(tmp_path)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert other.state.global_step == 6
    assert (tmp_path / "checkpoint-6" / "optimizer.pt").is_file()
    assert_equal(other.lr_scheduler.state_dict(), run.lr_scheduler.state_dict(), "scheduler")
    torch.save(script["model"], tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="does not say how many steps"):
        convert(tmp_path / "weights.pt", tmp_path / "c", "consolidated", TRAINER)


def test_adamw_becomes_anon_for_the_trainer(whole, tmp_path):
    _, source, names = whole
    target = tmp_path / "checkpoint-3"
    convert(source, target, "consolidated", TRAINER, ReadOptions(names=names), optimizer=AnonOptions(gamma=0.5))
    other = trainer(tmp_path, optimizer_cls_and_kwargs=(Anon, {"lr": 1e-2}))
    loaded = {}

    def keep(optimizer, *_):
        loaded.setdefault("state", {k: v.clone() for k, v in next(iter(optimizer.state.values())).items()})

    create = other.create_optimizer
    other.create_optimizer = lambda *a, **k: (create(*a, **k), other.optimizer.register_step_pre_hook(keep))[0]
    other.train(resume_from_checkpoint=str(target))
    expected = torch.load(target / "optimizer.pt")["state"][0]
    assert_equal(loaded["state"], expected, "state")
    factor = torch.load(target / "scheduler.pt")["base_lrs"][0] / torch.load(source / "scheduler.pt")["base_lrs"][0]
    assert abs(factor - 1) > 0.1
    assert other.lr_scheduler.base_lrs[0] == pytest.approx(1e-2 * factor)


def test_accelerate_loads_what_is_written_for_one_process(whole, tmp_path):
    from accelerate.checkpointing import load_accelerator_state

    _, source, names = whole
    options = WriteOptions(layout="accelerate", world_size=2)
    convert(source, tmp_path / "acc", "consolidated", options, ReadOptions(names=names))
    assert {p.name for p in (tmp_path / "acc").iterdir()} == {
        "model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "extras.pt", "training_args.bin"
    }  # fmt: skip
    other = trainer(tmp_path)
    other.create_optimizer_and_scheduler(6)
    load_accelerator_state(tmp_path / "acc", [other.model], [other.optimizer], [other.lr_scheduler], [], 0)
    expected = torch.load(source / "optimizer.pt")
    assert_equal(other.optimizer.state_dict()["state"], expected["state"], "state")
    assert_equal(other.lr_scheduler.state_dict(), torch.load(source / "scheduler.pt"), "scheduler")
    assert torch.equal(torch.get_rng_state(), torch.load(source / "rng_state.pth", weights_only=False)["cpu"])
