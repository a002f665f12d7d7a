"""Which rank stopped first, asked by three processes that fail in every way; tests/multinode asks it of real runs."""

import json
import multiprocessing
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch.distributed as dist

from anon_dist import launcher
from anon_dist.engines import peers
from anon_dist.engines.comparison import check_alike

HERE = socket.gethostname()
FORK = multiprocessing.get_context("fork")


class RefusedError(ValueError):
    """For a user to mend."""


FIRST, LATER, NEVER = "first", "later", "never"
"""When a rank fails: it waits for nobody; for a report in the store, so that another was the first; not at all, it ends without a word."""


def fail(rank: int, ranks: int, port, when: str, error: Exception, queue, folder) -> None:
    """A rank: it signs in, then raises, or ends without a word. Its notes go to the queue."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port.get()),
    }
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_ERROR_FILE": str(folder / f"{rank}.json")}
    peers.sign_in()
    if when == NEVER:
        return
    while when == LATER and not peers.store(30).check(["report/1"]):
        time.sleep(0.1)
    with suppress(type(error)), peers.who_stopped(RefusedError) as ending:
        raise error
    (folder / f"{rank}.ending").write_text(json.dumps([ending.alike, ending.speaks]))
    queue.put((rank, getattr(error, "__notes__", [])))


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """A function: the notes of ranks that raise these errors, by rank; those of the silent are not there."""

    def run(*ranks: tuple[str, Exception], store: bool = True) -> dict[int, list[str]]:
        queue, port = FORK.Queue(), FORK.Queue()
        if store and all(when != NEVER for when, _ in ranks):
            monkeypatch.setattr(peers, "WAIT_SECONDS", 60.0)  # a busy machine may start them more than 5 s apart
        # Made before the store: they close the connections that they inherit.
        processes = [
            FORK.Process(target=fail, args=(rank, len(ranks), port, when, error, queue, tmp_path))
            for rank, (when, error) in enumerate(ranks)
        ]
        for process in processes:
            process.start()
        if store:
            server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            number = server.port
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                number = free.getsockname()[1]
        for _ in ranks:
            port.put(number)
        found = dict(queue.get(timeout=300) for when, _ in ranks if when != NEVER)
        for process in processes:
            process.join(300)
        return found

    return run


def test_all_name_the_first(notes, tmp_path, monkeypatch):
    record = peers.get_error_handler

    def late():
        if os.environ["RANK"] == "1":
            time.sleep(2)  # the first to fail comes to write it last, as it may on a busy machine
        return record()

    monkeypatch.setattr(peers, "get_error_handler", late)
    closed = RuntimeError("Connection closed by peer\nand more")
    found = notes((LATER, closed), (FIRST, ValueError("a shape is wrong")), (LATER, closed))
    assert found[1] == [f"The first of 3 ranks to fail was this one, rank 1 on {HERE}."]
    for rank in (0, 2):
        assert found[rank][0].startswith(f"The first of 3 ranks to fail was rank 1 on {HERE} at ")
        assert found[rank][0].endswith(" (ValueError: a shape is wrong).")
    told = [json.loads((tmp_path / f"{rank}.json").read_text())["message"] for rank in range(3)]
    assert told[2]["message"] == "RuntimeError: Connection closed by peer\nand more"
    assert told[2]["extraInfo"]["py_callstack"].endswith(f"{found[2][0]}\n")
    # Whose second is the earliest is the launcher's "root cause".
    seconds = [int(message["extraInfo"]["timestamp"]) for message in told]
    assert seconds[1] < min(seconds[0], seconds[2])


def test_the_silent_are_named(notes):
    found = notes((FIRST, RuntimeError("closed")), (NEVER, ValueError()), (LATER, RuntimeError("timed out")))
    begin = (
        f"Stopped without a word: rank 1 on {HERE}; killed, cut off or hanging. The first to notice, or to fail, was "
    )
    assert found[0] == [f"{begin}this one, rank 0 on {HERE}."]
    assert found[2][0].startswith(f"{begin}rank 0 on {HERE} at ")


def test_a_mistake_of_all_has_no_note(notes):
    assert notes(*[(FIRST, ValueError("no such model"))] * 3) == {0: [], 1: [], 2: []}


def test_the_last_report_may_come_just_before_it_is_over(monkeypatch):
    """The other two fail alike between this rank's two questions: how many have failed, and whether another has said that it is over."""
    store, error = dist.HashStore(), ValueError("no such model")

    class Met:
        def __getattr__(self, name):
            return getattr(store, name)

        def check(self, keys):
            if keys == ["over"] and not store.check(keys):
                for rank in (0, 1):
                    store.set(f"failed/{rank}", "")
                store.add("failed", 2)
                store.add("heard", 2)
                store.set("over", "")
            return store.check(keys)

    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(peers, "store", lambda seconds: Met())
    heard = peers._Heard()
    peers._listen(error, heard)
    assert heard.all
    assert heard.alike
    assert not heard.silent


