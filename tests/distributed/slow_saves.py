"""A rank that writes longer than the others wait for it, on two ranks; see `test_slow_saves.py`."""

import contextlib
import logging
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist
from launch_cases import Patch, run_cases

from anon_dist.checkpoint import Checkpoints
from anon_dist.checkpoint.keeping.folder import read_progress
from anon_dist.train import saving
from anon_dist.train.config.parsing import Config
from anon_dist.train.saving import Saver

SHORT, LONG = 3.0, 300.0
"""Seconds that ranks wait: until the first failure, and then."""


def stand_in(folder):
    """A run that has nothing but a step: each rank writes it into a file; rank 0, of step 5, when the others have given up."""
    config = Config()
    config.train.timeout_minutes, config.train.first_timeout_minutes = SHORT / 120, SHORT / 60
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()

    def capture(copied):
        slow = rank == 0 and run.step == 5

        def write(temporary, group, links):
            while slow and not store.check(["given up"]):
                time.sleep(0.05)
            (temporary / f"{rank}").write_text("written")

        return write

    run = SimpleNamespace(
        config=config,
        step=0,
        lock=None,
        checkpoints=Checkpoints(folder / "checkpoints", keep=1, keep_every=5),
        engine=SimpleNamespace(capture=capture),
        accelerator=SimpleNamespace(process_index=rank),
        pulse=SimpleNamespace(phase=lambda *_, **__: contextlib.nullcontext()),
    )
    return run, lambda: store.set("given up", "") if rank else None


def case_a_slow_rank_costs_one_background_save():
    """It is said of which step; the step in its place stays as that would have; and the saves after it are in the background again."""
    folder, patch, timeouts, said = Path(sys.argv[1]), Patch(), [], []
    run, give_up = stand_in(folder)
    new_group = dist.new_group
    patch.setattr(dist, "new_group", lambda **options: timeouts.append(options["timeout"]) or new_group(**options))
    patch.setattr(saving, "progress_of", lambda run: {"step": run.step})
    patch.setattr(saving.randomness, "capture", lambda rank: lambda folder: None)
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    saving.log.addHandler(handler)
    stop = SimpleNamespace(failure=None)
    try:
        with Saver(run, stop, lambda: None) as saver:
            run.step = 5
            saver.save()
            if dist.get_rank() == 1:
                saver._job.join()
            give_up()
            run.step, saver._seconds = 6, LONG
            assert saver.recover()
            assert saver.finished()["saves"] == 1
            for run.step in (8, 10, 11, 12):
                saver.save()
                assert saver._job is not None
                assert not saver.recover()
            found = saver.finished()
            assert found["saves"] == 4, found
            assert 0 < found["save_blocked_s"] < found["save_s"] * 100
    finally:
        patch.close()
        saving.log.removeHandler(handler)
    assert [limit.total_seconds() for limit in timeouts] == [SHORT, LONG]
    dist.barrier()
    assert [p.name for p in run.checkpoints.present()] == ["step-00000006", "step-00000010", "step-00000012"]
    assert read_progress(run.checkpoints.folder / "step-00000006")["in_place_of"] == 5
    assert not (run.checkpoints.folder / ".unfinished").exists()
    if dist.get_rank() == 0:
        (line,) = said
        assert line.startswith("the checkpoint of step 5 could not be written (rank 0: another rank "), line
        assert line.endswith("); step 6 is written in its place, and stays for ever"), line
        assert "(train.first_timeout_minutes)" in line


if __name__ == "__main__":
    run_cases(globals())
