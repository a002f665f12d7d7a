"""The options of `anon-dist sweep` and `anon-dist sweep report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class Sweep:
    """Train a configuration over a grid of settings, and report which γ and learning rate are best.

    Further options are those of `anon-dist train`, and hold for every cell: --train.steps 2000. The same command goes on with a sweep
    that was interrupted; with a larger grid it runs what is new.
    """

    config: str
    """Training configuration: a file, or the name of a shipped one."""
    grid: tuple[str, ...]
    """FIELD=VALUES, several: values are separated by commas, and may be ranges: a:b:step with both ends, log:a:b:n evenly by ratio.
    optim.gamma=-0.5:1.5:0.25 optim.lr=1e-3,3e-3,1e-2"""
    out: Path
    """Folder of the sweep; `anon-dist sweep report OUT` looks at it while it runs."""
    seeds: str = "1"
    """How many (3 is 0, 1, 2), or a list (0,4,7): of weights and data order, the same for every setting."""
    baseline: Literal["adamw"] | None = None
    """Another optimizer to compare with, over the fields of the grid that mean something to it."""
    baseline_lr: str | None = None
    """Its learning rates, as in --grid. None: those of the grid."""
    match_rms: bool = False
    """Learning rates (and update_clip, and 1 / weight_decay) are meant for γ = 1, and multiplied for other γ so that steps keep their
    root mean square: see anon_dist.optim.matching. Measured in a short run at γ = 1. One factor for a cell; with gamma_by_name or
    gamma_schedule, one for each param group."""
    match_from: Path | None = None
    """The same, measured from a checkpoint of Anon or AdamW, or as another sweep's calibration/spectrum.json has it."""
    parallel: int | None = None
    """Runs at once. None: one per GPU, or one per core as far as free memory goes."""
    early_stop: bool = True
    """Stop hopeless cells: see anon_dist.sweep.early. They are reported as stopped, and go on with --no-early-stop."""
    retry_failed: bool = False
    """Run cells again that diverged or crashed, from their last checkpoint."""
    keep_weights: bool = False
    """Keep the checkpoint and the exported model of finished cells."""


@dataclass
class Report:
    """Write report.md, its pictures, report.html and cells.csv for a sweep as it is now; it may be running."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """The sweep's --out."""
