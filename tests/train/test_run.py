"""Whole runs in one process: interrupted and resumed, exported, refused."""

import contextlib
import json
import shutil
import signal

import numpy as np
import pytest
import torch
from former import convert_to_former
from helpers import Crash, at_step, crash, metrics, send
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from anon_dist.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.schema import WEIGHT, Key
from anon_dist.cli import main
from anon_dist.data import DataError, PrepareConfig, TokenShards, prepare
from anon_dist.engines.torch_native import TorchEngine
from anon_dist.train import finishing, loop
from anon_dist.train.config.errors import Interrupted, RunInUseError, SkippedError
from anon_dist.train.config.lr import lr_factor
from anon_dist.train.config.parsing import ConfigError
from anon_dist.train.recording import trackers
from anon_dist.train.reports import report
from anon_dist.train.reports.plot import plot_loss

# β2 = 0.95, ρ = 1.1: refreshes at 1 … 11, 13; a window of 2 is closed at step 12, and open at 4, 8 and 13.
OPTIMIZERS = {
    "preset": {},
    "window": {"optim__window": 2, "optim__refresh_ratio": 2.0},
    "adamw": {"optim__name": "adamw"},
    "compact": {
        "train__precision": "bf16-true",
        "optim__state_dtype": "exp_avg=int8, exp_avg_sq=bfloat16, precond=bfloat16",
    },
    "gamma": {"optim__gamma": 0.5, "optim__gamma_by_name": {"*wte*": 1.0, "*ln_*": 0.0}},
    "basis": {
        "optim__basis": "both",
        "optim__basis_block": 24,
        "optim__nesterov": True,
        "optim__cautious_decay": True,
        "optim__max_interval": 3,
        "optim__lr_by_name": {"*wte*": 3.0},
        "optim__embedding_beta1": 0.8,
    },
}


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    models = [AutoModelForCausalLM.from_pretrained(folder / "model").state_dict() for folder in (a, b)]
    assert all(torch.equal(x, y) for x, y in zip(models[0].values(), models[1].values(), strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_that_crashes_ends_like_one_that_does_not(optimizer, run_config, train, tmp_path, monkeypatch, capsys):
    """Crashes at steps before, at and after checkpoints (every 4 steps), with gradient accumulation and dropout. The checkpoint of step 8
    is damaged: what its load has changed until that is noticed, everything, is none the less that of step 4 in the end."""
    changes = {**OPTIMIZERS[optimizer], "model__dropout": 0.1}
    whole = train(run_config(**changes, run_dir=str(tmp_path / "whole")))
    config = run_config(**changes, run_dir=str(tmp_path / "crashed"))
    for step in (2, 6, 11, 13):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            if step == 13:
                damage(tmp_path / "crashed" / "checkpoints" / "step-00000008", patch)
                capsys.readouterr()
            at_step(patch, step, crash)
            train(config)
    said = capsys.readouterr().out
    assert "step-00000008 is damaged, and set aside as step-00000008.damaged: " in said
    assert "random-00000.pt is damaged" in said
    assert "Take an earlier checkpoint" not in said  # which the run has done
    assert "step-00000004: steps 5 to 10 are taken again" in said
    assert_same_run(whole, train(config))
    assert (tmp_path / "crashed" / "checkpoints" / "step-00000008.damaged" / ".metadata").exists()


def damage(checkpoint, patch):
    """Cut off a file that is read last; and have the load before it leave wreckage, as one that ends half way may."""
    random_state = checkpoint / "random-00000.pt"
    random_state.write_bytes(random_state.read_bytes()[:-100])
    load = TorchEngine.load

    def wreck(engine, folder):
        load(engine, folder)
        if folder.name == checkpoint.name:
            for p in engine.model.parameters():
                p.data.fill_(torch.nan)
            for state in engine.optimizer.state.values():
                for value in state.values():
                    value.fill_(3)
            for group in engine.optimizer.param_groups:
                group.update(lr=7.0, weight_decay=5.0, betas=(0.1, 0.2))
                if "history" in group:
                    group.update(gamma=-1.0, history='[{"since": 3, "gamma": -1.0}]')

    patch.setattr(TorchEngine, "load", wreck)


@pytest.mark.parametrize("how", ["empty", "a key", "the cursor", "random"])
def test_what_is_damaged_everywhere_is_refused_in_a_line_and_stays(how, run_config, train, tmp_path):
    config = run_config(train__steps=8)
    folder = train(config)
    config.train.steps = 10
    for checkpoint in (folder / "checkpoints").iterdir():
        progress = json.loads((checkpoint / "trainer.json").read_text())
        if how == "a key":
            del progress["skipped"]
        if how == "the cursor":
            progress["data"]["cursor"] = -1
        (checkpoint / "trainer.json").write_text("" if how == "empty" else json.dumps(progress))
        if how == "random":
            torch.save({"torch": 1}, checkpoint / "random-00000.pt")
    before = sorted((folder / "checkpoints").rglob("*"))
    for resume in ("auto", str(folder / "checkpoints" / "step-00000004")):
        config.resume = resume
        with pytest.raises(DamagedCheckpoint, match=r"step-00000004/(trainer\.json|random-00000\.pt)") as refused:
            train(config)
        assert "\n" not in str(refused.value)
        assert sorted((folder / "checkpoints").rglob("*")) == before


def test_a_run_goes_back_to_an_older_step(run_config, train, tmp_path, monkeypatch, capsys):
    """The finished run is one no more, whatever befalls the other; and what came later is there to go back to."""
    whole = train(run_config(run_dir=str(tmp_path / "whole")))
    config = run_config(checkpoint__keep=4)
    folder = train(config)
    for resume in (
        folder / "checkpoints" / "step-00000008",
        folder.parent / "run" / ".." / "run" / "checkpoints" / "step-00000004",
    ):
        config.resume = str(resume)
        with monkeypatch.context() as patch, pytest.raises(Crash):
            at_step(patch, 10, crash)
            train(config)
    said = capsys.readouterr().out
    assert (
        "what came after is set aside as result.json.aside, metrics.jsonl.aside, step-00000014.aside, step-00000012.aside"
        in said
    )
    assert "set aside as metrics.jsonl.aside-2, step-00000008.aside; metrics.jsonl ends at step 4" in said
    assert [r["step"] for r in metrics(folder) if "loss" in r] == list(range(1, 10))
    config.resume = "auto"
    assert_same_run(whole, train(config))
    lines = (folder / "metrics.jsonl.aside").read_text().splitlines()
    assert json.loads(lines[-1])["final_loss"] == metrics(whole)[-1]["final_loss"]

    later = folder / "checkpoints" / "step-00000014.aside"
    config.resume, config.train.steps = str(later), 16
    train(config)
    assert metrics(folder)[-1]["step"] == 16
    other = run_config(run_dir=str(tmp_path / "whole"), resume=str(later), train__steps=16)
    with pytest.raises(ConfigError, match=r"is not of run_dir = .*which has checkpoints of its own \(step-00000014\)"):
        train(other)


@contextlib.contextmanager
def refused(folder):
    """For `loop.held`, where another run is at work."""
    raise RunInUseError(f"run_dir = {folder} is in use")
    yield


def test_going_back_is_done_once(run_config, train, tmp_path, monkeypatch, capsys):
    """The same command, as batch systems give it again, goes on from what came after, though the checkpoint that it names is deleted, and
    though another start with auto was refused meanwhile."""
    whole = train(run_config(run_dir=str(tmp_path / "whole")))
    config = run_config(checkpoint__keep=2)
    folder = train(config)
    config.resume = str(folder / "checkpoints" / "step-00000012")
    set_aside, done = Checkpoints.set_aside, []

    def killed(self, checkpoint, why):
        if done:
            raise Crash
        done.append(checkpoint)
        return set_aside(self, checkpoint, why)

    (folder / "checkpoints" / "step-00000013").mkdir()  # a second one that is to be set aside
    (folder / "checkpoints" / "step-00000013" / "trainer.json").write_text("{}")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Checkpoints, "set_aside", killed)
        train(config)
    resume, config.resume = config.resume, "auto"
    assert_same_run(whole, train(config))
    assert f"an earlier start ended while it went back to {resume}" in capsys.readouterr().out
    assert json.loads((folder / "resumed.json").read_text()) == {"resume": resume, "step": 12, "done": True}
    shutil.rmtree(resume)
    aside = sorted(folder.rglob("*.aside*"))
    config.resume, config.train.steps = "auto", 16
    with monkeypatch.context() as patch, pytest.raises(RunInUseError):
        patch.setattr(loop, "held", refused)
        train(config)
    config.resume = resume
    train(config)
    assert (
        f"resume = {resume} was done by an earlier start, so this one goes on from what came after"
        in capsys.readouterr().out
    )
    assert [r["step"] for r in metrics(folder) if "loss" in r] == list(range(1, 17))
    assert sorted(folder.rglob("*.aside*")) == aside


def test_a_checkpoint_of_an_earlier_version_goes_on(run_config, train, tmp_path):
    """Its bases had other keys."""
    changes = {**OPTIMIZERS["basis"], "checkpoint__keep": 4}
    whole = train(run_config(**changes, run_dir=str(tmp_path / "whole")))
    convert_to_former(whole / "checkpoints" / "step-00000008", tmp_path / "former", "dcp")
    again = train(run_config(**changes, run_dir=str(tmp_path / "again"), resume=str(tmp_path / "former")))
    assert metrics(again)[-1]["final_loss"] == metrics(whole)[-1]["final_loss"]
    ends = [open_checkpoint(folder / "checkpoints" / "step-00000014") for folder in (whole, again)]
    assert ends[0].tensors == ends[1].tensors
    for key, info in ends[0].tensors.items():
        assert torch.equal(*(end.read(key, 0, info.numel) for end in ends)), key


@pytest.mark.parametrize(("first", "second"), [("adamw", "anon"), ("anon", "adamw")])
def test_a_run_changes_its_optimizer(first, second, run_config, train, tmp_path):
    """By `anon-dist ckpt convert --optimizer`: the other optimizer goes on from the same weights, data and step count."""
    whole = train(run_config(optim__name=first, run_dir=str(tmp_path / "whole"), train__steps=12))
    source = whole / "checkpoints" / "step-00000008"
    target = tmp_path / "changed" / "checkpoints" / "step-00000008"
    target.parent.mkdir(parents=True)
    main(["ckpt", "convert", str(source), str(target), "--to", "dcp", "--optimizer", second])
    refused = run_config(optim__name=first, run_dir=str(tmp_path / "changed"), train__steps=12)
    with pytest.raises(CheckpointError, match="--optimizer"):
        train(refused)
    changed = train(run_config(optim__name=second, run_dir=str(tmp_path / "changed"), train__steps=12))
    a, b = ({r["step"]: r for r in metrics(folder) if "loss" in r} for folder in (whole, changed))
    assert sorted(b) == [9, 10, 11, 12]
    assert a[9]["loss"] == b[9]["loss"]  # before a step of its own
    assert all(abs(a[t]["loss"] / b[t]["loss"] - 1) < 0.02 for t in (10, 11, 12))
    assert all(a[t]["samples"] == b[t]["samples"] for t in b)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_save_and_exit(number, run_config, train, tmp_path, monkeypatch, capsys):
    whole = train(run_config(run_dir=str(tmp_path / "whole")))
    config = run_config(run_dir=str(tmp_path / "stopped"), checkpoint__every=0)
    with monkeypatch.context() as patch:
        at_step(patch, 7, send(number))
        with pytest.raises(Interrupted) if number == signal.SIGINT else contextlib.nullcontext():
            train(config)
    folder = tmp_path / "stopped"
    assert f"Stopped by {number.name} after step 7" in capsys.readouterr().out
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000007"]
    assert_same_run(whole, train(config))


def test_a_finished_run_says_that_there_is_nothing_to_do(run_config, train, monkeypatch, capsys):
    config = run_config(log__sample_prompt="def ")
    monkeypatch.setattr(report, "plot_loss", plot_loss)
    folder = train(config)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != "loss.png"}
    capsys.readouterr()
    train(config)
    out = capsys.readouterr().out
    assert "Nothing to do" in out
    assert "unigram entropy" in out
    assert "A sample, from the exported model" in out
    assert str(folder / "model") in out
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != "loss.png"}
    steps, config.train.steps = config.train.steps, 5
    train(config)
    assert f"this run has taken {steps} steps, more than train.steps = 5" in capsys.readouterr().out
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"

    config.model.width *= 2
    with pytest.raises(ConfigError, match=r"finished run, made without model\.width = 64 \(here 32\)"):
        train(config)
    config.model.width //= 2

    config.train.steps = 18  # more steps: it goes on
    train(config)
    assert metrics(folder)[-1]["step"] == 18


CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


@pytest.mark.parametrize(
    ("family", "tie", "sizes"),
    [
        ("gpt2", True, {}),
        ("gpt2", False, {}),
        ("llama", True, {"kv_heads": 1}),
        ("llama", False, {}),
        ("qwen3", False, {"head_dim": 32}),
        ("gemma3", True, {"window": 8, "layers": 6}),
        ("olmo2", False, {}),
        ("mixtral", False, {"experts": 3}),
    ],
)
def test_the_exported_model_is_the_trained_one(family, tie, sizes, run_config, train, prepared):
    """Loaded with plain transformers, it has the validation loss that the run ended with."""
    sizes = {f"model__{name}": value for name, value in sizes.items()}
    config = run_config(model__family=family, model__tie_embeddings=tie, train__steps=5, **sizes)
    folder = train(config)
    result = json.loads((folder / "result.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert type(model).__name__ == CLASSES[family]
    batch = torch.from_numpy(TokenShards(prepared, "val").samples(np.arange(32), 32)).long()
    with torch.no_grad():
        logits = model(input_ids=batch[:, :-1]).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    assert float(loss) == pytest.approx(result["final_loss"], rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer("héllo\n")["input_ids"] == list("héllo\n".encode())
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_continued_pretraining_starts_from_the_weights(run_config, train, tmp_path):
    first = train(run_config(run_dir=str(tmp_path / "first")))
    second = train(
        run_config(
            run_dir=str(tmp_path / "second"), model__from_pretrained=str(first / "model"), train__steps=4, optim__lr=0.0
        )
    )
    loss = json.loads((first / "result.json").read_text())["final_loss"]
    assert json.loads((second / "result.json").read_text())["final_loss"] == pytest.approx(loss, rel=1e-6)


def test_a_model_that_sees_what_it_is_to_predict_is_refused(run_config, train, tmp_path):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_key_value_heads": 2,
    }
    for kind, words in (("bert-generation", "sees the tokens it is to predict"), ("stablelm", None)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **sizes}))
        config = run_config(model__config=str(tmp_path / "config.json"), train__steps=4, run_dir=str(tmp_path / kind))
        if words is None:
            assert (train(config) / "model" / "model.safetensors").is_file()
            continue
        with pytest.raises(ConfigError, match=words):
            train(config)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 32},
            r"data\.mask_documents is true, and .*see earlier documents",
        ),
        ({"model_type": "qwen3_next", "intermediate_size": 32}, r"is initialised by copy_ from what its code computes"),
        (
            {"model_type": "gpt_oss"},
            r"model\.attention = sdpa: transformers does not have it for gpt_oss; set it to eager",
        ),
    ],
    ids=["documents", "weights", "attention"],
)
def test_what_a_model_of_another_architecture_cannot_do_is_said_in_a_line(shape, message, run_config, train, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **shape}))
    config = run_config(model__config=str(tmp_path / "config.json"), train__steps=4, data__mask_documents=True)
    with pytest.raises(ConfigError, match=message) as refused:
        train(config)
    assert "\n" not in str(refused.value)


