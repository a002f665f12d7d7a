"""Spikes: what is one, against plain Python; what is done about one in whole runs."""

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Crash, at_step, crash, metrics, send

from anon_dist.data import BatchLoader
from anon_dist.train import loop
from anon_dist.train.config.errors import RunError
from anon_dist.train.health import spikes
from anon_dist.train.health.spikes import SpikeDetector
from anon_dist.train.reports.metrics import MetricsFile


def plainly(series, sigma=6.0, span=128, warm=64):
    """Which of (loss, norm) are spikes: by lists of the values that were none."""
    kept, found = [], []
    for values in series:
        out = not all(map(math.isfinite, values))
        if not out and len(kept) >= warm:
            for i, value in enumerate(values):
                before = sorted(v[i] for v in kept[-span:])
                core = before[: len(before) - len(before) // 16]
                far = statistics.fmean(core) + 2 * sigma * statistics.stdev(core)
                before = [v for v in before if v <= far]
                out |= value > statistics.fmean(before) + sigma * statistics.stdev(before)
        found.append(out)
        if not out:
            kept.append(values)
    return found


def series(steps=420, seed=1):
    """A falling loss with noise, and spikes, one after the other, small and great, and what is not finite."""
    draw = np.random.default_rng(seed)
    loss = 3.0 + 5.0 * np.exp(-np.arange(steps) / 60) + 0.05 * draw.standard_normal(steps)
    norm = 1.0 + 0.1 * draw.standard_normal(steps) ** 2
    for at in (20, 90, 91, 200, 330):
        loss[at] += 30.0
    for at in (150, 333):
        norm[at] = 40.0
    loss[250], norm[260], norm[30] = math.nan, math.inf, math.nan
    return [(float(a), float(b)) for a, b in zip(loss, norm, strict=True)]


def judged(detector, values):
    """The answers, and what the host reads."""
    found = []
    for loss, norm in values:
        detector.begin(torch.tensor(loss, dtype=torch.float64), 1)
        vetoed = bool(detector.veto(torch.tensor(norm, dtype=torch.float64)))
        found.append((vetoed, detector.read().spike))
    return found


@pytest.mark.parametrize("action", ["record", "skip"])
def test_what_is_a_spike(action):
    """By plain Python in float64; and the same when it is saved as JSON and loaded in between, in another detector."""
    values = series()
    expected = plainly(values)
    out = {at for at, spike in enumerate(expected) if spike}
    assert out >= {30, 90, 91, 150, 200, 250, 260, 330, 333}
    assert 20 not in out  # before the window is warm
    found = judged(SpikeDetector(torch.device("cpu"), 6.0, action), values)
    assert [spike for _, spike in found] == expected
    assert [vetoed for vetoed, _ in found] == [action == "skip" and out for out in expected]
    for at in (0, 40, 91, 300):
        first, second = (SpikeDetector(torch.device("cpu"), 6.0, action) for _ in range(2))
        judged(first, values[:at])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert judged(second, values[at:]) == found[at:]


def test_outliers_that_were_not_judged_hide_no_spike():
    """Before anything is judged up to 4 of 64 steps stand out; without such steps what counts is the mean of the window and its σ."""
    draw = np.random.default_rng(2)
    values = [(4.0 + 0.05 * a, 1.0 + 0.1 * b) for a, b in draw.standard_normal((120, 2))]
    for at in (3, 20, 33, 60):
        values[at] = (4.0, 1e5)
    values[80] = (4.0, 40.0)
    found = [spike for _, spike in judged(SpikeDetector(torch.device("cpu"), 6.0, "skip"), values)]
    assert [at for at, spike in enumerate(found) if spike] == [80]
    detector = SpikeDetector(torch.device("cpu"), 6.0, "skip")
    judged(detector, values[90:] * 3)  # none of which stands out
    mean, sigma = detector._statistics(detector._count)
    told = np.array(values[90:] * 3)
    assert mean.numpy() == pytest.approx(told.mean(0), rel=1e-12)
    assert sigma.numpy() == pytest.approx(told.std(0, ddof=1), rel=1e-12)


def test_a_new_level_is_no_spike_for_ever():
    """Where the steps are taken; what would be skipped ends the run by `train.max_skipped`."""
    values = [(3.0 + 0.01 * (i % 7), 1.0) for i in range(100)] + [(5.0 + 0.01 * (i % 7), 1.0) for i in range(100)]
    found = [spike for _, spike in judged(SpikeDetector(torch.device("cpu"), 6.0, "record"), values)]
    assert found == [False] * 100 + [True] * spikes.LEVEL + [False] * (100 - spikes.LEVEL)
    found = [spike for _, spike in judged(SpikeDetector(torch.device("cpu"), 6.0, "skip"), values)]
    assert found == [False] * 100 + [True] * 100


def test_a_loss_scale_may_overflow():
    """fp16: a step that is not finite is no spike."""
    found = judged(SpikeDetector(torch.device("cpu"), 6.0, "rewind", scaled=True), [(3.0, math.nan)] * 3)
    assert found == [(False, False)] * 3


def test_an_update_that_doubles():
    detector = SpikeDetector(torch.device("cpu"), 6.0, "record")
    assert [detector.update_doubled(x) for x in [1.0] * 8 + [1.9, 2.1, 5.0, 1.0]] == [None] * 9 + [1.0, 1.0, None]


def test_a_state_that_is_none():
    for state in ({"window": [[0.0]], "count": 1, "row": 0, "updates": [], "found": 0}, {"count": 1}, {"window": 3}):
        with pytest.raises(ValueError, match="spikes' detector"):
            SpikeDetector(torch.device("cpu"), 6.0, "skip").load_state_dict(state)


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch):
    """A function: the loss of these steps, by the samples read before, is so many times greater. Judged from the 8th step on."""
    monkeypatch.setattr(spikes, "WARM", 8)
    losses, take_step, now, poisoned = loop.Batch.losses, loop.take_step, [0], []

    def greater(batch, model, *args, **options):
        found = losses(batch, model, *args, **options)
        return found * 30.0 if model.training and now[0] in poisoned else found

    def told(run, *rest):
        now[0] = run.loader.cursor // 8 + 1
        return take_step(run, *rest)

    monkeypatch.setattr(loop.Batch, "losses", greater)
    monkeypatch.setattr(loop, "take_step", told)
    return poisoned.extend


