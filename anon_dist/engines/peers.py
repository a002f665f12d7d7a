"""After an error: which rank stopped first. A launcher knows the ranks of its own node only, and calls one of them the root cause.

The ranks tell each other through the store at which they met: the launchers' (torchrun, accelerate), or rank 0's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from anon_dist.engines.errors import EngineError
from anon_dist.exits import may_pass
from anon_dist.launcher import LAUNCHER, Process, date_error, tell_launcher, this_process

WAIT_SECONDS = 5.0
"""How long a rank that failed waits for the store's answer, and then for word from the others."""
FIRST_SECONDS = 60.0
"""How long a rank that has joined the others waits for rank 0's name, and for the processes of its node's ranks."""
HANG_UP_SECONDS = 0.5
"""How long it may take to report, before connections are closed in any case."""
NAMES = 8
"""Of more ranks than this, the rest goes unnamed."""
_FIRST_HOST: list[str] = []
"""Of rank 0, once it is known: with its node the store may be lost that could say it."""
_NEIGHBOURS: dict[int, Process] = {}
"""The other ranks of this node, once they are known: where the launcher is lost, and the store with it, nobody else says which are gone."""
_OURS: set[int] = set()
"""The sockets that process groups opened, by inode: descriptors are used again."""


def sign_in() -> None:
    """Leave this rank's host and process with the store. Every rank, once it has joined the others."""
    if several():
        _within(WAIT_SECONDS, _leave_name)
        _started(_learn_names)  # they may come later


def _leave_name() -> None:
    rank, own, met = os.environ["RANK"], this_process(), store(WAIT_SECONDS)
    met.set(f"process/{rank}", f"{own.pid} {own.began}")
    met.set(f"host/{rank}", socket.gethostname())