def test_a_run_goes_on_with_longer_sequences(run_config, train, capsys):
    """After as many tokens; with another base of its rotary positions, which is said; and not where positions are learned."""
    config = run_config(model__family="qwen3", data__seq_len=16, model__context=16, train__steps=8)
    folder = train(config)
    (folder / "result.json").unlink()
    config.data.seq_len = config.model.context = 32
    config.model.rope_theta, config.train.steps = 1e5, 12
    train(config)
    out = capsys.readouterr().out
    assert "resuming with model.rope_theta = 100000.0; step-00000008 had 10000.0" in out
    assert "data.seq_len is 32 now: the run goes on after 1,024 tokens, at sample 32 of" in out
    assert [r["samples"] for r in metrics(folder) if "samples" in r][-5:] == [64, 72, 80, 88, 96]

    learned = run_config(data__seq_len=16, model__context=16, train__steps=8, run_dir=str(folder) + "-learned")
    train(learned)
    learned.data.seq_len = learned.model.context = 32
    learned.train.steps = 12
    with pytest.raises(
        ConfigError, match=r"model\.context = 32, and .*step-00000008 was trained with 16: gpt2 learns a vector for"
    ):
        train(learned)
    learned.data.seq_len = learned.model.context = 8
    with pytest.raises(
        ConfigError, match=r"model\.context = 8, and .* Keep model\.context = 16, and data\.seq_len no longer than that"
    ):
        train(learned)


