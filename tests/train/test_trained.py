"""What a run left behind is sampled and exported: by `anon-dist generate` and `anon-dist export`, against transformers' own loading."""

import io
import json
import shutil
from dataclasses import asdict

import huggingface_hub
import pytest
import torch
from helpers import forget_accelerate
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config
from transformers.generation.streamers import BaseStreamer

from anon_dist.checkpoint import CheckpointError, cli
from anon_dist.cli import main
from anon_dist.train import loop
from anon_dist.train.config import parsing as c
from anon_dist.train.model import card
from anon_dist.train.reports import report
from anon_dist.trained import hub
from anon_dist.trained.find import find, tokenizer_of
from anon_dist.trained.generate import continued
from anon_dist.trained.model import load_model
from anon_dist.trained.options import Generate

CONTEXT = 48


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    """A finished run, with checkpoints of steps 3 and 6; its data is a copy, to be moved away."""
    return trained(prepared, tmp_path_factory.mktemp("trained"))


def trained(prepared, folder, **model):
    data = shutil.copytree(prepared, folder / "data")
    config = c.Config(
        model=c.ModelConfig(layers=2, width=32, heads=2, context=CONTEXT, **model),
        data=c.DataConfig(path=str(data), seq_len=32),
        optim=c.OptimConfig(lr=3e-3),
        schedule=c.ScheduleConfig(warmup_steps=2),
        train=c.TrainConfig(steps=6, global_batch=8, micro_batch=8),
        eval=c.EvalConfig(every=3, sequences=4, final_sequences=8),
        checkpoint=c.CheckpointConfig(every=3),
        log=c.LogConfig(every=1, trackers=()),
        run_dir=str(folder / "run"),
    )
    forget_accelerate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot_loss", lambda *_: None)
        made = loop.train(config)
    forget_accelerate()
    return made


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_checkpoint_of_a_rotary_model_is_the_model_that_was_exported(family, prepared, tmp_path):
    """Its rotary frequencies are in no checkpoint."""
    run = trained(prepared, tmp_path, family=family)
    tokens = torch.arange(40).unsqueeze(0)
    logits = [load_model(find(path)).eval()(tokens).logits for path in (checkpoint(run), run / "model")]
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    main(["generate", str(checkpoint(run)), "import", "--max-new-tokens", "3"])


def test_a_text_that_is_none_is_told_by_its_option(run, tmp_path):
    with pytest.raises(SystemExit, match=f"error: --text {tmp_path}: no files there"):
        main(["eval", str(run), "--text", str(tmp_path)])


def test_a_checkpoint_that_a_training_removes_meanwhile(run, tmp_path, monkeypatch):
    """As its `keep` does, between the look at the run's folder and the reading."""
    going = shutil.copytree(run, tmp_path / "run")

    def removed(parsed):
        shutil.rmtree(parsed.src)
        raise CheckpointError(f"{parsed.src} does not exist")

    monkeypatch.setattr(cli, "_inspect", removed)
    with pytest.raises(SystemExit, match=r"step-00000006 was there and is gone: a training removes its older"):
        main(["ckpt", "inspect", str(going)])


def checkpoint(run, step=6):
    return run / "checkpoints" / f"step-{step:08d}"


