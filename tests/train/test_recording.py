"""A run whose metrics cannot be written for a while: they are kept, and each is written and told once."""

import json
import threading
from pathlib import Path

import pytest
from accelerate import Accelerator
from helpers import at_step, metrics

from anon_dist.train import recording
from anon_dist.train.config.errors import RunError
from anon_dist.train.reports.metrics import MetricsFile, read_metrics

FULL = OSError(28, "No space left on device")


@pytest.fixture
def full(monkeypatch):
    """A function that has writes of metrics fail, from a step on and until another."""
    left, write = [False], MetricsFile.write

    def fail(file, record):
        if left[0]:
            raise FULL
        write(file, record)

    def between(patch, first, last):
        patch.setattr(MetricsFile, "write", fail)
        at_step(patch, first, lambda: left.__setitem__(0, True))
        at_step(patch, last, lambda: left.__setitem__(0, False))

    yield between
    left[0] = False


def losses(tracker):
    return [(step, values["loss"]) for values, step in tracker.told if "loss" in values]


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_records_that_cannot_be_written_come_with_the_next_one(
    run_config, train, tmp_path, monkeypatch, caplog, tracker, full
):
    whole = train(run_config(run_dir=str(tmp_path / "whole")))
    expected = losses(tracker)
    tracker.told.clear()
    with monkeypatch.context() as patch:
        full(patch, 9, 12)  # from the record of step 9 on, until that of step 12
        folder = train(run_config(checkpoint__every=7))
    assert metrics(folder) == metrics(whole)
    assert steps(folder) == sorted(steps(folder))
    assert losses(tracker) == expected
    assert len(expected) == 14
    said = [r.getMessage() for r in caplog.records if "metrics.jsonl" in r.getMessage()]
    assert len(said) == 2
    assert "metrics.jsonl could not be written: [Errno 28] No space left on device. The run goes on" in said[0]
    assert said[1].endswith(
        "metrics.jsonl is written again, with the 5 records that were kept"
    )  # step 10 has a validation


@pytest.mark.parametrize("limit", ["checkpoint", "records"])
def test_a_run_whose_metrics_stay_unwritten_ends_before_it_saves(limit, run_config, train, tmp_path, monkeypatch, full):
    whole = train(run_config(run_dir=str(tmp_path / "whole")))
    config = run_config(checkpoint__every=4 if limit == "checkpoint" else 6)
    with (
        monkeypatch.context() as patch,
        pytest.raises(RunError, match=r"metrics.jsonl could not be written: .*No space"),
    ):
        full(patch, 7, 100)
        patch.setattr(recording, "KEPT", 1000 if limit == "checkpoint" else 2)
        train(config)
    folder = tmp_path / "run"
    assert max(steps(folder)) == 6
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step-0000000{4 if limit == 'checkpoint' else 6}"]
    train(config)
    assert metrics(folder) == metrics(whole)


def test_a_tracker_that_cannot_write_ends_no_run(run_config, train, monkeypatch, caplog, tracker):
    class Broken:
        name = "tensorboard"

        def log(self, values, step):
            if step > 3:
                raise FULL

        def finish(self):
            raise FULL

    begin = Accelerator.init_trackers

    def init(accelerator, *args, **kwargs):
        begin(accelerator, *args, **kwargs)
        accelerator.trackers.insert(0, Broken())

    monkeypatch.setattr(Accelerator, "init_trackers", init)
    folder = train(run_config())
    assert [step for step, _ in losses(tracker)] == list(range(1, 15))
    assert len(metrics(folder)) > 14
    said = [r.getMessage() for r in caplog.records if "tensorboard" in r.getMessage()]
    assert said == [
        "tensorboard could not be written: [Errno 28] No space left on device. It gets no more records of this start; "
        "metrics.jsonl has all"
    ]


def test_a_file_that_is_taken_away_while_the_run_is_at_work_is_whole_at_the_end(
    run_config, train, tmp_path, monkeypatch, caplog
):
    whole = train(run_config(run_dir=str(tmp_path / "whole")))
    config = run_config()
    path = Path(config.run_dir) / "metrics.jsonl"
    with monkeypatch.context() as patch:
        at_step(patch, 6, path.unlink)
        folder = train(config)
    assert metrics(folder) == metrics(whole)
    assert "was taken away while the run was at work, and is written anew" in caplog.text


def test_a_damaged_line_is_said_and_the_others_stay(run_config, train, tmp_path, caplog):
    whole = train(run_config(run_dir=str(tmp_path / "whole")))
    folder = train(run_config(train__steps=8))
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1].replace(b'"', b"", 1), *lines[2:]]))
    train(run_config())
    assert "1 damaged lines are passed over: 2" in caplog.text
    kept = {record["step"] for record in read_metrics(path)}
    assert kept == {record["step"] for record in metrics(whole)} - {2}


def test_tensorboards_thread_prints_no_traceback(run_config, train, monkeypatch, caplog):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def fail(writer, data):
        raise FULL

    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    at_step(monkeypatch, 4, lambda: monkeypatch.setattr(RecordWriter, "write", fail))
    config = run_config()
    config.log.trackers = ("tensorboard",)
    folder = train(config)
    assert len(metrics(folder)) > 14
    assert [r.getMessage() for r in caplog.records if "tensorboard could not be written: [Errno 28]" in r.getMessage()]
    assert not printed
