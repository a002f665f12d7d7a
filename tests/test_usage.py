"""What the command says of a command line that it cannot read: one line, and exit code 2."""

import pytest
import tyro

from anon_dist.checkpoint.cli import Convert
from anon_dist.cli import main
from anon_dist.usage import UsageError, parse, parse_or_raise


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("ckpt convert a b --to dcp --layuot trainer", "--layuot is no option; did you mean --layout"),
        (
            "ckpt convert a b --to dcp --layout x",
            "--layout must be one of anon_dist, accelerate, torchtitan, trainer, not 'x'",
        ),
        ("ckpt convert a b --to dcp --world-size two", "--world-size must be a whole number, not 'two'"),
        ("completion tcsh", "SHELL must be one of bash, zsh, fish, not 'tcsh'"),
        ("ckpt convert a --to dcp", "DST is missing: Complete or absent (--help"),
        ("init 124M --out x", "--data is missing: Folder made by `anon-dist data prepare`, or its address (--help"),
        ("ckpt convert a", "DST, --to are missing (DST: Complete or absent; --to: "),
        *(
            (
                f"ckpt convert a b --to {name}",
                f"--to must be one of canonical, consolidated, dcp, hf, zero0, zero1, zero2, "
                f"zero3, universal, not '{name}'; did you mean {meant}? (",
            )
            for name, meant in (
                ("fsdp", "dcp"),
                ("fsdp2", "dcp"),
                ("ddp", "consolidated"),
                ("zero", "zero2 or zero3"),
                ("zero4", "zero3"),
                ("safetensors", "hf"),
                ("FSDP2", "dcp"),
                ("univ", "universal"),
            )
        ),
        ("ckpt verify a b c", "'c' belongs to no option"),
        ("ckpt inspect a --json --no-json", "--json and --no-json contradict each other; give one"),
        ("ckpt inspect a --json=1", "'1' belongs to no option: --json takes no more"),
        ("ckpt inspect a --json --workers 2 3", "--workers is no option"),
        ("sweep --config quickstart", "--grid, --out are missing"),
        ("sweep --config a --grid x=1 --grid y=2 --out z", "--grid comes twice; give it once"),
        ("data prepare --tokeniser bytes", "--tokeniser is no option; did you mean --tokenizer"),
        ("bench --plan --model 7b --rank 2", "--rank is no option; did you mean --ranks"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.endswith("\n")
    assert err.count("\n") == 1


def test_help_is_tyros(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["ckpt", "verify", "--help"])
    assert ended.value.code == 0
    assert "usage: anon-dist ckpt verify" in capsys.readouterr().out


def test_without_tyros_hook_its_own_report_remains(monkeypatch, capsys):
    monkeypatch.delattr("tyro._errors.on_parse_error")
    with pytest.raises(SystemExit) as ended:
        parse(Convert, ["a", "b", "--to", "dcp", "--layout", "x"], "convert")
    assert ended.value.code == 2
    assert "--layout" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--to comes twice"):
        parse_or_raise(Convert, ["a", "b", "--to", "dcp", "--to", "hf"], "convert")


def test_a_line_that_is_right_is_read_as_tyro_reads_it():
    words = ["a", "b", "--to=dcp", "--world_size", "4", "--buffers", "x", "y", "--unsafe"]
    assert parse(Convert, words, "convert") == tyro.cli(Convert, args=words)
