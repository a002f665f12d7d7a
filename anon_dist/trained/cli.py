"""`anon-dist generate`, `anon-dist eval`, `anon-dist export` and `anon-dist runs`."""

from __future__ import annotations

from typing import TypeVar

from anon_dist.arguments import parse
from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.exits import at_work
from anon_dist.trained.options import Eval, Export, Generate, Runs
from anon_dist.usage import ending

_Kind = TypeVar("_Kind", Generate, Eval, Export, Runs)


def generate(args: list[str]) -> None:
    """`anon-dist generate`; one line and an exit code of `anon_dist.exits` if something is wrong."""
    options = _options(Generate, args, "anon-dist generate")
    _quietly()
    from anon_dist.trained.generate import generate as run

    with ending(CheckpointError, OSError):
        run(options)


def evaluate(args: list[str]) -> None:
    """`anon-dist eval`; as above."""
    options = _options(Eval, args, "anon-dist eval")
    _quietly()
    from anon_dist.trained.evaluate import evaluate as run

    with ending(CheckpointError, OSError):
        run(options)


def export(args: list[str]) -> None:
    """`anon-dist export`; as above."""
    options = _options(Export, args, "anon-dist export")
    with ending(CheckpointError, OSError):
        _export(options)


def runs(args: list[str]) -> None:
    """`anon-dist runs`; as above."""
    options = _options(Runs, args, "anon-dist runs")
    from anon_dist.trained.runs import runs as run

    with ending(CheckpointError, OSError):
        run(options)


def _export(options: Export) -> None:
    _quietly()
    from anon_dist.trained.export import export as run
    from anon_dist.trained.hub import hub, push

    api = hub() if options.push else None  # before the work
    for note in run(options):
        print(f"note: {note}")
    print(f"{options.target} is complete")
    if options.push:
        with at_work():
            print(f"uploaded: {push(options.target, options.push, options.private, api)}")


def _options(kind: type[_Kind], args: list[str], prog: str) -> _Kind:
    """Read and checked, before seconds go into imports."""
    options = parse(kind, args, prog)
    with ending():
        options.check()
    return options


def _quietly() -> None:
    """Without transformers' bars and remarks."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
