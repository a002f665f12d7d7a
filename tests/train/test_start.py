"""What is said at the start of a run, before its first step: what is missing, what does not fit, what a resumed run changes."""

import contextlib
import json
import logging
import os
import shutil
import sys

import numpy as np
import pytest
import torch
import tyro
from helpers import Crash, at_step, crash
from transformers import GPT2Config, GPT2LMHeadModel

from anon_dist.cli import main
from anon_dist.data import DataError, PrepareConfig, ShardError, Tokenizer, TokenShards
from anon_dist.engines.errors import EngineError
from anon_dist.engines.peers import Ending
from anon_dist.engines.start import _resolve
from anon_dist.train.config.at_once import check_at_once
from anon_dist.train.config.changes import changes, recorded, versions
from anon_dist.train.config.parsing import ConfigError, parse_args, shipped_configs, to_yaml
from anon_dist.train.inputs.vocabulary import tokenizer_problem
from anon_dist.train.model.trainable import cpu_remarks
from anon_dist.train.run import wanted_engine

PRESETS = sorted(p.stem for p in (shipped_configs() / "train").glob("*.yaml"))


@pytest.fixture
def data(prepared, tmp_path):
    """A copy of the prepared folder, to be damaged."""
    return shutil.copytree(prepared, tmp_path / "copy")


def edit_json(path, change):
    """An index then is as of a version that had no checksum of it."""
    content = json.loads(path.read_text())
    content.pop("checksum", None)
    change(content)
    path.write_text(json.dumps(content))


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def swap_two_tokens(folder):
    def swap(content):
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    edit_json(folder / "tokenizer.json", swap)


DAMAGE = {
    "missing": (shutil.rmtree, r"copy/tokenizer is missing: the data's tokenizer\. Copy it again"),
    "altered": (swap_two_tokens, r"copy/tokenizer was changed after the data was prepared"),
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], r"copy/tokenizer was changed after"),
    "torn": (lambda f: (f / "tokenizer_config.json").write_text("{"), r"copy/tokenizer: transformers cannot load it"),
    "without its configuration": (
        lambda f: (f / "tokenizer_config.json").unlink(),
        r"copy/tokenizer/tokenizer_config.json is missing: it says which tokens are special. Copy it again",
    ),
    "other padding": (
        lambda f: edit_json(f / "tokenizer_config.json", lambda c: c.update(pad_token="a")),
        r"copy/tokenizer was changed after the data was prepared: pad_token is 'a' \(97\), and was '<\|endofdoc\|>' \(256\)\. Copy",
    ),
    "another token": (
        lambda f: edit_json(f / "tokenizer_config.json", lambda c: c.update(cls_token="b")),
        r"copy/tokenizer was changed after the data was prepared: cls_token is 'b' \(98\), and was not set",
    ),
    "an added map": (
        lambda f: (f / "special_tokens_map.json").write_text('{"bos_token": "c"}'),
        r"copy/tokenizer was changed after the data was prepared: bos_token is 'c' \(99\), and was '<",
    ),
    "cut in another way": (
        lambda f: edit_json(f / "tokenizer_config.json", lambda c: c.update(split_special_tokens=False)),
        r"copy/tokenizer was changed after the data was prepared: AutoTokenizer encodes 'The 1,234 naïve foxes'… differently",
    ),
    "no end": (
        lambda f: edit_json(f / "tokenizer_config.json", lambda c: [c.pop(k) for k in list(c) if k.endswith("_token")]),
        r"copy/tokenizer: no eos_token",
    ),
    "other end": (
        lambda f: edit_json(f / "tokenizer_config.json", lambda c: c.update(eos_token="a")),
        r"copy/tokenizer: end-of-document token 97 of 257 tokens, and the data has 256 of 257",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_tokenizer_that_is_not_the_datas_is_refused_at_start(damage, data, run_config, train, tmp_path):
    action, message = DAMAGE[damage]
    action(data / "tokenizer")
    with pytest.raises(ConfigError, match=message) as error:
        train(run_config(data__path=str(data)))
    assert "\n" not in str(error.value)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["run.lock"]


def test_what_changes_no_token_is_no_change(data):
    """A chat template or a length, say; and folders that were prepared before the behaviour was recorded."""
    change = {"model_max_length": 77, "name_or_path": "elsewhere", "chat_template": "{{ messages }}"}
    edit_json(data / "tokenizer" / "tokenizer_config.json", lambda c: c.update(change))
    assert Tokenizer.of(data).vocab_size == 257
    edit_json(data / "tokenizer" / "tokenizer_config.json", lambda c: c.update(pad_token="a"))
    edit_json(data / "index.json", lambda c: c.pop("tokenizer_behaviour"))
    assert Tokenizer.of(data).vocab_size == 257
    edit_json(data / "index.json", lambda c: c.update(tokenizer_behaviour=[]))
    with pytest.raises(ShardError, match="tokenizer_behaviour must be an object"):
        Tokenizer.of(data)


@pytest.fixture
def pretrained(prepared, tmp_path):
    """A function that makes a pretrained model with the data's tokenizer, after a change to its folder."""

    def make(change=lambda folder: None):
        folder = tmp_path / "pretrained"
        GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=32, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
            folder
        )
        Tokenizer.of(prepared).save_pretrained(folder)
        change(folder)
        return str(folder)

    return make