def test_documents_can_be_kept_apart(run_config, train, tmp_path):
    lines = [json.dumps({"text": f"line {i % 7} of {i}"}) for i in range(300)]
    (tmp_path / "short.jsonl").write_text("\n".join(lines))
    data = tmp_path / "data"
    prepare(
        PrepareConfig(source=str(tmp_path / "short.jsonl"), tokenizer="bytes", out=data, val_fraction=0.3, workers=1)
    )
    plain = train(run_config(run_dir=str(tmp_path / "plain"), data__path=str(data)))
    masked = train(run_config(run_dir=str(tmp_path / "masked"), data__path=str(data), data__mask_documents=True))
    assert metrics(plain)[-1]["final_loss"] != metrics(masked)[-1]["final_loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {"train__activation_checkpointing": "selective"},
        {"train__loss": "whole"},
        {"model__attention": "eager"},
        pytest.param({"train__compile": "blocks"}, marks=pytest.mark.slow),
        pytest.param({"train__compile": "whole"}, marks=pytest.mark.slow),
        pytest.param(
            {"train__compile": "blocks", "train__activation_checkpointing": "selective"}, marks=pytest.mark.slow
        ),
        pytest.param({"train__compile": "blocks", "train__activation_checkpointing": "budget"}, marks=pytest.mark.slow),
    ],
)
def test_options_that_do_not_change_the_result(changes, run_config, train, tmp_path):
    plain = train(run_config(run_dir=str(tmp_path / "plain")))
    other = train(run_config(run_dir=str(tmp_path / "other"), **changes))
    a, b = ([r["loss"] for r in metrics(f) if "loss" in r] for f in (plain, other))
    assert a == pytest.approx(b, rel=1e-4)