def _learn_names() -> None:
    met = store(FIRST_SECONDS)
    _FIRST_HOST.append(met.get("host/0").decode())
    own, here = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    for rank in range(own - here, own - here + int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
        if rank != own:
            _NEIGHBOURS[rank] = Process(*map(int, met.get(f"process/{rank}").split()))


@contextlib.contextmanager
def connecting() -> Iterator[None]:
    """A block in which process groups are made: the connections that it opens are to other ranks, and are closed after an error."""
    before = {inode for inode, _ in _connections()}
    try:
        yield
    finally:
        _OURS.update({inode for inode, _ in _connections()} - before)


@dataclass
class Ending:
    """How this rank is to end after an error."""

    alike: bool = False
    """Whether all ranks failed by the same error."""
    speaks: bool = True
    """Whether it is for this rank to say which: the first that failed so, or that could not ask."""
    when: int = 0
    """Seconds since 1970, for the launchers, which take the rank with the earliest for the cause: of the first that failed earlier than of
    any other that heard of it, whenever that came to write it."""


@contextlib.contextmanager
def who_stopped(*refusals: type[Exception]) -> Iterator[Ending]:
    """A block in which ranks work together, and after which an error ends the process: it gets a note of which rank stopped first.

    torch's launchers get error and note too, for their report. Neither note nor delay if there is one rank; no note if all failed alike,
    by a mistake in the configuration, say. At most 2 · WAIT_SECONDS pass, and connections to the other ranks are closed.

    Args:
        refusals: errors that are for a user to mend: the launchers get their line, from one rank of a node, not where in the code it
            was raised.
    """
    ending = Ending()
    try:
        yield ending
    except Exception as error:
        refused, ending.when = isinstance(error, refusals), int(time.time())
        with contextlib.suppress(Exception):  # the error is what matters
            if several():
                _explain(error, ending)
            if not refused:
                get_error_handler().record_exception(error)
                date_error(ending.when)
            elif ending.speaks or os.environ.get("LOCAL_RANK") == "0":  # the launcher of each node reports its first
                tell_launcher(_line(error), ending.when)
        raise


def several() -> bool:
    """Whether there are other ranks, and a store to meet them at."""
    variables = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    there = dist.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return there and all(v in os.environ for v in variables) and int(os.environ["WORLD_SIZE"]) > 1


@dataclass
class _Heard:
    """What the store said, so far: it may be lost at any moment."""

    reported: threading.Event = field(default_factory=threading.Event)
    """This rank's own error has reached the store."""
    first: str = ""
    """The rank that failed first, where, when and how."""
    since: int = 0
    """When that was, in seconds since 1970."""
    speaks: bool = True
    """Whether no rank reported the same error before."""
    alike: bool = False
    """Whether all failed by the same error."""
    silent: dict[int, str] = field(default_factory=dict)
    """Hosts of the ranks that did not report in time; the first of them."""
    more: int = 0
    """How many others did not."""
    all: bool = False
    """Whether the above is complete."""


def _explain(error: Exception, ending: Ending) -> None:
    """Add a note of what the ranks together know of who stopped first; none if that explains nothing."""
    with contextlib.suppress(ValueError):  # not the main thread
        # The launcher terminates the ranks next to one that ended; not before they have said why they did.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    heard = _Heard()
    listening = _started(lambda: _listen(error, heard))
    heard.reported.wait(HANG_UP_SECONDS)  # the others, once they notice, are not to be taken for the first
    gone = [rank for rank, process in sorted(_NEIGHBOURS.items()) if process.gone]
    _hang_up()
    listening.join(2 * WAIT_SECONDS)
    ending.alike, ending.speaks = heard.alike, heard.speaks or not heard.all
    own = _own_name()
    is_first = heard.first.startswith(f"{own} ")
    if note := _note(heard, f"this one, {own}" if is_first else heard.first, gone):
        error.add_note(note)
    if not is_first and not heard.alike:
        ending.when = max(ending.when, heard.since + 1)
        time.sleep(1)  # the launcher of the first is to end first


def _note(heard: _Heard, first: str, gone: list[int]) -> str | None:
    """`gone`: the ranks of this node that had ended when this one failed."""
    launcher = _launcher_is_gone()
    noticed = f" The first to notice, or to fail, was {first}." if first else ""
    if not heard.all:
        place = f"The store at {os.environ['MASTER_ADDR']}{f' on {_FIRST_HOST[-1]}' if _FIRST_HOST else ''}"
        silent = _named({rank: socket.gethostname() for rank in gone[:NAMES]}, len(gone[NAMES:]))
        if not launcher and not gone:
            lost = f"{place} does not answer {_own_name()}: the node of rank 0 stopped or was lost, or this one is cut off from it."
        elif launcher and os.environ.get("GROUP_RANK") == "0" and _agents_store():
            lost = (
                f"{launcher}{silent} {place}, by which the ranks tell each other who stopped first, was the launcher's."
            )
        else:
            lost = f"{launcher}{silent} {place}, by which the ranks tell each other who stopped first, does not answer."
        return f"{lost.strip()}{noticed}"
    if heard.silent:
        return f"{_named(heard.silent, heard.more).strip()}{noticed}{f' {launcher}' if launcher else ''}"
    return None if heard.alike else f"The first of {os.environ['WORLD_SIZE']} ranks to fail was {first}."


def _named(silent: dict[int, str], more: int) -> str:
    """Those that did not say why they stopped, by their hosts, in a sentence."""
    names = ", ".join(f"rank {rank} on {host}" for rank, host in silent.items())
    return (
        f" Stopped without a word: {names}{f' and {more} more' if more else ''}; killed, cut off or hanging."
        if names
        else ""
    )


def _launcher_is_gone() -> str:
    if LAUNCHER is None or not LAUNCHER.gone:
        return ""
    what = f"{LAUNCHER.name}, process {LAUNCHER.pid}"
    return f"The launcher of {_own_name()} ({what}) is gone: killed, by somebody or for want of memory."


def _listen(error: Exception, heard: _Heard) -> None:
    """Report this rank's error, and wait for the others' reports."""
    rank, ranks, text = os.environ["RANK"], int(os.environ["WORLD_SIZE"]), _line(error)
    met, end = store(WAIT_SECONDS), time.monotonic() + WAIT_SECONDS
    place = met.add("place", 1)
    met.set(f"since/{place}", str(int(time.time())))
    met.set(f"report/{place}", f"{_own_name()} at {time.strftime('%T')}\n{text}")
    heard.speaks = met.add(f"same/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    heard.reported.set()
    name, first_text = _first_report(met)
    heard.first, heard.since = f"{name} ({first_text})", int(met.get("since/1"))
    if text != first_text:
        met.set("differ", "")
    met.set(f"failed/{rank}", "")
    met.add("failed", 1)
    while met.add("failed", 0) < ranks and time.monotonic() < end and not met.check(["over"]):
        time.sleep(0.1)
    failed = met.add("failed", 0)  # again: the last may have come just before another rank said that it is over
    met.set("over", "")
    heard.alike = failed >= ranks and not met.check(["differ"])  # who is not there yet may differ
    if failed < ranks:
        silent = [r for r in range(ranks) if not met.check([f"failed/{r}"])]
        for r in silent[:NAMES]:
            known = met.check([f"host/{r}"])
            heard.silent[r] = met.get(f"host/{r}").decode() if known else "a host that never joined"
        heard.more = len(silent[NAMES:])
    heard.all = True
    # The store ends soon after the first rank of its node has: nobody leaves before all have heard.
    met.add("heard", 1)
    while met.add("heard", 0) < failed and time.monotonic() < end + 1:
        time.sleep(0.1)


def _first_report(met: Store) -> list[str]:
    """Name and error of the rank that reported first."""
    return met.get("report/1").decode().split("\n", 1)


def wait_for(met: Store, keys: list[str], seconds: float) -> list[str]:
    """Wait until all keys are set, or a rank has reported an error, or the time is over.

    Returns:
        The keys that are not set.

    Raises:
        EngineError: a rank has reported an error.
    """
    end, pause = time.monotonic() + seconds, 0.002
    while not met.check(keys):
        if met.check(["report/1"]):
            name, text = _first_report(met)
            raise may_pass(EngineError(f"{name} stopped: {text}"))
        if time.monotonic() > end:
            return [key for key in keys if not met.check([key])]
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    return []


def _own_name() -> str:
    return f"rank {os.environ['RANK']} on {socket.gethostname()}"


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:500]}" if text else type(error).__name__


