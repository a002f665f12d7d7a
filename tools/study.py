#!/usr/bin/env python
"""The study behind the language-model presets: the sweeps of configs/study/results, one after the other, and a table of what they gave.

    python tools/study.py run --corpus python=data/stdlib --out runs/study [--only screen] [-- --parallel 2]
    python tools/study.py collect runs/study configs/study/results
    python tools/study.py table configs/study/results

A corpus is a folder made by `anon-dist data prepare`, with a name for the tables. Each sweep is a folder OUT/CORPUS/SWEEP with its own
report; interrupted, the same command goes on. Differences are taken seed by seed from AdamW at the learning rate and the beta2 that are
best for it over all sweeps of a part on that corpus (the first part's, where a part has no AdamW).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from anon_dist.sweep.results import Spread

CONFIG = Path(__file__).parents[1] / "configs" / "study" / "base.yaml"


@dataclass(frozen=True)
class Sweep:
    """Arguments of one `anon-dist sweep`."""

    name: str
    args: str


RATES = "optim.lr=3e-3,6e-3"
VECTORS = "'*.ln_*': 0, '*.bias': 0"
GROUPS = f"{{'*wte*': 0.5}},{{{VECTORS}}},{{'*wte*': 0.5, {VECTORS}}},{{'*wte*': 1.25}}".replace("'", '"')
NEW = "optim.refresh_ratio=1.03 optim.beta3=0.93"
LONG = "--seeds 3 --train.steps 2000 --schedule.warmup-steps 100 --eval.every 500"
WARM = "--seeds 3 --train.steps 2000 --eval.every 500 --no-early-stop"
PARTS: dict[str, tuple[str, list[Sweep]]] = {
    # One dial at a time around the preset, 700 steps.
    "screen": (
        "--seeds 2",
        [
            Sweep("base", "--grid optim.lr=1.5e-3,3e-3,6e-3,1.2e-2 --baseline adamw"),
            Sweep(
                "beta2",
                f"--grid optim.betas=[0.9,0.99],[0.9,0.999] {RATES} --baseline adamw --baseline-lr 3e-3,6e-3,1.2e-2",
            ),
            Sweep("groups", f"--grid 'optim.gamma_by_name={GROUPS}' {RATES} --match-rms"),
            Sweep("clip", f"--grid optim.update_clip=null,0.3,3.0 {RATES}"),
            Sweep("beta3", f"--grid optim.beta3=0.5,0.9 {RATES}"),
            Sweep("rho", f"--grid optim.refresh_ratio=1.03,1.3 {RATES}"),
            Sweep("gamma", f"--grid optim.gamma=0.8,0.9,1.1,1.25,1.5 {RATES} --match-rms"),
            # A higher rate, into the same folder.
            Sweep("gamma", "--grid optim.gamma=1.1,1.25 optim.lr=1.2e-2 --match-rms"),
        ],
    ),
    # What was best alone, together.
    "combine": (
        "--seeds 2 --match-rms",
        [
            Sweep(
                "both",
                "--grid optim.gamma=1.1,1.25 optim.refresh_ratio=1.03 optim.betas=[0.9,0.95],[0.9,0.99] optim.lr=3e-3,6e-3,1.2e-2",
            ),
            Sweep("both", "--grid optim.gamma=1.1,1.25 optim.betas=[0.9,0.99] optim.lr=3e-3,6e-3,1.2e-2"),
        ],
    ),
    # Refreshes more often, the preconditioner's memory kept.
    "memory": (
        "--seeds 2",
        [
            Sweep(
                "refresh",
                "--grid optim.gamma=1.0,1.1 optim.refresh_ratio=1.03 optim.beta3=0.93 optim.lr=3e-3,6e-3,1.2e-2 --match-rms",
            ),
        ],
    ),
    # The comparison: the preset, the one before it, and AdamW at three or four learning rates.
    "final": (
        LONG,
        [
            Sweep("preset", f"--grid {NEW} optim.lr=2.1e-3,3e-3,4.2e-3,6e-3"),
            # A window so short that it leaves out most of the last steps.
            Sweep("window", f"--grid optim.window=8 {NEW} optim.lr=3e-3"),
            Sweep("before", "--grid optim.refresh_ratio=1.1 optim.beta3=0.8 optim.lr=2.1e-3,3e-3"),
            Sweep(
                "beta2",
                f"--grid optim.betas=[0.9,0.99] {NEW} optim.lr=2.1e-3,3e-3 "
                "--baseline adamw --baseline-lr 1.5e-3,2.1e-3,3e-3,4.2e-3,6e-3",
            ),
        ],
    ),
    # The comparison again, with a longer warm-up.
    "warm": (
        WARM,
        [
            Sweep("preset", f"--grid {NEW} schedule.warmup_steps=300 optim.lr=4.2e-3,6e-3,8.4e-3"),
            Sweep(
                "beta2",
                f"--grid optim.betas=[0.9,0.99] {NEW} schedule.warmup_steps=300 optim.lr=3e-3,4.2e-3,6e-3 "
                "--baseline adamw --baseline-lr 2.1e-3,3e-3,4.2e-3,6e-3",
            ),
        ],
    ),
    # 12M parameters: for a GPU.
    "large": (
        "--seeds 2 --model.layers 6 --model.width 384 --model.heads 6 --model.context 256 --data.seq-len 256 --train.global-batch 16 "
        "--train.micro-batch 16 --train.steps 800 --schedule.warmup-steps 100 --eval.every 400",
        [
            Sweep(
                "gamma",
                "--grid optim.gamma=1.1 optim.betas=[0.9,0.99] optim.lr=5e-4,1e-3,2e-3 --match-rms "
                "--baseline adamw --baseline-lr 5e-4,1e-3,2e-3",
            )
        ],
    ),
    # 3.5M parameters.
    "size": (
        "--seeds 2 --model.layers 6 --model.width 192 --model.heads 6 --schedule.warmup-steps 150",
        [
            Sweep("preset", f"--grid {NEW} optim.lr=3e-3,6e-3"),
            Sweep(
                "beta2", f"--grid optim.betas=[0.9,0.99] {NEW} optim.lr=3e-3 --baseline adamw --baseline-lr 3e-3,6e-3"
            ),
        ],
    ),
    "rest": (
        "--seeds 2",
        [
            Sweep("eps", f"--grid optim.eps=1e-12,1e-10 {NEW} optim.lr=3e-3"),
            Sweep("eps", f"--grid optim.eps=1e-8,1e-7,1e-6 {NEW} {RATES}"),
            Sweep(
                "schedule",
                f"--grid 'optim.gamma_schedule={{0: 0.8, 100: 1.0}},{{0: 1.0, 350: 1.1}}' {NEW} optim.lr=3e-3 --match-rms",
            ),
        ],
    ),
    # A longer warm-up, and gamma again with it.
    "warmup": (
        "--seeds 2",
        [
            Sweep("steps", f"--grid schedule.warmup_steps=150 {NEW} {RATES} --baseline adamw"),
            Sweep(
                "steps",
                f"--grid schedule.warmup_steps=150 optim.betas=[0.9,0.99] {NEW} optim.lr=3e-3 --baseline adamw --baseline-lr 3e-3,6e-3",
            ),
            Sweep("steps", f"--grid schedule.warmup_steps=300 {NEW} optim.lr=6e-3,1.2e-2"),
            Sweep(
                "steps",
                f"--grid schedule.warmup_steps=300 optim.betas=[0.9,0.99] {NEW} optim.lr=6e-3 --baseline adamw --baseline-lr 6e-3,1.2e-2",
            ),
            Sweep(
                "gamma",
                f"--schedule.warmup-steps 150 --grid optim.gamma=0.8,0.9,1.1,1.25 {NEW} optim.lr=6e-3 --match-rms",
            ),
        ],
    ),
    # Matrices in bases of their own, beside Anon by element with the same momentum, and AdamW.
    "basis": (
        "--seeds 2 --schedule.warmup-steps 150",
        [
            Sweep("sides", f"--grid optim.basis=both,columns,null optim.nesterov=true {NEW} optim.lr=6e-3,1.2e-2"),
            Sweep(
                "adamw",
                f"--grid optim.betas=[0.9,0.99] {NEW} optim.lr=6e-3 --baseline adamw --baseline-lr 3e-3,6e-3",
            ),
        ],
    ),
    # Refreshes more often still.
    "around": (
        "--seeds 2",
        [
            Sweep("rho", f"--grid optim.refresh_ratio=1.01 optim.beta3=0.977 {RATES}"),
        ],
    ),
    "untied": (
        "--seeds 2 --model.tie-embeddings False",
        [
            Sweep("preset", f"--grid {NEW} optim.lr=3e-3,6e-3"),
            Sweep(
                "adamw", f"--grid optim.betas=[0.9,0.99] {NEW} optim.lr=3e-3 --baseline adamw --baseline-lr 1.5e-3,3e-3"
            ),
        ],
    ),
}


def run(args: argparse.Namespace, more: list[str]) -> None:
    """Run the parts that were asked for."""
    for corpus in args.corpus:
        name, _, folder = corpus.partition("=")
        for part in args.only or PARTS:
            common, sweeps = PARTS[part]
            for sweep in sweeps:
                out = Path(args.out) / name / f"{part}-{sweep.name}"
                command = [sys.executable, "-m", "anon_dist.cli", "sweep", "--config", str(CONFIG), "--out", str(out)]
                command += ["--data.path", folder, *shlex.split(common), *shlex.split(sweep.args), *more]
                print(shlex.join(command), flush=True)
                subprocess.run(command, check=True)


def collect(out: Path, results: Path) -> None:
    """Copy each sweep's cells to RESULTS/CORPUS-PART-SWEEP.csv."""
    results.mkdir(parents=True, exist_ok=True)
    for cells in sorted(out.glob("*/*/cells.csv")):
        shutil.copyfile(cells, results / f"{cells.parent.parent.name}-{cells.parent.name}.csv")


@dataclass
class Line:
    """What was measured at one setting; its losses by learning rate and seed, None where a run was stopped or failed."""

    sweep: str
    optimizer: str
    settings: str
    losses: dict[float, dict[int, float | None]] = field(default_factory=dict)


def lines_of(files: list[Path], part: str) -> list[Line]:
    """A line for each setting of which a run has ended, in the order of the files."""
    found: dict[tuple[str, ...], Line] = {}
    for path in files:
        sweep = path.stem.partition(f"-{part}-")[2]
        for cell in csv.DictReader(path.open()):
            own = {k: v for k, v in cell.items() if k.startswith(("optim.", "schedule.")) and k != "optim.lr" and v}
            text = " ".join(f"{k.partition('.')[2]}={v}" for k, v in own.items())
            line = found.setdefault((sweep, cell["optimizer"], text), Line(sweep, cell["optimizer"], text))
            if cell["state"] in ("finished", "stopped", "failed"):
                losses = line.losses.setdefault(float(cell["optim.lr"]), {})
                losses[int(cell["seed"])] = float(cell["loss"]) if cell["state"] == "finished" else None
    return [line for line in found.values() if line.losses]


def best_adamw(lines: list[Line]) -> dict[int, float]:
    """The losses by seed of AdamW at the settings where their mean is lowest."""
    whole = [x for line in lines if line.optimizer == "adamw" for x in line.losses.values() if None not in x.values()]
    return min(
        ({s: v for s, v in x.items() if v is not None} for x in whole), key=lambda x: mean(x.values()), default={}
    )