def test_bf16_computes_in_bf16_over_float32_weights(run_config, train, tmp_path):
    plain = train(run_config(run_dir=str(tmp_path / "plain")))
    half = train(run_config(run_dir=str(tmp_path / "half"), train__precision="bf16"))
    a, b = ([r["loss"] for r in metrics(f) if "loss" in r] for f in (plain, half))
    assert a != b
    assert a == pytest.approx(b, rel=2e-2)
    weights = AutoModelForCausalLM.from_pretrained(half / "model").state_dict()
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_gradients_that_are_not_finite_skip_the_step(run_config, train, tmp_path, monkeypatch):
    """The weights and the optimizer's step count stay; the sample is passed over; too many in a row end the run."""
    original, calls = loop.Batch.losses, []

    def poisoned(batch, model, *args, **options):
        calls.append(1)
        loss = original(batch, model, *args, **options)
        return loss * float("nan") if model.training and poison() else loss

    monkeypatch.setattr(loop.Batch, "losses", poisoned)
    poison = lambda: len(calls) in (5, 6)  # noqa: E731 - both micro-batches of step 3
    folder = train(run_config(eval__every=0, optim__refresh_ratio=1.1))
    records = {r["step"]: r for r in metrics(folder) if "loss" in r}
    assert records[3]["skipped"] == 1
    assert "skipped" not in records[4]
    assert records[14]["refreshes"] == 12  # of 13 steps taken: a_k = 1 … 11, 13
    poison = lambda: True  # noqa: E731
    with pytest.raises(SkippedError, match=r"3 steps in a row had a non-finite gradient.*Lower optim.lr"):
        train(run_config(run_dir=str(tmp_path / "nan"), train__max_skipped=2))


class Asked(TorchDispatchMode):
    """How often the host asked for a number of a tensor: on a GPU, each time it would wait."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_asks_the_device_for_nothing_between_records(run_config, train, monkeypatch):
    """With what is as on a GPU: numbers that the host does not know at once, and a kernel that reads them itself."""
    asked = []
    take_step = loop.take_step

    def watched(run, batches, watch):
        with Asked() as mode:
            done = take_step(run, batches, watch)
        asked.append(mode.count)
        return done

    monkeypatch.setattr(loop, "take_step", watched)
    for module in ("anon_dist.train.loop", "anon_dist.optim.scaling"):
        monkeypatch.setattr(f"{module}.known_to_the_host", lambda number: False)
    monkeypatch.setattr("anon_dist.optim.backends.choice.choose", lambda *args: lambda *work: None)
    monkeypatch.setattr("anon_dist.optim.host_copy.HostCopy.value", lambda self: self._copy.numpy().item())
    train(run_config(eval__every=0, log__every=4))
    assert len(asked) == 14
    assert sum(asked[1:]) == 0, asked


@pytest.mark.parametrize("at", [5, 6, 14])
def test_a_skipped_step_is_learnt_of_one_step_late(run_config, train, tmp_path, monkeypatch, at):
    """As on a GPU; the run is the one that learns at once, and no checkpoint is written in between."""
    original, folders = loop.Batch.losses, []
    for late in (False, True):
        calls = []

        def poisoned(batch, model, *args, calls=calls, **options):
            calls.append(model.training)
            loss = original(batch, model, *args, **options)
            return loss * float("nan") if model.training and sum(calls) in (2 * at, 2 * at + 2) else loss

        monkeypatch.setattr(loop.Batch, "losses", poisoned)
        if late:
            for module in ("anon_dist.train.loop", "anon_dist.optim.scaling"):
                monkeypatch.setattr(f"{module}.known_to_the_host", lambda number: False)
        options = {"log__every": 1, "checkpoint__every": 5, "optim__refresh_ratio": 1.1}
        folders.append(train(run_config(run_dir=str(tmp_path / str(late)), **options)))
    (at_once, later) = (metrics(folder) for folder in folders)
    assert [r["loss"] for r in at_once if "loss" in r] == [r["loss"] for r in later if "loss" in r]
    states = [json.loads((folder / "checkpoints/step-00000014/trainer.json").read_text()) for folder in folders]
    assert states[0]["skipped"] == states[1]["skipped"]
    assert at_once[-1] == later[-1]


def test_changed_hyperparameters_are_applied_on_resume_and_said(run_config, train, monkeypatch, capsys):
    config = run_config()
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, 10, crash)
        train(config)
    config.optim.gamma, config.optim.weight_decay, config.optim.beta3 = 0.5, 0.0, 0.5
    config.optim.state_dtype = "exp_avg=int8, precond=bfloat16"
    capsys.readouterr()
    folder = train(config)
    out = capsys.readouterr().out
    assert "resuming with gamma = 0.5 in param group 0; the checkpoint had 1.0" in out
    assert "resuming with weight_decay = 0.0 in param group 0; the checkpoint had 0.1" in out
    assert "resuming with optim.state_dtype = 'exp_avg=int8, precond=bfloat16'; step-00000008 had 'float32'" in out
    tensors = open_checkpoint(folder / "checkpoints" / "step-00000014").tensors
    dtypes = {key.state: info.dtype for key, info in tensors.items()}
    assert (dtypes["exp_avg"], dtypes["exp_avg_sq"]) == (torch.bfloat16, torch.float32)
    assert metrics(folder)[-1]["step"] == 14


def test_a_basis_is_changed_on_resume(run_config, train, tmp_path, monkeypatch, capsys):
    """From none to columns, in other blocks, to none and back; or to both sides, which parts the groups, and to rows. As no refresh
    is in between, each is the identity, and changes nothing."""
    plain = train(run_config(run_dir=str(tmp_path / "plain"), optim__refresh_ratio=2.0))  # refreshes at 1, 2, 4, 8
    bases, losses = {}, [r["loss"] for r in metrics(plain) if "loss" in r]

    def go_on(name, basis, block, until, beta1=None):
        config = run_config(run_dir=str(tmp_path / name), optim__refresh_ratio=2.0, checkpoint__every=8)
        config.optim.basis, config.optim.basis_block, config.optim.embedding_beta1 = basis, block, beta1
        with monkeypatch.context() as patch:
            if until < 14:
                at_step(patch, until, send(signal.SIGTERM))
            capsys.readouterr()
            folder = train(config)
        checkpoint = open_checkpoint(Checkpoints(folder / "checkpoints", 2).latest())
        bases[name, basis] = {key.state for key in checkpoint.tensors if key.state.startswith("basis")}
        found = [r["loss"] for r in metrics(folder) if "loss" in r]
        assert found == pytest.approx(losses[:until], rel=1e-6)
        return capsys.readouterr().out

    go_on("a", None, 128, 8)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert "basis = 'columns' in param group 0; the checkpoint had None" in go_on("a", "columns", 128, 9)
    assert "basis_block = 8 in param group 0; the checkpoint had 128" in go_on("a", "columns", 8, 11)
    assert "basis = None in param group 1; the checkpoint had 'columns'" in go_on("a", None, 8, 12)
    assert "basis = 'both' in param group 1; the checkpoint had None" in go_on("b", "both", 16, 10)
    go_on("b", "rows", 16, 12)
    assert bases == {
        ("a", None): set(),
        ("a", "columns"): {"basis_columns"},
        ("b", "both"): {"basis_rows", "basis_columns"},
        ("b", "rows"): {"basis_rows"},
    }
    for basis in ("columns", None):
        with pytest.raises(ConfigError, match=r"parts the param groups. Set optim.embedding_beta1 = 0.9, the β1 of"):
            go_on("b", basis, 16, 14)
    go_on("b", "columns", 16, 13, beta1=0.9)
    go_on("b", None, 16, 14, beta1=0.9)


@pytest.mark.parametrize("name", ["anon", "adamw"])
def test_parted_groups_go_on_as_what_they_were(run_config, train, tmp_path, name, capsys):
    """By a β1 of embeddings that is that of all others: with γ and ρ changed in the same resume, and before, the losses stay the same."""

    def go_on(folder, steps, beta1=None, **optim):
        values = {f"optim__{key}": value for key, value in {"name": name, **optim}.items()}
        run = run_config(run_dir=str(tmp_path / folder), train__steps=steps, checkpoint__every=4, **values)
        run.optim.embedding_beta1 = beta1
        capsys.readouterr()
        return [r["loss"] for r in metrics(train(run)) if "loss" in r], capsys.readouterr().out

    go_on("a", 8)
    changed = {"gamma": 0.5, "refresh_ratio": 1.7} if name == "anon" else {"weight_decay": 0.3}
    for other in ("b", "c"):
        shutil.copytree(tmp_path / "a", tmp_path / other)
    whole, _ = go_on("a", 14, **changed)
    parted, said = go_on("b", 14, 0.9, **changed)
    assert parted == pytest.approx(whole, rel=1e-6)
    first = {"anon": "gamma = 0.5", "adamw": "weight_decay = 0.3"}[name]
    assert f"resuming with {first} in param group 0; the checkpoint had {1.0 if name == 'anon' else 0.1}" in said
    assert not [line for line in said.splitlines() if "param group" in line and "had None" in line]
    go_on("c", 10, **changed)
    shutil.copytree(tmp_path / "c", tmp_path / "d")
    whole, _ = go_on("d", 14, **changed)
    parted, said = go_on("c", 14, 0.9, **changed)
    assert parted == pytest.approx(whole, rel=1e-6)
    assert "param group" not in said
    with pytest.raises(ConfigError, match=r"parts the param groups. Set optim.embedding_beta1 = 0.9"):
        go_on("c", 16, **changed)


def test_rates_decay_and_momentum_of_some(run_config, train, tmp_path):
    """Factors are of every step's learning rate, and in the metrics; a run without decay of one matrix is another."""
    own = {
        "optim__lr_by_name": {"*wte*": 3.0, "*ln_*": 0.0},
        "optim__weight_decay_by_name": {"*mlp*": 0.0},
        "optim__embedding_beta1": 0.5,
        "optim__embedding_beta3": 0.25,
    }
    for name in ("anon", "adamw"):
        folder = train(run_config(optim__name=name, train__steps=5, run_dir=str(tmp_path / name), **own))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last = [r for r in lines if "loss" in r][-1]
        checkpoint = open_checkpoint(folder / "checkpoints" / "step-00000005")
        for i, group in enumerate(checkpoint.manifest.groups):
            first, h = group.members[0], group.hyperparameters
            factor = 3.0 if "wte" in first else 0.0 if "ln_" in first else 1.0
            rate = 3e-3 * lr_factor(5, 5, run_config().schedule)
            assert h["lr"] == pytest.approx(rate * factor)
            assert last[f"lr_factor/{i}"] == factor
            assert h["weight_decay"] == (0.0 if "mlp" in first or "bias" in first or "ln_" in first else 0.1)
            embedding = "wte" in first or "wpe" in first
            assert tuple(h["betas"]) == (0.5 if embedding else 0.9, 0.95)
            assert name == "adamw" or h["beta3"] == (0.25 if embedding else 0.93)
        norm = "transformer.h.0.ln_1.weight"
        assert bool((checkpoint.read(Key(norm, WEIGHT), 0, 32) == 1.0).all())
    with pytest.raises(ConfigError, match=r"^optim: lr_by_name: \['\*lm_head\*'\] match no trainable parameter"):
        train(run_config(optim__lr_by_name={"*lm_head*": 0.5}, run_dir=str(tmp_path / "other")))
    with pytest.raises(
        ConfigError, match=r"^optim: weight_decay_by_name: '\*wte\*' never counts, as patterns before it"
    ):
        train(
            run_config(optim__weight_decay_by_name={"*te.weight": 0.0, "*wte*": 0.1}, run_dir=str(tmp_path / "other"))
        )
    for left_out in ("lr_by_name", "weight_decay_by_name"):
        go_on = {**own, f"optim__{left_out}": {}, "optim__name": "adamw", "run_dir": str(tmp_path / "adamw")}
        with pytest.raises(ConfigError, match=rf"trained with optim\.{left_out} of .* Keep these patterns"):
            train(run_config(train__steps=6, **go_on))
    go_on["optim__weight_decay_by_name"] = {"*mlp*": 0.1}  # as it says
    train(run_config(train__steps=6, **go_on))
    with pytest.raises(ConfigError, match=r"decay the weights past 0 in a step"):
        train(run_config(optim__lr_by_name={"*wte*": 5e3}, run_dir=str(tmp_path / "other")))


