"""Every command that a page shows: run here in this process, made short, or read by its own parser where another test runs it.

A command that no rule below knows fails, so a new one comes with its test. So does a Python block that `snippets.py` has no name for, and a
link that leads nowhere.
"""

import argparse
import contextlib
import difflib
import json
import re
import runpy
import shlex
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tyro
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from helpers import forget_accelerate, write_tasks
from snippets import PAGES, ROOT, SNIPPETS, blocks
from torch.distributed.run import get_args_parser

from anon_dist.bench.cli import KINDS
from anon_dist.cli import main, train
from anon_dist.data import PrepareConfig
from anon_dist.sweep import cli as sweep_cli
from anon_dist.sweep.cells import CellFolder
from anon_dist.train.config.parsing import parse_args

PROGRAM = (
    r"(?:[A-Z_]+=\S+ )*(?:anon-dist|python|bash|pytest|sbatch|accelerate launch|torchrun|pip|launch/pretrain\.py) [^`]*"
)
README_BYTES = 8192


def commands(text: str) -> list[str]:
    """Those of a page: the lines of its bash blocks, and what stands between backquotes and begins with a program."""
    shown = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [re.sub(r"\s+#\s.*$", "", line).strip() for b in shown for line in b.replace("\\\n", " ").splitlines()]
    inline = re.findall(rf"`({PROGRAM})`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line for line in [*lines, *inline] if line and not line.startswith("#") and "…" not in line]


COMMANDS = sorted({c for path in PAGES for c in commands(path.read_text())})

SHORT = shlex.split(
    "--data.path data/stdlib --data.seq-len 32 --model.layers 1 --model.width 32 --model.heads 2 --model.context 64 "
    "--train.steps 2 --schedule.warmup-steps 1 --train.global-batch 4 --train.micro-batch 4 --train.precision fp32 "
    "--train.compile none --eval.sequences 4 --eval.final-sequences 4 --checkpoint.every 1 --log.trackers"
)


@pytest.fixture(scope="module")
def work(prepared, tmp_path_factory):
    """The clone as a command sees it, with what the READMEs' commands leave behind for each other, at other paths than the clone's."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "launch", "tools", "tests"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(prepared, folder / "data" / "stdlib")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    (folder / "my-config.json").write_text(json.dumps({"model_type": "phi3", "num_key_value_heads": 1, **sizes}))
    return folder


@pytest.fixture(autouse=True)
def here(work, monkeypatch):
    monkeypatch.chdir(work)
    forget_accelerate()
    yield
    forget_accelerate()


def with_options(args: list[str], options: list[str]) -> list[str]:
    """Arguments with these options in place of their own of the same name."""
    kept, keep = [], True
    for arg in args:
        keep = arg not in options if arg.startswith("--") else keep
        kept += [arg] if keep else []
    return [*kept, *options]


def tasks() -> Path:
    """Tasks for which nothing is fetched."""
    folder = Path.cwd() / "my-tasks"
    return folder if folder.exists() else write_tasks(folder)


def pretrain(args: list[str]) -> None:
    """A training, made short and in this process; its own options first, which must be right by themselves."""
    parse_args(args)
    if any(arg.startswith("/shared/") for arg in args):  # a file system that is not here
        return
    if "--optim.match" in args:
        args = ["spectrum" if a.startswith("runs/before") else a for a in args]
        before = ["--config", "gpt2-small", *SHORT, "--run-dir", "runs/before"]
        train(before)
        args = [*args]
        args[args.index("spectrum")] = "runs/before/checkpoints/step-00000002"
        forget_accelerate()
    run = Path("runs") / str(abs(hash(tuple(args))))
    mine = ["--eval.tasks", "local_mc", "--eval.tasks-path", str(tasks())] if "--eval.tasks" in args else []
    profiled = ["--log.profile-steps", "1", "2"] if "--log.profile-steps" in args else []
    train(with_options(args, [*SHORT, *mine, *profiled, "--run-dir", str(run)]))
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
                *config.source,
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


def data_index(command: str) -> None:
    """Of a file that is written here."""
    folder = Path("my-tokens")
    if not folder.exists():
        folder.mkdir()
        (folder / "a.ds").write_bytes((b"a\0" * 63 + b"\0\1") * 400)
        (folder / "a.ds.index").write_bytes(b"".join(struct.pack("<Q", 64 * i) for i in range(1, 401)))
    filled = command.replace("SRC", str(folder)).replace("DIR", "data/indexed").replace("hf:gpt2", "bytes")
    main(shlex.split(filled)[1:])
    assert Path("data/indexed/index.json").is_file()


def parts_and_merge(command: str) -> None:
    """Two parts of the tests' own files, merged as shown."""
    for i in (1, 2):
        out = f"data/parts/{i}"
        options = f"--tokenizer bytes --shard-tokens 100 --val-fraction 0 --workers 1 --part {i}/2 --out {out}"
        main(["data", "prepare", "--source", "tests/conftest.py", "--source", "tests/helpers.py", *options.split()])
    main(["data", "merge", "data/parts/1", "data/parts/2", *shlex.split(command.replace("data/parts/*", ""))[3:]])


def prepare_array(command: str) -> None:
    """The script is one, and its options those of `data prepare`. tests/multinode runs it."""
    words = shlex.split(command.replace("SRC", "tests/conftest.py"))
    subprocess.run(["bash", "-n", words[1]], check=True)
    assert words[2].isdigit()
    tyro.cli(PrepareConfig, args=words[3:])


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


def doctor(command: str, monkeypatch) -> None:
    """`anon-dist doctor`: its options are read, and the training's. tests/multinode has it look at hosts."""
    read: list[object] = []
    monkeypatch.setitem(
        sys.modules, "anon_dist.doctor.cli", types.SimpleNamespace(run=lambda *given: read.append(given))
    )
    main(["doctor", *shlex.split(command.partition("doctor")[2])])
    ((_, rest),) = read
    parse_args(rest) if rest else None


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
    """Spectra by which γ changes nothing, in the quickstart's bases."""

    frames = ("transformer.wte.weight",)

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
    name = "adamw" if "--optimizer anon" in command else "anon"
    source = Path(f"runs/checkpoint-{name}/checkpoints/step-00000002")
    if not source.exists():
        settings = ["--optim.name", name, "--optim.basis", "None", "--run-dir", f"runs/checkpoint-{name}"]
        train(["--config", "quickstart", *SHORT, *settings])
    target = "converted-" + "".join(c for c in command if c.isalnum())
    if "verify" in command:
        target = "converted"
        if not Path(target).exists():
            main(["ckpt", "convert", str(source), target, "--to", "dcp"])
    with contextlib.suppress(SystemExit) if "verify" in command else contextlib.nullcontext():
        filled = command.replace("SRC", str(source)).replace("FOLDER", str(source)).replace("DST", target)
        main(shlex.split(filled)[1:])
    if "convert" in command:
        assert Path(target).exists()


def of_a_run(command: str) -> None:
    if not Path("runs/quickstart/model").exists():
        train(["--config", "quickstart", *SHORT, "--run-dir", "runs/quickstart"])
    if "runs/mine" in command and not Path("runs/mine").exists():
        shutil.copytree("runs/quickstart", "runs/mine")
    main(shlex.split(command)[1:])


def evaluation(command: str) -> None:
    """lm-eval's own tasks, which it would fetch, stand for those of a folder."""
    folder, words = (
        tasks(),
        command.replace("README.md", "my-texts")
        .replace("my-texts", str(ROOT / "README.md"))
        .replace("--tasks mine", "--tasks local_mc"),
    )
    words = re.sub(r"--tasks (hellaswag|arc_easy| )+", f"--tasks local_mc --include-path {folder} ", words)
    of_a_run(words)


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
        main(shlex.split(command.replace("launch/pretrain.py", "anon-dist train"))[1:])
    assert ended.value.code == 0


def files(command: str) -> None:
    for word in shlex.split(command)[1:]:
        assert word.startswith("-") or word.isdigit() or (ROOT / word).exists(), word


RULES = {
    r"(anon-dist [a-z ]+|launch/pretrain\.py) --help": help_of,
    r"anon-dist (data (prepare( --part I/N)?|merge|inspect|verify|index)|train|sweep)|python launch/pretrain\.py": (
        lambda command: None
    ),  # as a name
    r"source \.venv/bin/activate": lambda command: None,  # as launch/setup.sh makes it
    r"bash launch/quickstart\.sh": quickstart,
    r"bash (tests/run|launch/setup|tools/first_minutes)\.sh( deepspeed)?( dev)?": script,
    r"(DOCTOR=1 )?(NODE_RANK=\d )?(bash launch/multinode/accelerate\.sh|sbatch launch/multinode/slurm\.sbatch) .*": script,
    r"export [A-Z_= \w.]+": lambda command: None,
    r"anon-dist data index .*": data_index,
    r"anon-dist data prepare .*": prepare,
    r"anon-dist data merge .*": parts_and_merge,
    r"anon-dist data (inspect|verify) .*": lambda c: main(shlex.split(c.replace("DIR", "data/stdlib"))[1:]),
    r"bash launch/prepare\.sbatch .*": prepare_array,
    # an environment that is not made here; tests/tools/test_common_crawl.py runs the script in one, if there is one
    r"python -m venv \.venv-crawl && .*": lambda command: None,
    r"\.venv-crawl/bin/python tools/.*": lambda c, monkeypatch: tool(c.removeprefix(".venv-crawl/bin/"), monkeypatch),
    r"accelerate launch (--cpu|--config_file FILE)|launch/pretrain\.py --config NAME_OR_FILE": lambda command: None,
    r"(accelerate launch|torchrun) .* launch/pretrain\.py .*": launched,
    r"python launch/pretrain\.py .*": lambda c: pretrain(shlex.split(c.replace("DIR", "data/stdlib"))[2:]),
    r"anon-dist train .*": lambda c: pretrain(shlex.split(c)[2:]),
    r"(OMP_NUM_THREADS=\d )?anon-dist bench.*": bench,
    r"anon-dist (runs|generate|export) .*": of_a_run,
    r"anon-dist eval .*": evaluation,
    r"anon-dist init .*": lambda c: main(shlex.split(c.replace("data/mine", "data/stdlib"))[1:]),
    r"(srun |torchrun .* -m anon_dist\.cli )?(anon-dist )?doctor( .*)?": doctor,
    r"anon-dist completion \w+": lambda c: main(shlex.split(c)[1:]),
    r"anon-dist sweep report .*": sweep_report,
    r"anon-dist sweep .*": sweep,
    r"anon-dist (ckpt (inspect|convert|verify)|init|runs|generate|eval|export)": lambda command: (
        None
    ),  # as a name; with arguments below
    r"anon-dist ckpt .*": checkpoint,
    r"python tools/.*": tool,
    # its options are those of a script beside it
    r"bash tools/gpu_check\.sh.*": lambda c, monkeypatch: tool(
        c.replace("bash tools/gpu_check.sh", "python tools/gpu_check/check.py"), monkeypatch
    ),
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


def test_every_python_block_is_run():
    shown = {(str(page.relative_to(ROOT)), block) for page in PAGES for block in blocks(page)}
    named = {(page, block) for page, words in SNIPPETS.values() for block in blocks(ROOT / page) if words in block}
    assert shown == named, "tests/snippets.py has no name for a block, or names one that is gone"
    assert len(shown) == len(SNIPPETS)
    for _, block in shown:
        compile(block, "a block", "exec")


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = [title.strip().lower().replace("\\", "") for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`(?!\])", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} is not there"
        assert target.is_relative_to(ROOT), f"{link} leads out of the clone"
        assert not anchor or anchor in headings(target), f"{link}: {target.name} has no such heading"


def test_as_many_lines_of_a_deepspeed_script_change_as_the_first_page_says():
    before, after = (
        (ROOT / f"tools/first_minutes/deepspeed_{n}.py").read_text().splitlines() for n in ("adamw", "anon")
    )
    changed = [line for line in difflib.ndiff(before, after) if line.startswith("+ ") and line[2:].strip()]
    assert f"{len(changed)} lines change" in (ROOT / "README.md").read_text()


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES
