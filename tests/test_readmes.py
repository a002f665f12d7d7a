"""Every command that a README shows: run here in this process, made short, or read by its own parser where another test runs it.

A command that no rule below knows fails, so a new one comes with its test.
"""

import argparse
import contextlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tyro
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from helpers import forget_accelerate
from torch.distributed.run import get_args_parser

from anon_dist.bench.cli import KINDS
from anon_dist.cli import main, train
from anon_dist.data import PrepareConfig
from anon_dist.sweep import cli as sweep_cli
from anon_dist.sweep.cells import CellFolder
from anon_dist.train.config import parse_args

ROOT = Path(__file__).parents[1]
READMES = sorted(
    p for p in ROOT.rglob("README.md") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)
)
PROGRAM = (
    r"(?:[A-Z_]+=\S+ )*(?:anon-dist|python|bash|pytest|sbatch|accelerate launch|torchrun|pip|launch/pretrain\.py) [^`]*"
)


def commands(text: str) -> list[str]:
    """Those of a page: the lines of its bash blocks, and what stands between backquotes and begins with a program."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [re.sub(r"\s+#\s.*$", "", line).strip() for b in blocks for line in b.replace("\\\n", " ").splitlines()]
    inline = re.findall(rf"`({PROGRAM})`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line for line in [*lines, *inline] if line and not line.startswith("#") and "…" not in line]


COMMANDS = sorted({c for path in READMES for c in commands(path.read_text())})

SHORT = shlex.split(
    "--data.path data/stdlib --data.seq-len 32 --model.layers 1 --model.width 32 --model.heads 2 --model.context 64 "
    "--train.steps 2 --schedule.warmup-steps 1 --train.global-batch 4 --train.micro-batch 4 --train.precision fp32 "
    "--train.compile false --eval.sequences 4 --eval.final-sequences 4 --checkpoint.every 1 --log.trackers"
)


@pytest.fixture(scope="module")
def work(prepared, tmp_path_factory):
    """The clone as a command sees it, with what the READMEs' commands leave behind for each other, at other paths than the clone's."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "launch", "tools", "tests"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(prepared, folder / "data" / "stdlib")
    return folder


@pytest.fixture(autouse=True)
def here(work, monkeypatch):
    monkeypatch.chdir(work)
    forget_accelerate()
    yield
    forget_accelerate()


def pretrain(args: list[str]) -> None:
    """A training, made short and in this process; its own options first, which must be right by themselves."""
    parse_args(args)
    if "--run-dir" in args:  # on a shared file system that is not here
        return
    if "--optim.match" in args:
        args = ["spectrum" if a.startswith("runs/before") else a for a in args]
        before = ["--config", "gpt2-small", *SHORT, "--run-dir", "runs/before"]
        train(before)
        args[args.index("spectrum")] = "runs/before/checkpoints/step-00000002"
        forget_accelerate()
    run = Path("runs") / str(abs(hash(tuple(args))))
    train([*args, *SHORT, "--run-dir", str(run)])
    assert (run / "model" / "model.safetensors").is_file()


def launched(command: str) -> None:
    """What a launcher is given: its options by its own parser, its configuration read; the script in this process."""
    words = shlex.split(command)
    if words[0] == "accelerate":
        parsed = launch_command_parser().parse_args(words[2:])
        load_config_from_file(parsed.config_file)
    else:
        parsed = get_args_parser().parse_args(words[1:])
    assert parsed.training_script == "launch/pretrain.py"
    pretrain(parsed.training_script_args)


def prepare(command: str) -> None:
    filled = command.replace("SRC", "tests/conftest.py").replace("TOK", "bytes").replace("DIR", "data/here")
    config = tyro.cli(PrepareConfig, args=shlex.split(filled)[3:])
    if config.tokenizer == "bytes":
        main(
            [
                "data",
                "prepare",
                "--source",
                str(config.source),
                "--tokenizer",
                "bytes",
                "--out",
                "data/here",
                "--val-fraction",
                "0",
                "--workers",
                "1",
            ]
        )


def quickstart(_: str) -> None:
    """Its commands, in their order; the installation aside."""
    script = (ROOT / "launch" / "quickstart.sh").read_text().replace("\\\n", " ")
    subprocess.run(["bash", "-n", ROOT / "launch" / "quickstart.sh"], check=True)
    (prepared_by,) = re.findall(r"^anon-dist data prepare .*$", script, re.MULTILINE)
    prepare(prepared_by)
    (launch,) = re.findall(r"^exec (accelerate launch .*)$", script, re.MULTILINE)
    gpus, cpus = re.findall(r"configs/accelerate/\S+\.yaml", script)
    load_config_from_file(gpus)
    launched(launch.replace('"$accelerate_config"', cpus).replace('"$ranks"', "2").replace('"$@"', ""))


def script(command: str) -> None:
    """A shell script and what it starts: it must be one, and the training's options right. tests/multinode runs those of that folder."""
    words = [w for w in shlex.split(command) if not re.match(r"[A-Z_]+=", w)]
    subprocess.run(["bash", "-n", words[1]], check=True)
    if words[2:] and "pretrain" in Path(words[1]).read_text() + (ROOT / "launch/multinode/common.sh").read_text():
        parse_args(words[2:]) if words[2].startswith("--") else None


def bench(command: str, monkeypatch) -> None:
    """`anon-dist bench`: its options are read. tests/bench runs each kind in small."""
    read: list[object] = []
    for kind in KINDS:
        monkeypatch.setitem(sys.modules, f"anon_dist.bench.{kind}", types.SimpleNamespace(main=read.append))
    main(shlex.split(re.sub(r"^[A-Z_]+=\S+ ", "", command))[1:])
    assert read or command == "anon-dist bench"