def test_a_pretrained_model_of_other_tokens_is_refused_at_start(pretrained, run_config, train, tmp_path, caplog):
    """Its embeddings are enough for the data's tokens, and mean others."""
    assert tokenizer_problem(run_config(model__from_pretrained=pretrained()), 32) is None
    config = run_config(model__from_pretrained=pretrained(swap_two_tokens))
    with pytest.raises(
        ConfigError,
        match=r"has other tokens than .*\(2 of 257; 97 is 'a' in the data and 'b' there\); .*--tokenizer hf:",
    ):
        train(config)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["run.lock"]

    def space(content):
        content["pre_tokenizer"]["add_prefix_space"] = True

    config = run_config(model__from_pretrained=pretrained(lambda f: edit_json(f / "tokenizer.json", space)))
    assert "text is cut differently" in tokenizer_problem(config, 32)
    without = pretrained(lambda f: [p.unlink() for p in f.glob("tokenizer*")])
    with caplog.at_level(logging.WARNING):
        assert tokenizer_problem(run_config(model__from_pretrained=without), 32) is None
    assert "has no tokenizer that loads" in caplog.text


def test_a_prompt_that_leaves_no_room_is_refused_at_start(run_config):
    assert tokenizer_problem(run_config(log__sample_prompt="x" * 31), 32) is None
    assert "log.sample_prompt must have from 1 to 31 tokens" in tokenizer_problem(
        run_config(log__sample_prompt="x" * 32), 32
    )


# -- the data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_outside_of_the_vocabulary_is_named(split, data, run_config, train):
    """Written before the checksum was taken, or with the check of contents off: it would index past the embeddings."""
    file = data / f"{split}-00000.bin"
    tokens = np.fromfile(file, "<u2")
    tokens[:] = np.where(np.arange(len(tokens)) % 40 == 0, 60000, tokens)
    tokens.tofile(file)
    with pytest.raises(ShardError, match=rf"copy, split {split}: token 60000 is not in the vocabulary, .* 257 tokens"):
        train(run_config(data__path=str(data), data__verify="size"))
    with pytest.raises(ShardError, match="token 60000"):
        TokenShards(data, split).tokens(0, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 100}, "eod_id = .* must be below vocab_size"),
        ({"eod_id": -1}, "eod_id = .* must be below vocab_size"),
        ({"vocab_size": "x"}, "vocab_size must be a valid integer"),
        ({"vocab_size": 1 << 17}, "eod_id = .* must be below vocab_size"),
    ],
)
def test_an_edited_index_is_refused(change, message, data):
    edit_json(data / "index.json", lambda c: c.update(change))
    with pytest.raises(DataError, match=rf"index\.json: {message}"):
        TokenShards(data)


@pytest.mark.parametrize("preset", PRESETS)
def test_missing_data_is_answered_with_the_presets_own_command(preset, tmp_path, capsys, monkeypatch, fresh_accelerate):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--config", preset, "--train.precision", "fp32"])
    said, command = capsys.readouterr().err.rstrip("\n").split(": anon-dist data prepare ")
    config = parse_args(["--config", preset])
    assert said.startswith(f"error: data.path = {config.data.path} is not there")
    asked = tyro.cli(PrepareConfig, args=command.split())
    assert str(asked.out) == config.data.path
    file = (shipped_configs() / "train" / f"{preset}.yaml").read_text().replace("\\\n#     ", "")
    script = (shipped_configs().parent / "launch" / "quickstart.sh").read_text()
    assert f"anon-dist data prepare {command}" in (script if preset == "quickstart" else file)
    assert not list(tmp_path.iterdir())