def store(seconds: float) -> Store:
    """A connection of its own, as that of the process group may be broken or in use; its calls wait for so long."""
    met = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
    )
    return PrefixStore(f"anon_dist/{_attempt()}", met)


def _attempt() -> str:
    """Of torchrun's restarts, where its store outlives them. Rank 0's is a new one each time; and there launchers of several nodes may
    count otherwise: who restarts since others do has not failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if _agents_store() else "0"


def _agents_store() -> bool:
    """Whether the store is a launcher's, and not rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def restarts_remedy() -> str:
    """What to say besides, where launchers of several nodes restart ranks over one store: some count restarts that others do not."""
    nodes, restarts = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if nodes == "1" or restarts == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return ""
    return "; for restarts with c10d, export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all nodes (launch/multinode does)"


@contextlib.contextmanager
def new_keys() -> Iterator[None]:
    """A block in which the first process group is made: of a restarted node that is alone it meets no key of the attempt before.

    Torchrun's c10d keeps one store for all attempts, in which torch 2.13 leaves the addresses of ranks that are dead: gloo connects to
    these, if they are not replaced in time, and the restart fails.
    """
    module: Any = import_module("torch.distributed.rendezvous")  # of which torch.distributed has the function
    create = getattr(module, "_create_c10d_store", None)
    if create is None or _attempt() == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        yield
        return
    prefix = f"attempt/{_attempt()}"
    module._create_c10d_store = lambda *args, **options: PrefixStore(prefix, create(*args, **options))
    try:
        yield
    finally:
        module._create_c10d_store = create


def _hang_up() -> None:
    """Close the connections to the other ranks, so that those that wait for this one get an error now, and not when it has ended.

    By their descriptors, because gloo's groups have no other way: destroyed or aborted, they stay connected (torch 2.13).
    """
    for inode, connection in _connections():
        if inode in _OURS:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _connections() -> Iterator[tuple[int, socket.socket]]:
    """Inode and duplicate, closed after its turn, of each TCP connection of this process."""
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):  # another thread has closed it; or it is no connection
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername():
                    yield os.fstat(connection.fileno()).st_ino, connection


def _within(seconds: float, action: Callable[[], object]) -> None:
    """Do it, but do not wait for longer."""
    _started(action).join(seconds)


def _started(action: Callable[[], object]) -> threading.Thread:
    """A thread that does it, to be left behind if it takes too long: a store that was cut off answers after minutes, if ever."""

    def run() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread
