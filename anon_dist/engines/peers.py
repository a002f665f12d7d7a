"""After an error: which rank stopped first. A launcher knows the ranks of its own node only, and calls one of them the root cause.

The ranks tell each other through the store at which they met: the launchers' (torchrun, accelerate), or rank 0's.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

WAIT_SECONDS = 5.0
"""How long a rank that failed waits for the store's answer, and then for word from the others."""
NAMES = 8
"""Of more ranks than this, the rest goes unnamed."""


def sign_in() -> None:
    """Leave this rank's host with the store. Every rank, once it has joined the others."""
    if _several():
        _within(WAIT_SECONDS, lambda: _store().set(f"host/{os.environ['RANK']}", socket.gethostname()))


@contextlib.contextmanager
def who_stopped() -> Iterator[None]:
    """A block in which ranks work together, and after which an error ends the process: it gets a note of which rank stopped first.

    The launcher gets error and note too, for its report. Neither note nor delay if there is one rank; no note if all failed alike, by a
    mistake in the configuration, say. At most 2 · WAIT_SECONDS pass, and connections to the other ranks are closed.
    """
    try:
        yield
    except Exception as error:
        now = time.time()
        with contextlib.suppress(Exception):  # the error is what matters
            if _several() and (note := _note(error)):
                error.add_note(note)
            _tell_launcher(error, now)
        raise


def _several() -> bool:
    """Whether there are other ranks, and a store to meet them at."""
    variables = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    there = dist.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return there and all(v in os.environ for v in variables) and int(os.environ["WORLD_SIZE"]) > 1


@dataclass
class _Heard:
    """What the store said, so far: it may be lost at any moment."""

    first: str = ""
    """The rank that failed first, where, when and how."""
    alike: bool = False
    """Whether all failed by the same error."""
    silent: dict[int, str] = field(default_factory=dict)
    """Hosts of the ranks that did not report in time; the first of them."""
    more: int = 0
    """How many others did not."""
    all: bool = False
    """Whether the above is complete."""


def _note(error: Exception) -> str | None:
    """What the ranks together know of who stopped first; None if that explains nothing."""
    with contextlib.suppress(ValueError):  # not the main thread
        # The launcher terminates the ranks next to one that ended; not before they have said why they did.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    heard = _Heard()
    _hang_up()
    _within(2 * WAIT_SECONDS, lambda: _listen(error, heard))
    own = _own_name()
    first = f"this one, {own}" if heard.first.startswith(f"{own} ") else heard.first
    if not heard.all:
        return (
            f"The store at {os.environ['MASTER_ADDR']} does not answer {own}: the node of rank 0 stopped or was lost, or this one is cut "
            f"off from it.{f' The first to notice, or to fail, was {first}.' if first else ''}"
        )
    if heard.silent:
        names = ", ".join(f"rank {rank} on {host}" for rank, host in heard.silent.items())
        return (
            f"Stopped without a word: {names}{f' and {heard.more} more' if heard.more else ''}; killed, cut off or hanging. "
            f"The first to notice, or to fail, was {first}."
        )
    return None if heard.alike else f"The first of {os.environ['WORLD_SIZE']} ranks to fail was {first}."


def _listen(error: Exception, heard: _Heard) -> None:
    """Report this rank's error, and wait for the others' reports."""
    rank, ranks, text = os.environ["RANK"], int(os.environ["WORLD_SIZE"]), _line(error)
    store, end = _store(), time.monotonic() + WAIT_SECONDS
    store.set(f"report/{store.add('place', 1)}", f"{_own_name()} at {time.strftime('%T')}\n{text}")
    name, first_text = store.get("report/1").decode().split("\n", 1)
    heard.first = f"{name} ({first_text})"
    if text != first_text:
        store.set("differ", "")
    store.set(f"failed/{rank}", "")
    store.add("failed", 1)
    while (failed := store.add("failed", 0)) < ranks and time.monotonic() < end and not store.check(["over"]):
        time.sleep(0.1)
    store.set("over", "")
    heard.alike = not store.check(["differ"])
    if failed < ranks:
        silent = [r for r in range(ranks) if not store.check([f"failed/{r}"])]
        for r in silent[:NAMES]:
            known = store.check([f"host/{r}"])
            heard.silent[r] = store.get(f"host/{r}").decode() if known else "a host that never joined"
        heard.more = len(silent[NAMES:])
    heard.all = True
    # The store ends soon after the first rank of its node has: nobody leaves before all have heard.
    store.add("heard", 1)
    while store.add("heard", 0) < failed and time.monotonic() < end + 1:
        time.sleep(0.1)


def _own_name() -> str:
    return f"rank {os.environ['RANK']} on {socket.gethostname()}"


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:500]}" if text else type(error).__name__


def _store() -> Store:
    """A connection of its own, as that of the process group may be broken or in use."""
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=WAIT_SECONDS),
        wait_for_workers=False,
    )
    return PrefixStore(f"anon_dist/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _hang_up() -> None:
    """Close this process's connections, so that peers that wait for it get an error now, and not when it has ended.

    By their descriptors, because gloo's groups have no other way: destroyed or aborted, they stay connected while a model holds them.
    """
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername():
                    connection.shutdown(socket.SHUT_RDWR)


def _within(seconds: float, action: Callable[[], object]) -> None:
    """Do it in a thread, which is left behind if it takes longer or fails: a store that was cut off answers after minutes, if ever."""

    def run() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)


def _tell_launcher(error: Exception, moment: float) -> None:
    """Write what torchrun and accelerate show of this rank in their reports of a failure."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        text = "\n".join([_line(error), *getattr(error, "__notes__", [])])
        with open(path, "w") as file:
            json.dump({"message": {"message": text, "extraInfo": {"timestamp": str(int(moment))}}}, file)
