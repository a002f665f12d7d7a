"""The commands as one meets them: bare, asked for help, misspelt; and that none of that waits for torch."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from fsspec.registry import _registry

from anon_dist.arguments import whole_number
from anon_dist.checkpoint import CheckpointError, DamagedCheckpoint
from anon_dist.cli import COMMANDS, main
from anon_dist.data.errors import ShardError, TokenizerError, UnpreparedError
from anon_dist.engines.errors import EngineError
from anon_dist.exits import at_work, code_of
from anon_dist.train.config.errors import ConfigError, Interrupted, RunError, RunInUseError
from anon_dist.train.config.parsing import parse_args

ROOT = Path(__file__).parents[1]
GROUPS = [["data"], ["ckpt"], ["bench"]]
BARE = [list(c.words) for c in COMMANDS if c.words not in (("bench",), ("doctor",))]
KINDS = [*(["bench", kind] for kind in ("step", "train", "scaling", "plan")), ["doctor"]]
SCRIPT = """
import contextlib, io, json, sys, time
from anon_dist.cli import main
for words in json.loads(sys.argv[1]):
    before = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(words)
            code = 0
        except SystemExit as ended:
            code = ended.code
    heavy = [m for m in ("torch", "numpy", "transformers", "datasets", "accelerate", "matplotlib", "lm_eval") if m in sys.modules]
    print(json.dumps([words, code, out.getvalue(), err.getvalue(), heavy, time.process_time() - before]))
