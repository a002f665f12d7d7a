"""`anon-dist sweep` and `anon-dist sweep report`."""

from __future__ import annotations

import copy
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import nn

from anon_dist.checkpoint import CheckpointError
from anon_dist.data import DataError, Index, verify_checksums
from anon_dist.exits import INTERRUPTED
from anon_dist.files import write_json
from anon_dist.machine import processor
from anon_dist.optim.matching import Spectra
from anon_dist.stores import is_address
from anon_dist.sweep.asked import Asked
from anon_dist.sweep.calibrate import calibrate
from anon_dist.sweep.cells import CellFolder
from anon_dist.sweep.grid import BY_NAME, Cell, Grid
from anon_dist.sweep.options import Report, Sweep
from anon_dist.sweep.report import write_report
from anon_dist.sweep.run import Command, Room, Scheduler, train_command
from anon_dist.train.config.errors import RunError, RunInUseError
from anon_dist.train.config.parsing import Config, ConfigError, to_yaml, with_fields
from anon_dist.train.config.sources import all_sources, called
from anon_dist.train.inputs.corpora import use_cache
from anon_dist.train.optimizer.build import build_optimizer
from anon_dist.train.optimizer.spectrum import load_spectra
from anon_dist.train.saves.lock import held
from anon_dist.usage import ending


def sweep(parsed: Sweep, asked: Asked, args: list[str]) -> None:
    """`anon-dist sweep`; one line and an exit code of `anon_dist.exits` if something is wrong, or a signal ended it.

    Args:
        asked: what these ask for.
        args: all, as the user typed them, for the report.
    """
    with ending(ConfigError, DataError, CheckpointError, RunError, OSError):
        if not run_sweep(parsed, asked, shlex.join(["anon-dist", "sweep", *args])):
            sys.exit(INTERRUPTED)


def report(parsed: Report) -> None:
    """`anon-dist sweep report`"""
    with ending(ConfigError, OSError):
        print(f"Report: {write_report(parsed.folder)}, and with its pictures in one file: report.html")


def run_sweep(args: Sweep, asked: Asked, command: str, trainer: Command = train_command) -> bool:
    """Run a sweep, or go on with it, and write its report.

    Args:
        asked: what `args` ask for.
        command: as the user typed it, for the report.
        trainer: what trains a cell.

    Returns:
        False if a signal ended it early.

    Raises:
        ConfigError: a hyperparameter is out of its range, or the folder is another sweep's; before anything is run or changed.
        RunInUseError: another sweep is at work there, or others in some cells, of which nothing is recorded then.
        DataError, CheckpointError: see there.
    """
    grid, matched, kept = asked.grid, asked.matched, args.out / "calibration" / "spectrum.json"
    base = copy.deepcopy(asked.base)
    common = copy.deepcopy(base)
    if asked.by_group:  # of this folder's own making
        common.optim.match = None
    for cell in replace(grid, seeds=grid.seeds[:1]).cells(base):
        _check_optimizer(cell, base)
    indices = _check_data(base)
    args.out.mkdir(parents=True, exist_ok=True)
    room = Room.of_this_machine(base, indices[0].vocab_size, args.parallel)
    with held(args.out, "--out"):
        _record(args.out, common, indices, str(args.match_from or "a run at γ = 1") if matched else None, command, room)
        if matched:
            spectra = _spectra(args, kept, base, grid, room, trainer)
            if spectra is None:
                return False
            grid = _matched(grid, base, spectra, asked.by_group)
        whole, in_use = _run_cells(args, grid, base, room, trainer)
    print(f"Report: {write_report(args.out)}, and with its pictures in one file: report.html")
    if in_use and whole:
        raise RunInUseError(
            f"cells left out, as other processes are at work in their folders: {len(in_use)} (the first, {in_use[0].path}: "
            f"{in_use[0].last_line().removeprefix('error: ')}). The same command runs them when those have ended"
        )
    return whole