def test_missing_data_elsewhere(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--config", "quickstart", "--data.path", str(tmp_path / "a b")])
    assert capsys.readouterr().err.endswith(f"--source stdlib --tokenizer spm-bpe:4096 --out '{tmp_path}/a b'\n")


@pytest.mark.parametrize(
    ("alike", "speaks", "said"),
    [
        (False, True, "error (rank 3): --optim.gama is no"),
        (True, True, "error: --optim.gama is no"),
        (True, False, ""),
    ],
)
def test_one_of_several_ranks_says_why(alike, speaks, said, monkeypatch, capsys):
    """Which one, the ranks agree on (`distributed/test_peers.py`)."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")  # and of its node the only one
    ending = contextlib.nullcontext(Ending(alike, speaks))
    monkeypatch.setattr("anon_dist.engines.peers.who_stopped", lambda *refusals: ending)
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--optim.gama", "1"])
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", bool(said))
    assert err.startswith(said)


def test_a_folder_of_texts_is_not_prepared_from_other_texts(tmp_path, monkeypatch, capsys):
    """The preset's source is for the preset's folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my texts").mkdir()
    (tmp_path / "my texts" / "a.txt").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--config", "quickstart", "--data.path", "my texts"])
    said = capsys.readouterr().err
    command = "anon-dist data prepare --source 'my texts' --tokenizer spm-bpe:4096 --out 'my texts-prepared'"
    assert f"my texts is a folder, and not one of prepared data. If it holds text: {command}, and name" in said
    assert os.listdir("my texts") == ["a.txt"]


@pytest.mark.parametrize(
    ("path", "message", "said"),
    [
        (
            "texts.txt",
            "texts.txt is a file; name a folder that",
            "data.path = texts.txt is a file; name a folder that `anon-d",
        ),
        ("x" * 300, "cannot be read: File name too long", "is not there, or not finished"),
    ],
)
def test_what_is_no_folder_of_data(path, message, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("x")
    with pytest.raises(DataError, match=message):
        TokenShards(path)
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--config", "quickstart", "--data.path", path])
    assert said in capsys.readouterr().err


def test_missing_data_of_a_configuration_of_ones_own(run_config, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(to_yaml(run_config()))
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--config", str(tmp_path / "own.yaml"), "--data.path", str(tmp_path / "nowhere")])
    assert capsys.readouterr().err.startswith("error: preparation unfinished or not a data folder")


def test_a_model_that_cannot_be_had_is_one_line(run_config, train):
    if "flash_attn" in sys.modules or torch.cuda.is_available():
        pytest.skip("it can be had here")
    config = run_config(model__attention="flash_attention_2", train__precision="bf16")
    with pytest.raises(ConfigError, match=r"model\.attention = flash_attention_2: ") as error:
        train(config)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"model: more than .* GB on this machine, do not fit into its .* GB; lower"):
        train(run_config(model__width=1 << 22, model__layers=1))


NONE = "as torch finds no GPU here (nvidia-smi, CUDA_VISIBLE_DEVICES and torch.version.cuda say more), and "
HERE = "though a GPU is here (use_cpu or --cpu of the launcher?), and "


@pytest.mark.parametrize(
    ("precision", "parameters", "device", "gpu", "said"),
    [
        ("fp32", 49_000_000, "cpu", False, None),
        ("fp32", 124_400_000, "cpu", False, f"{NONE}124.4M parameters are slow here"),
        ("bf16", 1_300_000, "cpu", False, f"{NONE}train.precision is bf16"),
        ("bf16", 124_400_000, "cpu", False, f"{NONE}train.precision is bf16, and 124.4M parameters are slow here"),
        ("bf16", 1_300_000, "cpu", True, f"{HERE}train.precision is bf16"),
        ("bf16", 124_400_000, "cuda", True, None),
    ],
)
def test_a_run_that_means_a_gpu_says_that_it_has_none(
    precision, parameters, device, gpu, said, run_config, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    lines = cpu_remarks(run_config(train__precision=precision), torch.device(device), parameters)
    assert lines == ([f"WARNING: this trains on the CPU, {said}"] if said else [])


# -- the engine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "environment", "result"),
    [
        ({}, {}, "single"),
        ({"engine": "fsdp2"}, {}, "single"),
        ({"engine": "ddp"}, {}, "single"),
        ({"engine": "fsdp2", "offload": "serial"}, {}, "fsdp2"),
        ({"engine": "fsdp2"}, {"RANK": "0", "WORLD_SIZE": "1"}, "fsdp2"),
        ({}, {"WORLD_SIZE": "2"}, "fsdp2"),
        ({}, {"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"}, "ddp"),
        ({"engine": "zero1"}, {"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"}, "zero1"),
        ({"engine": "fsdp2"}, {"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"}, EngineError("was started for plain data")),
        ({"engine": "deepspeed"}, {"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"}, EngineError("was started for plain data")),
        ({"engine": "ddp"}, {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, EngineError("asks for fsdp2")),
        ({"shard_ranks": 2}, {"WORLD_SIZE": "4"}, EngineError("train.shard_ranks is 2, which engine fsdp2 does not look at")),
        ({"engine": "ddp", "deepspeed_config": "x.json"}, {"WORLD_SIZE": "2"}, EngineError("train.deepspeed_config is x.json")),
        ({"engine": "hsdp", "shard_ranks": 2}, {"WORLD_SIZE": "4"}, "hsdp"),
    ],
)  # fmt: skip
def test_the_engine_is_what_the_launcher_and_the_configuration_say(
    wanted, environment, result, run_config, monkeypatch, caplog
):
    for key in ("RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    asked = wanted_engine(run_config(**{f"train__{k}": v for k, v in wanted.items()}))
    launched = int(environment.get("WORLD_SIZE", "1"))
    if isinstance(result, EngineError):
        with pytest.raises(EngineError, match=str(result)):
            _resolve(asked, launched)
        return
    assert _resolve(asked, launched) == result
    assert ("it trains as engine single" in caplog.text) == (result == "single" and bool(wanted))


# -- a resumed run ----------------------------------------------------------------------------------------------------


def test_a_resume_says_all_that_it_changes(run_config, train, monkeypatch, capsys, tmp_path):
    config = run_config()
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, 10, crash)
        train(config)
    changed = {
        "optim.lr": (1e-3, 3e-3),
        "optim.gamma": (0.5, 1.0),
        "schedule.decay": ("linear", "cosine"),
        "schedule.warmup_steps": (2, 3),
        "train.steps": (11, 14),
        "train.micro_batch": (2, 4),
        "train.grad_clip": (None, 1.0),
        "eval.sequences": (8, 16),
        "checkpoint.every": (0, 4),
    }
    changes = {name.replace(".", "__"): new for name, (new, _) in changed.items()}
    # A start that changes nothing says nothing; and one that dies before its first checkpoint does not hide its changes from the next.
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, 9, crash)
        capsys.readouterr()
        train(config)
    assert "resuming with" not in capsys.readouterr().out
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            at_step(patch, 9, crash)
            train(run_config(**changes))
        said = [line for line in capsys.readouterr().out.splitlines() if "; step-00000008 had " in line]
        wanted = [f"resuming with {n} = {new!r}; step-00000008 had {old!r}" for n, (new, old) in changed.items()]
        assert sorted(said) == sorted(wanted)


def test_circumstances_and_checkpoints_that_say_less(run_config, tmp_path):
    source = tmp_path / "run" / "checkpoints" / "step-00000008"
    source.mkdir(parents=True)
    config = run_config(optim__gamma_schedule={0: 0.5})
    said = {"config": recorded(config), "engine": "ddp", "threads": torch.get_num_threads(), "versions": versions()}
    assert changes(config, "ddp", source, said) == []
    said = {**said, "engine": "fsdp2", "versions": {**versions(), "torch": "2.0"}}
    assert changes(config, "ddp", source, said) == [
        "resuming with engine = 'ddp'; step-00000008 had 'fsdp2'",
        f"resuming with versions.torch = {torch.__version__!r}; step-00000008 had '2.0'",
    ]
    # One that does not say its configuration: the folder of its run does; if not even that, it is said that nothing is known.
    del said["config"]
    assert f"{source} does not say with which configuration it was written" in changes(config, "fsdp2", source, said)[0]
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(run_config(optim__lr=1.0, optim__weight_decay=0.0)))
    assert "resuming with optim.lr = 0.003; step-00000008 had 1.0" in changes(config, "fsdp2", source, said)


@pytest.mark.parametrize(
    ("environment", "options", "ranks"),
    [
        ({"WORLD_SIZE": "4"}, (), "4 · 4"),
        ({"WORLD_SIZE": "8"}, ("--train.tensor-parallel", "2"), "4 · 4"),
        ({"WORLD_SIZE": "8", "PARALLELISM_CONFIG_CP_SIZE": "2"}, (), "4 · 4"),
        ({"WORLD_SIZE": "2"}, (), None),
        ({"WORLD_SIZE": "7"}, ("--train.tensor-parallel", "2"), None),
    ],
)
def test_a_batch_that_the_ranks_cannot_make_is_told_by_what_the_launcher_says(environment, options, ranks, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = parse_args(["--config", "quickstart", "--train.global-batch", "8", *options])
    wrong = pytest.raises(ConfigError, match=f"is not a multiple of train.micro_batch · ranks = {ranks}; change one")
    with wrong if ranks else contextlib.nullcontext():
        check_at_once(config, data=False)