"""


def test_help_and_bare_calls_offer_what_there_is_at_once():
    """In one new process, which imports nothing heavy. The times are of CPU, three times what is asked of each by itself."""
    calls = [[], ["--version"], *GROUPS, *([*g, "--help"] for g in GROUPS), *BARE]
    calls += [[*words, "--help"] for words in [*BARE, *KINDS]] + [["train", "--config", "quickstart", "--help"]]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(calls)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"COLUMNS": "80"},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == calls
    for words, code, out, err, heavy, seconds in lines:
        assert heavy == [], words
        assert seconds < 1.5, words
        if words == ["--version"]:
            assert out.startswith("anon-dist 0.")
            continue
        assert code == (2 if words in BARE else 0), (words, err)
        prog = " ".join(["anon-dist", *(w for w in words if not w.startswith("-") and w != "quickstart")])
        shown = err if words in BARE else out
        assert " ".join(shown.split()).startswith(f"usage: {prog} "), words
        assert max(map(len, shown.splitlines())) <= 80, words
        assert not (words in BARE and out)


MISTAKES = [
    ("train --config quickstart --train.stepz 3", "--train.stepz is no option; did you mean --train.steps? "),
    ("train --config quikstart", "; did you mean quickstart?"),
    ("train quickstart", "quickstart belongs to no option; did you mean --config quickstart?"),
    (
        "train --config quickstart --data.path nowhere",
        "data.path = nowhere is not there, or not finished. This makes it",
    ),
    ("train --config quickstart --resume empty", "resume = empty holds no weights (*.safetensors, "),
    (
        "train --config quickstart --resume runs",
        "resume = runs is a folder of runs; name one of them, such as runs/new",
    ),
    (
        "train --config quickstart --resume runs/saved",
        "resume = runs/saved is a folder of checkpoints; name one of them, such as runs/saved/checkpoints/step-00000004",
    ),
    (
        "train --config quickstart --train.global-batch 6",
        "train.global_batch = 6 is not a multiple of train.micro_batch · ranks = 4 · 1; change one of them",
    ),
    (
        "train --config quickstart --model.config torn/config.json",
        "model.config = torn/config.json: Expecting property name",
    ),
    (
        "train --config quickstart --model.config short.json",
        "data.seq_len = 256 is longer than the context of model.config = short.json, n_positions = 64; lower it, or raise n_positions",
    ),
    (
        "train --config quickstart --model.from-pretrained short",
        "the context of model.from_pretrained = short, n_positions = 64; lower it, or take a model with a longer context",
    ),
    ("train --config quickstart --run-dir notes.txt/x", "run_dir = notes.txt/x: notes.txt is a file; name a folder"),
    ("data prepare --source nowhere --out y", "--source nowhere: no such file or folder"),
    (
        "data prepare --source notes.txt --tokenizer spm-bpe:x --out y",
        "SIZE must be a whole number, as in spm-bpe:4096",
    ),
    ("data prepare --source notes.txt --out notes.txt", "--out notes.txt is a file; name a folder"),
    ("data inspect empty", "not a data folder: empty/index.json does not exist"),
    ("data merge empty --out y", "empty is no finished part: empty/part.json does not exist"),
    ("data index empty --out y", "empty: no .ds files of datatrove there, and no .bin and .idx files of Megatron-LM"),
    ("generate nowhere x", "nowhere does not exist; name a run, a checkpoint or an exported model"),
    ("generate empty x", "empty holds no weights (*.safetensors, "),
    ("generate notes.txt x", "notes.txt is no file of weights (*.safetensors, "),
    ("generate empty x --top-p 2", "--top-p must be a number > 0 and ≤ 1, not 2.0"),
    ("generate empty x --device gpu", "--device gpu: it must be cpu, cuda, or one of several as in cuda:1"),
    ("generate empty x --model-config nowhere", "--model-config nowhere does not exist; name a config.json"),
    ("eval nowhere --text notes.txt", "nowhere does not exist; name a run, a checkpoint or an exported model"),
    ("eval empty", "nothing to evaluate on: name --tasks of lm-eval, or a --text"),
    ("eval empty --text nowhere", "--text nowhere does not exist; name a file or folder of text"),
    ("export nowhere out", "nowhere does not exist; name a run, a checkpoint or an exported model"),
    ("export w.pt empty", "empty exists; choose another target, or replace it with --overwrite"),
    (
        "init 124M --data nowhere --out x.yaml",
        "--data nowhere does not exist; name a folder that `anon-dist data prepare`",
    ),
    (
        "init 124M --data notes.txt --out x.yaml",
        "--data notes.txt is a file; name a folder that `anon-dist data prepare`",
    ),
    ("data inspect notes.txt", "(`anon-dist data prepare --source notes.txt --tokenizer … --out DIR` makes one of it)"),
    ("data verify nowhere", "nowhere does not exist; name a folder that `anon-dist data prepare` made"),
    ("data inspect data/index.json", "data/index.json is a file; name the prepared folder, data"),
    ("data inspect data --plot nowhere/x.png", "--plot nowhere/x.png: there is no folder nowhere; make it, or name"),
    ("data inspect data --plot empty", "--plot empty is a folder; name a file in it, such as empty/picture.png"),
    ("data inspect data --plot x.foo", "--plot x.foo must end with one of .png, .pdf, "),
    ("data inspect data --plot x", "--plot x must end with one of .png, .pdf, "),
    ("data inspect data --samples -1", "--samples must be at least 0, not -1"),
    ("data inspect --folder data --json", "leave the word out: anon-dist data inspect data --json"),
    ("data index --source=x/*.ds --out y", "leave the word out: anon-dist data index 'x/*.ds' --out y"),
    (
        "train --config quickstart --data.path notes.txt",
        "data.path = notes.txt is a file; name a folder that `anon-dist ",
    ),
    ("generate model x", "model/config.json is empty; put the model's own in its place, or name the run"),
    ("ckpt inspect torn", "torn/config.json is damaged (Expecting property name"),
    ("init 124M --data empty --out notes.txt", "--out notes.txt exists; name another file, or remove it"),
    ("ckpt inspect nowhere", "nowhere does not exist; name a run, or a checkpoint's file or folder"),
    ("ckpt inspect runs/new", "runs/new is a run without a checkpoint so far (checkpoint.every says when it writes"),
    ("ckpt convert runs/old out --to hf", "name the model that it exported, runs/old/model"),
    ("ckpt inspect runs", "runs is a folder of runs; name one of them, such as runs/new"),
    ("generate runs x", "runs is a folder of runs; name one of them, such as runs/new"),
    ("export runs/new out", "runs/new is a run without a checkpoint so far"),
    ("ckpt inspect notes.txt", "notes.txt is no file of weights"),
    ("ckpt verify w.pt nowhere", "nowhere does not exist; name a run, or a checkpoint's file or folder"),
    ("ckpt convert w.pt empty --to hf", "empty exists; choose another target, or replace it with --overwrite"),
    ("ckpt convert w.pt out --to zero4", "--to must be one of canonical, consolidated, dcp, hf, zero0, "),
    ("ckpt convert w.pt out --to dcp --groups nowhere", "--groups nowhere is neither 'decay' nor a file"),
    ("runs nowhere", "nowhere does not exist; name one with runs in it, or below it"),
    ("runs empty", "there is no run in or below empty: no folder with config.yaml and metrics.jsonl"),
    ("runs runs --out notes.txt", "--out notes.txt is a file; name a folder"),
    ("bench plan --json nowhere/x.json", "--json nowhere/x.json: there is no folder nowhere; make it, or name another"),
    ("bench step --json empty", "--json empty is a folder; name a file in it, such as empty/bench.json"),
    ("sweep report empty", "empty/sweep.json does not exist; name the --out of a sweep"),
    ("sweep --config quikstart --grid optim.gamma=1 --out out", "; did you mean quickstart?"),
    (
        "sweep --config quickstart --grid optim.gama=1 --out out",
        "--grid optim.gama=1: unknown field 'optim.gama'; did you mean 'optim.gamma'?",
    ),
    ("sweep --config quickstart --grid optim.lr=1e-3 --seeds 0 --out out", "--seeds 0: expected a number of seeds"),
    (
        "sweep --config quickstart --grid optim.gamma=1 --out out",
        "data.path = data/stdlib is not there, or not finished",
    ),
]


def test_mistakes_are_told_before_anything_heavy_is_imported(tmp_path):
    """In a line, with exit code 2. The time is of CPU, twice what is asked of each by itself: the first pays for the imports."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for name, text in (("data/index", "{}"), ("model/config", ""), ("torn/config", "{")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "w.pt").write_bytes(b"\x80")
    (tmp_path / "short").mkdir()
    for file in ("short.json", "short/config.json"):
        (tmp_path / file).write_text('{"model_type": "gpt2", "n_positions": 64}')
    for name in ("new", "old"):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
        for file in ("config.yaml", "run.lock"):
            (tmp_path / "runs" / name / file).write_text("x")
    saved = tmp_path / "runs" / "saved" / "checkpoints" / "step-00000004"
    saved.mkdir(parents=True)
    for file in ("trainer.json", "../../config.yaml"):
        (saved / file).write_text("{}")
    (tmp_path / "runs" / "old" / "model").mkdir()
    (tmp_path / "runs" / "old" / "model" / "config.json").write_text('{"a": 1}')
    calls = [words.split() for words, _ in MISTAKES]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(calls)], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == calls
    for (_, message), (words, code, out, err, heavy, seconds) in zip(MISTAKES, lines, strict=True):
        assert (code, out, err.count("\n")) == (2, "", 1), words
        assert err.startswith("error: "), words
        assert message in err, words
        assert set(heavy) <= {"numpy"}, words
        assert seconds < 1.2, words
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "data",
        "empty",
        "model",
        "notes.txt",
        "runs",
        "short",
        "short.json",
        "torn",
        "w.pt",
    ]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError, 2),
        (EngineError, 2),
        (CheckpointError, 2),
        (TokenizerError, 2),
        (UnpreparedError, 2),
        (NotADirectoryError, 2),
        (ShardError, 1),
        (DamagedCheckpoint, 1),
        (RunError, 1),
        (OSError, 1),
        (RunInUseError, 75),
    ],
)
def test_an_error_says_the_exit_code_of_the_command_and_none_at_work_is_a_refusal(error, code):
    """Where a scheduler gives up at a 2 and not at a 1."""
    assert code_of(error()) == code
    with pytest.raises(error) as raised, at_work():
        raise error
    assert code_of(raised.value) == (1 if code == 2 else code)


def test_a_refusal_that_takes_torch_to_find_ends_with_2_and_one_at_work_with_1(tmp_path, prepared, monkeypatch, capsys):
    given = ["train", "--config", "quickstart", "--data.path", str(prepared), "--run-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        main([*given, "--train.tensor-parallel", "2"])
    assert ended.value.code == 2
    assert "train.tensor_parallel is 2: it needs engine fsdp2, here single" in capsys.readouterr().err

    def fail(*rest):
        raise CheckpointError("no room")

    torch.save({"a": torch.ones(2)}, tmp_path / "w.pt")
    monkeypatch.setattr("anon_dist.checkpoint.convert.write_files", fail)
    for words, code in (("--to hf", 1), ("--to hf --optimizer anon", 2)):
        with pytest.raises(SystemExit) as ended:
            main(["ckpt", "convert", str(tmp_path / "w.pt"), str(tmp_path / "out"), *words.split()])
        assert ended.value.code == code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("foo://b/r", "is no address that fsspec takes: "),
        ("gs://b/r", "needs gcsfs: pip install gcsfs"),
        ("file://b/r", "is relative to the folder that a command is given in: write file:///"),
    ],
)
@pytest.mark.parametrize("option", ["--checkpoint.remote", "--data.path", "--eval.sets"])
def test_an_address_that_nobody_can_open_here_is_a_mistake_in_the_configuration(
    option, address, said, prepared, monkeypatch, capsys
):
    """Told before torch is imported; and of a command that reads what is there."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(_registry, "gs", raising=False)
    monkeypatch.setattr("anon_dist.cli._train", lambda *_: pytest.fail("it was begun"))
    given = {"--data.path": [str(prepared)], option: [address]}
    if option == "--eval.sets":
        given[option] = ["held", address]
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", "quickstart", *(word for flag, values in given.items() for word in (flag, *values))])
    assert ended.value.code == 2
    name = option.removeprefix("--") + ".held" * (option == "--eval.sets")
    assert capsys.readouterr().err.startswith(f"error: {name}: {address} {said}")
    with pytest.raises(SystemExit) as ended:
        main(["data", "verify", address])
    assert ended.value.code == 2


def interrupt(*args):
    raise KeyboardInterrupt


def test_a_ctrl_c_before_the_first_step_is_a_line(monkeypatch, capsys, prepared):
    monkeypatch.setattr("anon_dist.completion.run", interrupt)
    monkeypatch.setattr("anon_dist.cli._train", interrupt)
    for words, said in (
        [["completion", "bash"], "Interrupted."],
        [["train", "--config", "quickstart", "--data.path", str(prepared)], "Interrupted; "],
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 130
        assert capsys.readouterr().err.startswith(f"\n{said}")


def test_a_ctrl_c_that_stopped_a_training_is_an_exit_code_alone(monkeypatch, capsys, prepared):
    """The training has said what is saved."""

    def stopped(config):
        raise Interrupted

    monkeypatch.setattr("anon_dist.train.loop.train", stopped)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", "quickstart", "--data.path", str(prepared)])
    assert ended.value.code == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("words", [["completion", "bash"], ["--help"], ["ckpt"], ["ckpt", "convert", "--help"]])
def test_a_reader_that_has_seen_enough_is_no_error(words):
    """As of `anon-dist … | head`."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "anon_dist.cli", *words]
    ended = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, timeout=60)
    os.close(writes)
    assert (ended.returncode, ended.stderr) == (141, b"")


RANK = """
import os
from anon_dist import cli
def interrupt(*args):
    raise KeyboardInterrupt
cli.check_training = interrupt
cli.train(["--config", "quickstart"])
"""
LAUNCHED = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize("terminal", [True, False])
def test_a_ctrl_c_at_a_terminal_leaves_the_last_word_to_the_run(terminal):
    """The launcher, which was interrupted too, is ended before it prints; without a terminal it goes on to its own exit code."""
    launcher = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {RANK!r}]); print('traceback', file=sys.stderr)"
    )
    screen, theirs = os.openpty()
    ended = subprocess.run(
        [sys.executable, "-c", launcher],
        stderr=theirs if terminal else subprocess.PIPE,
        env=os.environ | LAUNCHED,
        timeout=60,
    )
    shown = (os.read(screen, 1 << 16) if terminal else ended.stderr).decode().split("\n")
    os.close(theirs)
    os.close(screen)
    shown = [line.strip() for line in shown if line.strip()]
    assert shown[0].startswith("Interrupted; the same command goes on from the newest checkpoint")
    assert ended.returncode == (-signal.SIGKILL if terminal else 0)
    assert [line.split(" ")[0] for line in shown] == ["Interrupted;", "The" if terminal else "traceback"]


LAUNCHER = """
import os, signal, subprocess, sys
rank = "from anon_dist import cli; cli.train(['--config', 'quikstart'])"
ranks = [
    subprocess.Popen([sys.executable, "-c", rank], env=os.environ | {"RANK": r, "LOCAL_RANK": r}, start_new_session=True)
    for r in os.environ["RANKS"].split()
]
pid, status = os.wait()
for other in ranks:
    if other.pid != pid:
        other.terminate()
        other.wait()
print("code", os.waitstatus_to_exitcode(status), file=sys.stderr)
print("traceback", file=sys.stderr)
"""


