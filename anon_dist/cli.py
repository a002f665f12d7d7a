"""The console command `anon-dist`: thin, over the packages that do the work.

Each command's module is imported when it is called, and of its package what takes time only when its options are read: `--help` is there
at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import NoReturn

from anon_dist import __version__
from anon_dist.columns import listing
from anon_dist.exits import INTERRUPTED, code_of
from anon_dist.launcher import end_launcher, leave, on_one_node
from anon_dist.refusal import refuse_alike, say_last


@dataclass(frozen=True)
class Command:
    """A command, by the words that call it."""

    words: tuple[str, ...]
    summary: str
    run: Callable[[list[str]], None]


def data(command: str, args: list[str]) -> None:
    """`anon-dist data …`"""
    from anon_dist.data.cli import run

    run(command, args)


def checkpoints(command: str, args: list[str]) -> None:
    """`anon-dist ckpt …`"""
    from anon_dist.checkpoint.cli import run

    run(command, args)


def bench(args: list[str]) -> None:
    """`anon-dist bench …`"""
    from anon_dist.bench.cli import main as run

    run(args)


def train(args: list[str] | None = None, prog: str = "anon-dist train") -> None:
    """`anon-dist train`, and launch/pretrain.py: see `anon_dist.train.config.parsing` for the options."""
    given = list(sys.argv[1:] if args is None else args)
    said = "Interrupted; the same command goes on from the newest checkpoint, or begins if there is none."
    with _interruptible(said):
        if not {"-h", "--help"}.isdisjoint(given) or not given or on_one_node():
            # What it offers, or what is wrong, before torch is there. Of several nodes, those that know better are told first.
            check_training(given, prog)
        _train(given, prog)


def check_training(args: list[str], prog: str, data: bool = True) -> None:
    """End with what is wrong with a training's options; the launch scripts ask before they start any rank.

    Args:
        data: whether its data are to be there already.

    Raises:
        SystemExit: something is (code 2, after a line), or help was asked for.
    """
    from anon_dist.data.errors import DataError
    from anon_dist.train.config.parsing import ConfigError, parse_args

    try:
        config = parse_args(args, prog)
        from anon_dist.train.config.at_once import check_at_once  # numpy, which help does not wait for

        check_at_once(config, data)
    except (ConfigError, DataError) as error:
        refuse_alike(f"error: {error}", code_of(error))


def _train(args: list[str], prog: str) -> None:
    from anon_dist.checkpoint import CheckpointError
    from anon_dist.data import DataError
    from anon_dist.engines.errors import EngineError
    from anon_dist.engines.peers import who_stopped
    from anon_dist.train.config.errors import Interrupted, RunError
    from anon_dist.train.config.parsing import ConfigError, parse_args
    from anon_dist.train.loop import train as run

    refusals = (ConfigError, EngineError, CheckpointError, DataError, RunError)
    try:
        with who_stopped(*refusals) as ending:
            run(parse_args(args, prog))
        return
    except Interrupted:
        sys.exit(INTERRUPTED)
    except refusals as error:
        rank = "0" if ending.alike else os.environ.get("RANK", "0")
        text = f"error{f' (rank {rank})' if rank != '0' else ''}: {error}"
        code = code_of(error)
    finally:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
    if ending.speaks:
        say_last(text, ending.alike or "RANK" not in os.environ)
    sys.exit(code)


def sweep(args: list[str]) -> None:
    """`anon-dist sweep`"""
    from anon_dist.arguments import parse_known
    from anon_dist.sweep.options import Sweep

    parsed, rest = parse_known(Sweep, args, "anon-dist sweep")
    from anon_dist.data.errors import DataError
    from anon_dist.train.config.parsing import ConfigError, parse_args
    from anon_dist.usage import ending

    others = [f"--{f.name.replace('_', '-')}" for f in fields(Sweep)]
    with ending(ConfigError, DataError):
        base = parse_args(["--config", parsed.config, *rest], "anon-dist sweep", others=others)
        from anon_dist.sweep.asked import ask

        asked = ask(parsed, base)
        from anon_dist.sweep import cli

        cli.sweep(parsed, asked, args)


def sweep_report(args: list[str]) -> None:
    """`anon-dist sweep report`"""
    from anon_dist.arguments import parse
    from anon_dist.named import need, need_folder
    from anon_dist.sweep.options import Report
    from anon_dist.usage import ending

    parsed = parse(Report, args, "anon-dist sweep report")
    with ending():
        need_folder(parsed.folder, "the --out of a sweep")
        need(parsed.folder / "sweep.json", "the --out of a sweep")
    from anon_dist.sweep import cli

    cli.report(parsed)


def generate(args: list[str]) -> None:
    """`anon-dist generate`"""
    from anon_dist.trained.cli import generate as run

    run(args)


def evaluate(args: list[str]) -> None:
    """`anon-dist eval`"""
    from anon_dist.trained.cli import evaluate as run

    run(args)


def export(args: list[str]) -> None:
    """`anon-dist export`"""
    from anon_dist.trained.cli import export as run

    run(args)


def init(args: list[str]) -> None:
    """`anon-dist init`"""
    from anon_dist.arguments import parse
    from anon_dist.bench.options import InitOptions

    options = parse(InitOptions, args, "anon-dist init")
    from anon_dist.data.errors import DataError
    from anon_dist.train.config.errors import ConfigError
    from anon_dist.usage import ending

    with ending(ConfigError, DataError, OSError):
        options.check()
        from anon_dist.bench.asked import ask  # numpy

        asked = ask(options)
        from anon_dist.bench.init import init as run

        print(f"{options.out} is written {run(options, asked)}")


def runs(args: list[str]) -> None:
    """`anon-dist runs`"""
    from anon_dist.trained.cli import runs as run

    run(args)


def doctor(args: list[str]) -> None:
    """`anon-dist doctor`"""
    from anon_dist.arguments import parse_known
    from anon_dist.doctor.options import Doctor

    options, rest = parse_known(Doctor, args, "anon-dist doctor", runs_bare=True)
    from anon_dist.doctor.cli import run

    if code := run(options, rest):
        sys.exit(code)


def completion(args: list[str]) -> None:
    """`anon-dist completion`"""
    from anon_dist.completion import run

    run(args)


COMMANDS = (
    Command(("data", "prepare"), "tokenise text into shards for pretraining", partial(data, "prepare")),
    Command(("data", "index"), "use token files of datatrove or Megatron-LM where they lie", partial(data, "index")),
    Command(("data", "merge"), "make one folder of parts that several machines prepared", partial(data, "merge")),
    Command(("data", "inspect"), "show what a prepared folder holds, with samples", partial(data, "inspect")),
    Command(("data", "verify"), "compare a prepared folder's contents with its checksums", partial(data, "verify")),
    Command(("init",), "write a configuration for a model size, a data folder and a machine", init),
    Command(
        ("train",), "pretrain a model, in this process (for several: accelerate launch -m anon_dist.cli train …)", train
    ),
    Command(("doctor",), "check this machine, or all nodes and what joins them, before a training", doctor),
    Command(("runs",), "list and compare runs: a table, their loss curves, and a page that is one file", runs),
    Command(("generate",), "have a run's or checkpoint's model continue a text", generate),
    Command(("eval",), "say how good a run's or checkpoint's model is, on lm-eval's tasks and on any text", evaluate),
    Command(("export",), "make a Hugging Face model of a checkpoint, and upload it if you like", export),
    Command(("ckpt", "inspect"), "show what a checkpoint of any optimizer is", partial(checkpoints, "inspect")),
    Command(
        ("ckpt", "convert"),
        "write it for another engine, world size or optimizer, or as weights alone",
        partial(checkpoints, "convert"),
    ),
    Command(("ckpt", "verify"), "compare two of any formats, bit for bit", partial(checkpoints, "verify")),
    Command(("sweep", "report"), "the report of a sweep as it is now", sweep_report),
    Command(
        ("sweep",),
        "train over a grid of γ, learning rates and other settings, with AdamW beside it, and report the best",
        sweep,
    ),
    Command(("bench",), "measure optimizer steps, whole trainings and scaling, or predict them", bench),
    Command(("completion",), "a script by which the shell completes these commands and their options", completion),
)
"""In the order in which they are shown; of two that begin alike the longer comes first."""
HELP = ("-h", "--help", "help")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command that `args` (by default, the command line) names."""
    with _piped():
        _run(list(sys.argv[1:] if args is None else args))


