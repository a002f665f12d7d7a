#!/usr/bin/env python
"""The study behind the language-model presets: the sweeps of configs/study/README.md, one after the other, and a table of what they gave.

    python tools/study.py run --corpus python=data/stdlib --out runs/study [--only screen] [-- --parallel 2]
    python tools/study.py table runs/study/python …

A corpus is a folder made by `anon-dist data prepare`, with a name for the tables. Each sweep is a folder OUT/CORPUS/SWEEP with its own
report; interrupted, the same command goes on. Differences are taken seed by seed from AdamW at the learning rate and the beta2 that are
best for it over all sweeps of a part.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from anon_dist.sweep.results import Results, Setting, paired

CONFIG = Path(__file__).parents[1] / "configs" / "study" / "base.yaml"


@dataclass(frozen=True)
class Sweep:
    """Arguments of one `anon-dist sweep`."""

    name: str
    args: str


RATES = "optim.lr=3e-3,6e-3"
VECTORS = "'*.ln_*': 0, '*.bias': 0"
GROUPS = f"{{'*wte*': 0.5}},{{{VECTORS}}},{{'*wte*': 0.5, {VECTORS}}},{{'*wte*': 1.25}}".replace("'", '"')
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
            Sweep("eps", f"--grid optim.eps=1e-12,1e-10 {RATES}"),
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


def table(folders: list[Path]) -> None:
    """What the sweeps below each of the folders gave, in Markdown."""
    for folder in folders:
        sweeps = sorted(path.parent for path in folder.glob("*/sweep.json"))
        results = [(path.name, setting) for path in sweeps for setting in Results.read(path).settings]
        for part in dict.fromkeys(name.partition("-")[0] for name, _ in results):
            show_part(f"{folder.name}, {part}", [(n, s) for n, s in results if n.partition("-")[0] == part])


def show_part(title: str, results: list[tuple[str, Setting]]) -> None:
    """One table; settings that have not finished are left out."""
    finished = [(name, s) for name, s in results if s.ranked]
    adamw = min(
        (s for _, s in finished if s.cell.optimizer == "adamw"),
        key=lambda s: s.loss.mean if s.loss else 0.0,
        default=None,
    )
    print(f"\n{title}\n")
    shown = Table("sweep", "optimizer", "settings", "lr", "loss", "seeds", "minus the best AdamW", box=MARKDOWN)
    for name, s in finished:
        difference = paired(s, adamw) if adamw else None
        error = f" ± {difference.error:.4f}" if difference and difference.error is not None else ""
        shown.add_row(
            name.partition("-")[2],
            s.cell.optimizer,
            f"`{other}`" if (other := s.other("optim.lr")) else "",
            f"{s.cell.lr:g}" if s.cell.lr else "",
            str(s.loss),
            str(len(s.losses)),
            f"{difference.mean:+.4f}{error}" if difference else "",
        )
    Console(width=200).print(shown)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = arguments.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run the sweeps; what comes after -- goes to each `anon-dist sweep`")
    runs.add_argument("--corpus", action="append", required=True, metavar="NAME=FOLDER")
    runs.add_argument("--out", required=True)
    runs.add_argument("--only", action="append", choices=PARTS)
    tables = commands.add_parser("table", help="print what they gave")
    tables.add_argument("folder", nargs="+", type=Path)
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    args = arguments.parse_args(given[:cut])
    if args.command == "run":
        run(args, given[cut + 1 :])
    else:
        table(args.folder)


if __name__ == "__main__":
    main()