@pytest.mark.parametrize("ranks", ["0", "1 0"])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_mistake_under_a_launcher_is_the_last_line(terminal, ranks, tmp_path):
    """Which ends the other ranks when the first has ended, and then prints what it likes. One rank speaks; without a terminal the line
    comes again below."""
    (tmp_path / "accelerate").write_text(LAUNCHER)
    count = str(len(ranks.split()))
    environment = os.environ | LAUNCHED | {"RANKS": ranks, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    command = [sys.executable, str(tmp_path / "accelerate")]
    screen, theirs = os.openpty()
    ended = subprocess.run(command, stderr=theirs if terminal else subprocess.PIPE, env=environment, timeout=60)
    shown = (os.read(screen, 1 << 16) if terminal else ended.stderr).decode().split("\n")
    os.close(theirs)
    os.close(screen)
    said, *rest = [line.strip() for line in shown if line.strip()]
    assert said.startswith("error: --config quikstart: no such file")
    assert said.endswith("; did you mean quickstart?")
    if terminal:
        assert rest == ["The launcher is ended with it, code 137: it would print a traceback of its own."]
    else:
        assert rest == ["code 2", "traceback", said]


def test_the_launch_scripts_tell_a_mistake_before_they_start_a_rank(tmp_path):
    """Or prepare a corpus. In place of what they call stand programs that say that they were called."""
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    started = dict.fromkeys(("torchrun", "accelerate", "deepspeed", "anon-dist"), "echo started")
    for name, line in {**started, "python": f'exec {sys.executable} "$@"'}.items():
        (binaries / name).write_text(f"#!/bin/sh\n{line}\n")
        (binaries / name).chmod(0o755)
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "launch" / "setup.sh").write_text("")
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    given = {"NODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "HOSTFILE": str(tmp_path / "hosts")}
    environment = os.environ | given | {"PYTHONPATH": str(ROOT), "VENV": str(tmp_path / ".venv")}
    for name in ("multinode/torchrun", "multinode/accelerate", "multinode/deepspeed", "quickstart"):
        script = ["bash", f"{tmp_path}/launch/{name}.sh", *(() if name == "quickstart" else ("--config", "quickstart"))]
        run = partial(subprocess.run, capture_output=True, text=True, env=environment, timeout=60)
        done = run([*script, "--optim.lr", "-1"])
        assert (done.returncode, done.stdout) == (2, ""), (name, done.stderr)
        assert done.stderr.startswith("error: --optim.lr must be "), name
        assert done.stderr.count("\n") == 1, name
        done = run([*script, "--help"])
        assert (done.returncode, done.stderr, "started" in done.stdout) == (0, "", False), name
        assert done.stdout.startswith("usage: launch/"), name


def test_every_command_is_listed_with_its_group(capsys):
    main([])
    shown = capsys.readouterr().out
    assert all(f"  {' '.join(c.words)} " in shown for c in COMMANDS)
    main(["ckpt"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if re.match(r"  \S", line)]
    assert listed == ["inspect", "convert", "verify"]


def test_an_option_that_is_like_none_is_answered_without_a_guess(capsys):
    """Neither with one that a help mentions in passing, nor with a field that merely stands beside."""
    for words in (
        ["train", "--config", "quickstart", "--gpu", "1"],
        ["init", "1M", "--data", "x", "--out", "y", "--gpu"],
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert capsys.readouterr().err == "error: --gpu is no option (--help lists all)\n"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["trian"], "anon-dist train"),
        (["sweeep", "report"], "anon-dist sweep"),
        (["ckpt", "inspct"], "anon-dist ckpt inspect"),
        (["data", "prepar"], "anon-dist data prepare"),
        (["bench", "plans"], "anon-dist bench plan"),
        (["sweep", "repotr", "runs/gamma"], "anon-dist sweep report"),
        (["--verison"], "anon-dist --version"),
        (["data", "--hlep"], "anon-dist data --help"),
    ],
)
def test_a_misspelt_command_is_answered_in_a_line_with_the_one_that_was_meant(words, meant, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert f"; did you mean '{meant}'?" in err


def test_what_is_like_no_command_is_answered_without_a_guess(capsys):
    with pytest.raises(SystemExit):
        main(["xyzzy"])
    assert capsys.readouterr().err == "anon-dist: unknown command 'xyzzy' (anon-dist --help lists them)\n"


def test_help_of_the_training_lists_the_presets(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "usage: anon-dist train " in text
    assert "--config FILE" in text
    assert "(gpt2-medium, gpt2-small, llama-1b, quickstart, qwen3-1b)" in text


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1000", 1000),
        ("1_000", 1000),
        ("1e3", 1000),
        ("10k", 10_000),
        ("1.5M", 1_500_000),
        ("2B", 2 * 10**9),
        ("1e18", 10**18),
        ("9007199254740993", 2**53 + 1),
        ("-3", -3),
        ("0", 0),
    ],
)
def test_whole_numbers_as_people_write_them(text, number):
    assert whole_number(text) == number


