"""The configuration: defaults, files, command line, and what is said of mistakes."""

import pytest
import yaml

from anon_dist.train.config.parsing import (
    Config,
    ConfigError,
    SourceConfig,
    accumulation,
    find_config,
    load_config,
    parse_args,
    shipped_configs,
    to_yaml,
)
from anon_dist.train.config.phases import phases_of


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_a_configuration_survives_its_file(tmp_path):
    config = parse_args(
        ["--optim.gamma", "-0.5", "--optim.betas", "0.8", "0.9", "--optim.window", "12", "--train.grad-clip", "None"]
    )
    assert (config.optim.gamma, config.optim.betas, config.optim.window, config.train.grad_clip) == (
        -0.5,
        (0.8, 0.9),
        12,
        None,
    )
    assert load_config(write(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize("path", sorted((shipped_configs() / "train").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_are_valid(path):
    assert parse_args(["--config", path.stem]) == parse_args(["--config", str(path)])
    assert find_config(path.stem) == path


def test_command_line_over_file(tmp_path):
    path = write(tmp_path, "optim: {lr: 6e-4, gamma: 0.5}\ntrain: {steps: 50}\nschedule: {warmup_steps: 5}\n")
    config = parse_args([f"--config={path}", "--optim.lr", "1e-3"])
    assert (config.optim.lr, config.optim.gamma, config.train.steps) == (1e-3, 0.5, 50)
    assert load_config(path).optim.lr == 6e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {gama: 1}", r"c\.yaml: unknown key 'optim\.gama'; did you mean 'optim\.gamma'\?"),
        ("optim: {xyz: 1}", r"unknown key 'optim\.xyz' \(anon-dist train --help lists all\)$"),
        ("optm: {gamma: 1}", r"unknown key 'optm'; did you mean 'optim'\?"),
        ("optim: {gamma: high}", r"'optim\.gamma' must be a finite number ≥ -100 and ≤ 100, not 'high'"),
        ("train: {steps: 1.5}", r"'train\.steps' must be a whole number ≥ 1 and ≤ 16,777,216, not 1\.5"),
        ("train: {compile: 1}", r"'train\.compile' must be one of none, blocks, whole, not 1"),
        ("optim: {betas: [0.9]}", r"'optim\.betas' must be"),
        ("optim: {window: soon}", r"'optim\.window' must be"),
        ("train: {precision: fp9}", r"'train\.precision' must be one of fp32, bf16, fp16, bf16-true, fp8, not 'fp9'"),
        (
            "optim: {basis: column}",
            r"must be one of columns, rows, both, or None, not 'column'; did you mean columns\?",
        ),
        ("train: {engine: fsdp}", r"not 'fsdp'; did you mean fsdp2\?"),
        ("train: {engine: zero3}", r"not 'zero3'; did you mean deepspeed \(train\.deepspeed_config says the stage\)\?"),
        ("", r"c\.yaml says nothing; write what is to be other than by default, or leave --config out"),
        ("# optim: {lr: 1e-3}", r"c\.yaml says nothing; "),
        ("optim: 3", r"'optim' is a section, not 3"),
        ("[1, 2]", r"expected a mapping"),
        ("a: [", r"c\.yaml, line 1: while parsing"),
        (
            "data: {sources: {a: {path: b, weight: 0}}}",
            r"'data\.sources\.a\.weight' must be a finite number > 0, not 0",
        ),
        (
            "data: {sources: {a: {path: b, wieght: 1}}}",
            r"unknown key 'data\.sources\.a\.wieght'; did you mean 'weight'\?",
        ),
        (
            "data: {sources: {a: {weight: 1}}}",
            r"'data\.sources\.a\.path' is missing; it must be text that is not empty",
        ),
        ("data: {sources: {a: b}}", r"'data\.sources\.a' must be \{path, weight, max_epochs\}, not 'b'"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize(("text", "value"), [("true", True), ("True", True), ("false", False)])
def test_switches_take_a_value(text, value):
    assert parse_args(["--train.deterministic", text]).train.deterministic is value


@pytest.mark.parametrize(("text", "now"), [("true", ("full", "blocks")), ("false", ("none", "none"))])
def test_switches_that_are_choices_now_take_what_they_took(tmp_path, text, now):
    file = write(tmp_path, f"train: {{activation_checkpointing: {text}, compile: {text}}}")
    flags = ["--train.activation-checkpointing", text, f"--train.compile={text}"]
    for config in (load_config(file), parse_args(flags), parse_args([f"--config={file}"])):
        assert (config.train.activation_checkpointing, config.train.compile) == now


def test_mappings_in_a_file_and_on_the_command_line(tmp_path):
    file = write(tmp_path, 'optim: {gamma_schedule: {0: 0.5, 2000: 1}, match: a.json, gamma_by_name: {"*wte*": 0}}')
    given = ["--optim.gamma-schedule", "0", "0.5", "2000", "1", "--optim.match", "a.json"]
    given += ["--optim.gamma-by-name", "*wte*", "0"]
    for config in (load_config(file), parse_args(given)):
        assert config.optim.gamma_schedule == {0: 0.5, 2000: 1.0}
        assert config.optim.gamma_by_name == {"*wte*": 0.0}
        assert load_config(write(tmp_path, to_yaml(config))) == config


def test_sources_in_a_file_and_on_the_command_line(tmp_path):
    text = "{web: {path: a, weight: 0.7}, code: {path: b, max_epochs: 4}}"
    for config in (load_config(write(tmp_path, f"data: {{sources: {text}}}")), parse_args(["--data.sources", text])):
        assert config.data.sources == {"web": SourceConfig("a", 0.7), "code": SourceConfig("b", 1.0, 4.0)}
        file = write(tmp_path, to_yaml(config))
        assert load_config(file) == config
        assert parse_args([f"--config={file}", "--data.seed", "1"]).data.sources == config.data.sources
    for wrong in ("{a: {path: b}, a: {path: c}}", "{a: [", "a"):
        with pytest.raises(ConfigError, match=r"^--data\.sources must be a mapping from text"):
            parse_args(["--data.sources", wrong])
    with pytest.raises(ConfigError, match=r"^--data\.sources\.a\.weight must be a finite number > 0, not -1"):
        parse_args(["--data.sources", "{a: {path: b, weight: -1}}"])


def test_tokens_in_place_of_steps_and_sequences():
    config = parse_args(["--train.tokens", "1B", "--train.global-batch-tokens", "524288"])
    assert (config.train.global_batch, config.train.steps) == (512, 1908)  # 1e9 / 2^19 = 1907.3
    warm = "[{until: 100, global_batch: 64}, {until: 200, seq_len: 512}, {}]"
    config = parse_args(["--train.tokens", "100M", "--train.global-batch", "128", "--data.phases", warm])
    assert config.train.steps == 813  # 100 of 2^16, the others of 2^17 tokens: (1e8 - 100 * 2^16) / 2^17 = 712.9
    assert [(until, p.train.global_batch, p.train.micro_batch, p.data.seq_len) for until, p in phases_of(config)] == [
        (100, 64, 8, 1024),
        (200, 256, 16, 512),
        (813, 128, 8, 1024),
    ]


def test_unknown_configuration_lists_the_shipped_ones():
    with pytest.raises(ConfigError, match=r"--config quikstart: no such file.*quickstart"):
        find_config("quikstart")


def test_what_is_no_configuration_is_said_to_be_none(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xb0\x01")
    with pytest.raises(ConfigError, match=r"is a folder; name a YAML file, .*config\.yaml say"):
        parse_args(["--config", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"x\.yaml is no configuration: it is not text in UTF-8"):
        parse_args(["--config", str(tmp_path / "x.yaml")])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--train.steps", "0"], "--train.steps must be a whole number ≥ 1"),
        (["--model.heads", "7"], "model.width = 768 is not a multiple of model.heads = 7"),
        (["--data.seq-len", "2048"], "data.seq_len = 2048 is longer than model.context = 1024"),
        (["--train.steps", "50"], "schedule.warmup_steps = 100 leaves nothing of train.steps = 50"),
        (["--schedule.min-ratio", "2"], "--schedule.min-ratio must be a finite number ≥ 0 and ≤ 1, not 2"),
        (["--optim.gamma-schedule", "0", "0.5", "9", "1"], "set optim.match to a checkpoint"),
    ],
)
def test_fields_that_do_not_fit_each_other(args, message):
    with pytest.raises(ConfigError, match=message):
        parse_args(args)


def test_accumulation_follows_from_the_batch_sizes():
    config = Config()
    config.train.global_batch, config.train.micro_batch = 48, 4
    assert accumulation(config, 3) == 4
    with pytest.raises(ConfigError, match=r"48 is not a multiple of train.micro_batch · ranks = 4 · 5"):
        accumulation(config, 5)


def test_every_field_is_documented():
    """`--help` explains every option."""
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        parse_args(["--help"])
    flags = [
        f"--{s}.{k.replace('_', '-')}"
        for s, v in yaml.safe_load(to_yaml(Config())).items()
        if isinstance(v, dict)
        for k in v
    ]
    missing = [f for f in flags if f not in text.getvalue()]
    assert not missing
    assert text.getvalue().count("(default:") + text.getvalue().count("(optional)") >= len(flags)
