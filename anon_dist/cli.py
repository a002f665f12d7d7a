"""The console command `anon-dist`: thin, over the packages that do the work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from anon_dist.launcher import leave

COMMANDS = """usage: anon-dist COMMAND [OPTIONS]

  data prepare   tokenise text into shards for pretraining
  ckpt inspect   show what a checkpoint of any optimizer is
  ckpt convert   write it for another engine, world size or optimizer, or as weights alone
  ckpt verify    compare two of any formats, bit for bit
  train          pretrain a model, in this process (for several: accelerate launch -m anon_dist.cli train …)
  sweep          train over a grid of γ, learning rates and other settings, with AdamW beside it, and report the best
  sweep report   the report of a sweep as it is now
  bench          measure optimizer steps against torch's fused AdamW and other optimizers'

anon-dist COMMAND --help says more."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command that `args` (by default, the command line) names."""
    args = list(sys.argv[1:] if args is None else args)
    commands: dict[tuple[str, ...], Callable[[list[str]], None]] = {
        ("data", "prepare"): data_prepare,
        ("ckpt", "inspect"): partial(checkpoints, "inspect"),
        ("ckpt", "convert"): partial(checkpoints, "convert"),
        ("ckpt", "verify"): partial(checkpoints, "verify"),
        ("train",): train,
        ("sweep", "report"): partial(sweep, "report"),
        ("sweep",): partial(sweep, "sweep"),
        ("bench",): bench,
    }
    for words, command in commands.items():
        if tuple(args[: len(words)]) == words:
            return command(args[len(words) :])
    asked_for_help = not args or args[0] in ("-h", "--help", "help")
    print(
        COMMANDS if asked_for_help else f"anon-dist: unknown command '{' '.join(args[:2])}'\n\n{COMMANDS}",
        file=sys.stderr if args else None,
    )
    sys.exit(0 if asked_for_help else 2)


def data_prepare(args: list[str]) -> None:
    """`anon-dist data prepare`"""
    from anon_dist.data import DataError, PrepareConfig, prepare
    from anon_dist.usage import parse

    config = parse(PrepareConfig, args, "anon-dist data prepare")
    _or_exit(lambda: prepare(config), DataError, OSError)


def checkpoints(command: str, args: list[str]) -> None:
    """`anon-dist ckpt …`"""
    from anon_dist.checkpoint.cli import run

    run(command, args)


def bench(args: list[str]) -> None:
    """`anon-dist bench …`"""
    from anon_dist.bench.cli import main as run

    run(args)


def train(args: list[str] | None = None) -> None:
    """`anon-dist train`, and launch/pretrain.py: see `anon_dist.train.config` for the options."""
    from anon_dist.checkpoint import CheckpointError
    from anon_dist.data import DataError
    from anon_dist.engines.errors import EngineError
    from anon_dist.engines.peers import who_stopped
    from anon_dist.train.config import ConfigError, parse_args
    from anon_dist.train.errors import IN_USE, RunError, RunInUseError
    from anon_dist.train.loop import train as run

    refusals = (ConfigError, EngineError, CheckpointError, DataError, RunError)
    try:
        with who_stopped(*refusals) as ending:
            run(parse_args(args))
    except refusals as error:
        rank = "0" if ending.alike else os.environ.get("RANK", "0")
        text = f"error{f' (rank {rank})' if rank != '0' else ''}: {error}" if ending.speaks else ""
        if isinstance(error, RunInUseError):
            print(text, file=sys.stderr, end="\n" * bool(text))
            sys.exit(IN_USE)
        sys.exit(text or 1)
    finally:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def sweep(command: str, args: list[str]) -> None:
    """`anon-dist sweep` and `anon-dist sweep report`"""
    from anon_dist.sweep import cli

    (cli.report if command == "report" else cli.sweep)(args)


def _or_exit(action: Callable[[], object], *expected: type[Exception]) -> None:
    """Run it; an error that the user can mend is one line, without a traceback, and exit code 1."""
    try:
        action()
    except expected as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
    leave()