def test_a_beta3_of_embeddings_is_set_on_resume(run_config, train, tmp_path, capsys):
    """Also as the first thing that parts them, and to that of the others."""
    for steps, own in ((5, None), (8, 0.97), (10, 0.9), (12, 0.93)):
        folder = train(run_config(train__steps=steps, checkpoint__every=5, optim__embedding_beta3=own))
        said = capsys.readouterr().out
        assert own is None or f"resuming with beta3 = {own} in param group 0; the checkpoint had" in said
        groups = open_checkpoint(folder / "checkpoints" / f"step-{steps:08}").manifest.groups
        found = [g.hyperparameters["beta3"] for g in groups]
        assert found == ([0.93] * 2 if own is None else [own, 0.93, 0.93])
    with pytest.raises(
        ConfigError, match=r"embedding_beta3 = 0.93: that parts the param groups. Set optim.embedding_beta1"
    ):
        train(run_config(train__steps=14))


def test_what_cannot_be_resumed_is_refused_and_stays(run_config, train, texts, tmp_path):
    config = run_config(train__steps=5)
    folder = train(config)
    files = sorted(p for p in (folder / "checkpoints").rglob("*"))

    def refused(error, match, **changes):
        with pytest.raises(error, match=match):
            train(run_config(train__steps=8, **changes))
        assert sorted(p for p in (folder / "checkpoints").rglob("*")) == files

    refused(CheckpointError, r"another optimizer's state than AdamW's", optim__name="adamw")
    refused(DataError, r"keep the data seed", data__seed=1)
    refused(ConfigError, r"resume is never, but run_dir", resume="never")
    refused(CheckpointError, r"nowhere is no complete checkpoint", resume=str(tmp_path / "nowhere"))
    refused(
        ConfigError,
        r"64 is not a multiple of train.micro_batch · ranks = 5",
        train__global_batch=64,
        train__micro_batch=5,
    )
    other = tmp_path / "other"
    prepare(PrepareConfig(source=str(texts), tokenizer="bytes", out=other, val_fraction=0.4, workers=1))
    refused(DataError, r"fingerprint is", data__path=str(other))
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / ".metadata").write_bytes(b"torn")
    files = sorted(p for p in (folder / "checkpoints").rglob("*"))
    refused(DamagedCheckpoint, r"\.metadata is damaged: it has 4 bytes")


