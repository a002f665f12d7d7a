"""What `anon-dist sweep` is asked for: looked at before torch is imported."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from anon_dist.named import need_room
from anon_dist.sweep.grid import Grid, parse_axes, parse_axis, parse_seeds
from anon_dist.sweep.options import Sweep
from anon_dist.train.config.at_once import check_at_once
from anon_dist.train.config.errors import ConfigError
from anon_dist.train.config.fields import Config


@dataclass(frozen=True)
class Asked:
    """A sweep, as far as its options say."""

    base: Config
    """What all cells have in common."""
    grid: Grid
    matched: bool
    """Whether learning rates follow γ."""
    by_group: bool
    """Whether each param group's then does by itself, by `optim.match`."""


def ask(options: Sweep, base: Config) -> Asked:
    """What the options name.

    Args:
        base: what all cells have of the training's options.

    Raises:
        ConfigError: the grid is wrong, options contradict each other, or a cell's settings do.
        ShardError: the index of prepared data is missing or malformed.
        UsageError: --out cannot be a folder.
    """
    given, base = base, shared(base)
    grid = Grid(
        parse_axes(options.grid, base),
        parse_seeds(options.seeds),
        options.baseline is not None,
        _baseline_lr(options, base),
    )
    if options.parallel is not None and options.parallel < 1:
        raise ConfigError(f"--parallel {options.parallel}: at least 1")
    matched = options.match_rms or options.match_from is not None
    if matched and base.optim.match is not None:
        raise ConfigError("optim.match matches learning rates already; remove it, or --match-rms and --match-from")
    if matched and any(name in ("optim.basis", "optim.basis_block") for name, _ in grid.axes):
        raise ConfigError(
            "--match-rms measures in one basis, and optim.basis or basis_block is in the grid: sweep each by itself"
        )
    by_group = matched and grid.has_own_gammas(base)
    if by_group:
        base.optim.match = str((options.out / "calibration" / "spectrum.json").resolve())
    grid.cells(base)  # for its errors
    check_at_once(given)
    need_room(options.out, "--out")
    return Asked(base, grid, matched, by_group)


def shared(base: Config) -> Config:
    """What all cells have in common: one process each, no sample, one checkpoint; the corpus is verified once.

    Raises:
        ConfigError: the configuration needs several processes, or another optimizer.
    """
    base = copy.deepcopy(base)
    if base.optim.name != "anon":
        raise ConfigError(f"optim.name = {base.optim.name}: a sweep's cells are Anon's; --baseline adamw adds AdamW's")
    if (
        base.train.tensor_parallel not in (None, 1)
        or base.train.engine == "deepspeed"
        or base.train.precision == "fp16"
    ):
        raise ConfigError("a sweep's cell is one process on one device: no tensor_parallel, deepspeed or fp16")
    base.train.engine, base.train.shard_ranks, base.run_dir = "single", None, "."
    base.data.prepare, base.resume = None, "auto"
    base.log.sample_prompt, base.checkpoint.keep = None, 1
    base.train.tokens = base.train.global_batch_tokens = None  # steps and batch say the same
    return base


def _baseline_lr(options: Sweep, base: Config) -> list[float] | None:
    if options.baseline_lr is None:
        return None
    if options.baseline is None:
        raise ConfigError("--baseline-lr without --baseline adamw")
    return parse_axis(f"optim.lr={options.baseline_lr}", base, "--baseline-lr, that is")[1]
