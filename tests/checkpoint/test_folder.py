"""Checkpoints are complete or absent."""

import pytest

from anon_dist.checkpoint import CheckpointError, Checkpoints
from anon_dist.checkpoint.folder import read_progress


def write(checkpoints, step):
    with checkpoints.writing(step, {"step": step}) as folder:
        (folder / "weights").write_text(str(step))


def test_the_last_ones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.latest() is None
    for step in (1, 2, 10, 9):
        write(checkpoints, step)
    assert [p.name for p in checkpoints.complete()] == ["step-00000009", "step-00000010"]
    assert read_progress(checkpoints.latest()) == {"step": 10}
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step-00000009", "step-00000010"]
    write(checkpoints, 3)  # the one just written stays, whatever its step
    assert "step-00000003" in [p.name for p in checkpoints.complete()]


def test_an_interrupted_checkpoint_does_not_count(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    write(checkpoints, 1)
    with pytest.raises(KeyboardInterrupt), checkpoints.writing(2, {"step": 2}) as folder:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt
    (tmp_path / "c" / "step-00000001.deleting").mkdir()
    (tmp_path / "c" / "step-00000003").mkdir()  # no trainer.json: not ours, or damaged
    assert [p.name for p in checkpoints.complete()] == ["step-00000001"]
    checkpoints.clean()
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step-00000001", "step-00000003"]
    write(checkpoints, 2)
    assert (checkpoints.latest() / "weights").read_text() == "2"


def test_a_crash_between_the_renames_loses_nothing(tmp_path):
    """Replacing a checkpoint takes two renames; after the first, the new one is complete under its temporary name."""
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    write(checkpoints, 1)
    (tmp_path / "c" / "step-00000001").rename(tmp_path / "c" / "step-00000001.tmp")
    checkpoints.clean()
    assert read_progress(checkpoints.latest()) == {"step": 1}


def test_writing_a_step_again_replaces_it(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    write(checkpoints, 1)
    with checkpoints.writing(1, {"step": 1, "again": True}) as folder:
        (folder / "other").write_text("x")
    assert read_progress(checkpoints.latest())["again"]
    assert not (checkpoints.latest() / "weights").exists()


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is no complete checkpoint"):
        read_progress(tmp_path / "nowhere")