def test_a_refusal_is_said_by_one_rank_and_told_to_the_launcher_without_a_traceback(notes, tmp_path, monkeypatch):
    def endings():
        return [json.loads((tmp_path / f"{rank}.ending").read_text()) for rank in range(3)]

    notes(*[(FIRST, RefusedError("no such model"))] * 3)
    assert [alike for alike, _ in endings()] == [True] * 3
    assert [speaks for _, speaks in endings()].count(True) == 1
    (told,) = tmp_path.glob("*.json")  # of the rank that speaks; no LOCAL_RANK is set here
    message = json.loads(told.read_text())["message"]
    assert message["message"] == message["extraInfo"]["py_callstack"] == "RefusedError: no such model"
    # Each of two errors is said once; a bug is shown where it is.
    notes((LATER, RefusedError("torn")), (FIRST, RefusedError("no such model")), (LATER, RefusedError("torn")))
    assert [alike for alike, _ in endings()] == [False] * 3
    speak = [speaks for _, speaks in endings()]
    assert speak[1]
    assert sorted([speak[0], speak[2]]) == [False, True]
    monkeypatch.setattr(peers, "WAIT_SECONDS", 5.0)
    notes((FIRST, KeyError("x")), (LATER, RefusedError("torn")), (NEVER, ValueError()))
    assert "Traceback" in json.loads((tmp_path / "0.json").read_text())["message"]["extraInfo"]["py_callstack"]
    assert [speaks for _, speaks in endings()][:2] == [True, True]


def test_without_a_store_the_exit_does_not_hang(notes, monkeypatch):
    monkeypatch.setattr(peers, "WAIT_SECONDS", 1.5)
    since = time.monotonic()
    found = notes(*[(FIRST, ValueError("a shape is wrong"))] * 2, store=False)
    assert time.monotonic() - since < 30
    assert found[1][0].startswith(f"The store at 127.0.0.1 does not answer rank 1 on {HERE}: ")


def orphan(rank: int, port, known, lost, queue) -> None:
    """Rank 0 has the store, and waits to be killed; rank 1 fails afterwards."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    if rank == 0:
        socket.gethostname = lambda: "node-a"
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port.put(server.port)
        port.put(server.port)
    os.environ["MASTER_PORT"] = str(port.get(timeout=60))
    peers.sign_in()
    while rank == 0 or not peers._FIRST_HOST:
        time.sleep(0.05)
    known.set()
    lost.wait(60)
    with suppress(ValueError), peers.who_stopped():
        error = ValueError("closed")
        raise error
    queue.put(error.__notes__)


def test_with_the_node_of_rank_0_its_name_is_not_lost():
    port, queue, known, lost = FORK.Queue(), FORK.Queue(), FORK.Event(), FORK.Event()
    first, other = (FORK.Process(target=orphan, args=(rank, port, known, lost, queue)) for rank in range(2))
    first.start()
    other.start()
    assert known.wait(60)
    first.kill()
    first.join()
    lost.set()
    (note,) = queue.get(timeout=60)
    assert note.startswith(f"The store at 127.0.0.1 on node-a does not answer rank 1 on {HERE}: the node of rank 0 ")
    other.join(60)
    assert other.exitcode == 0


def with_a_launcher(rank: int, port, known, lost, queue) -> None:
    """A rank of three, the first two of one node, whose launcher has the store and is killed together with rank 1."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.get())}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": str(rank // 2), "LOCAL_RANK": str(rank % 2)}
    os.environ |= {"LOCAL_WORLD_SIZE": "1" if rank == 2 else "2"}
    parent = os.getppid()
    began = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19])
    peers.LAUNCHER = None if rank == 2 else launcher.Launcher(parent, began, "torchrun")
    peers.sign_in()
    while not peers._FIRST_HOST or (rank == 0 and not peers._NEIGHBOURS):
        time.sleep(0.05)
    known.put((rank, os.getpid()))
    lost.acquire(timeout=60)
    with suppress(ValueError), peers.who_stopped():
        error = ValueError("closed")
        raise error
    queue.put((rank, error.__notes__))


def launching(port, known, lost, queue) -> None:
    """The launcher; of the other node's rank too, which does not know it."""
    for rank in range(3):  # before the store, whose connections they would inherit
        FORK.Process(target=with_a_launcher, args=(rank, port, known, lost, queue)).start()
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in range(3):
        port.put(server.port)
    time.sleep(300)