@pytest.mark.parametrize(
    "text", ["", "k", "1.5", "1.2345k", "1e-3", "nan", "inf", "1e", "ten", "1 k", "1kk", "1e999999999", "0x10"]
)
def test_what_is_no_whole_number(text):
    with pytest.raises(ValueError, match="is no whole number"):
        whole_number(text)


def test_whole_numbers_on_the_command_line(capsys):
    given = ["--train.steps", "1e3", "--optim.window", "1e2", "--data.seed", "2k", "--optim.match", "a.json"]
    config = parse_args([*given, "--optim.gamma-schedule", "0", "0.5", "1k", "1"])
    assert (config.train.steps, config.optim.window, config.data.seed) == (1000, 100, 2000)
    assert config.optim.gamma_schedule == {0: 0.5, 1000: 1.0}
    assert parse_args(["--optim.window", "auto"]).optim.window == "auto"
    with pytest.raises((SystemExit, ConfigError)):
        parse_args(["--train.steps", "1.5"])


def test_the_shell_completes(tmp_path):
    """By the script that the command prints, asked as bash asks."""
    script = tmp_path / "completion.bash"
    script.write_text(
        subprocess.run(
            [sys.executable, "-m", "anon_dist.cli", "completion", "bash"], capture_output=True, text=True, check=True
        ).stdout
    )
    asked = {
        "anon-dist tr": "train",
        "anon-dist ckpt ": "convert inspect verify",
        "anon-dist train --train.engine z": "zero1",
        "anon-dist train --optim.gamma-sch": "--optim.gamma-schedule",
        "anon-dist data prepare --tokenizer-": "--tokenizer-sample-mb",
    }
    lines = [f"source {script}", "complete -p anon-dist"]
    for line in asked:
        words = " ".join(f"'{word}'" for word in line.split(" "))
        lines += [f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); COMPREPLY=()", "_tyro_anon_dist"]
        lines += ['echo "${COMPREPLY[*]}"']
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True, timeout=60)
    registered, *lines = done.stdout.splitlines()
    assert "-o default" in registered  # elsewhere names of files, as of a run
    found = [" ".join(w for w in line.split() if w not in ("-h", "--help")) for line in lines]
    assert found == list(asked.values())