def steps_of(tracker):
    """Of what it got: the run's step, its own."""
    return [(values["step"], step) for values, step in tracker.told]


def by_step(folder):
    return {r["step"]: r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in r}


OPTIONS = {
    "train__steps": 20,
    "train__spike_sigma": 30.0,
    "eval__final_sequences": 8,
    "eval__every": 0,
    "optim__refresh_ratio": 1.1,
}


@pytest.mark.parametrize("optimizer", ["anon", "adamw"])
def test_a_spike_is_skipped_and_the_run_resumes_with_what_it_knew(
    optimizer, run_config, train, tmp_path, monkeypatch, poison
):
    """The step is none; decisions are those of plain Python on the records; a run that crashed comes to the same bits."""
    poison([15, 19])
    options = {**OPTIONS, "train__on_spike": "skip", "optim__name": optimizer}
    whole = train(run_config(**options))
    records = by_step(whole)
    expected = plainly([(records[t]["loss"], records[t]["grad_norm"]) for t in sorted(records)], 30.0, warm=8)
    assert [t for t in records if expected[t - 1]] == [15, 19]
    assert [t for t, r in records.items() if r.get("skipped")] == [15, 19]
    assert [records[t].get("spikes", 0) for t in (14, 15, 18, 19, 20)] == [0, 1, 1, 2, 2]
    if optimizer == "anon":
        assert records[15]["update_rms"] == records[14]["update_rms"]  # nothing has changed
    if optimizer == "adamw":
        return
    config = run_config(**options, run_dir=str(tmp_path / "crashed"))
    with monkeypatch.context() as once, pytest.raises(Crash):
        at_step(once, 18, crash)
        train(config)
    assert metrics(train(config)) == metrics(whole)