def plain(folder, prompt, new=12):
    """What transformers alone writes at temperature 2, without a cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(7)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    options = {"do_sample": True, "temperature": 2.0, "top_k": 40, "max_new_tokens": new}
    return tokenizer.decode(model.generate(**inputs, **options, use_cache=False)[0], skip_special_tokens=True)


PLAIN = ("--temperature", "2", "--seed", "7", "--max-new-tokens", "12")


def said(capsys, *words):
    main(["generate", *map(str, words)])
    return capsys.readouterr().out


# -- generating -------------------------------------------------------------------------------------------------------


def test_a_run_a_checkpoint_and_a_model_write_what_the_weights_say(run, capsys):
    wanted = plain(run / "model", "def f")
    assert len(set(wanted)) > 8
    for source in (run, run / "model", checkpoint(run), run / "checkpoints"):
        assert said(capsys, source, "def f", *PLAIN) == wanted + "\n"
    assert wanted not in said(capsys, checkpoint(run, 3), "def f", *PLAIN)


def test_of_a_run_its_newest_complete_checkpoint_is_inspected_converted_and_verified(run, tmp_path, capsys):
    """And named, beside what is asked for. A newer one that is not complete does not count."""
    copied = shutil.copytree(run, tmp_path / "run", symlinks=True)
    (checkpoint(copied).parent / "step-00000009").mkdir()
    for words, source in (
        ("inspect {} --json", copied),
        ("inspect {} --json", copied / "checkpoints"),
        ("inspect {} --json", checkpoint(copied)),
    ):
        main(["ckpt", *words.format(source).split()])
        out, err = capsys.readouterr()
        assert json.loads(out)["step"] == 6
        assert (f"taken: {checkpoint(copied)}\n" in err) == (source != checkpoint(copied))
    main(["ckpt", "convert", str(copied), str(tmp_path / "hf"), "--to", "hf"])
    main(["ckpt", "verify", str(copied), str(checkpoint(run))])
    assert capsys.readouterr().out.endswith("is complete\nthe same\n")
    weights = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", run / "model"))
    assert {n: w.sum().item() for n, w in next(weights).items()} == {
        n: w.sum().item() for n, w in next(weights).items()
    }


class Seen(BaseStreamer):
    def __init__(self):
        self.sizes = []

    def put(self, value):
        self.sizes.append(value.numel())

    def end(self):
        self.sizes.append(0)


def test_tokens_come_one_by_one_from_a_cache_also_without_us(run):
    """The exported model alone, by transformers' own defaults; and through the command."""
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    prompt = tokenizer("import", return_tensors="pt")["input_ids"]
    for ours in (False, True):
        model, read, seen = AutoModelForCausalLM.from_pretrained(run / "model"), [], Seen()
        model.transformer.wte.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0].shape[1]))
        if ours:
            continued(model, tokenizer, "import", Generate(run, "", max_new_tokens=5, temperature=0), seen, print)
        else:
            model.generate(prompt, max_new_tokens=5, streamer=seen)
        assert read == [6, 1, 1, 1, 1]
        assert seen.sizes == [6, 1, 1, 1, 1, 1, 0]


def test_sampling_follows_its_options(run, capsys):
    def text(*options):
        return said(capsys, run, "class", "--max-new-tokens", "16", *options)

    likeliest = text("--temperature", "0")
    assert text("--top-k", "1", "--seed", "3") == likeliest
    assert text("--top-p", "1e-9", "--top-k", "0", "--seed", "3") == likeliest
    assert text("--temperature", "1e-6", "--seed", "3") == likeliest
    hot = ("--temperature", "3", "--top-k", "0")
    assert text(*hot, "--seed", "1") == text(*hot, "--seed", "1") != text(*hot, "--seed", "2")
    assert text(*hot) != text(*hot)


def test_a_text_ends_with_the_context_which_is_said(run, capsys):
    main(["generate", str(run), "x" * (CONTEXT - 3), "--max-new-tokens", "1k", "--temperature", "0"])
    shown = capsys.readouterr()
    assert "note: 3 tokens at most, to the end of the model's context of 48" in shown.err
    with pytest.raises(SystemExit, match="the text has 48 tokens, and the model's context 48; shorten it"):
        main(["generate", str(run), "x" * CONTEXT])


def test_a_text_from_the_standard_input_and_none(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("from the pipe"))
    assert said(capsys, run, "-", "--max-new-tokens", "2").startswith("from the pipe")
    assert said(capsys, run, "", "--max-new-tokens", "3", "--seed", "0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--temperature -1", "--temperature must be a number ≥ 0, not -1"),
        ("--temperature nan", "--temperature must be a number ≥ 0, not nan"),
        ("--top-p 0", "--top-p must be a number > 0 and ≤ 1, not 0"),
        ("--top-k -2", "--top-k must be at least 0, not -2"),
        ("--max-new-tokens 0", "--max-new-tokens must be at least 1, not 0"),
        ("--device quantum", "--device quantum: "),
    ],
)
def test_an_option_out_of_its_range_is_refused_before_anything_is_read(words, message, capsys):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        main(["generate", "/", "x", *words.split()])


