"""The end-to-end benchmark: what it reports, and that it ends when a contender does."""

import pytest

from anon_dist.bench import train
from anon_dist.cli import main


def test_ratios_are_of_neighbouring_turns():
    ours, theirs = train.Result([10.0, 30.0, 50.0], 0), train.Result([10.0, 20.0, 10.0], 0)
    assert ours.ratios(theirs) == [1.25, 1.5, 3.25]


def test_a_folder_that_is_none():
    with pytest.raises(SystemExit, match="error: "):
        main(["bench", "train", "--data", "/nonexistent"])


def test_a_failing_contender_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train: {typo: 1}\n")
    with (
        train.Process("trainer", path, deadline=train.time.monotonic() + 300) as process,
        pytest.raises(train.BenchError, match=r"(?s)HF Trainer.*ended.*typo"),
    ):
        process.ask("1")
