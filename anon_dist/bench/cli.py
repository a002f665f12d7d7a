"""`anon-dist bench`: which benchmark, and its options."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from anon_dist.arguments import parse, unknown
from anon_dist.bench.options import PlanOptions, ScalingOptions, StepOptions, TrainOptions
from anon_dist.columns import listing
from anon_dist.named import need_picture, need_place
from anon_dist.usage import ending

KINDS: dict[str, tuple[Any, str]] = {
    "step": (
        StepOptions,
        "optimizer steps, in turns with torch's fused AdamW; peers, bytes of state, a stream through memory",
    ),
    "train": (TrainOptions, "tokens per second and peak memory of whole trainings, beside a Hugging Face Trainer"),
    "scaling": (ScalingOptions, "time and bytes sent on 1, 2, 4 processes of this machine, beside what the plan says"),
    "plan": (
        PlanOptions,
        "memory, bytes sent and milliseconds to expect of a rank, for every engine and optimizer; nothing is run",
    ),
}


def main(argv: list[str]) -> None:
    """Run `anon_dist.bench.step`, `train`, `scaling` or `plan`; what begins with another option is step's. `--plan` is `plan`."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        lines = listing([(kind, summary) for kind, (_, summary) in KINDS.items()])
        print(f"usage: anon-dist bench KIND [OPTIONS]\n\n{lines}\n\nanon-dist bench KIND --help says more.")
        return
    kind = argv[0].removeprefix("--")
    if kind in KINDS:
        argv = argv[1:]
    elif argv[0].startswith("-"):
        kind = "step"
    else:
        unknown("anon-dist bench", argv[0], KINDS)
    options = parse(KINDS[kind][0], argv, f"anon-dist bench {kind}", runs_bare=True)
    with ending():
        if options.json is not None:
            need_place(options.json, "--json", "bench.json")
        if (plot := getattr(options, "plot", None)) is not None:
            need_picture(plot, "--plot")
    import_module(f"anon_dist.bench.{kind}").main(options)
