"""Anon outside of our training loop: the scripts of this folder, on two ranks and on one process, against each other and an oracle."""

import json
import math
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import toy
from ranks import run_ranks
from transformers import Trainer, TrainingArguments

from anon_dist import Anon
from anon_dist.optim import ReferenceAnon

WAYS = ("trainer", "trainer_fsdp2", "accelerate_fsdp2", "torch_fsdp2", "torch_ddp_zero1")
ALONE = tuple(way for way in WAYS if way != "trainer_fsdp2")
FEWER = tuple(way for way in ALONE if way != "accelerate_fsdp2")
RANKS, STEPS, SAVED, WARMUP, LR = 2, 12, 5, 3, 1e-2
GROUPS = [(0.5, 0.1), (1.0, 0.1), (1.0, 0.0)]  # γ and λ: token embeddings; other matrices; vectors


def launch(out, part, ranks):
    log = out / f"{part}.log"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    script = Path(__file__).with_name("launched.py")
    assert run_ranks(script, [environment] * ranks, [str(out), part], log, seconds=2000), log.read_text()[-6000:]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of what two ranks did: each way whole; and ended after step 7, resumed from step 5 in new processes.

    The same on one process; and the checkpoints of two ranks resumed by it.
    """
    out = tmp_path_factory.mktemp("users")
    launch(out, "first", RANKS)
    for way in FEWER:
        shutil.copytree(out / way, out / f"{way}-fewer")
    launch(out, "again", RANKS)
    launch(out, "alone", 1)
    return out


def found(out, run, rank=0):
    result = torch.load(out / f"{run}-{rank}.pt", weights_only=False)
    assert "failed" not in result, result["failed"]
    return result


def merged_state(out, run, ranks):
    """The state of all parameters: with ZeRO stage 1 each rank has that of some."""
    return {name: state for rank in range(ranks) for name, state in found(out, run, rank)["state"].items()}


def schedule(step):
    """Linear warm-up, then a cosine to 0: the factor at `step` = 0, 1, …"""
    if step < WARMUP:
        return step / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def check_resumed(out, whole, resumed, ranks):
    """The steps after the checkpoint are those of the run that was never ended, to the last bit."""
    for rank in range(ranks):
        a, b = found(out, whole, rank), found(out, resumed, rank)
        assert len(b["steps"]) == STEPS - SAVED
        assert b["steps"] == a["steps"][SAVED:]
        assert b["losses"][-(STEPS - SAVED) :] == a["losses"][SAVED:]
        assert b["groups"] == a["groups"]
        assert_same(a["weights"], b["weights"])
    a, b = merged_state(out, whole, ranks), merged_state(out, resumed, ranks)
    assert a.keys() == b.keys() == found(out, whole)["weights"].keys()
    for name in a:
        assert_same(a[name], b[name])


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_resumed_is_bit_identical(way, out):
    check_resumed(out, f"whole-{way}", f"resumed-{way}", RANKS)


@pytest.mark.parametrize("way", ALONE)
def test_resumed_is_bit_identical_on_one_process(way, out):
    check_resumed(out, f"alone-whole-{way}", f"alone-resumed-{way}", 1)


@pytest.mark.parametrize("way", FEWER)
def test_fewer_ranks_take_over(way, out):
    """A checkpoint of two ranks goes on in one process; sums of gradients are rounded in another order, nothing else differs."""
    a, b = found(out, f"whole-{way}"), found(out, f"fewer-{way}")
    assert b["steps"] == a["steps"][SAVED:]
    assert b["losses"][-(STEPS - SAVED) :] == pytest.approx(a["losses"][SAVED:], rel=2e-6)
    for name, weight in a["weights"].items():
        torch.testing.assert_close(b["weights"][name], weight, rtol=1e-5, atol=5e-6, msg=name)


def test_snippets_resume(out):
    """The pages' blocks as they stand: five steps, then resumed and on to eight."""
    found = json.loads((out / "snippets.json").read_text())
    names = ("trainer, resumed", "accelerate, resumed", "fsdp2, resumed", "zero1, resumed")
    assert found == {name: [[5.0], [8.0]] for name in names}


def test_snippets_of_a_line(out):
    """The pages' blocks that make an optimizer step with Anon, by the settings that they give."""
    found = json.loads((out / "lines.json").read_text())
    assert {(made["class"], *made["steps"]) for made in found.values()} == {("Anon", 1.0)}
    presets = {
        "betas": [0.9, 0.95],
        "gamma": 1.0,
        "refresh_ratio": 1.03,
        "beta3": 0.93,
        "update_clip": 1.0,
        "window": 64,
    }
    for name in ("fsdp2", "trainer", "arguments"):
        assert {g["weight_decay"] for g in found[name]["groups"]} == {0.1, 0.0}
        assert found[name]["dtypes"] == ["torch.bfloat16"]
        for group in found[name]["groups"]:
            assert (group["initial_lr"] or group["lr"]) == 1e-3
            assert {key: group[key] for key in presets} == presets
    embeddings, *others = found["matched"]["groups"]
    assert (embeddings["gamma"], {g["gamma"] for g in others}) == (0.5, {1.0})
    assert {(g["lr"], g["update_clip"]) for g in others} == {(1e-3, 1.0)}
    assert embeddings["lr"] * embeddings["update_clip"] == pytest.approx(1e-3)
    assert embeddings["lr"] != pytest.approx(1e-3, rel=0.1)


