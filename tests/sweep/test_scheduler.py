"""Cells run, resumed, stopped, failed and killed, with a trainer that is fast and does harm when asked."""

import contextlib
import fcntl
import json
import os
import re
import signal
import time
from collections import Counter
from functools import partial

import fake_trainer
import pytest
from fake_trainer import CRASH, DIVERGE, HELD, HOPELESS, PATIENCE, final_loss
from helpers import browse

from anon_dist.exits import IN_USE
from anon_dist.sweep import run
from anon_dist.sweep.report import write_report
from anon_dist.sweep.results import Results
from anon_dist.sweep.run import Room
from anon_dist.train.config.errors import RunInUseError
from anon_dist.train.config.parsing import ConfigError

STEPS = list(range(1, 13))
WAITS = {"log__project": HELD}


def steps_taken(folder):
    """The steps in a cell's metrics, in order."""
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    return [r["step"] for r in map(json.loads, lines) if "loss" in r]


def states(cells):
    return Counter(folder.state for folder in cells.values())


def until(condition):
    """Wait for it; false if it does not come true."""
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def once(monkeypatch):
    """A function: have the action called, once, as soon as the condition is true of a sweep that runs here."""

    def arrange(condition, action):
        pending, start = [action], run.Scheduler._start

        def _start(scheduler):
            start(scheduler)
            if pending and condition():
                pending.pop()()

        monkeypatch.setattr(run.Scheduler, "_start", _start)

    return arrange


