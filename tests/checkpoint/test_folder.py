"""Checkpoints are complete or absent."""

import resource

import pytest

from anon_dist.checkpoint import CheckpointError, Checkpoints
from anon_dist.checkpoint.errors import DamagedCheckpoint
from anon_dist.checkpoint.keeping.folder import read_progress


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


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_an_interrupted_checkpoint_does_not_count(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    write(checkpoints, 1)
    with pytest.raises(KeyboardInterrupt), checkpoints.writing(2, {"step": 2}) as folder:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt
    (tmp_path / "c" / ".unfinished" / "step-00000001.deleting").mkdir()
    (tmp_path / "c" / "step-00000003").mkdir()  # no trainer.json: not ours, or damaged
    assert [p.name for p in checkpoints.complete()] == ["step-00000001"]
    checkpoints.clean()
    assert names(tmp_path / "c") == ["step-00000001", "step-00000003"]
    write(checkpoints, 2)
    assert (checkpoints.latest() / "weights").read_text() == "2"


def test_a_crash_between_the_renames_loses_nothing(tmp_path):
    """Replacing a checkpoint takes two renames; after the first, the new one is complete but for its place."""
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    write(checkpoints, 1)
    (tmp_path / "c" / ".unfinished").mkdir()
    (tmp_path / "c" / "step-00000001").rename(tmp_path / "c" / ".unfinished" / "step-00000001")
    checkpoints.clean()
    assert read_progress(checkpoints.latest()) == {"step": 1}
    assert names(tmp_path / "c") == ["step-00000001"]


def test_what_is_not_ours_stays_and_stops_nothing(tmp_path):
    folder, elsewhere = tmp_path / "c", tmp_path / "elsewhere"
    write(Checkpoints(elsewhere, keep=1), 1)
    (elsewhere / "mine").mkdir()
    (elsewhere / "mine" / "notes").write_text("mine")
    folder.mkdir()
    for name in ("step-00000002", "notes.tmp", "step-00000003.tmp", "step-00000003.deleting", "step-x"):
        (folder / name).write_text(name)
    for name in ("mine.tmp", "step-00000004", "step-00000004.tmp", "step-00000005.deleting"):
        (folder / name).mkdir()
        (folder / name / "notes").write_text(name)
    links = {
        "step-00000001": elsewhere / "step-00000001",  # a checkpoint that was moved to another disk
        "step-00000005": elsewhere / "mine",
        "step-00000006": elsewhere / "nowhere",
        "step-00000007": folder / "step-00000007",
        "step-00000008.tmp": elsewhere / "mine",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    before = {p.name for p in folder.iterdir()}

    checkpoints = Checkpoints(folder, keep=1)
    assert checkpoints.latest().name == "step-00000001"
    checkpoints.clean()
    for step in range(2, 9):
        write(checkpoints, step)
        checkpoints.clean()
    assert checkpoints.latest().name == "step-00000008"
    assert not checkpoints.latest().is_symlink()
    ours = {"step-00000008"}
    moved = {
        "step-00000002",
        "step-00000004",
        "step-00000005",
        "step-00000006",
        "step-00000007",
    }  # their names were needed
    assert {p.name for p in folder.iterdir()} == ours | (before - moved) | {f"{name}.aside" for name in moved}
    for name, target in links.items():
        link = folder / (f"{name}.aside" if name in moved else name)
        assert link.is_symlink()
        assert link.readlink() == target
    assert (folder / "step-00000002.aside").read_text() == "step-00000002"
    assert (folder / "step-00000004.aside" / "notes").read_text() == "step-00000004"
    assert (folder / "mine.tmp" / "notes").read_text() == "mine.tmp"
    assert (elsewhere / "mine" / "notes").read_text() == "mine"
    assert read_progress(elsewhere / "step-00000001") == {"step": 1}


@pytest.mark.parametrize("size", ["weights", "progress"])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(size, tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    write(checkpoints, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(
        CheckpointError, match=r"step-00000002 could not be written: \[Errno 27\].*step-00000001"
    ) as raised:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with checkpoints.writing(2, {"step": 2, "more": "x" * 2000 * (size == "progress")}) as folder:
                (folder / "weights").write_text("x" * 2000 * (size == "weights"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(raised.value)
    assert names(tmp_path / "c") == ["step-00000001"]
    assert (checkpoints.latest() / "weights").read_text() == "1"
    write(checkpoints, 2)
    assert names(tmp_path / "c") == ["step-00000002"]


def test_what_is_set_aside_keeps_its_contents(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    for again in ("", "-2"):
        write(checkpoints, 1)
        write(checkpoints, 2)
        kept = checkpoints.set_aside(checkpoints.latest(), "damaged")
        assert kept.name == f"step-00000002.damaged{again}"
        assert (kept / "weights").read_text() == "2"
        assert checkpoints.latest().name == "step-00000001"


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
    for text in ("", "{", "[1]", "\xff"):
        (tmp_path / "trainer.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(DamagedCheckpoint, match=r"trainer\.json"):
            read_progress(tmp_path)