# -- what was stepped -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_anon_took_the_steps_that_were_asked_for(way, out):
    """It is Anon, with the groups' own γ and λ; no library spent a step on zeros, and each step had the schedule's learning rate."""
    for rank in range(RANKS):
        for run, first, last in (("whole", 0, STEPS), ("early", 0, 7), ("resumed", SAVED, STEPS)):
            result = found(out, f"{run}-{way}", rank)
            assert result["class"] == "anon_dist.optim.anon.Anon"
            assert [(g["gamma"], g["weight_decay"]) for g in result["groups"]] == GROUPS
            assert all((g["eps"], g["refresh_ratio"], g["beta3"]) == (1e-8, 1.1, 0.8) for g in result["groups"])
            rates = [pytest.approx([LR * schedule(step)] * len(GROUPS)) for step in range(first, last)]
            assert result["steps"] == rates
            assert {float(s["step"]) for s in result["state"].values()} == {last}


@pytest.mark.parametrize("way", WAYS)
def test_bytes_of_state_on_a_rank(way, out):
    """Model, Anon(model's parameters), then wrapping: nothing unsharded stays. Plain DDP replicates, as it should."""
    for run in ("whole", "early", "resumed"):
        for rank in range(RANKS):
            result = found(out, f"{run}-{way}", rank)
            whole = 3 * 4 * sum(p.numel() for p in result["weights"].values())
            share = whole if way == "trainer" else whole / RANKS
            assert abs(result["bytes"] / share - 1) < 0.02, (run, rank, result["bytes"], share)


def expected(samples):
    """The losses and weights of one process that trains on these batches by the reference recurrence, in float64."""
    model, data = toy.model(), toy.Tokens()
    names = dict(model.named_parameters())
    reference = {
        name: ReferenceAnon(
            p,
            eps=1e-8,
            gamma=0.5 if "wte" in name else 1.0,
            weight_decay=0.1 if p.dim() > 1 else 0.0,
            refresh_ratio=1.1,
            beta3=0.8,
        )
        for name, p in names.items()
    }
    losses = []
    for step, batch in enumerate(samples):
        items = [data[i] for i in batch]
        loss = model(**{key: torch.stack([item[key] for item in items]) for key in items[0]}).loss
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in names.values()))
        for name, p in names.items():
            reference[name].lr = LR * schedule(step)
            reference[name].step(p.grad * min(1.0, 1.0 / (norm + 1e-6)))
            p.data.copy_(reference[name].theta)
    return losses, {name: r.theta.float() for name, r in reference.items()}


@pytest.mark.parametrize("way", WAYS)
def test_agrees_with_the_reference(way, out):
    """Against float64 on the whole batches; γ = 0.5 would show a wrong scale of the gradient. The difference is float32's."""
    runs = [found(out, f"whole-{way}", rank) for rank in range(RANKS)]
    size = 8 // RANKS
    samples = [[i for run in runs for i in run["samples"][size * t : size * (t + 1)]] for t in range(STEPS)]
    assert len({i for batch in samples for i in batch}) == 8 * STEPS  # no sample twice
    losses, weights = expected(samples)
    assert runs[0]["losses"] == pytest.approx(losses, rel=2e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(runs[0]["weights"][name], weight, rtol=1e-5, atol=5e-6, msg=name)


# -- what a user may get wrong ----------------------------------------------------------------------------------------


def test_accelerates_schedule(out):
    """By default a prepared schedule moves as many steps as there are processes; four steps at 0.5 to the power of the step."""
    right, fast = [1.0, 0.5, 0.25, 0.125], [1.0, 0.25, 0.0625, 0.015625]
    for rank in range(RANKS):
        factors = json.loads((out / f"traps-{rank}.json").read_text())["schedules"]
        for accumulated in (1, 2):
            assert factors[f"default, {accumulated}"] == fast
            assert factors[f"split_batches, {accumulated}"] == right
            assert factors[f"unlinked, guarded, {accumulated}"] == right
        assert factors["unlinked, 1"] == factors["not prepared, 1"] == right
        assert factors["unlinked, 2"] == factors["not prepared, 2"] == [0.5, 0.125, 0.03125, 0.0078125]


def test_fully_shard_wants_the_optimizer_afterwards(out):
    """torch's own `fully_shard` makes new parameters: an optimizer from before it has others, and trains nothing."""
    before = json.loads((out / "traps-0.json").read_text())["before"]
    assert before == {"trained": False, "same parameters": False, "states": before["states"]}


@pytest.mark.parametrize(("hyper", "decays"), [({}, [0.25, 0.0]), ({"weight_decay": 0.1}, [0.25, 0.0])])
def test_trainer_sets_the_weight_decay_itself(hyper, decays, tmp_path):
    """Without `params`, it is TrainingArguments' that counts; and the learning rate is Anon's default unless given with the class."""
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", weight_decay=0.25, learning_rate=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = Trainer(toy.model(), args, optimizer_cls_and_kwargs=(Anon, hyper)).create_optimizer()
    assert [g["weight_decay"] for g in optimizer.param_groups] == decays
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 1e-3]