def test_a_spike_that_is_recorded_is_taken(run_config, train, poison, caplog):
    poison([15])
    records = by_step(train(run_config(**OPTIONS)))
    assert "skipped" not in records[15]
    assert records[15]["spikes"] == records[20]["spikes"] == 1
    assert records[15]["update_rms"] != records[14]["update_rms"]
    assert "step 15 is a spike, and was taken: the loss is" in caplog.text
    assert "σ above" in caplog.text


@pytest.mark.parametrize("late", [False, True])
def test_a_run_goes_back_from_a_spike(late, run_config, train, tmp_path, monkeypatch, poison, tracker, caplog):
    """To the last checkpoint, and past the samples: the steps that follow are those of a run whose cursor was moved there by hand."""
    if late:  # as on a GPU, a step later
        for module in ("anon_dist.train.loop", "anon_dist.optim.scaling"):
            monkeypatch.setattr(f"{module}.known_to_the_host", lambda number: False)
    poison([15])
    options = {**OPTIONS, "train__on_spike": "rewind"}
    folder = train(run_config(**options))
    passed = 8 * (4 if late else 3)  # steps 13 to 15, or 16
    (told,) = [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "rewound_from" in r]
    assert (told["step"], told["rewinds"], told["samples_passed_over"]) == (12, 1, passed)
    assert told["rewound_from"] == 15 + late
    assert told["spike_loss"] > 30
    records = by_step(folder)
    assert list(records) == list(range(1, 21))
    counted = [told["spikes"], *(records[t].get("spikes", 0) for t in (12, 13, 20))]
    assert counted == [1, 0, 1, 1]  # step 12 was taken before
    assert records[20]["samples"] == 20 * 8 + passed
    assert f"Gone back to step 12, and past the {passed} samples since (time 1 of 3)" in caplog.text
    back = 3 + late  # trackers count on, or they would drop what comes again
    rising = [(t, t) for t in range(1, 12 + back)] + [(t, t + back) for t in range(12, 21)]
    assert [told for told in steps_of(tracker) if told != (20, 20 + back)] == rising[:-1]

    monkeypatch.undo()
    original = BatchLoader.advance

    def jump(loader):
        if original(loader) == 12 * 8:
            loader.pass_over(12 * 8 + passed)
        return loader.cursor

    monkeypatch.setattr(BatchLoader, "advance", jump)
    by_hand = by_step(train(run_config(**OPTIONS, run_dir=str(tmp_path / "by-hand"))))
    for key in ("loss", "grad_norm", "update_rms", "lr", "refreshes"):
        assert [records[t][key] for t in range(13, 21)] == [by_hand[t][key] for t in range(13, 21)], key


def test_going_back_outlives_a_crash_and_has_an_end(run_config, train, tmp_path, monkeypatch, poison, tracker, caplog):
    options = {**OPTIONS, "train__on_spike": "rewind", "checkpoint__every": 12}
    poison([15])
    whole = train(run_config(**options))
    config, calls = run_config(**options, run_dir=str(tmp_path / "crashed")), []
    with monkeypatch.context() as once, pytest.raises(Crash):
        at_step(once, 14, lambda: (calls.append(1), len(calls) == 2 and crash()))  # when it has gone back
        train(config)
    tracker.told.clear()
    resumed = train(config)
    assert {theirs - ours for ours, theirs in steps_of(tracker)} == {3}
    assert "The samples up to 120 are passed over, as before: there was a spike in step 15." in caplog.text
    a, b = by_step(whole), by_step(resumed)
    told = ("loss", "samples", "rewinds", "spikes")
    assert [[r.get(k) for k in told] for r in a.values()] == [[r.get(k) for k in told] for r in b.values()]
    assert a[20]["spikes"] == 1

    poison(range(15, 40))
    end = tmp_path / "end"
    for _ in range(2):  # as it says
        words = (
            r"gone back 2 times already \(train.max_rewinds\). The same command would end so again, from .*step-0+12:"
        )
        with pytest.raises(RunError, match=words):
            train(run_config(**options, run_dir=str(end), train__max_rewinds=2))
    assert [(e["rewinds"], e["spikes"]) for e in json.loads((end / "rewinds.json").read_text())] == [(1, 1), (2, 2)]