def test_the_report_is_one_file_that_a_browser_shows(sweep, cells, tmp_path):
    """Logs and settings are text in it, whatever they look like."""
    assert sweep("optim.gamma=0,1", "optim.lr=1e-3,3e-3", baseline="adamw", pictures=True)
    folder = cells()["anon", 1.0, 1e-3, 0]
    outcome = json.loads((folder.path / "outcome.json").read_text())
    tail = "<script>document.title = 'run'</script>\n<b>not bold</b> & so on"
    failed = {**outcome, "state": "failed", "reason": "a <class 'x'> | b", "loss": None, "log_tail": tail}
    (folder.path / "outcome.json").write_text(json.dumps(failed))
    write_report(tmp_path / "sweep")
    text = (tmp_path / "sweep" / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', text) == []
    assert text.count("<details>") == text.count("</details>") == 1
    for said in ("<h2>Best</h2>", "&lt;class 'x'&gt;", "&lt;script&gt;", "&lt;b&gt;not bold&lt;/b&gt; &amp; so on"):
        assert said in text
    assert "<script" not in text
    shown = browse(tmp_path / "sweep" / "report.html", tmp_path)
    assert len(shown["pictures"]) >= 2
    assert min(shown["pictures"]) > 500
    assert shown["asked"] == []
    assert shown["tables"] == [4, 7, 2]
    assert shown["wide"] <= shown["window"]


def test_a_sweep_finds_the_best_and_says_so(sweep, cells, tmp_path):
    grid = ("optim.gamma=0:1:0.5", "optim.lr=1e-3,3e-3,1e-2")
    assert sweep(*grid, seeds="2", baseline="adamw", baseline_lr="3e-3", pictures=True)
    found = cells()
    assert len(found) == 3 * 3 * 2 + 2
    for (name, *_), folder in found.items():
        cell = folder.cell
        gamma = cell.gamma if name == "anon" else 0.9
        assert folder.outcome.loss == pytest.approx(final_loss(gamma, cell.lr, cell.seed))
        assert steps_taken(folder) == STEPS
        assert not (folder.path / "checkpoints").exists()
    results = Results.read(tmp_path / "sweep")
    best = results.best(results.of("anon"))
    assert dict(best.cell.settings) == {"optim.gamma": 0.5, "optim.lr": 3e-3}
    a, b = (final_loss(0.5, 3e-3, seed) for seed in (0, 1))
    assert best.loss.mean == pytest.approx((a + b) / 2)
    assert best.loss.error == pytest.approx(abs(a - b) / 2)  # s / √n of two values
    page = (tmp_path / "sweep" / "report.md").read_text()
    assert f"| Anon | 0.5 | 0.003 | **{best.loss}** | 2 of 2 |" in page
    assert all(
        (tmp_path / "sweep" / name).read_bytes()[:4] == b"\x89PNG" for name in re.findall(r"\((\w+\.png)\)", page)
    )
    assert {"lr.png", "gamma.png", "curves.png"} == set(re.findall(r"\((\w+\.png)\)", page))
    assert "`the command`" in page


def test_what_has_ended_is_not_run_again_and_a_larger_grid_runs_what_is_new(sweep, cells):
    sweep("optim.lr=1e-3,3e-3")
    before = {k: (f.path / "metrics.jsonl").stat().st_mtime_ns for k, f in cells().items()}
    assert sweep("optim.lr=1e-3,3e-3,1e-2", seeds="2")
    after = {k: (f.path / "metrics.jsonl").stat().st_mtime_ns for k, f in cells().items()}
    assert len(after) == 6
    assert all(after[k] == before[k] for k in before)


def test_failures_are_kept_with_their_reason_and_retried_when_asked(sweep, cells, tmp_path):
    grid = f"optim.lr=3e-3,{CRASH},{DIVERGE}"
    assert sweep(grid)
    found = cells()
    crashed, diverged = found["anon", CRASH, 0], found["anon", DIVERGE, 0]
    assert crashed.outcome.reason == "crashed (exit code 1): RuntimeError: the disk is full"
    assert "Traceback" in crashed.outcome.log_tail
    assert diverged.outcome.reason == "diverged: error: 3 steps in a row had a non-finite gradient"
    page = (tmp_path / "sweep" / "report.md").read_text()
    assert "1 finished" in page
    assert "2 failed" in page
    assert "| anon lr=0.5 | 0 | failed | 6 | crashed (exit code 1): RuntimeError: the disk is full |" in page

    (tmp_path / "sweep" / "cells" / "mended").touch()
    assert sweep(grid)
    assert states(cells()) == {"finished": 1, "failed": 2}
    assert sweep(grid, retry_failed=True)
    assert states(cells()) == {"finished": 2, "failed": 1}


def test_hopeless_cells_are_stopped_and_go_on_when_asked(sweep, cells, tmp_path):
    grid = f"optim.lr=1e-3,2e-3,3e-3,4e-3,{HOPELESS}"
    assert sweep(grid, parallel=5)
    stopped = cells()["anon", HOPELESS, 0]
    assert states(cells()) == {"finished": 4, "stopped": 1}
    assert "1.1 times the median" in stopped.outcome.reason
    assert stopped.outcome.loss is None
    assert "| anon lr=0.125 | 0 | stopped |" in (tmp_path / "sweep" / "report.md").read_text()
    assert steps_taken(stopped) == STEPS[:5]
    assert sweep(grid, parallel=5)
    assert steps_taken(stopped) == STEPS[:5]
    assert sweep(grid, parallel=5, early_stop=False)
    assert stopped.outcome.state == "finished"
    assert steps_taken(stopped) == STEPS  # from its checkpoint


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_children_and_the_same_sweep_goes_on(number, sweep, cells, once, tmp_path):
    grid, old = "optim.lr=1e-3,3e-3,1e-2", signal.getsignal(number)
    once(lambda: sum(bool(f.metrics()) for f in cells().values()) == 2, lambda: os.kill(os.getpid(), number))
    assert not sweep(grid, changes=WAITS)
    assert signal.getsignal(number) is old
    found = cells()
    assert states(found) == {"unfinished": 2, "missing": 1}
    assert all((f.path / "checkpoints" / "step").exists() for f in found.values() if f.state == "unfinished")
    assert "| unfinished |" in (tmp_path / "sweep" / "report.md").read_text()
    (tmp_path / "sweep" / "cells" / "go").touch()
    assert sweep(grid, changes=WAITS)
    assert states(cells()) == {"finished": 3}
    assert all(steps_taken(f) == STEPS for f in cells().values())


def test_a_killed_sweep_leaves_no_run_behind_and_its_folder_free(sweep, cells, tmp_path):
    grid = "optim.lr=1e-3,3e-3"
    pid = os.fork()
    if pid == 0:
        try:
            sweep(grid, changes=WAITS)
        finally:
            os._exit(1)
    assert until(lambda: len(cells()) == 2 and all(f.metrics() for f in cells().values()))
    with pytest.raises(
        RunInUseError, match=rf"^--out = {tmp_path}/sweep is in use by process {pid} on .* choose another --out$"
    ):
        sweep(grid, changes=WAITS)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

    def free():  # the children write their checkpoints; until then they hold their cells
        with contextlib.suppress(RunInUseError):
            return sweep(grid, changes=WAITS)

    assert until(lambda: all((f.path / "checkpoints" / "step").exists() for f in cells().values()))
    (tmp_path / "sweep" / "cells" / "go").touch()
    assert until(free)
    assert all(steps_taken(f) == STEPS for f in cells().values())


def test_a_cell_in_which_another_is_at_work_is_left_out_and_not_recorded(sweep, cells, tmp_path, capsys):
    grid = "optim.lr=1e-3,3e-3"
    assert sweep(grid)
    (busy, free) = (cells()["anon", lr, 0] for lr in (1e-3, 3e-3))
    for folder in (busy, free):
        folder.reopen()
    with (busy.path / "fake.lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(RunInUseError) as left_out:
            sweep(grid)
    assert str(left_out.value).startswith(
        f"cells left out, as other processes are at work in their folders: 1 (the first, {busy.path}: run_dir"
    )
    assert "lr=0.001 seed=0: error: run_dir = " in capsys.readouterr().out
    assert (busy.outcome, free.outcome.state) == (None, "finished")
    assert "| finished |" not in (tmp_path / "sweep" / "report.md").read_text().split("0.001")[-1]
    assert sweep(grid)
    assert states(cells()) == {"finished": 2}
    assert IN_USE == fake_trainer.IN_USE


def test_a_run_that_does_not_listen_is_killed(sweep, cells, once, monkeypatch):
    monkeypatch.setattr("anon_dist.sweep.cli.Scheduler", partial(run.Scheduler, grace=0.5))
    deaf = [
        "python3",
        "-c",
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)",
    ]
    told = []

    def tell():
        told.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    once(lambda: any("deaf" in f.log.read_text() for f in cells().values()), tell)
    assert not sweep("optim.lr=1e-3", trainer=lambda config: deaf)
    assert time.monotonic() - told[0] < run.GRACE_SECONDS / 2


def test_other_configurations_are_refused_in_the_same_folder(sweep, cells, tmp_path):
    sweep("optim.lr=1e-3")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"config\.train\.steps: 12 there, 16 now"):
        sweep("optim.lr=1e-3", changes={"train__steps": 16})
    with pytest.raises(ConfigError, match=r"match_rms: None there, a run at γ = 1 now"):
        sweep("optim.lr=1e-3", match_rms=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"parallel": 0}, {}, "--parallel 0"),
        ({"baseline_lr": "1e-3"}, {}, "without --baseline adamw"),
        ({"baseline": "adamw", "baseline_lr": "-1"}, {}, "--baseline-lr, that is optim.lr=-1: 'optim.lr' must be"),
        ({"match_rms": True}, {"optim__match": "spectrum.json"}, "matches learning rates already"),
        ({}, {"optim__gamma_schedule": {0: 0.5, 9: 1.0}}, "set optim.match"),
        ({}, {"train__tensor_parallel": 2}, "one process on one device"),
        ({}, {"optim__name": "adamw"}, "--baseline adamw adds AdamW's"),
        ({}, {"data__seq_len": 32, "train__global_batch": 6}, "not a multiple"),
    ],
)
def test_errors_come_before_anything_is_made(options, changes, message, sweep, tmp_path):
    with pytest.raises(ConfigError, match=message):
        sweep("optim.lr=1e-3", changes=changes, **options)
    assert not (tmp_path / "sweep").exists()


