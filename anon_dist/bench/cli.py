"""`anon-dist bench`: optimizer steps, or what the first argument names."""

from __future__ import annotations

from importlib import import_module

OTHERS = {"--plan": "plan", "--scaling": "scaling", "--train": "train"}


def main(argv: list[str]) -> None:
    """Run `anon_dist.bench.plan`, `scaling` or `train` if the first argument asks for it, and `step` if not."""
    if argv and argv[0] in OTHERS:
        import_module(f"anon_dist.bench.{OTHERS[argv[0]]}").main(argv[1:])
        return
    from anon_dist.bench import step

    step.main(argv)