def test_an_altered_shard_is_refused(run_config, train, prepared, tmp_path):
    import shutil

    shutil.copytree(prepared, tmp_path / "altered")
    shard = tmp_path / "altered" / "train-00000.bin"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"train-00000\.bin"):
        train(run_config(data__path=str(tmp_path / "altered")))


def test_trackers_and_what_the_report_finds_in_memory(run_config, train, monkeypatch):
    """The exported weights are gone before a sample loads them anew."""
    export, held, left = finishing.export_model, [], []
    monkeypatch.setattr(
        finishing, "export_model", lambda folder, weights, *rest: (held.append(weights), export(folder, weights, *rest))
    )
    monkeypatch.setattr(finishing, "report", lambda *_: left.append(len(held[0])))
    folder = train(run_config(log__trackers=("tensorboard",)))
    assert list((folder / "tensorboard").rglob("events.out.tfevents.*"))
    assert (folder / "model" / "model.safetensors").exists()
    assert left == [0]


def test_a_tracker_that_is_not_installed_is_refused(run_config, tmp_path, monkeypatch):
    """accelerate would leave it out; a folder of its name, as wandb makes, is not it."""
    (tmp_path / "here" / "no_tracker").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "here")
    config = run_config()
    for name in ("no_tracker", "no_tracker_either"):
        config.log.trackers = (name,)
        with pytest.raises(ConfigError, match=f"log.trackers: {name} is not installed: pip install {name}"):
            trackers(config)


@pytest.mark.parametrize("left", ["all", "newest"])
def test_a_checkpoint_that_has_lost_its_progress_is_damaged(left, run_config, train, tmp_path, monkeypatch, capsys):
    """Without trainer.json a checkpoint was taken for none, and the run began anew over its own results."""
    at_step(monkeypatch, 10, crash)
    with pytest.raises(Crash):
        train(run_config())
    monkeypatch.undo()
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    for checkpoint in checkpoints if left == "all" else checkpoints[1:]:
        (checkpoint / "trainer.json").unlink()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    if left == "all":
        with pytest.raises(DamagedCheckpoint, match=r"no checkpoint that can be loaded \(.*trainer.json is missing"):
            train(run_config())
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
        return
    train(run_config())
    said = capsys.readouterr().out
    assert f"{checkpoints[1].name} is damaged, and set aside as {checkpoints[1].name}.damaged: " in said
    assert f"the run goes on from {checkpoints[0]}: steps 5 to 9 are taken again" in said


def test_a_checkpoint_under_another_name_is_damaged(run_config, train, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 10, crash)
    with pytest.raises(Crash):
        train(run_config())
    monkeypatch.undo()
    older, newer = sorted((tmp_path / "run" / "checkpoints").iterdir())
    newer.rename(older.with_name("aside"))
    older.rename(newer)
    older.with_name("aside").rename(older)
    with pytest.raises(DamagedCheckpoint, match=r"is not what its name says: trainer\.json in it is of step"):
        train(run_config())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model__width": 64}, "model.width = 64, not 32. Keep model.width = 32"),
        ({"model__layers": 1}, "model.layers = 1, not 2. Keep model.layers = 2"),
        ({"model__heads": 4}, "model.heads = 4, not 2. Keep model.heads = 2"),
        ({"model__hidden": 64}, "model.hidden = 64, not None. Keep model.hidden = None"),
        (
            {"model__pad_vocab_to": 512},
            "a vocabulary of 512 by model.pad_vocab_to = 512 and the data's tokenizer, not ",
        ),
    ],
)
def test_another_model_is_refused_by_its_field(change, words, run_config, train):
    """It is no damage: the command is wrong, and every checkpoint stays where it is."""
    folder = train(run_config(train__steps=4))
    before = sorted(p.name for p in (folder / "checkpoints").iterdir())
    with pytest.raises(ConfigError, match=f"step-00000004 is of another model: this one has {words}") as error:
        train(run_config(train__steps=8, **change))
    assert str(error.value).endswith("or choose another run_dir to begin anew")
    assert error.value.exit_code == 2
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == before


def test_a_change_of_basis_that_is_refused_is_told_with_what_can_be_done(run_config, train):
    """Where rows are turned, embeddings are in a group of their own; else they are with the other matrices."""
    folder = train(run_config(train__steps=4, optim__basis="rows"))
    words = r"step-0+4 was trained with optim.basis = rows: .* Set optim.embedding_beta1 = 0.9,"
    for basis in ("columns", None):
        with pytest.raises(ConfigError, match=words) as error:
            train(run_config(train__steps=8, optim__basis=basis))
        assert error.value.exit_code == 2
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000004"]
    train(run_config(train__steps=5, optim__embedding_beta1=0.9))  # as it says
    train(run_config(train__steps=6, optim__basis="both"))
