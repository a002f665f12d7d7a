"""A small training to sweep over, and a sweep of it with a fast trainer."""

import sys
from pathlib import Path

import pytest

from anon_dist.sweep import report, run
from anon_dist.sweep.asked import ask
from anon_dist.sweep.cells import CellFolder
from anon_dist.sweep.cli import Sweep, run_sweep
from anon_dist.sweep.plots import draw_all
from anon_dist.train.config import parsing as c


@pytest.fixture
def base(prepared):
    """A function that gives the configuration; keywords are `section__field`."""

    def make(**changes):
        config = c.Config(
            model=c.ModelConfig(layers=1, width=16, heads=2, context=32),
            data=c.DataConfig(path=str(prepared), seq_len=32),
            optim=c.OptimConfig(lr=3e-3),
            schedule=c.ScheduleConfig(warmup_steps=3),
            train=c.TrainConfig(steps=12, global_batch=4, micro_batch=4),
            eval=c.EvalConfig(every=3, sequences=8, final_sequences=16),
            log=c.LogConfig(every=1, trackers=()),
        )
        return c.with_fields(config, {k.replace("__", "."): v for k, v in changes.items()}, "test")

    return make


@pytest.fixture
def sweep(base, tmp_path, monkeypatch):
    """A function that runs a sweep with the fake trainer, or another; it returns whether it came to its end."""
    monkeypatch.setattr(run, "POLL_SECONDS", 0.03)

    def go(*grid, trainer=None, changes=None, pictures=False, **options):
        monkeypatch.setattr(report, "draw_all", draw_all if pictures else lambda results, folder: [])  # slow
        fake = [sys.executable, str(Path(__file__).with_name("fake_trainer.py"))]
        args = Sweep(config="", grid=grid, out=tmp_path / "sweep", **{"parallel": 2, **options})
        asked = ask(args, base(**(changes or {})))
        return run_sweep(args, asked, "the command", trainer or (lambda config: [*fake, str(config)]))

    return go


@pytest.fixture
def cells(tmp_path):
    """A function: (optimizer, γ, lr, seed) → the folder of that cell; what the grid does not set is left out."""

    def find():
        found = {}
        for folder in CellFolder.all(tmp_path / "sweep"):
            cell = folder.cell
            key = (cell.optimizer, cell.gamma, cell.lr, cell.seed)
            found[tuple(k for k in key if k is not None)] = folder
        return found

    return find