def _run(args: list[str]) -> None:
    for command in COMMANDS:
        if tuple(args[: len(command.words)]) == command.words:
            rest = args[len(command.words) :]
            below = [c.words[-1] for c in COMMANDS if c.words[:-1] == command.words]
            if below and rest and not rest[0].startswith("-"):  # such a command takes options alone
                _unknown(command.words, rest[0], below)
            with _interruptible("Interrupted."):
                return command.run(rest)
    if args[:1] == ["--version"]:
        print(f"anon-dist {__version__}")
        return
    groups = {c.words[0] for c in COMMANDS if len(c.words) > 1}
    group = tuple(args[:1]) if args and args[0] in groups else ()
    rest = args[len(group) :]
    prog = " ".join(("anon-dist", *group))
    if not rest or rest[0] in HELP:
        print(_usage(prog, group))
        return
    known = [c.words[len(group)] for c in COMMANDS if c.words[: len(group)] == group]
    _unknown(group, rest[0], [*known, *(() if group else ("--version",)), "--help"])


def _unknown(words: Sequence[str], word: str, known: Sequence[str]) -> NoReturn:
    """`word` follows these, and is none of those that may."""
    from anon_dist.arguments import unknown  # tyro, which listing the commands does without

    unknown(" ".join(("anon-dist", *words)), word, known)


def _usage(prog: str, group: tuple[str, ...]) -> str:
    """The commands, or those of a group."""
    shown = [(" ".join(c.words[len(group) :]), c.summary) for c in COMMANDS if c.words[: len(group)] == group]
    shown += [] if group else [("--version", "what is installed")]
    return f"usage: {prog} COMMAND [OPTIONS]\n\n{listing(shown)}\n\n{prog} COMMAND --help says more."


@contextlib.contextmanager
def _interruptible(said: str) -> Iterator[None]:
    """A Ctrl-C is a line, once for all ranks of a machine, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"\n{said}", file=sys.stderr)
            end_launcher()
        sys.exit(INTERRUPTED)


@contextlib.contextmanager
def _piped() -> Iterator[None]:
    """Whoever read the output through a pipe (`| head`) may have seen enough of it: exit code 141, without a word."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()  # fails again if that was the pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
    leave()
