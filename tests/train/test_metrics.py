"""The metrics file survives kills and resumes."""

from anon_dist.train.metrics import MetricsFile, read_metrics


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


def test_lines_that_are_no_records_end_what_is_kept(tmp_path):
    """A line without its end may be half a number; what follows a line that cannot be read has no place."""
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": 0.5}\n'
    for tail in (
        b'{"step": 2, "loss": 0.2',
        b'{"step": 2}',
        b"\xff\n" + good,
        b"[2]\n",
        b"{}\n",
        b'{"step": 1, "final_loss": 1}\n',
    ):
        path.write_bytes(good + tail)
        file = MetricsFile(path, 5)
        file.write({"step": 2, "loss": 0.25})
        file.close()
        assert read_metrics(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
