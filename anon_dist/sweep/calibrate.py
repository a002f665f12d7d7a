"""How the learning rate has to change with γ on this model and data, measured: the spectrum of a short run at γ = 1, or of a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from anon_dist.checkpoint import CheckpointError, Checkpoints
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.recognise import ADAM, ADAMW, ANON
from anon_dist.checkpoint.schema import Checkpoint, Key, ParamGroup
from anon_dist.optim.matching import Spectrum
from anon_dist.sweep.cells import CellFolder
from anon_dist.sweep.grid import Cell, Grid
from anon_dist.sweep.run import Command, Room, Scheduler
from anon_dist.train.config import Config, ConfigError

SHARE, LEAST_STEPS, MOST_STEPS = 0.1, 40, 1000
"""The run takes this share of the cells' steps, within these bounds."""
BLOCK = 1 << 20
"""Elements read at once."""


def calibrate(
    folder: Path, base: Config, grid: Grid, room: Room, lock: int, command: Command, say: Callable[[str], None]
) -> Spectrum | None:
    """The spectrum of a run at γ = 1 in `folder`: the sum of those half-way, at three quarters and at its end.

    Returns:
        None if a signal ended it early; it can go on.

    Raises:
        ConfigError: the run failed.
    """
    config, run = calibration(base, grid), CellFolder(Cell("anon", {}, base.train.seed), folder)
    say(
        f"Measuring how the learning rate depends on γ: {config.train.steps} steps at γ = 1, lr = {config.optim.lr:.4g}."
    )
    run.reopen()
    options: dict[str, Any] = {"early_stop": False, "keep_weights": True, "command": command, "say": lambda text: None}
    if not Scheduler([run], [], config, room, lock, **options).run():
        return None
    outcome = run.outcome
    if outcome is None or outcome.state != "finished":
        raise ConfigError(
            f"--match-rms: the run at γ = 1 in {folder} failed: {outcome.reason if outcome else 'no outcome'}. Lower the middle of the "
            "learning rates, or name a checkpoint with --match-from"
        )
    spectrum = Spectrum()
    for checkpoint in Checkpoints(folder / "checkpoints", 3).complete()[-3:]:
        spectrum.merge(spectrum_of(checkpoint))
    run.drop_weights()
    return spectrum


def calibration(base: Config, grid: Grid) -> Config:
    """The run: the cells', shorter, at γ = 1, at the middle of their learning rates, which stays constant after the warm-up."""
    config = copy.deepcopy(base)
    steps = min(max(LEAST_STEPS, min(int(SHARE * base.train.steps), MOST_STEPS)), base.train.steps)
    steps = max(4, steps - steps % 4)
    config.optim.name, config.optim.gamma = "anon", 1.0
    config.optim.lr = median_low(dict(grid.axes).get("optim.lr", [base.optim.lr]))
    config.schedule.decay, config.schedule.warmup_steps = "constant", min(base.schedule.warmup_steps, steps // 4)
    config.train.steps = steps
    config.eval.every, config.eval.final_sequences = 0, 16
    config.checkpoint.every, config.checkpoint.keep = steps // 4, 3
    return config


def spectrum_of(path: Path) -> Spectrum:
    """The spectrum of a checkpoint of Anon (at γ ≠ 0) or AdamW, in any format.

    Raises:
        CheckpointError: it is another optimizer's, has γ = 0, has taken no step, or cannot be read.
    """
    checkpoint, spectrum = open_checkpoint(path), Spectrum()
    optimizer = checkpoint.manifest.optimizer
    if optimizer not in (ANON, ADAM, ADAMW):
        raise CheckpointError(
            f"{path} holds the state of {optimizer or 'no optimizer'}; second moments are read from Anon or AdamW"
        )
    for group in checkpoint.manifest.groups:
        if optimizer == ANON and float(group.hyperparameters["gamma"]) == 0.0:
            raise CheckpointError(
                f"{path} was made at γ = 0, where the preconditioner says nothing about the second moment"
            )
        for name in group.members:
            if Key(name, "exp_avg") in checkpoint.tensors:
                _add(spectrum, checkpoint, group, name, optimizer == ANON)
    checkpoint.close()
    if spectrum.rms(1.0) == 0.0:
        raise CheckpointError(f"{path} has no optimizer state after a step")
    return spectrum


def _add(spectrum: Spectrum, checkpoint: Checkpoint, group: ParamGroup, name: str, anon: bool) -> None:
    h, step = group.hyperparameters, int(checkpoint.manifest.scalars[name]["step"])
    if step == 0:
        return
    beta1, beta2 = map(float, h["betas"])
    moment = Key(name, "precond" if anon else "exp_avg_sq")
    numel = checkpoint.tensors[moment].numel
    for start in range(0, numel, BLOCK):
        stop = min(start + BLOCK, numel)
        second = checkpoint.read(moment, start, stop).double()
        sigma: Tensor = (
            torch.exp(second.log() * (-2.0 / float(h["gamma"])))
            if anon
            else second / (1.0 - beta2**step) + float(h["eps"]) ** 2
        )
        spectrum.add(sigma, checkpoint.read(Key(name, "exp_avg"), start, stop).double() / (1.0 - beta1**step))
