"""Nonsense in every field of the configuration, from a file and from the command line: one line that names field, value and place."""

import dataclasses
import json

import pytest
import yaml

from anon_dist.train.config.parsing import (
    Config,
    ConfigError,
    check,
    field_types,
    load_config,
    parse_args,
    to_yaml,
    with_fields,
)
from anon_dist.train.config.ranges import spell

NAN, INF = float("nan"), float("inf")
NO_NUMBER = ["", "x", True, NAN, INF, -INF, [1], {"a": 1}]
NO_COUNT = [*NO_NUMBER, -1, 1.5, 1.0, 10**40, 1 << 63]
NO_TEXT = ["", 3, 1.5, True, ["a"], {"a": 1}]
NO_PATH = [*NO_TEXT, "a\0b"]
NO_CHOICE = ["", "x", 1, True, ["x"], None]
NO_SWITCH = ["", "x", 0, 1, "true", None]
BELOW_1 = [*NO_NUMBER, None, -0.1, 1, 1.0, 2]
"""What is allowed is at least 0 and below 1."""

NONSENSE = {
    "model.family": NO_CHOICE,
    "model.layers": [*NO_COUNT, 0, None, 100_000],
    "model.width": [*NO_COUNT, 0, None],
    "model.heads": [*NO_COUNT, 0, None],
    "model.kv_heads": [*NO_COUNT, 0],
    "model.hidden": [*NO_COUNT, 0],
    "model.context": [*NO_COUNT, 0, None],
    "model.tie_embeddings": NO_SWITCH,
    "model.dropout": BELOW_1,
    "model.head_dim": [*NO_COUNT, 0],
    "model.experts": [*NO_COUNT, 0],
    "model.experts_per_token": [*NO_COUNT, 0],
    "model.window": [*NO_COUNT, 0],
    "model.config": NO_PATH,
    "model.rope_theta": [*NO_NUMBER, 0, -1.0, None],
    "model.pad_vocab_to": [*NO_COUNT, 0, None],
    "model.from_pretrained": NO_PATH,
    "model.attention": NO_CHOICE,
    "data.path": [*NO_PATH, None],
    "data.sources": [None, 1, "x", [1], {"": {"path": "x"}}],
    "data.phases": [None, 1, "x", {"a": 1}],
    "data.prepare": NO_TEXT,
    "data.seq_len": [*NO_COUNT, 0, None],
    "data.seed": [*NO_COUNT, None],
    "data.mask_documents": NO_SWITCH,
    "data.packing": NO_CHOICE,
    "data.cache_dir": NO_PATH,
    "data.cache_bytes": NO_COUNT,
    "data.verify": NO_CHOICE,
    "optim.name": NO_CHOICE,
    "optim.lr": [*NO_NUMBER, -1e-9, 1e300, None],
    "optim.betas": [
        None,
        0.9,
        [],
        [0.9],
        [0.9, 0.9, 0.9],
        [0.9, 1.0],
        [-0.1, 0.9],
        [NAN, 0.9],
        ["x", 0.9],
        [True, 0.9],
    ],
    "optim.eps": [*NO_NUMBER, 0, -1e-8, 1e-60, 1e300],
    "optim.embedding_beta1": [NAN, "x", True, -0.1, 1.0],
    "optim.embedding_beta3": [NAN, "x", True, -0.1, 1.0],
    "optim.weight_decay": [*NO_NUMBER, -0.1, None],
    "optim.lr_by_name": [None, 1, "x", [1], {"": 1}, {"*": NAN}, {"*": "x"}, {"*": True}, {"*": -1}, {"*": 1e9}],
    "optim.weight_decay_by_name": [None, 0.1, "x", {"": 1}, {"*": INF}, {"*": "x"}, {"*": False}, {"*": -0.1}],
    "optim.gamma": [*NO_NUMBER, 1e300, None],
    "optim.gamma_by_name": [None, 1, "x", [1], {"": 1}, {"*": NAN}, {"*": "x"}, {"*": True}, {"*": 1e9}],
    "optim.gamma_schedule": [None, 1, "x", [1], {-1: 1}, {"x": 1}, {1.5: 1}, {0: NAN}, {0: "x"}, {10**40: 1}],
    "optim.match": NO_PATH,
    "optim.refresh_ratio": [*NO_NUMBER, 1, 0.5, -1, 1e300, None],
    "optim.beta3": BELOW_1,
    "optim.update_clip": [*NO_NUMBER, 0, -1],
    "optim.window": [*NO_COUNT, 0],
    "optim.max_interval": [*NO_COUNT, 0],
    "optim.nesterov": NO_SWITCH,
    "optim.cautious_decay": NO_SWITCH,
    "optim.basis": ["", "x", 1, True, ["columns"]],
    "optim.basis_block": [*NO_COUNT, 0, None],
    "optim.hold_silent": NO_SWITCH,
    "optim.state_dtype": [
        None,
        3,
        "",
        "x",
        "float16",
        "int8",
        "exp_avg=int4",
        "exp_avg_sq=int8",
        "nothing=bfloat16",
        "exp_avg=",
    ],
    "schedule.warmup_steps": [*NO_COUNT, None],
    "schedule.decay": NO_CHOICE,
    "schedule.decay_fraction": [*NO_NUMBER, 0, -0.1, 1.1, None],
    "schedule.min_ratio": [*NO_NUMBER, -0.1, 1.1, None],
    "train.steps": [*NO_COUNT, 0, None, (1 << 24) + 1],
    "train.global_batch": [*NO_COUNT, 0, None],
    "train.tokens": NO_COUNT,
    "train.global_batch_tokens": NO_COUNT,
    "train.micro_batch": [*NO_COUNT, 0, None],
    "train.engine": NO_CHOICE,
    "train.shard_ranks": [*NO_COUNT, 0, -2],
    "train.tensor_parallel": [*NO_COUNT, 0],
    "train.context_parallel": [*NO_COUNT, 0],
    "train.offload": NO_CHOICE[:-1],
    "train.accumulate": NO_CHOICE[:-1],
    "train.deepspeed_config": NO_PATH,
    "train.precision": NO_CHOICE,
    "train.grad_clip": [*NO_NUMBER, 0, -1],
    "train.max_skipped": [*NO_COUNT, None],
    "train.on_spike": NO_CHOICE,
    "train.spike_sigma": [*NO_NUMBER, 0, -6, None],
    "train.max_rewinds": [*NO_COUNT, None],
    "train.activation_checkpointing": ["", "x", 1, ["x"], None],
    "train.activation_budget": [*NO_NUMBER, -0.1, 1.1, None],
    "train.compile": ["", "x", 1, ["x"], None],
    "train.loss": NO_CHOICE,
    "train.z_loss": [*NO_NUMBER, -1e-4, None],
    "train.tf32": NO_SWITCH,
    "train.deterministic": NO_SWITCH,
    "train.seed": [*NO_COUNT, None],
    "train.timeout_minutes": [*NO_NUMBER, 0, -1, 1e-9, 1e9, None],
    "train.first_timeout_minutes": [*NO_NUMBER, 0, -1, 1e-9, 1e9],
    "eval.every": [*NO_COUNT, None],
    "eval.sequences": [*NO_COUNT, -3, None],
    "eval.final_sequences": [*NO_COUNT, None],
    "eval.sets": [None, 1, "x", [1], {"": "a"}, *({"a": p} for p in NO_TEXT)],
    "eval.tasks": [None, "hellaswag", [1], [""], {"hellaswag": 1}],
    "eval.tasks_every": [*NO_COUNT, None],
    "eval.tasks_path": NO_PATH,
    "eval.tasks_limit": [*NO_COUNT, 0],
    "eval.tasks_fewshot": NO_COUNT,
    "checkpoint.every": [*NO_COUNT, None],
    "checkpoint.keep": [*NO_COUNT, 0, None],
    "checkpoint.keep_every": [*NO_COUNT, None],
    "checkpoint.keep_steps": [None, "x", 5, [0], [-1], [1.5], [True], ["x"]],
    "checkpoint.async_save": NO_SWITCH,
    "checkpoint.remote": NO_PATH,
    "log.every": [*NO_COUNT, 0, None],
    "log.trackers": [None, "tensorboard", ["x"], [1], {"tensorboard": 1}],
    "log.profile_steps": [3, "x", [], [3], [1, 2, 3], [0, 2], [1, -1], [1.5, 2], [True, 2], [NAN, 2], ["x", 2]],
    "log.project": [*NO_TEXT, None],
    "log.sample_prompt": NO_TEXT,
    "run_dir": [*NO_PATH, None],
    "resume": [*NO_PATH, None],
}
CASES = [(name, value) for name, values in NONSENSE.items() for value in values]
EDGES = {
    "model.dropout": [0, 0.999],
    "data.cache_dir": [None, "cache"],
    "data.cache_bytes": [None, 1 << 40],
    "optim.lr": [0, 1e-300],
    "optim.betas": [[0, 0], [0.999999, 0]],
    "optim.gamma": [-4, 0, 4, 1],
    "optim.window": [1, "auto", None],
    "optim.eps": [None, 1e-16],
    "optim.update_clip": [None, 1e-3],
    "optim.gamma_by_name": [{}, {"*wte*": -1}],
    "optim.max_interval": [1, None],
    "optim.basis": [None, "columns", "rows", "both"],
    "optim.basis_block": [1, 4096],
    "optim.embedding_beta1": [None, 0, 0.999],
    "optim.embedding_beta3": [None, 0, 0.999],
    "optim.lr_by_name": [{}, {"*wte*": 0, "*": 2.5}],
    "optim.weight_decay_by_name": [{}, {"*wte*": 0}],
    "optim.state_dtype": ["bfloat16", "exp_avg=int8, precond=bfloat16"],
    "schedule.warmup_steps": [0],
    "schedule.decay_fraction": [1, 1e-9],
    "train.grad_clip": [None, 1e-9, 5],
    "train.offload": ["off", None],
    "train.max_skipped": [0],
    "train.timeout_minutes": [0.05, 10],
    "train.first_timeout_minutes": [10, None],
    "train.max_rewinds": [0],
    "train.spike_sigma": [0.5],
    "train.seed": [0, (1 << 63) - 1],
    "eval.sequences": [0],
    "eval.tasks": [[], ["hellaswag", "mine.yaml"]],
    "eval.tasks_limit": [1, None],
    "eval.tasks_fewshot": [0, None],
    "log.trackers": [[], ["wandb", "tensorboard"]],
}


