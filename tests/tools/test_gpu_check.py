"""tools/gpu_check.sh, on the CPU: what its parts find, and what becomes of those that fail, hang or find no time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "gpu_check"))
import check  # noqa: E402 - scripts of that folder import each other by name


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Its whole script with the parts that take least."""
    out = tmp_path_factory.mktemp("checked") / "out"
    command = ["bash", "tools/gpu_check.sh", "--out", str(out), "--device", "cpu", "--only", "gpt2-small"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, out


def test_a_table_and_its_numbers(checked):
    printed, out = checked
    text = (out / "table.md").read_text()
    assert text in printed
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines()]
    assert rows[0] == list(check.COLUMNS)
    assert {len(row) for row in rows} == {len(check.COLUMNS)}
    numbers = json.loads((out / "numbers.json").read_text())
    assert len(numbers["rows"]) == len(rows) - 2
    assert not [row for row in numbers["rows"] if "FAILED" in row.get("remark", "")], (out / "log.txt").read_text()
    assert [name for name in numbers if name != "rows"] == ["machine", "gpt2-small"]
    assert all(0 < numbers[name]["seconds"] < 600 for name in ("machine", "gpt2-small"))


def test_both_loops_train_one_model_on_the_same_batches(checked):
    found = json.loads((checked[1] / "numbers.json").read_text())["gpt2-small"]
    ours, plain = found["tokens/s"]["ours"], found["tokens/s"]["plain"]
    # The first loss is of equal weights; in bfloat16, of which one of them makes float32 logits on a CPU.
    assert ours["losses"][0] == pytest.approx(plain["losses"][0], abs=2e-3)
    assert len(set(ours["losses"])) == len(ours["losses"]) == 5
    assert len(ours["tokens_per_s"]) == len(plain["tokens_per_s"]) == 6
    assert all({"data", "forward", "backward", "optimizer"} <= set(loop["seconds"]) for loop in (ours, plain))
    measured, planned = found["peak memory, GB"]
    assert measured == pytest.approx(planned, rel=0.25)


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """`check.run_part`, of parts that this test writes."""

    def run(name, code, seconds=60.0):
        (tmp_path / "parts.py").write_text("import json, sys, time, subprocess\nout = sys.argv[7]\n" + code)
        monkeypatch.setattr(check, "HERE", tmp_path)
        return check.run_part(check.Part(name, seconds), seconds, "cpu", tmp_path, tmp_path / "log.txt")

    return run


WRITE = "open(out, 'w').write(json.dumps({'rows': [{'what': 'first'}], 'numbers': {'x': 1}}))\n"


def test_a_part_that_fails_is_a_row_with_its_error(parts):
    rows, numbers = parts("broken", WRITE + "raise ValueError('no such | device')")
    assert rows == [
        {"part": "broken", "what": "first"},
        {"part": "broken", "what": "the rest of it", "remark": "FAILED (code 1): ValueError: no such | device"},
    ]
    assert 0 <= numbers.pop("seconds") < 30  # in tenths
    assert numbers == {"x": 1}
    assert check.table(rows).splitlines()[3].count("|") == len(check.COLUMNS) + 2  # one of them is escaped


def test_a_part_that_hangs_is_ended_with_what_it_started(parts, tmp_path):
    child = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(subprocess.Popen(['sleep', '600']).pid))\n"
    rows, _ = parts("slow", WRITE + child + "print('at work', flush=True)\ntime.sleep(600)", seconds=10.0)
    assert rows[-1]["remark"] == "stopped after 10 s; last: at work"
    stat = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    ended = time.monotonic() + 30
    while _runs(stat) and time.monotonic() < ended:  # killed, and dead when the kernel comes to it
        time.sleep(0.05)
    assert not _runs(stat)


def _runs(stat):
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_parts_together_take_no_longer_than_all_may(tmp_path, monkeypatch):
    """Each hangs as long as it may. By the clock of a machine with few cores and of one with many; a part that ends early leaves its time
    to the others."""
    for cores in (1, 16):
        monkeypatch.setattr(check.os, "cpu_count", lambda cores=cores: cores)
        ahead = check.groups(list(check.PARTS))
        left, taken = 476.0, []
        for i in range(len(ahead)):
            limits = check.shares(ahead[i:], left)
            assert min(limits) >= check.LEAST
            taken += [max(limits)]
            left -= max(limits)
        assert sum(taken) == pytest.approx(476.0)
        assert check.shares(ahead[-1:], 300.0) == pytest.approx([300.0] * len(ahead[-1]))


def test_parts_that_hang_are_ended_within_the_time_of_all(tmp_path, monkeypatch, capsys):
    """Which began with the script, a while before."""
    (tmp_path / "parts.py").write_text("import time\nprint('at work', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setattr(check, "HERE", tmp_path)
    monkeypatch.setattr(check, "LEAST", 0.5)
    monkeypatch.setattr(check, "ENDING", 1.0)
    monkeypatch.setenv("GPU_CHECK_BEGUN", str(time.time() - 1000.0))
    monkeypatch.setattr(sys, "argv", ["check", "--out", str(tmp_path / "out"), "--seconds", "1016", "--device", "cpu"])
    begun = time.monotonic()
    check.main()
    assert time.monotonic() - begun < 100  # of 16: a loaded machine is slow to end processes; each would hang for 600
    rows = json.loads((tmp_path / "out" / "numbers.json").read_text())["rows"]
    assert [row["part"] for row in rows] == [part.name for part in check.PARTS]
    assert all(row["remark"].startswith("stopped after ") or row["remark"].startswith("not run: ") for row in rows)


def test_what_a_part_has_no_time_for_is_a_row(tmp_path):
    from found import Found

    found = Found(tmp_path / "out.json", tmp_path, False, time.monotonic() + 5.0)
    assert found.has_time("first", 1.0)
    assert not found.has_time("second", 10.0)
    assert [(row["what"], row["ours"]) for row in found.rows] == [("second", "–")]
    assert found.rows[0]["remark"].startswith("not run: of 10 s that it may take ")


def test_without_time_a_part_is_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check", "--out", str(tmp_path), "--seconds", "1"])
    check.main()
    rows = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert [row["part"] for row in rows] == [part.name for part in check.PARTS]
    assert {row["remark"] for row in rows} == {"not run: no time was left"}


def test_a_check_that_is_stopped_ends_its_parts_and_writes_what_it_has(tmp_path, monkeypatch, capsys):
    code = f"import os, signal, sys, time\nif 'kernel' in sys.argv:\n    os.kill({os.getpid()}, signal.SIGTERM)\n    time.sleep(600)\n"
    (tmp_path / "parts.py").write_text(code)
    monkeypatch.setattr(check, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["check", "--out", str(tmp_path), "--only", "kernel", "--device", "cpu"])
    begun, before = time.monotonic(), signal.getsignal(signal.SIGTERM)
    try:
        check.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - begun < 30  # a part may take longer
    rows = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert rows[-1] == {"part": "all", "what": "the rest of it", "remark": "interrupted"}
    assert check.RUNNING == []
