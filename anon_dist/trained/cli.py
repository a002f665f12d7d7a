"""`anon-dist generate`, `anon-dist eval`, `anon-dist export` and `anon-dist runs`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from anon_dist.arguments import parse
from anon_dist.trained.options import Eval, Export, Generate, Runs


def generate(args: list[str]) -> None:
    """`anon-dist generate`; exit code 1 with one line for an error that the user can mend, 130 if interrupted."""
    options = parse(Generate, args, "anon-dist generate")
    _there(options.source)
    _quietly()
    from anon_dist.trained.generate import generate as run

    _or_exit(lambda: run(options))


def evaluate(args: list[str]) -> None:
    """`anon-dist eval`; as above."""
    options = parse(Eval, args, "anon-dist eval")
    _there(options.source)
    _quietly()
    from anon_dist.trained.evaluate import evaluate as run

    _or_exit(lambda: run(options))


def export(args: list[str]) -> None:
    """`anon-dist export`; as above."""
    options = parse(Export, args, "anon-dist export")
    _there(options.source)
    _or_exit(lambda: _export(options))


def runs(args: list[str]) -> None:
    """`anon-dist runs`; as above."""
    options = parse(Runs, args, "anon-dist runs")
    from anon_dist.trained.runs import runs as run

    _or_exit(lambda: run(options))


def _export(options: Export) -> None:
    _quietly()
    from anon_dist.trained.export import export as run
    from anon_dist.trained.hub import hub, push

    api = hub() if options.push else None  # before the work
    for note in run(options):
        print(f"note: {note}")
    print(f"{options.target} is complete")
    if options.push:
        print(f"uploaded: {push(options.target, options.push, options.private, api)}")


def _there(source: Path) -> None:
    """Before seconds go into imports."""
    if not source.exists():
        sys.exit(f"error: {source} does not exist; name a run, a checkpoint or an exported model")


def _quietly() -> None:
    """Without transformers' bars and remarks."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _or_exit(action: Callable[[], object]) -> None:
    from anon_dist.checkpoint.errors import CheckpointError

    try:
        action()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