def _check_optimizer(cell: Cell, base: Config) -> None:
    """Refuse hyperparameters that its optimizer does; patterns of names are of the model's parameters, which is not there yet."""
    where = f"--grid, at {cell.setting}"
    config = with_fields(cell.config(base), {name: {} for name in BY_NAME}, where)
    try:
        build_optimizer(config.optim, nn.Sequential(nn.Embedding(1, 1), nn.Linear(1, 1)))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _matched(grid: Grid, base: Config, spectra: Spectra, by_group: bool) -> Grid:
    """The grid whose learning rates follow γ, which is said."""
    if by_group:
        print("learning rates are multiplied group by group: lr_factor/0, … in the cells' metrics.jsonl")
        return grid
    if bool(spectra.frames) != (base.optim.basis is not None):
        raise ConfigError(
            f"optim.basis is {base.optim.basis}, and what learning rates are matched by was measured "
            f"{'with' if spectra.frames else 'without'} a basis: --match-from takes a checkpoint of Anon with the same one"
        )
    grid = replace(grid, factor=spectra.whole().lr_factor)
    for gamma in grid.gammas(base):
        print(f"γ = {gamma:g}: learning rates are multiplied by {grid.factor_of(gamma, base.optim.update_clip):g}")
    return grid


def _run_cells(args: Sweep, grid: Grid, base: Config, room: Room, trainer: Command) -> tuple[bool, list[CellFolder]]:
    """Those that have not ended: whether no signal ended it early, and which cells are in use by others."""
    cells = [CellFolder.of(args.out, cell) for cell in grid.cells(base)]
    _reopen(cells, args)
    for cell in cells:
        cell.plan(base)
    print(f"{len(cells)} cells, {room.parallel} at a time, {room.threads} threads each, in {args.out}", flush=True)
    scheduler = Scheduler(
        cells,
        CellFolder.all(args.out),
        base,
        room,
        early_stop=args.early_stop,
        keep_weights=args.keep_weights,
        command=trainer,
        say=lambda text: print(text, flush=True),
    )
    return scheduler.run(), scheduler.in_use


def _check_data(base: Config) -> list[Index]:
    """The sources' indices."""
    use_cache(base.data)
    folders = {called(name): source.path for name, source in all_sources(base).items()}
    indices = {place: Index.load(path) for place, path in folders.items()}
    long_enough = [
        place
        for place, index in indices.items()
        if "val" in index.splits and index.split("val").tokens > base.data.seq_len
    ]
    if not long_enough:
        where = ", ".join(f"{place} = {path}" for place, path in folders.items())
        raise ConfigError(
            f"{where} has no validation split of data.seq_len = {base.data.seq_len} tokens to compare settings on; "
            "prepare it with a larger val_fraction"
        )
    paths = [path for path in (*folders.values(), *base.eval.sets.values()) if not is_address(path)]
    old = [path for path in paths if not Index.load(path).has_sums]
    for path in old:
        verify_checksums(path)
    if old:  # once for all cells
        base.data.verify = "size"
    return list(indices.values())


def _spectra(args: Sweep, kept: Path, base: Config, grid: Grid, room: Room, trainer: Command) -> Spectra | None:
    """Measured once for a folder, and kept in a file of it. None if a signal ended the run that measures it."""
    if kept.exists():
        return load_spectra(kept)
    if args.match_from is not None:
        spectra: Spectra | None = load_spectra(args.match_from)
    else:
        spectra = calibrate(kept.parent, base, grid, room, trainer, lambda text: print(text, flush=True))
    if spectra is not None:
        kept.parent.mkdir(exist_ok=True)
        write_json(kept, spectra.to_json())
    return spectra


def _reopen(cells: list[CellFolder], args: Sweep) -> None:
    """What is to be run again."""
    for cell in cells:
        outcome = cell.outcome
        if outcome and (
            (outcome.state == "failed" and args.retry_failed) or (outcome.state == "stopped" and not args.early_stop)
        ):
            cell.reopen()


def _record(out: Path, base: Config, indices: list[Index], match: str | None, command: str, room: Room) -> None:
    """Write down what all cells share and what works on them; refuse a folder whose cells share something else."""
    file = out / "sweep.json"
    common = {
        "config": yaml.safe_load(to_yaml(base)),
        "corpus": ", ".join(index.fingerprint for index in indices),
        "match_rms": match,
    }
    recorded: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {**common, "commands": []}
    before, now = _flat(recorded), _flat(common)
    changed = [
        f"{k}: {before.get(k)} there, {now.get(k)} now" for k in {**before, **now} if before.get(k) != now.get(k)
    ]
    if changed:
        raise ConfigError(
            f"--out {out} is a sweep of another configuration ({'; '.join(changed)}); name another folder"
        )
    recorded["commands"].append(
        {
            "command": command,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "machine": machine(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "room": asdict(room),
        }
    )
    write_json(file, recorded)


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What is compared, by dotted name."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        if key != "commands":
            found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def machine() -> str:
    """What computes, in a few words."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return f"{len(os.sched_getaffinity(0))} cores of {processor()}" + (f", {len(gpus)} × {gpus[0]}" if gpus else "")
