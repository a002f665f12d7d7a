"""The metrics file survives kills and resumes."""

import io
import json
import logging
import math
import resource

import pytest

from anon_dist.train.reports.metrics import Console, MetricsFile, add_metrics, read_metrics, table_line
from anon_dist.train.reports.pace import Pace
from anon_dist.trained.runs import collect


def test_a_resumed_run_repeats_no_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in range(1, 6):
        file.write({"step": step, "loss": step / 3})
    file.close()
    with path.open("a") as torn:
        torn.write('{"step": 6, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5]
    file = MetricsFile(path, 3)
    file.write({"step": 4, "loss": 0.5})
    file.close()
    assert read_metrics(path) == [{"step": t, "loss": t / 3} for t in (1, 2, 3)] + [{"step": 4, "loss": 0.5}]


@pytest.mark.parametrize("cut_at_once", [True, False])
def test_of_a_line_that_could_not_be_written_nothing_stays(cut_at_once, tmp_path, monkeypatch):
    """The kernel writes as much of it as there is room for, before it refuses the rest; taking that out may be refused too."""
    path, records = tmp_path / "metrics.jsonl", [{"step": t, "loss": t / 3} for t in (1, 2, 3)]
    file = MetricsFile(path, 0)
    file.write(records[0])
    whole, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        if not cut_at_once:
            patch.setattr(MetricsFile, "_cut", lambda file: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, hard))
        try:
            with pytest.raises(OSError, match="too large"):
                file.write(records[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(path.read_bytes()) == len(whole) + (0 if cut_at_once else 10)
    for record in records[1:]:
        file.write(record)
    file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == records


def test_last_lines_that_are_no_records_are_taken_out(tmp_path):
    """A line without its end may be half a number."""
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": 0.5}\n'
    for tail in (
        b'{"step": 2, "loss": 0.2',
        b'{"step": 2}',
        b"\xff\n",
        b"[2]\n" + b"\0" * 40,
        b"{}\n",
        b'{"step": 1, "final_loss": 1}\n',
    ):
        path.write_bytes(good + tail)
        file = MetricsFile(path, 5)
        file.write({"step": 2, "loss": 0.25})
        file.close()
        assert read_metrics(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


@pytest.mark.parametrize("damage", [b'{"step: 2, "loss": 0.6}', b"\xff", b"", b'{"step": "2"}', b"{}"])
def test_a_damaged_line_takes_no_other_with_it(damage, tmp_path):
    """It stays where it is: some of it may be of use to a person."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": t, "loss": t / 3}).encode() for t in range(1, 8)]
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]) + b"\n")
    file = MetricsFile(path, 5)
    assert file.damaged == [2]
    file.write({"step": 6, "loss": 0.25})
    file.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 3, 4, 5, 6]
    assert path.read_bytes().splitlines()[:5] == [lines[0], damage, *lines[2:5]]


@pytest.mark.parametrize("how", ["removed", "renamed", "empty instead"])
def test_a_file_that_was_taken_away_is_written_anew(how, tmp_path):
    path, records = tmp_path / "metrics.jsonl", [{"step": t, "loss": t / 3} for t in range(1, 5)]
    file = MetricsFile(path, 0)
    for record in records[:2]:
        file.write(record)
    assert file.confirm() is None
    path.unlink() if how == "removed" else path.rename(tmp_path / "old.jsonl")
    if how == "empty instead":
        path.touch()
    file.write(records[2])
    assert "taken away" in file.confirm()
    assert file.confirm() is None
    file.write(records[3])
    file.close()
    assert read_metrics(path) == records


def test_a_file_in_whose_place_is_something_else_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write({"step": 1, "loss": 0.5})
    path.rename(tmp_path / "old.jsonl")
    path.mkdir()
    with pytest.raises(FileExistsError, match="something else has its name"):
        file.confirm()
    path.rmdir()
    path.write_text("mine\n")
    with pytest.raises(FileExistsError, match="something else has its name"):
        file.confirm()
    assert path.read_text() == "mine\n"
    file.close()


def test_a_file_that_was_cut_is_said_and_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write({"step": 1, "loss": 0.5})
    path.write_bytes(b"")
    assert "25 bytes" in file.confirm()
    file.write({"step": 2, "loss": 0.5})
    file.close()
    assert read_metrics(path) == [{"step": 2, "loss": 0.5}]


def test_what_is_no_finite_number_is_strict_json_and_comes_back(tmp_path):
    """And lines of earlier versions, with a bare NaN, are read as before."""
    path = tmp_path / "metrics.jsonl"
    record = {
        "step": 1,
        "loss": math.nan,
        "val_loss/a b": math.inf,
        "grad_norm": -math.inf,
        "lr": 0.5,
        "slowest_host": "x",
    }
    path.write_text('{"step": 0, "loss": NaN, "grad_norm": -Infinity}\n')
    file = MetricsFile(path, 1)
    file.write(record)
    file.close()
    add_metrics(path, record)
    old, *lines = path.read_text().splitlines()
    for line in lines:
        written = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        assert [written[k] for k in ("loss", "val_loss/a b", "grad_norm", "lr")] == [None, None, None, 0.5]
        assert written["not_finite"] == "loss nan; val_loss/a b inf; grad_norm -inf"
    assert json.dumps(read_metrics(path)) == json.dumps([json.loads(old), record, record])
    (tmp_path / "config.yaml").write_text("{}")
    ((run,), _) = collect(tmp_path)  # for `anon-dist runs`
    assert math.isnan(run.records[-1]["loss"])


def test_a_damaged_line_hides_no_others(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 3}\n{"st\xffep": 2\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 3]
    add_metrics(path, {"step": 3, "final_loss": 1.0})
    assert [r["step"] for r in read_metrics(path)] == [1, 3, 3]


FULL = {
    "step": 1_234_567,
    "samples": 10**9,
    "epoch": 0.5,
    "loss": 3.0123456,
    "lr": 0.00012345,
    "grad_norm": 123.456789,
    "tokens_per_s": 12_345_678.9,
    "gamma/0": 1.0,
    "update_rms": 0.5,
    "mfu": 0.4123,
    "memory_gb": 123.456,
    "skipped": 10,
}


def test_a_record_is_a_line_of_a_table_that_fits_a_terminal():
    line = table_line(FULL, 16_777_216, 3e6)
    assert len(line) <= 100
    assert line.startswith("step=1234567 ")
    assert {"loss=3.0123", "lr=1.234e-04", "norm=123.46", "skipped=10"} <= set(line.split())
    assert line.endswith("eta=833:20:00")
    small = {k: v for k, v in FULL.items() if k != "skipped"} | {"step": 20}
    lines = [table_line({**small, "loss": loss}, 600, 75) for loss in (3.0, 12.3456789)]
    assert lines[1] == (
        "step=20  loss=12.346  lr=1.234e-04 norm=123.46  tok/s=12,345,679 mfu=41.2% mem=123.5GB eta=01:15"
    )
    assert lines[0].index("lr=") == lines[1].index("lr=")
    said = table_line({"step": 5, "val_loss": 4.0, "val_perplexity": 54.6, "val_bits_per_byte": 1.9}, 600, 9.0)
    assert said == "step=5   val_loss=4       perplexity=54.6    bits/byte=1.9"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_a_line_of_progress(monkeypatch):
    """Steps of all, time left, and the numbers one looks at; the records stay above it."""
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("sys.stdout", screen)
    console = Console(600, 100)
    for step in (101, 102, 103):
        console.step(step)
    logging.getLogger("anon_dist.train.optimizer.watch").warning("much is clipped")
    console.record({**FULL, "step": 103})
    console.close()
    text = screen.getvalue()
    assert "\rmuch is clipped\n" in text  # not behind what the bar shows
    last = text.split("\r")[-1]
    assert "103/600" in last
    assert all(word in last for word in ("loss=3.0123", "tok/s=12,345,679", "mfu=41.2%", "<"))
    assert "step=103 loss=3.0123" in text


def test_elsewhere_there_is_none(capsys):
    console = Console(600, 0)
    console.step(1)
    console.record({"step": 1, "loss": 2.5})
    console.close()
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("step=1   loss=2.5     eta=")


def test_the_time_left_does_not_jump_with_a_validation(monkeypatch):
    """Of a run with steps of 2 s, and 30 s for a validation after each tenth: right to within one, on the bar and in the table."""
    screen, now = Terminal(), 0.0
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("sys.stdout", screen)
    console = Console(100, 0, clock=lambda: now)
    for step in range(1, 100):
        now += 2
        console.step(step)
        console.record({"step": step, "loss": 3.0})
        lines = screen.getvalue().replace("\r", "\n").split("\n")
        (said,) = [line.split("eta=")[1] for line in lines if line.startswith(f"step={step} ")]
        (bar, *_) = [line.partition("<")[2][:5] for line in reversed(lines) if f"{step}/100" in line]
        assert said.strip() == bar
        minutes, seconds = bar.split(":")
        left = 60 * int(minutes) + int(seconds)
        if step <= 10:
            assert left == 2 * (100 - step)  # it knows of no validation yet
        else:
            assert abs(left - 2 * (100 - step) - 30 * (10 - (step - 1) // 10)) <= 30
        now += 30 if step % 10 == 0 else 0.01
        console.pause()
    console.close()


def test_a_run_that_goes_back_has_more_time_left():
    now = 0.0
    pace = Pace(10, 0, clock=lambda: now)
    assert pace.left() is None
    for step in (1, 2, 3):
        now += 2
        pace.step(step)
    assert pace.left() == 14
    pace.step(1)
    assert pace.left() == 18
