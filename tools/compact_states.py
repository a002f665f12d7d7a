#!/usr/bin/env python
"""What fewer bits of optimizer state cost: the validation loss of the same trainings with each state_dtype, over seeds.

A seed decides initial weights and data order, and is the same for all; so each state_dtype is compared with float32 in the mean (is it
within one standard error of float32's mean?) and seed by seed. Printed: mean ± standard error, the paired difference ± its, and bytes of
state per parameter. Runs that are there are not run again.

    python tools/compact_states.py --data data/stdlib --out runs/compact [--seeds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState
from rich.console import Console
from rich.table import Table

from anon_dist.train import loop
from anon_dist.train.config import parsing as c
from anon_dist.train.reports.metrics import from_json

HALF = "exp_avg_sq=bfloat16, precond=bfloat16"
WAYS = {  # name: state_dtype, precision of the parameters, bytes of state per parameter
    "float32": ("float32", "fp32", 12.0),
    "bf16 precond": ("precond=bfloat16", "fp32", 10.0),
    "bf16 precond, exp_avg_sq": (HALF, "fp32", 8.0),
    "bf16 precond, exp_avg_sq, exp_avg": ("bfloat16", "fp32", 6.0),
    "bf16 precond, exp_avg_sq; 8-bit exp_avg": (f"exp_avg=int8, {HALF}", "fp32", 5.03),
    "bf16 parameters, float32 states": ("float32", "bf16-true", 12.0),
    "bf16 parameters and states": ("bfloat16", "bf16-true", 6.0),
}


def loss(args: argparse.Namespace, way: str, seed: int) -> float:
    """The last validation loss, nats per token."""
    state_dtype, precision, _ = WAYS[way]
    folder = Path(args.out) / f"{list(WAYS).index(way)}-{seed}"
    result = folder / "result.json"
    if not result.exists():
        config = c.Config(
            model=c.ModelConfig(layers=args.layers, width=args.width, heads=4, context=128),
            data=c.DataConfig(path=args.data, seq_len=128, seed=seed),
            optim=c.OptimConfig("anon", lr=args.lr, state_dtype=state_dtype),
            schedule=c.ScheduleConfig(warmup_steps=50),
            train=c.TrainConfig(
                steps=args.steps,
                global_batch=8,
                micro_batch=8,
                engine="single",
                seed=seed,
                precision=precision,  # type: ignore[arg-type]
            ),
            eval=c.EvalConfig(every=0, sequences=512, final_sequences=512),
            checkpoint=c.CheckpointConfig(every=0, keep=1),
            log=c.LogConfig(every=50, trackers=()),
            run_dir=str(folder),
            resume="never",
        )
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        loop.train(config)
    return float(from_json(json.loads(result.read_text()))["final_loss"])


def error(values: list[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", required=True, help="folder made by `anon-dist data prepare`")
    arguments.add_argument("--out", required=True, help="folder for the runs and the table")
    for name, default in (("steps", 400), ("seeds", 5), ("layers", 4), ("width", 128)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument("--lr", type=float, default=3e-3)
    args = arguments.parse_args()
    losses: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in range(args.seeds):
        for way in WAYS:
            losses[way].append(loss(args, way, seed))
    report(args, losses)


def report(args: argparse.Namespace, losses: dict[str, list[float]]) -> None:
    """The table, and its numbers in a file."""
    base = losses["float32"]
    table = Table("", "bytes", "validation loss", "minus float32's, by seed", "within one standard error of its mean")
    for way, values in losses.items():
        paired = [a - b for a, b in zip(values, base, strict=True)]
        near = abs(statistics.mean(values) - statistics.mean(base)) <= error(base)
        table.add_row(
            way,
            f"{WAYS[way][2]:.4g}",
            f"{statistics.mean(values):.4f} ± {error(values):.4f}",
            f"{statistics.mean(paired):+.4f} ± {error(paired):.4f}",
            "yes" if near else "no",
        )
    Console(width=150).print(table)
    print(
        f"{args.seeds} seeds, {args.steps} steps of 8 × 128 tokens, {args.layers} layers of width {args.width}, lr {args.lr:g}"
    )
    (Path(args.out) / "compact.json").write_text(json.dumps(losses, indent=1))


if __name__ == "__main__":
    main()