def test_a_setting_with_a_failed_seed_is_never_the_best(sweep, cells, tmp_path):
    """The seeds that survived would flatter it."""
    assert sweep("optim.lr=1e-3,3e-3", seeds="2")
    best = cells()["anon", 3e-3, 1]
    outcome = json.loads((best.path / "outcome.json").read_text())
    (best.path / "outcome.json").write_text(
        json.dumps({**outcome, "state": "failed", "reason": "diverged", "loss": None})
    )
    write_report(tmp_path / "sweep")
    results = Results.read(tmp_path / "sweep")
    assert results.best(results.settings).cell.lr == 1e-3
    assert (
        f"| Anon | 0.003 | ({final_loss(1.0, 3e-3, 0):.4f}) | 1 finished, 1 failed |"
        in (tmp_path / "sweep" / "report.md").read_text()
    )


def test_no_sweep_no_report(tmp_path):
    with pytest.raises(ConfigError, match="is no sweep's folder"):
        write_report(tmp_path)


def test_a_gpu_each_or_as_many_as_cores_and_memory_allow(base, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr("anon_dist.sweep.run.free_memory", lambda: 64e9)
    room = Room.of_this_machine(base(), 256, None)
    assert (room.parallel, room.threads, room.devices) == (8, 1, [])
    assert room.environment(3)["OMP_NUM_THREADS"] == "1"
    assert Room.of_this_machine(base(), 256, 3).threads == 2
    monkeypatch.setattr("anon_dist.sweep.run.free_memory", lambda: 2e9)
    assert Room.of_this_machine(base(), 256, None).parallel == 2
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    room = Room.of_this_machine(base(), 256, None)
    assert (room.parallel, room.threads) == (2, 4)
    assert [room.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "6", "4"]