# -- exporting --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    target = tmp_path_factory.mktemp("exported") / "made" / "small"
    main(["export", str(checkpoint(run, 3)), str(target)])  # into a folder that is made
    return target


def test_an_exported_checkpoint_has_its_weights(run, exported, tmp_path):
    """By torch's own reading of the checkpoint."""
    dcp_to_torch_save(checkpoint(run, 3), tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)["model"]
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert all(torch.equal(p, whole[name]) for name, p in model.named_parameters())


def test_an_exported_model_knows_how_it_is_used(run, exported):
    for folder in (exported, run / "model"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        made = model.generation_config
        assert (made.bos_token_id, made.eos_token_id, made.pad_token_id, model.config.eos_token_id) == (256,) * 4
        assert tokenizer.model_max_length == CONTEXT
        assert model.config.use_cache
        assert model.config.architectures == ["GPT2LMHeadModel"]
        assert json.loads((folder / "generation_config.json").read_text()).get("use_cache", True)
        assert tokenizer.decode(tokenizer("naïve 1").input_ids) == "naïve 1"


SCHEDULE = asdict(c.ScheduleConfig())
TRAIN = asdict(c.TrainConfig())


def test_the_model_card_says_what_was_chosen_of_the_optimizer():
    optim = asdict(c.OptimConfig(basis="columns", nesterov=True, max_interval=4, lr_by_name={"*wte*": 2.0}))
    said = dict(card._training({"optim": optim, "schedule": SCHEDULE, "train": TRAIN, "data": {"seq_len": 8}}, {}))
    assert {"basis columns", "nesterov True", "max_interval 4", "lr_by_name {'*wte*': 2.0}"} <= {
        *said["optimizer"].split(", ")
    }
    optim["name"] = "adamw"
    said = dict(card._training({"optim": optim, "schedule": SCHEDULE, "train": TRAIN, "data": {"seq_len": 8}}, {}))
    assert "basis" not in said["optimizer"]
    assert "lr_by_name" in said["optimizer"]


def test_the_model_card_has_no_path_of_this_machine(tmp_path):
    """In what it says of sources, a tokenizer, weights, a command and phases; names of the hub and addresses stay."""
    (tmp_path / "mine").mkdir()
    for place, shown in {
        str(tmp_path / "mine"): "mine",
        f"{tmp_path}/mine/": "mine",
        f"spm:{tmp_path}/my.model": "spm:my.model",
        f"hf:{tmp_path}/mine": "hf:mine",
        "~/texts": "texts",
        "hf:HuggingFaceFW/fineweb-edu:sample-100BT": "hf:HuggingFaceFW/fineweb-edu:sample-100BT",
        "hf:gpt2": "hf:gpt2",
        "openai-community/gpt2": "openai-community/gpt2",
        "s3://bucket/texts": "s3://bucket/texts",
        "stdlib": "stdlib",
        "spm-bpe:4096": "spm-bpe:4096",
        "bytes": "bytes",
    }.items():
        assert card.without_folders(place) == shown
    sources = {"a": {"path": str(tmp_path / "a"), "weight": 0.5}}
    data = {"seq_len": 8, "path": "", "prepare": f"--source {tmp_path}/mine --tokenizer bytes"}
    config = {
        "optim": asdict(c.OptimConfig()),
        "schedule": SCHEDULE,
        "train": TRAIN,
        "model": {"from_pretrained": str(tmp_path / "mine")},
    }
    phases = [{"until": 5, "sources": sources, "seq_len": None}]
    for more in ({}, {"phases": phases}, {"sources": sources}):
        text = card.model_card("x", {}, {"config": {**config, "data": data | more}}, {})
        assert str(tmp_path) not in text
        assert "from the weights of mine with" in text
        assert ("| phases | until 5, sources a 0.5 |" in text) == ("phases" in more)
        assert ("| prepared by | anon-dist data prepare --source mine --tokenizer bytes |" in text) == (not more)


def test_the_model_card_says_data_recipe_and_results(run, exported, texts):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for folder, step in ((exported, 3), (run / "model", 6)):
        found = huggingface_hub.ModelCard.load(folder / "README.md")
        assert found.data.pipeline_tag == "text-generation"
        assert found.data.library_name == "transformers"
        lines = [line for line in found.text.splitlines() if line.startswith("| ") and line != "| | |"]
        rows = dict(line.strip("| ").split(" | ", 1) for line in lines)
        assert rows["source"] == texts.name
        assert str(run.parent) not in found.text
        assert str(texts.parent) not in found.text
        assert rows["tokenizer"] == "bytes"
        assert rows["tokens"] == f"{step * 8 * 32} (256 a step)".replace("1536", "1,536")
        assert "anon: lr 0.003, betas [0.9, 0.95]" in rows["optimizer"]
        assert "gamma 1.0" in rows["optimizer"]
        assert rows["after step"] == str(step)
        loss = next(r for r in records if r["step"] == step and ("final_loss" if step == 6 else "val_loss") in r)
        where = "the whole validation split" if step == 6 else "a part of the validation split"
        assert rows[f"loss, nats per token, on {where}"] == f"{loss['final_loss' if step == 6 else 'val_loss']:.4f}"


def test_any_checkpoint_is_exported_with_what_is_named(run, tmp_path):
    """Weights in a file of torch.save, which knows neither its model nor its tokenizer."""
    main(["ckpt", "convert", str(checkpoint(run)), str(tmp_path / "w.pt"), "--to", "consolidated"])
    state = torch.load(tmp_path / "w.pt", weights_only=False)
    torch.save({"model": state["model"]}, tmp_path / "w.pt")
    words, model = ["export", str(tmp_path / "w.pt"), str(tmp_path / "out")], run / "model"
    with pytest.raises(SystemExit, match=r"w\.pt: no tokenizer .*name it with --tokenizer FOLDER"):
        main(words)
    with pytest.raises(SystemExit, match=r"does not say which model its weights are of; .*--model-config"):
        main([*words, "--tokenizer", str(model)])
    GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=320, n_positions=CONTEXT).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match=r"has another shape of transformer\.wte\.weight and \d+ more"):
        main([*words, "--tokenizer", str(model), "--model-config", str(tmp_path / "other" / "config.json")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "w.pt"]
    main([*words, "--tokenizer", str(model), "--model-config", str(model / "config.json")])
    assert plain(tmp_path / "out", "a") == plain(model, "a")
    with pytest.raises(SystemExit, match=r"out exists; choose another target, or replace it with --overwrite"):
        main([*words, "--tokenizer", str(model), "--model-config", str(model / "config.json")])
    main([*words, "--tokenizer", str(model), "--model-config", str(model / "config.json"), "--overwrite"])


def test_a_model_is_not_given_another_models_tokenizer(run, tmp_path):
    corpus = ["--source", __file__, "--text-unit", "line", "--workers", "1"]
    main(["data", "prepare", *corpus, "--tokenizer", "spm-bpe:500", "--out", str(tmp_path / "d")])
    with pytest.raises(SystemExit, match=r"has 320 embeddings, and the tokenizer a token 4\d\d"):
        main(["generate", str(run), "x", "--tokenizer", str(tmp_path / "d" / "tokenizer")])


def test_data_that_changed_since_is_not_asked_for_its_tokenizer(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    assert tokenizer_of(find(copy), None).get_vocab() == AutoTokenizer.from_pretrained(run / "model").get_vocab()
    progress = json.loads((checkpoint(run) / "trainer.json").read_text())
    trained = find(checkpoint(copy))
    trained.progress["data"]["sources"][0]["fingerprint"] = "0" * 32
    with pytest.raises(CheckpointError, match="is not the data that the run read any more"):
        tokenizer_of(trained, None)
    trained.progress.update(tokenizer=str(tmp_path / "gone" / "tokenizer"), data=progress["data"])
    with pytest.raises(CheckpointError, match=r"gone/index\.json does not exist"):
        tokenizer_of(trained, None)


def test_what_is_none_is_refused_in_a_line(run, tmp_path):
    (tmp_path / "begun").mkdir()
    for name in ("config.yaml", "run.lock"):
        (tmp_path / "begun" / name).touch()
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    cases = {
        run.parent.name: f"is a folder of runs; name one of them, such as .*{run.name}",
        "empty": "empty is no run, no checkpoint of a known format .* and no model",
        "nowhere": "nowhere does not exist",
        "begun": "begun is a run without a checkpoint so far",
        "file": "file is no run, no checkpoint of a known format",
    }
    for name, message in cases.items():
        with pytest.raises(CheckpointError, match=message) as refused:
            find(run.parent if name == run.parent.name else tmp_path / name)
        assert "\n" not in str(refused.value)


# -- the hub ----------------------------------------------------------------------------------------------------------


class FakeHub:
    def __init__(self, error=None):
        self.calls, self.error = [], error

    def create_repo(self, name, **options):
        self.calls.append((name, options))
        if self.error:
            raise self.error

    def upload_folder(self, *, folder_path, repo_id, **options):
        self.calls.append((repo_id, sorted(p.name for p in (c.Path(folder_path)).iterdir())))
        return huggingface_hub.CommitInfo(
            commit_url="https://huggingface.co/me/small/commit/1", commit_message="", commit_description="", oid="1"
        )


def test_pushing_needs_a_token_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(SystemExit, match=r"^error: --push needs a token .*`hf auth login`, or set HF_TOKEN$"):
        main(["export", str(run), str(tmp_path / "out"), "--push", "me/small"])
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_mine")
    assert hub.hub().token == "hf_mine"


def test_pushing_uploads_the_folder_and_a_refusal_leaves_it(run, tmp_path, monkeypatch, capsys):
    fake = FakeHub()
    monkeypatch.setattr(hub, "hub", lambda: fake)
    main(["export", str(run), str(tmp_path / "out"), "--push", "me/small", "--private"])
    (made, options), (repository, files) = fake.calls
    assert (made, repository, options["private"]) == ("me/small", "me/small", True)
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert 'from_pretrained("me/small")' in (tmp_path / "out" / "README.md").read_text()
    assert "uploaded: https://huggingface.co/me/small/commit/1" in capsys.readouterr().out
    fake.error = OSError("403\nForbidden")
    with pytest.raises(SystemExit, match=r"^error: --push me/small: OSError: 403 Forbidden; .*out is complete"):
        main(["export", str(run), str(tmp_path / "out"), "--push", "me/small", "--overwrite"])
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "words", [["generate", "SRC", "x"], ["eval", "SRC", "--text", __file__], ["export", "SRC", "x"]]
)
def test_a_file_that_is_no_checkpoint_is_said_to_be_none(words, tmp_path):
    """And not to lack a tokenizer."""
    (tmp_path / "junk.bin").write_text("junk")
    with pytest.raises(SystemExit, match=r"junk\.bin is damaged, truncated, or no file of torch\.save"):
        main([word.replace("SRC", str(tmp_path / "junk.bin")) for word in words])


def test_a_damaged_configuration_is_named_and_not_the_tokenizer(run, tmp_path):
    """Of a run's exported model, which the run's name stands for."""
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "model" / "config.json").write_text("{")
    with pytest.raises(
        SystemExit, match=r"model/config\.json is damaged \(.*\); put the model's own in its place, or name"
    ):
        main(["generate", str(copy), "x"])


def test_damaged_weights_are_a_line(run, tmp_path):
    model = shutil.copytree(run / "model", tmp_path / "model")
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 20)
    for words in (["generate", str(model), "x"], ["export", str(model), str(tmp_path / "out")]):
        with pytest.raises(SystemExit, match=r"model.*header"):
            main(words)