def nested(name, value):
    section, _, key = name.rpartition(".")
    return {section: {key: value}} if section else {key: value}


def test_the_tables_name_every_field():
    assert set(NONSENSE) == set(field_types())


def test_nonsense_in_a_file_is_refused_where_it_stands(tmp_path):
    path = tmp_path / "c.yaml"
    for name, value in CASES:
        path.write_text(yaml.safe_dump(nested(name, value)))
        with pytest.raises(ConfigError) as error:
            load_config(path)
        message = str(error.value)
        assert message.startswith(f"{path}: '{name}' must be "), (name, value, message)
        assert "\n" not in message
        assert repr(value)[:40] in message.rpartition(", not ")[2], (name, value, message)


def test_nonsense_on_the_command_line_is_refused_by_its_flag():
    typed = {name: [""] for name, values in NONSENSE.items() if "" in values and "text" in spell(field_types()[name])}
    for name, values in NONSENSE.items():
        if spell(field_types()[name]).startswith(("a whole number", "a finite number")):
            kinds = (int,) if "whole" in spell(field_types()[name]) else (int, float)
            typed[name] = [v for v in values if type(v) in kinds][-1:]
    assert len(typed) > 40
    for name, values in typed.items():
        flag = "--" + name.replace("_", "-")
        for value in values:
            with pytest.raises(ConfigError, match=f"^{flag} must be ") as error:
                parse_args([flag, str(value)])
            assert str(error.value).endswith(f"not {float(value) if 'finite' in str(error.value) else repr(value)}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--train.steps 1x3", "--train.steps must be a whole number ≥ 1 and ≤ 16,777,216, not '1x3'"),
        ("--train.steps=True", "--train.steps must be a whole number ≥ 1 and ≤ 16,777,216, not 'True'"),
        ("--train.steps", "--train.steps needs a value: a whole number ≥ 1 and ≤ 16,777,216"),
        ("--train.steps -- 3", "--train.steps must be a whole number"),
        ("--optim.lr high", "--optim.lr must be a finite number ≥ 0 and ≤ 1e+06, not 'high'"),
        ("--optim.lr 1 2", "--optim.lr must be a finite number ≥ 0 and ≤ 1e+06, not '1' '2'"),
        ("--optim.window soon", "--optim.window must be a whole number ≥ 1 and ≤ 16,777,216, or auto, or None, not"),
        ("--train.precision fp9", "--train.precision must be one of fp32, bf16, fp16, bf16-true, fp8, not 'fp9'"),
        ("--train.compile maybe", "--train.compile must be one of none, blocks, whole, not 'maybe'"),
        (
            "--optim.basis col",
            "--optim.basis must be one of columns, rows, both, or None, not 'col'; did you mean columns?",
        ),
        (
            "--train.engine fsdp",
            "--train.engine must be one of auto, single, ddp, zero1, fsdp2, hsdp, fsdp1, deepspeed, not 'fsdp'; did you mean fsdp2?",
        ),
        ("--optim.betas 0.9", "--optim.betas must be 2 values, each a finite number ≥ 0 and < 1, not '0.9'"),
        ("--optim.betas 0.9 0.9 0.9", "--optim.betas must be 2 values, each a finite number ≥ 0 and < 1, not"),
        ("--optim.gamma-by-name *wte*", "--optim.gamma-by-name must be a mapping from text that is not empty to a"),
        ("--optim.gama 0.5", "--optim.gama is no option; did you mean --optim.gamma"),
        ("--gamma_schedule=0", "--gamma_schedule is no option; did you mean --optim.gamma-schedule?"),
        ("--optn_lr 3", "--optn_lr is no option; did you mean --optim.lr"),
        ("--zzz 3", "--zzz is no option (--help lists all)"),
        ("quickstart", "quickstart belongs to no option; did you mean --config quickstart?"),
        ("--config", "--config names nothing"),
        ("--optim.lr 1e-3 --optim.lr=2e-3", "--optim.lr comes twice; give it once"),
        ("--train.grad-clip 1 --train.steps 9 --train.grad_clip 2", "--train.grad_clip comes twice; give it once"),
        ("--optim.gamma-schedule 0 0.5 00 1.0", "--optim.gamma-schedule names 0 twice: 0 0.5 00 1.0"),
        ("--optim.gamma-by-name=*w* 0 b 1 *w* 2", "--optim.gamma-by-name names '*w*' twice: *w* 0 b 1 *w* 2"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_one_line(words, message, capsys):
    with pytest.raises(ConfigError) as error:
        parse_args(words.split())
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")


def test_the_ends_of_ranges_are_inside(tmp_path):
    path = tmp_path / "c.yaml"
    for name, values in EDGES.items():
        for value in values:
            path.write_text(yaml.safe_dump(nested(name, value)))
            config = load_config(path)
            section, _, key = name.rpartition(".")
            got = getattr(getattr(config, section), key)
            assert json.loads(json.dumps(got)) == value
            check(config)
            path.write_text(to_yaml(config))
            assert load_config(path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 200}\ntrain: {steps: 300}", r"c\.yaml, line 2: the key 'train' comes twice"),
        ("optim: {lr: 1, lr: 2}", r"line 1: the key 'lr' comes twice"),
        ("optim: {gamma_schedule: {0: 1, 0: 2}}", r"line 1: the key '0' comes twice"),
        ("optim: {gamma_schedule: {0: 1, '0': 2}}", r"gamma_schedule' names one of its keys twice: \{0: 1, '0': 2\}"),
        ("optim: {gamma_schedule: {1000: 1, 1_000: 2}}", r"line 1: the key '1_000' comes twice"),
        ("optim: {gamma_schedule: {0: 1, 00: 2}}", r"line 1: the key '00' comes twice"),
        ("optim: {gamma_by_name: {1: 1, '1': 2}}", r"gamma_by_name' names one of its keys twice"),
        ("model: {wdith: 3}", r"c\.yaml: unknown key 'model\.wdith'; did you mean 'model\.width'\?"),
        ("1: 2", "unknown key '1'"),
        ("{gamma: 1}", r"unknown key 'gamma'; did you mean 'optim\.gamma'\?"),
        ("model: [width]", r"'model' is a section, not \['width'\]"),
        ("model: {layers: 0, width: -1}", r"model\.layers' must be .*, not 0; .*model\.width' must be .*, not -1"),
        ("a: &a [*a]", "Circular reference"),
        ("optim: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("run_dir: x\n---\nrun_dir: y", "expected a single document"),
        ("? [a, b]\n: 3", "unhashable key"),
    ],
)
def test_what_is_no_configuration_is_one_line(text, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_yaml_means_what_it_looks_like(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("optim: {lr: 6e-4, update_clip: None}\ntrain: {offload: off}\nrun_dir: 2026-01-01\n")
    config = load_config(path)
    assert (config.optim.lr, config.optim.update_clip, config.train.offload) == (6e-4, None, "off")
    assert config.run_dir == "2026-01-01"


LLAMA = ["--model.family", "llama"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            [*LLAMA, "--model.heads", "12", "--model.kv-heads", "5"],
            r"heads = 12 is not a multiple of model.kv_heads = 5",
        ),
        ([*LLAMA, "--model.width", "36"], r"36 / 12 is odd"),
        ([*LLAMA, "--model.dropout", "0.1"], r"model.dropout = 0.1 is for gpt2, and model.family is llama"),
        (["--model.kv-heads", "2"], "model.kv_heads = 2 is for llama, qwen3"),
        (["--model.rope-theta", "5e5"], "model.rope_theta = 500000.0 is for llama"),
        ([*LLAMA, "--model.experts", "4"], "model.experts = 4 is for mixtral, and model.family is llama"),
        ([*LLAMA, "--model.window", "4"], "model.window = 4 is for gemma3"),
        (
            ["--model.family", "olmo2", "--model.head-dim", "4"],
            "model.head_dim = 4 is for llama, qwen3, gemma3, mixtral",
        ),
        (["--model.family", "qwen3", "--model.head-dim", "5"], "model.head_dim = 5 is odd"),
        (["--model.family", "mixtral", "--model.experts-per-token", "9"], "= 9 is more than model.experts = 8"),
        (["--model.family", "mixtral", "--model.hidden", "36"], "model.hidden = 36 is not a multiple of 8"),
        (["--model.config", "a", "--model.from-pretrained", "b"], "both say what the model is"),
        (
            ["--log.profile-steps", "5", "4"],
            "log.profile_steps = 5 4 must be a first and a last step, up to train.steps",
        ),
        (["--model.attention", "flash_attention_2"], "in half precision only"),
        (["--checkpoint.remote", "bucket/run"], "checkpoint.remote = bucket/run is no address such as s3://bucket/run"),
        (["--resume", "s3://bucket/run/step-00000500"], "is an address: set checkpoint.remote to its folder"),
        (["--optim.lr", "10"], "decay the weights past 0"),
        (["--log.trackers", "wandb", "wandb"], "names one twice"),
        (
            ["--data.sources", "{a: {path: a}}", "--data.path", "b"],
            r"--data\.path does nothing, as data\.sources says what is read; give --data\.sources '\{\}'",
        ),
        (
            [
                "--data.phases",
                "[{until: 9, sources: {a: {path: a}}}, {sources: {b: {path: b}}}]",
                "--data.sources",
                "{}",
            ],
            r"--data\.sources does nothing, as each of data\.phases has its own; give --data\.phases \[\]",
        ),
        (["--config", "quickstart", "--config", "quickstart"], "--config comes 2 times"),
        (["--config", "quickstart", "--train.steps", "9"], r"quickstart\.yaml and the command line: schedule\.warmup"),
        (["--run-dir", "\udcff"], "the configuration"),
        (["--train.activation-checkpointing", "budget"], "which torch.compile keeps; set train.compile"),
        (["--train.activation-budget", "0.3"], "does nothing where train.activation_checkpointing is none"),
        (["--train.precision", "fp8"], "fp8 has no effect on gpt2"),
        (["--data.phases", "[{}, {until: 1000}]"], r"data\.phases\.0\.until is missing"),
        (["--data.phases", "[{until: 9}, {until: 9}]"], r"data\.phases\.1\.until = 9 must be more than"),
        (
            ["--data.phases", "[{until: 9}]"],
            r"data\.phases\.0\.until = 9, of the last phase, is before train\.steps = 1000",
        ),
        (["--data.phases", "[{until: 9, sources: {a: {path: b}}}, {}]"], r"data\.phases\.1\.sources is missing"),
        (
            ["--data.phases", "[{seq_len: 2048}]"],
            r"data\.phases\.0\.seq_len = 2048 is longer than model\.context = 1024",
        ),
        (
            ["--data.phases", "[{seq_len: 1000}]"],
            r"does not divide the 65,536 tokens of a step; give it a global_batch",
        ),
        (
            ["--data.phases", "[{until: 9, sources: {a: {path: b}}}, {sources: {a: {path: c}}}]"],
            "the source a is b in one and c in another",
        ),
        (["--train.global-batch-tokens", "1000"], r"is not a multiple of data\.seq_len = 1024; change one of them"),
        (
            ["--train.tokens", "1B", "--train.steps", "5"],
            r"^--train\.steps does nothing, as train\.tokens = 1000000000 says",
        ),
        (["--train.tokens", "0"], r"train\.tokens = 0: 0 steps, which are none or too many"),
        (["--train.tokens", "1M", "--data.phases", "[{until: 2}]"], "the phases end 868,928 tokens before"),
        (["--data.phases", "[{until: 0}]"], r"^--data\.phases\.0\.until must be a whole number ≥ 1"),
        (["--train.first-timeout-minutes", "5"], "first_timeout_minutes = 5 is for what takes longer than a step"),
        (["--train.on-spike", "rewind", "--checkpoint.every", "0"], "there is nothing to go back to"),
    ],
)
def test_what_does_not_go_together(args, message):
    with pytest.raises(ConfigError, match=message):
        parse_args(args)


def test_code_is_told_too():
    """A configuration made without any file, and the axis of a grid."""
    config = dataclasses.replace(Config(), run_dir="")
    with pytest.raises(ConfigError, match=r"^run_dir must be text that is not empty, not ''$"):
        check(config)
    with pytest.raises(ConfigError, match=r"^a grid: 'train\.grad_clip' must be a finite number > 0, or None, not -1$"):
        with_fields(Config(), {"train.grad_clip": -1}, "a grid")
