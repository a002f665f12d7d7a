"""Small runs, in this process."""

import pytest
from accelerate import Accelerator
from helpers import forget_accelerate

from anon_dist.train import loop
from anon_dist.train.config import parsing as c
from anon_dist.train.reports import report


@pytest.fixture
def fresh_accelerate():
    """Each test starts without accelerate's state, and leaves none."""
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture
def without_pictures(monkeypatch):
    """A third of a small run's time. A test that looks at the picture puts `plot_loss` back."""
    monkeypatch.setattr(report, "plot_loss", lambda *_: None)


@pytest.fixture
def run_config(prepared, tmp_path, fresh_accelerate, without_pictures):
    """A function that gives a small configuration; keywords are `section__field`."""

    def make(**changes):
        config = c.Config(
            model=c.ModelConfig(layers=2, width=32, heads=2, context=32),
            data=c.DataConfig(path=str(prepared), seq_len=32),
            optim=c.OptimConfig(lr=3e-3),
            schedule=c.ScheduleConfig(warmup_steps=3),
            train=c.TrainConfig(steps=14, global_batch=8, micro_batch=4),
            eval=c.EvalConfig(every=5, sequences=16, final_sequences=32),
            checkpoint=c.CheckpointConfig(every=4),
            log=c.LogConfig(every=1, trackers=()),
            run_dir=str(tmp_path / "run"),
        )
        for name, value in changes.items():
            section, _, key = name.rpartition("__")
            setattr(getattr(config, section) if section else config, key, value)
        c.check(config)
        return config

    return make


@pytest.fixture
def train():
    """Train in this process, as if it had just been started."""

    def run(config):
        forget_accelerate()
        return loop.train(config)

    return run


class Tracker:
    """Keeps what it is told: (values, step)."""

    name = "mine"

    def __init__(self):
        self.told = []

    def log(self, values, step):
        self.told.append((values, step))

    def finish(self):
        pass


@pytest.fixture
def tracker(monkeypatch):
    """A tracker of all runs of a test."""
    found, begin = Tracker(), Accelerator.init_trackers

    def init(accelerator, *args, **kwargs):
        begin(accelerator, *args, **kwargs)
        accelerator.trackers.append(found)

    monkeypatch.setattr(Accelerator, "init_trackers", init)
    return found
