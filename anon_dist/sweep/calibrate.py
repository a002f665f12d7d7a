"""How the learning rate has to change with γ on this model and data, measured on a short run at γ = 1."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from statistics import median_low
from typing import Any

from anon_dist.checkpoint import Checkpoints
from anon_dist.optim.matching import Spectra
from anon_dist.sweep.cells import CellFolder
from anon_dist.sweep.grid import Cell, Grid
from anon_dist.sweep.run import Command, Room, Scheduler
from anon_dist.train.config.errors import RunInUseError
from anon_dist.train.config.parsing import Config, ConfigError
from anon_dist.train.optimizer.spectrum import spectra_of

SHARE, LEAST_STEPS, MOST_STEPS = 0.1, 40, 1000
"""The run takes this share of the cells' steps, within these bounds."""


def calibrate(
    folder: Path, base: Config, grid: Grid, room: Room, command: Command, say: Callable[[str], None]
) -> Spectra | None:
    """The spectra of a run at γ = 1 in `folder`: the sum of those half-way, at three quarters and at its end.

    Returns:
        None if a signal ended it early; it can go on.

    Raises:
        ConfigError: the run failed.
        RunInUseError: another process is at work in its folder.
    """
    config, run = calibration(base, grid), CellFolder(Cell("anon", {}, base.train.seed), folder)
    say(
        f"Measuring how the learning rate depends on γ: {config.train.steps} steps at γ = 1, lr = {config.optim.lr:.4g}."
    )
    run.reopen()
    options: dict[str, Any] = {"early_stop": False, "keep_weights": True, "command": command, "say": lambda text: None}
    scheduler = Scheduler([run], [], config, room, **options)
    if not scheduler.run():
        return None
    if scheduler.in_use:
        raise RunInUseError(f"--match-rms: {run.last_line().removeprefix('error: ')}")
    outcome = run.outcome
    if outcome is None or outcome.state != "finished":
        raise ConfigError(
            f"--match-rms: the run at γ = 1 in {folder} failed: {outcome.reason if outcome else 'no outcome'}. Lower the middle of the "
            "learning rates, or name a checkpoint with --match-from"
        )
    spectra = Spectra()
    for checkpoint in Checkpoints(folder / "checkpoints", 3).complete()[-3:]:
        spectra.merge(spectra_of(checkpoint))
    run.drop_weights()
    return spectra


def calibration(base: Config, grid: Grid) -> Config:
    """The run: the cells', shorter, at γ = 1, at the middle of their learning rates, which stays constant after the warm-up."""
    config = copy.deepcopy(base)
    steps = min(max(LEAST_STEPS, min(int(SHARE * base.train.steps), MOST_STEPS)), base.train.steps)
    steps = max(4, steps - steps % 4)
    config.optim.name, config.optim.gamma = "anon", 1.0
    config.optim.gamma_by_name, config.optim.gamma_schedule, config.optim.match = {}, {}, None
    config.optim.lr = median_low(dict(grid.axes).get("optim.lr", [base.optim.lr]))
    config.schedule.decay, config.schedule.warmup_steps = "constant", min(base.schedule.warmup_steps, steps // 4)
    config.train.steps = steps
    config.eval.every, config.eval.final_sequences = 0, 16
    config.checkpoint.every, config.checkpoint.keep = steps // 4, 3
    return config