def table(results: Path, parts: list[str] | None) -> None:
    """Tables of what was collected, in Markdown: losses, and in parentheses their difference from the best AdamW's, seed by seed."""
    names = {
        path.stem.partition(f"-{part}-")[0]
        for path in results.glob("*.csv")
        for part in PARTS
        if f"-{part}-" in path.stem
    }
    for corpus, part in itertools.product(sorted(names), parts or PARTS):
        lines = lines_of(sorted(results.glob(f"{corpus}-{part}-*.csv")), part)
        if not lines:
            continue
        base = best_adamw(lines) or best_adamw(lines_of(sorted(results.glob(f"{corpus}-screen-*.csv")), "screen"))
        rates = sorted({rate for line in lines for rate in line.losses})
        print(f"\n{corpus}, {part}\n")
        shown = Table("sweep", "optimizer", "settings", *(f"lr {rate:g}" for rate in rates), box=MARKDOWN)
        for line in lines:
            cells = [_cell(line.losses.get(rate, {}), base) for rate in rates]
            shown.add_row(line.sweep, line.optimizer, f"`{line.settings}`" if line.settings else "", *cells)
        Console(width=240).print(shown)


def _cell(losses: dict[int, float | None], base: dict[int, float]) -> str:
    finished = {seed: loss for seed, loss in losses.items() if loss is not None}
    if len(finished) < len(losses):
        return f"{len(losses) - len(finished)} of {len(losses)} stopped"
    if not finished:
        return ""
    shared = finished.keys() & base.keys()
    difference = Spread.of(finished[seed] - base[seed] for seed in shared) if shared else None
    error = f" ± {difference.error:.3f}" if difference and difference.error is not None else ""
    return f"{mean(finished.values()):.3f}" + (f" ({difference.mean:+.3f}{error})" if difference else "")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = arguments.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run the sweeps; what comes after -- goes to each `anon-dist sweep`")
    runs.add_argument("--corpus", action="append", required=True, metavar="NAME=FOLDER")
    runs.add_argument("--out", required=True)
    runs.add_argument("--only", action="append", choices=PARTS)
    collects = commands.add_parser("collect", help="copy the cells of each sweep's report")
    collects.add_argument("out", type=Path)
    collects.add_argument("results", type=Path)
    tables = commands.add_parser("table", help="print what was collected")
    tables.add_argument("results", type=Path)
    tables.add_argument("--only", action="append", choices=PARTS)
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    args = arguments.parse_args(given[:cut])
    if args.command == "run":
        run(args, given[cut + 1 :])
    elif args.command == "collect":
        collect(args.out, args.results)
    else:
        table(args.results, args.only)


if __name__ == "__main__":
    main()