@pytest.mark.parametrize("killed", ["tracker", "file"])
def test_no_tracker_misses_a_rewind(killed, run_config, train, monkeypatch, poison, tracker):
    """A run is killed while the record of one goes to the trackers, or to the file: after the resume both have it."""
    poison([15])
    target, name = (type(tracker), "log") if killed == "tracker" else (MetricsFile, "write")
    config = run_config(**OPTIONS, train__on_spike="rewind")

    def until_then(self, values, *args, **options):
        return crash() if "rewound_from" in values else original(self, values, *args, **options)

    with monkeypatch.context() as once, pytest.raises(Crash):
        original = getattr(target, name)
        once.setattr(target, name, until_then)
        train(config)
    tracker.told.clear()
    lines = (train(config) / "metrics.jsonl").read_text().splitlines()
    (record,) = [r for r in map(json.loads, lines) if "rewound_from" in r]
    assert [(values, step) for values, step in tracker.told if "rewound_from" in values] == [(record, 15)]
    assert [step for _, step in tracker.told] == sorted(step for _, step in tracker.told)


@pytest.mark.parametrize("how", ["going back", "damage"])
def test_what_another_history_passed_over_is_read(how, run_config, train, monkeypatch, poison, capsys):
    """A rewind counts no more where the run goes on from a checkpoint before the one that it went back to, and meets no spike this time."""
    poison([15])
    options = {**OPTIONS, "checkpoint__keep": 9}
    config, calls = run_config(**options, train__on_spike="rewind"), []
    with monkeypatch.context() as once, pytest.raises(Crash):
        at_step(once, 14, lambda: (calls.append(1), len(calls) == 2 and crash()))  # when it has gone back to 12
        train(config)
    folder = Path(config.run_dir)
    assert [e["to"] for e in json.loads((folder / "rewinds.json").read_text())] == [12]
    capsys.readouterr()
    config.train.on_spike = "record"  # so there is none to go back from
    if how == "damage":
        (folder / "checkpoints" / "step-00000012" / "__0_0.distcp").write_bytes(b"torn")
    else:
        config.resume = str(folder / "checkpoints" / "step-00000008")
    with monkeypatch.context() as once, pytest.raises(Crash):
        at_step(once, 14, crash)
        train(config)
    said = capsys.readouterr().out
    assert "rewinds.json: going back from step 15 to 12 is not of the history of step 8, and counts no more" in said
    assert (folder / "rewinds.json.aside").exists()
    config.resume = "auto"
    records = by_step(train(config))
    assert "after step 12" in capsys.readouterr().out
    assert [r["samples"] for r in records.values()] == [8 * t for t in range(1, 21)]
    assert not any("rewinds" in r for r in records.values())


def test_a_spike_before_the_first_checkpoint_is_skipped(run_config, train, poison, caplog):
    poison([10])
    options = {**OPTIONS, "train__on_spike": "rewind", "checkpoint__every": 11, "train__steps": 12}
    records = by_step(train(run_config(**options)))
    assert "there is no checkpoint yet to go back to" in caplog.text
    assert [t for t, r in records.items() if r.get("skipped")] == [10]
    assert records[12]["samples"] == 12 * 8


def test_a_signal_in_a_step_that_is_gone_back_from_still_stops_the_run(
    run_config, train, monkeypatch, poison, tmp_path
):
    import signal

    poison([15])
    at_step(monkeypatch, 15, send(signal.SIGTERM))
    folder = train(run_config(**OPTIONS, train__on_spike="rewind"))
    assert max(by_step(folder)) < 15
    assert not (folder / "result.json").exists()


def test_damaged_rewinds_are_told_once(run_config, train, monkeypatch, poison, caplog):
    poison([15])
    config = run_config(**OPTIONS, train__on_spike="rewind")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, 18, crash)
        train(config)
    path = Path(config.run_dir) / "rewinds.json"
    path.write_text(path.read_text()[:-9])
    train(config)
    said = [r.getMessage() for r in caplog.records if "rewinds.json" in r.getMessage()]
    assert len(said) == 1
    assert "rewinds.json cannot be read, and is left out of account: JSONDecodeError" in said[0]
