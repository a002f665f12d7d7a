"""Who keeps the others waiting: three processes that train on nothing, of which one hangs, in every way, also that with the store."""

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from anon_dist.train.config import parsing as c
from anon_dist.train.health import hang_report, hangs, whereabouts
from anon_dist.train.health.pulse import Pulse

HERE = socket.gethostname()
FORK = multiprocessing.get_context("fork")
RANKS = 3
LIMIT = 2.0
"""Seconds without progress."""


def loops() -> None:
    while True:
        pass


def reads(folder: Path) -> None:
    """As from a file system that does not answer."""
    os.mkfifo(folder / "fifo")
    (folder / "fifo").read_bytes()


def holds_python() -> None:
    """In code that lets no other thread run."""
    re.match(r"(a+)+$", "a" * 60 + "b")


FAULTS = {
    "stopped": lambda folder: os.kill(os.getpid(), signal.SIGSTOP),
    "loops": lambda folder: loops(),
    "reads": reads,
    "holds": lambda folder: holds_python(),
    "folder": lambda folder: loops(),
}


def take_part(rank: int, guilty: int, fault: str, port: int, folder: Path) -> None:
    """A rank, of which one hangs in the third step."""
    os.setpgid(0, 0)
    os.dup2(os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # rank 0 hosts the store
    hangs.ANSWER, hangs.ASK, hangs.PROXY, hangs.POLL = 4.0, 0.3, 0.7, 0.1
    if fault == "folder":
        hangs._Watch._write = hangs._Watch._read_files = hangs._Watch._summed_up = lambda *_: time.sleep(100)
    config = c.Config(train=c.TrainConfig(timeout_minutes=1.0, first_timeout_minutes=1.0))
    whereabouts.record_collectives(folder)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    with hangs.watched(config, folder) as pulse:
        for step in range(5):
            if step == 3:  # before, a busy machine may take its time
                pulse.usual = LIMIT
            with pulse.phase("step", step):
                pulse.beat("after data")
                if step == 3 and rank == guilty:
                    while len(list(folder.glob("waits-*"))) < RANKS - 1:
                        time.sleep(0.01)
                    pulse.beat("after data")
                    (folder / "begun").touch()
                    FAULTS[fault](folder)
                work = dist.all_reduce(torch.ones(7), async_op=True)
                if step == 3:
                    (folder / f"waits-{rank}").touch()
                work.wait()
    os._exit(0)


def hang(guilty: int, fault: str, folder: Path) -> list[int]:
    """Have them hang; their pids. The others have ended by themselves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [FORK.Process(target=take_part, args=(r, guilty, fault, port, folder)) for r in range(RANKS)]
    for process in ranks:
        process.start()
    try:
        others = [process for rank, process in enumerate(ranks) if rank != guilty]
        for process in others:
            process.join(100)
        assert [process.exitcode for process in others] == [hangs.HUNG] * 2
    finally:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.join()
    return [process.pid for process in ranks]


@pytest.mark.parametrize(
    ("guilty", "fault", "said"),
    [
        (
            0,
            "stopped",
            r"stopped \(by SIGSTOP, a terminal or a job scheduler\); after step 3, \d+ s ago, it was at: after data",
        ),
        (
            1,
            "loops",
            r"no progress for \d s, after step 3, at: after data; in tests/distributed/test_hangs.py:\d+ loops",
        ),
        (
            0,
            "reads",
            r"no progress for \d s, after step 3, at: after data; in tests/distributed/test_hangs.py:\d+ reads, in .*pathlib",
        ),
        (
            2,
            "holds",
            r"computing, in code that does not let Python's other threads run; after step 3, .*re/__init__.py",
        ),
    ],
)
def test_a_rank_that_hangs_is_named(guilty, fault, said, tmp_path):
    pids = hang(guilty, fault, tmp_path)
    (summary,) = tmp_path.glob("hangs/*/summary.txt")
    assert summary.stat().st_mtime - (tmp_path / "begun").stat().st_mtime < LIMIT + 20  # 10 on an idle machine
    lines = summary.read_text().splitlines()
    assert len(lines) <= 10
    assert lines[0].startswith(f"This run waits for rank {guilty} on {HERE}. No progress for ")
    assert re.fullmatch(rf"  rank {guilty} on {HERE}, pid {pids[guilty]}: {said}.*", lines[1]), lines
    waiting = hang_report.spelled([r for r in range(RANKS) if r != guilty])
    assert lines[2].startswith(f"  waiting: ranks {waiting} in gloo all_reduce number "), lines
    assert lines[2].endswith(" of ranks 0-2, [7]")
    told = [rank for rank in range(RANKS) if (summary.parent / f"rank-{rank:05d}.txt").exists()]
    assert told == [r for r in range(RANKS) if r != guilty or fault in ("loops", "reads")]
    (first, *_) = told
    text = (summary.parent / f"rank-{first:05d}.txt").read_text()
    assert "thread MainThread:" in text
    assert "last collectives:" in text
    shown = [(tmp_path / f"log-{r}").read_text().count("This run waits for") for r in range(RANKS)]
    assert shown == [int(r == first) for r in range(RANKS)]  # by one of them


def test_a_folder_that_does_not_answer(tmp_path):
    """The ranks' words go through the store; what they have come to is printed."""
    hang(1, "folder", tmp_path)
    lines = (tmp_path / "log-0").read_text().splitlines()
    assert lines[0].startswith(f"This run waits for rank 1 on {HERE}. ")
    assert "test_hangs.py:" in lines[1]
    assert lines[1].endswith(" loops")
    assert re.fullmatch(rf"  {tmp_path}/hangs/\S+ does not answer", lines[-1])


def report(running=None, done=3, where="a.py:1 f", group="0", ranks=(0, 1, 2)):
    entry = {"group": group, "ranks": list(ranks), "name": "gloo:all_reduce", "sizes": [[4]]}
    calls = [{**entry, "number": n, "running": False} for n in range(done)]
    calls += [{**entry, "number": done, "running": True, **running}] if running is not None else []
    return {"step": 5, "doing": "x", "age": 60.0, "late": True, "where": where, "collectives": calls}


def test_ten_lines(tmp_path):
    """What is said when nobody is to blame, when all are, and of more ranks than have room."""
    places = [{"host": f"node-{r // 8}", "pid": 100 + r} for r in range(3)]
    same = {r: report({}) for r in range(3)}
    (first, *_) = hang_report.summary(same, {}, places, tmp_path, "No.")
    assert first == "This run waits, all in the same collective: the network, or a device, hangs. No."
    apart = {**same, 2: report({"name": "gloo:broadcast"})}
    (first, *rest) = hang_report.summary(apart, {}, places, tmp_path, "No.")
    assert first == "This run waits, the ranks for each other, in different collectives. No."
    assert [line.split(" in ")[0] for line in rest[:2]] == ["  waiting: ranks 0, 1", "  waiting: rank 2"]
    (first, *_) = hang_report.summary({0: report(), 1: report({}), 2: report()}, {}, places, tmp_path, "No.")
    assert first == "This run waits for rank 0 on node-0, rank 2 on node-0. No."

    (first, *_) = hang_report.summary(same, {}, places, tmp_path, "No.", [1, 2], "10.0.0.1")
    assert (
        first == "This run waits: cut off from the store at 10.0.0.1 on node-0: rank 1 on node-0, rank 2 on node-0. No."
    )

    many = [{"host": f"node-{r // 8}", "pid": r} for r in range(64)]
    lines = hang_report.summary({r: report({}) for r in range(8)}, {}, many, tmp_path, "No.")
    assert len(lines) <= 10
    assert lines[0].startswith("This run waits for rank 8 on node-1, ")
    assert lines[0].endswith(" and 52 more. No.")
    assert any(line.startswith("  no rank of node-1, node-2, node-3, node-4 answers") for line in lines)
    assert lines[-1].endswith(str(tmp_path))
    unrecorded = {
        r: {**report(where=w), "collectives": []} for r, w in enumerate(["torch/distributed/c10d.py:1 f", "b.py:2 g"])
    }
    assert hang_report.judge(unrecorded, 2).busy == [1]


def test_the_first_of_each_kind_may_take_longer():
    pulse = Pulse(1.0, 9.0)
    assert pulse.limit == 9.0
    limits = []
    for _ in range(2):
        with pulse.phase("step", 1):
            limits.append(pulse.limit)
    with pulse.phase("save", 1, long=True):
        with pulse.phase("step", 1):
            limits.append(pulse.limit)
        limits.append(pulse.limit)
    assert [*limits, pulse.limit] == [9.0, 1.0, 1.0, 9.0, 1.0]


def test_what_is_pardoned_is_no_more_than_there_was():
    """A process that was stopped, and has made progress again before it noticed."""
    pulse = Pulse(1.0, 9.0)
    pulse.pardon(8.0)
    assert 0.0 <= pulse.age < 8.0
    pulse.at -= 5.0
    pulse.pardon(3.0)
    assert 2.0 <= pulse.age < 5.0


def test_a_process_that_is_gone():
    child = FORK.Process(target=os._exit, args=(0,))
    child.start()
    began = whereabouts._stat(Path(f"/proc/{child.pid}/stat"))[1]
    child.join()
    assert whereabouts.of_process(child.pid, began) == "gone: the process has ended"
    assert whereabouts.of_process(os.getpid(), 0) == "gone: the process has ended"
