"""`anon-dist completion SHELL`: a script by which the shell completes commands and options, made by tyro from the options' own classes."""

from __future__ import annotations

import contextlib
import functools
import io
import operator
from dataclasses import dataclass, make_dataclass
from typing import Annotated, Any, Literal

import tyro

from anon_dist.arguments import REGISTRY, parse


@dataclass
class Completion:
    """Print a script by which the shell completes commands and options.

    bash: put `eval "$(anon-dist completion bash)"` into ~/.bashrc; zsh: `anon-dist completion zsh > _anon-dist`, in a folder of $fpath.
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """Whose script."""


def run(args: list[str]) -> None:
    """`anon-dist completion`"""
    shell = parse(Completion, args, "anon-dist completion").shell
    with contextlib.redirect_stdout(io.StringIO()) as script, contextlib.suppress(SystemExit):
        tyro.cli(_one_of(_tree()), args=["--tyro-write-completion", shell, "-"], prog="anon-dist", registry=REGISTRY)
    for line in script.getvalue().splitlines():
        # tyro takes each line of a description for a completion.
        line = line.replace("\\n", " ") if line.startswith("COMPLETION_SPEC = ") else line
        # It knows no names of files where they stand without an option; bash does.
        print(line.replace("complete -F ", "complete -o bashdefault -o default -F "))


def _tree() -> dict[str, Any]:
    """Word → the options of that command, or a group's words."""
    from anon_dist.bench.cli import KINDS
    from anon_dist.bench.options import InitOptions
    from anon_dist.checkpoint.cli import COMMANDS
    from anon_dist.data.cli import COMMANDS as DATA
    from anon_dist.doctor.options import Doctor
    from anon_dist.sweep.options import Sweep
    from anon_dist.train.config.parsing import options_class
    from anon_dist.trained.options import Eval, Export, Generate, Runs

    return {
        "data": DATA,
        "init": InitOptions,
        "train": options_class(),
        "doctor": Doctor,
        "runs": Runs,
        "generate": Generate,
        "eval": Eval,
        "export": Export,
        "ckpt": COMMANDS,
        "sweep": Sweep,
        "bench": {kind: options for kind, (options, _) in KINDS.items()},
        "completion": Completion,
    }


def _one_of(words: dict[str, Any]) -> Any:
    """The type of which a command line is one, word by word."""
    kinds = []
    for word, options in words.items():
        if isinstance(options, dict):
            choice = _one_of(options)
            options = make_dataclass(word, [("command", Annotated[choice, tyro.conf.arg(name="")])])
        kinds.append(Annotated[options, tyro.conf.subcommand(word)])
    return functools.reduce(operator.or_, kinds[1:], kinds[0])