def sweep(command: str, monkeypatch) -> None:
    """The whole grid is planned and reported; tests/sweep trains one. The same command goes on with it."""
    args = shlex.split(command)[1:]
    if "--config" not in args:
        args += ["--config", "quickstart", "--out", "runs/other"]
    args += ["--data.path", "data/stdlib", "--data.seq-len", "64"]
    monkeypatch.setattr(sweep_cli, "calibrate", lambda *rest: Measured())
    monkeypatch.setattr(sweep_cli.Scheduler, "run", lambda self: True)
    main(args)
    assert len(CellFolder.all(Path(args[args.index("--out") + 1]))) > 10


class Measured:
    """Spectra by which γ changes nothing."""

    def to_json(self):
        return {}

    def whole(self):
        return self

    def lr_factor(self, gamma, clip):
        return 1.0


def sweep_report(command: str, monkeypatch) -> None:
    if not Path("runs/gamma").exists():
        sweep(next(c for c in COMMANDS if c.startswith("anon-dist sweep --config quickstart")), monkeypatch)
    main(shlex.split(command)[1:])
    assert Path("runs/gamma/report.md").is_file()


def checkpoint(command: str, monkeypatch) -> None:
    source = Path("runs/checkpoint/checkpoints/step-00000002")
    if not source.exists():
        train(["--config", "quickstart", *SHORT, "--run-dir", "runs/checkpoint"])
    if "verify" in command and not Path("converted").exists():
        checkpoint("anon-dist ckpt convert SRC DST --to dcp --world-size 4", monkeypatch)
    with contextlib.suppress(SystemExit) if "verify" in command else contextlib.nullcontext():
        main(shlex.split(command.replace("SRC", str(source)).replace("DST", "converted"))[1:])


def of_a_run(command: str) -> None:
    if not Path("runs/quickstart/model").exists():
        train(["--config", "quickstart", *SHORT, "--run-dir", "runs/quickstart"])
    main(shlex.split(command)[1:])


class ParsedError(Exception):
    """A script has read its options."""


def tool(command: str, monkeypatch) -> None:
    """A script of tools/ reads its options; the study's table is made. tests/tools runs the claims; the others take minutes and more."""
    file, *args = shlex.split(command)[1:]
    monkeypatch.syspath_prepend(str((ROOT / file).parent))
    monkeypatch.setattr(sys, "argv", [file, *args])
    if file == "tools/study.py" and args[0] == "table":
        runpy.run_path(str(ROOT / file), run_name="__main__")
        return
    original = argparse.ArgumentParser.parse_args

    def parse(*given, **more):
        original(*given, **more)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(ParsedError):
        runpy.run_path(str(ROOT / file), run_name="__main__")


def packages(command: str) -> None:
    """Installs something; Debian's names are not looked up."""
    if command.startswith("pip"):
        import tomllib

        (extra,) = re.findall(r"\.\[(\w+)\]", command)
        assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def help_of(command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        train(["--help"])
    assert ended.value.code == 0


def files(command: str) -> None:
    for word in shlex.split(command)[1:]:
        assert (ROOT / word).exists(), word


RULES = {
    r"bash launch/quickstart\.sh": quickstart,
    r"bash (tests/run|launch/setup)\.sh( deepspeed)?": script,
    r"(NODE_RANK=\d )?(bash launch/multinode/accelerate\.sh|sbatch launch/multinode/slurm\.sbatch) .*": script,
    r"export [A-Z_= \w.]+": lambda command: None,
    r"anon-dist data prepare .*": prepare,
    r"accelerate launch --config_file FILE|launch/pretrain\.py --config NAME_OR_FILE": lambda command: None,
    r"launch/pretrain\.py --help": help_of,
    r"(accelerate launch|torchrun) .* launch/pretrain\.py .*": launched,
    r"python launch/pretrain\.py .*": lambda c: pretrain(shlex.split(c.replace("DIR", "data/stdlib"))[2:]),
    r"anon-dist train .*": lambda c: pretrain(shlex.split(c)[2:]),
    r"(OMP_NUM_THREADS=\d )?anon-dist bench.*": bench,
    r"anon-dist (runs|generate|export) .*": of_a_run,
    r"anon-dist init .*": lambda c: main(shlex.split(c)[1:]),
    r"anon-dist completion \w+": lambda c: main(shlex.split(c)[1:]),
    r"anon-dist sweep report .*": sweep_report,
    r"anon-dist sweep .*": sweep,
    r"anon-dist ckpt (inspect|convert|verify)": lambda command: None,  # as a name; with its arguments below
    r"anon-dist ckpt .*": checkpoint,
    r"python tools/.*": tool,
    r"(apt-get|pip) install .*": packages,
    r"pytest .*": files,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_a_readme_does_what_it_says(command, monkeypatch):
    rule = next((rule for pattern, rule in RULES.items() if re.fullmatch(pattern, command)), None)
    assert rule is not None, "no rule of tests/test_readmes.py knows this command: add how it is tested"
    names = rule.__code__.co_varnames[: rule.__code__.co_argcount]
    rule(command, monkeypatch) if "monkeypatch" in names else rule(command)


def test_commands_are_found():
    assert len(COMMANDS) > 40
    assert commands("```bash\nls  # a remark\n\npwd \\\n  -P\n```\nand `python x.py`, `not this`") == [
        "ls",
        "pwd    -P",
        "python x.py",
    ]
