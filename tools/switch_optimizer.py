#!/usr/bin/env python
"""What it costs to change from AdamW to Anon in the middle of a run: with the converted state, and with a new one.

For each seed: AdamW to the end; and from its checkpoint at --switch, Anon with the state that `anon-dist ckpt convert --optimizer anon`
makes of AdamW's, and Anon with a fresh state. Same data, same learning rates. Printed and plotted: validation loss minus AdamW's at the
same step.

    python tools/switch_optimizer.py --data data/stdlib --out runs/switch [--seeds 3]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from rich.console import Console
from rich.table import Table
from torch import Tensor

from anon_dist.checkpoint.copy import write_files
from anon_dist.checkpoint.formats import open_checkpoint, plan
from anon_dist.checkpoint.optimizers.semantics import to_anon
from anon_dist.checkpoint.options import WriteOptions
from anon_dist.checkpoint.schema import Checkpoint, Key
from anon_dist.train import loop
from anon_dist.train.config import parsing as c
from anon_dist.train.reports.metrics import read_metrics

WAYS = {"adamw": "AdamW to the end", "converted": "Anon, state converted", "fresh": "Anon, state afresh"}


def configuration(args: argparse.Namespace, seed: int, way: str) -> c.Config:
    return c.Config(
        model=c.ModelConfig(layers=args.layers, width=args.width, heads=4, context=128),
        data=c.DataConfig(path=args.data, seq_len=128, seed=seed),
        optim=c.OptimConfig("adamw" if way == "adamw" else "anon", lr=args.lr),
        schedule=c.ScheduleConfig(warmup_steps=50, decay="cosine"),
        train=c.TrainConfig(steps=args.steps, global_batch=16, micro_batch=16, engine="single", seed=seed),
        eval=c.EvalConfig(every=args.every, sequences=256, final_sequences=256),
        checkpoint=c.CheckpointConfig(every=args.switch, keep=99),
        log=c.LogConfig(every=1, trackers=()),
        run_dir=str(Path(args.out) / f"{way}-{seed}"),
    )


def run(config: c.Config) -> list[dict[str, float]]:
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    folder = loop.train(config)
    return read_metrics(folder / "metrics.jsonl")


class Afresh(Checkpoint):
    """Anon's checkpoint, its state that of an optimizer before its first step."""

    def __init__(self, source: Checkpoint) -> None:
        self._source, self.tensors, self.manifest = source, source.tensors, source.manifest
        for own in self.manifest.scalars.values():
            own["step"] = torch.zeros(())

    def read(self, key: Key, start: int, stop: int) -> Tensor:
        """See `Checkpoint`."""
        if key.state in ("exp_avg", "exp_avg_sq", "precond"):
            return torch.full((stop - start,), float(key.state == "precond"))
        return self._source.read(key, start, stop)


def begin(source: Path, target: Path, way: str) -> None:
    """Put a checkpoint of AdamW's run where Anon's is to go on from."""
    shutil.rmtree(target.parents[1], ignore_errors=True)
    target.parent.mkdir(parents=True)
    checkpoint = to_anon(open_checkpoint(source))
    if way == "fresh":
        checkpoint = Afresh(checkpoint)
    write_files(plan(checkpoint, "dcp", WriteOptions()), checkpoint, way, target, quiet=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", required=True, help="folder made by `anon-dist data prepare`")
    arguments.add_argument("--out", required=True, help="folder for the runs, the table and the plot")
    for name, default in (("steps", 900), ("switch", 300), ("every", 25), ("seeds", 3), ("layers", 2), ("width", 64)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument("--lr", type=float, default=2e-3)
    args = arguments.parse_args()

    curves: dict[str, list[dict[int, float]]] = {way: [] for way in WAYS}
    for seed in range(args.seeds):
        for way in WAYS:
            config = configuration(args, seed, way)
            if way != "adamw":
                source = Path(args.out) / f"adamw-{seed}" / "checkpoints" / f"step-{args.switch:08d}"
                begin(source, Path(config.run_dir) / "checkpoints" / source.name, way)
            records = run(config)
            curves[way].append({int(r["step"]): r["val_loss"] for r in records if "val_loss" in r})
    report(args, curves)


def report(args: argparse.Namespace, curves: dict[str, list[dict[int, float]]]) -> None:
    """Table and plot of the differences, mean ± standard error over the seeds."""
    steps = [s for s in sorted(curves["converted"][0]) if s > args.switch]
    rows = {}
    for way in ("converted", "fresh"):
        differences = {s: [a[s] - b[s] for a, b in zip(curves[way], curves["adamw"], strict=True)] for s in steps}
        rows[way] = {
            s: (statistics.mean(d), statistics.stdev(d) / len(d) ** 0.5 if len(d) > 1 else 0.0)
            for s, d in differences.items()
        }
    shown = [s for s in steps if s - args.switch in (args.every, 2 * args.every, 4 * args.every, 8 * args.every)] + [
        steps[-1]
    ]
    table = Table("validation loss minus AdamW's", *(f"step {s} (+{s - args.switch})" for s in shown))
    for way, row in rows.items():
        table.add_row(WAYS[way], *(f"{row[s][0]:+.4f} ± {row[s][1]:.4f}" for s in shown))
    Console(width=140).print(table)
    print(
        f"AdamW's loss at step {steps[-1]}: {statistics.mean(x[steps[-1]] for x in curves['adamw']):.4f}; {args.seeds} seeds"
    )
    (Path(args.out) / "switch.json").write_text(json.dumps({"curves": curves, "differences": rows}, indent=1))

    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for way, row in rows.items():
        axes.errorbar(steps, [row[s][0] for s in steps], [row[s][1] for s in steps], label=WAYS[way], marker="o", ms=3)
    axes.axhline(0.0, color="gray", lw=1)
    axes.set(xlabel="step", ylabel="validation loss minus AdamW's (nats)", title=f"AdamW to Anon at step {args.switch}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(Path(args.out) / "switch.png", dpi=120)


if __name__ == "__main__":
    main()
