"""A run's folder is held by one process at a time, and free when that one is gone, however it went."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import time

import pytest

from anon_dist.train.config.errors import RunError
from anon_dist.train.saves import lock as module
from anon_dist.train.saves.lock import LOCK, RunLock, held

FORK = multiprocessing.get_context("fork")


def hold(folder, said, release):
    """Another process: says whether it got the lock, and what `confirm` says in the end."""
    try:
        lock = RunLock(folder)
    except RunError as error:
        said.put(str(error))
        return
    said.put("")
    release.wait(300)
    try:
        lock.confirm()
        said.put("")
    except RunError as error:
        said.put(str(error))
    lock.release()


@pytest.fixture
def other(tmp_path):
    """A function: start a process that holds the folder; (process, what it says, the event on which it lets go)."""
    started = []

    def start():
        said, release = FORK.Queue(), FORK.Event()
        process = FORK.Process(target=hold, args=(tmp_path, said, release))
        process.start()
        started.append(process)
        return process, said, release

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_second_start_is_told_who_is_there_until_that_one_ends(other, tmp_path):
    process, said, release = other()
    assert said.get(timeout=120) == ""
    with pytest.raises(RunError) as refused:
        RunLock(tmp_path)
    words = f"run_dir = {tmp_path} is in use by process {process.pid} on {socket.gethostname()}, since {time.strftime('%Y-')}"
    assert str(refused.value).startswith(words)
    assert "\n" not in str(refused.value)
    release.set()
    assert said.get(timeout=120) == ""
    process.join()
    with held(tmp_path) as lock:
        lock.confirm()
    assert (tmp_path / LOCK).read_bytes() == b""


def test_killed_it_is_free_at_once(other, tmp_path, monkeypatch):
    process, said, _ = other()
    assert said.get(timeout=120) == ""
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert json.loads((tmp_path / LOCK).read_text())["process"] == process.pid  # it had no time to let go
    monkeypatch.setattr(module.time, "sleep", lambda _: pytest.fail("it waited for a sign"))
    RunLock(tmp_path).release()


def test_of_many_that_start_at_once_one_has_it(other, tmp_path):
    started = [other() for _ in range(6)]
    answers = [said.get(timeout=120) for _, said, _ in started]
    assert answers.count("") == 1
    assert sum("is in use by" in answer for answer in answers) == 5


def test_a_removed_file_is_made_anew_and_a_taken_folder_is_left(other, tmp_path):
    process, said, release = other()
    assert said.get(timeout=120) == ""
    (tmp_path / LOCK).unlink()
    release.set()
    assert said.get(timeout=120) == ""  # nobody else was there: it goes on
    process.join()

    _, said, release = other()
    assert said.get(timeout=120) == ""
    (tmp_path / LOCK).unlink()
    with held(tmp_path):  # as the message says, once its machine is dead; which it is not
        release.set()
        assert "is another run's now" in said.get(timeout=120)


@pytest.mark.parametrize("locks", [True, False])
def test_another_machine_is_dead_when_it_gives_no_sign(locks, tmp_path, monkeypatch):
    """Where its lock is not in force here: a file system without locks, or with each machine's own."""
    monkeypatch.setattr(module, "SILENT_SECONDS", 1.5)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.3)
    if not locks:

        def no_locks(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "lockf", no_locks)
    owner = {"host": "node-b", "process": 7, "since": "2026-01-01 00:00:00 +0000", "machine": "another"}
    path = tmp_path / LOCK
    path.write_text(json.dumps(owner))
    with (
        monkeypatch.context() as living,
        pytest.raises(RunError, match="in use by process 7 on node-b, since 2026-01-01"),
    ):
        living.setattr(module.time, "sleep", lambda _: os.utime(path))  # between two looks it has given a sign
        RunLock(tmp_path)
    since = time.monotonic()
    with held(tmp_path) as lock:
        assert time.monotonic() - since > 1
        lock.confirm()


def test_folders_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for folder, words in (
        (tmp_path / "dangling", f"is a symbolic link to {tmp_path}/nowhere, which is not there"),
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "run", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(RunError, match="run_dir = ") as refused, held(folder):
            pass
        assert f"run_dir = {folder} cannot be written: " in str(refused.value)
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_folder_that_was_moved_is_said(tmp_path):
    folder = tmp_path / "run"
    lock = RunLock(folder)
    folder.rename(tmp_path / "moved")
    with pytest.raises(RunError, match="is gone: it was moved or removed while the run was at work"):
        lock.confirm()
    lock.release()
    assert not folder.exists()