def test_a_rank_knows_that_its_own_launcher_is_gone_and_which_of_its_neighbours():
    """It does not take its own node for lost, nor itself for cut off."""
    port, known, queue, lost = (
        FORK.Queue(),
        FORK.Queue(),
        FORK.Queue(),
        FORK.Semaphore(0),
    )  # an event waits for those that were killed
    starter = FORK.Process(target=launching, args=(port, known, lost, queue))
    starter.start()
    try:
        pids = dict(known.get(timeout=60) for _ in range(3))
        os.kill(pids[1], signal.SIGKILL)
    finally:
        starter.kill()
        starter.join()
    for _ in range(2):
        lost.release()
    notes = dict(queue.get(timeout=60) for _ in range(2))
    gone = f"The launcher of rank 0 on {HERE} (torchrun, process {starter.pid}) is gone: "
    assert notes[0][0].startswith(gone)
    assert f" Stopped without a word: rank 1 on {HERE}; " in notes[0][0]
    assert "cut off from" not in notes[0][0]
    assert notes[2][0].startswith(
        f"The store at 127.0.0.1 on {HERE} does not answer rank 2 on {HERE}: the node of rank 0 "
    )


def in_a_group(rank: int, port: int, queue) -> None:
    """Rank 0 waits for rank 1, which fails and does not end; each has a connection of its own besides."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    server = socket.create_server(("127.0.0.1", 0))
    own = socket.create_connection(server.getsockname())
    other, _ = server.accept()
    with peers.connecting():
        dist.init_process_group("gloo")
    dist.barrier()
    with suppress(ValueError, RuntimeError), peers.who_stopped():
        if rank == 1:
            queue.put(time.time())
            raise ValueError("a shape is wrong")
        try:
            dist.barrier()
        except RuntimeError:
            queue.put(time.time())
            raise
    own.sendall(b"still there")
    queue.put(f"rank {rank}: {other.recv(99)}")
    time.sleep(30)


def test_those_that_wait_notice_at_once_and_other_connections_stay():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = FORK.Queue()
    processes = [FORK.Process(target=in_a_group, args=(rank, port, queue), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    failed, noticed = queue.get(timeout=60), queue.get(timeout=60)
    assert 0 < noticed - failed < 20  # not when the other has ended, half a minute later
    assert {queue.get(timeout=60) for _ in processes} == {f"rank {rank}: b'still there'" for rank in range(2)}
    for process in processes:
        process.kill()


def wait_at_start(rank: int, port: int, queue) -> None:
    """Rank 1 fails before it has come to be compared."""
    peers.WAIT_SECONDS = 1.5
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    try:
        with peers.who_stopped():
            if rank == 2:
                raise ValueError("the YAML is broken")
            check_alike({"optim.lr": 0.1}, 60)
    except Exception as error:
        queue.put((rank, str(error)))


def test_nobody_waits_at_start_for_a_rank_that_failed():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    queue = FORK.Queue()
    processes = [FORK.Process(target=wait_at_start, args=(rank, server.port, queue)) for rank in range(3)]
    since = time.monotonic()
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=60) for _ in processes)
    assert time.monotonic() - since < 50  # not `check_alike`'s minute
    assert found[2] == "the YAML is broken"
    for rank in range(2):
        assert found[rank].startswith(f"rank 2 on {HERE} at ")
        assert found[rank].endswith(" stopped: ValueError: the YAML is broken")
    for process in processes:
        process.join(30)


def test_one_process_has_no_note(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    since = time.monotonic()
    with pytest.raises(ValueError, match="wrong") as raised, peers.who_stopped():
        raise ValueError("wrong")
    assert not hasattr(raised.value, "__notes__")
    assert time.monotonic() - since < peers.WAIT_SECONDS


def test_a_restarted_node_meets_no_key_of_the_attempt_before(monkeypatch):
    """torchrun's c10d keeps the store: in it are the addresses of ranks that are dead."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "3", "GROUP_WORLD_SIZE": "1"}

    def met():
        with peers.new_keys():
            return next(dist.rendezvous("env://"))[0]

    for name, value in place.items():
        monkeypatch.setenv(name, value)
    for store in (next(dist.rendezvous("env://"))[0], peers.store(30)):
        store.set("address", "of the dead")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "4")
    assert not met().check(["address"])
    assert not peers.store(30).check(["address"])
    met().set("address", "of the living")
    assert met().get("address") == b"of the living"
    assert next(dist.rendezvous("env://"))[0].get("address") == b"of the dead"  # torch's own, outside of the block
    # Launchers of several nodes may count otherwise. With a store for each attempt, their ranks meet all the same.
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    ours = peers.store(30)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "5")
    ours.set("who", "rank 0")
    assert peers.store(30).check(["who"])
