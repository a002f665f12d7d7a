"""Nodes meet at a store on node 0, as their ranks will; all that they exchange there is waited for only so long."""

from __future__ import annotations

import errno
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterable
from datetime import timedelta

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from anon_dist.doctor.place import Place

PAUSE = 0.05
QUIET_SECONDS = 2.0
"""Nodes that have met wait for each other without a word."""
STORE_SECONDS = 15.0
_VALIDATE, _PING = b"\x00" + struct.pack("<I", 0x3C85F7CE), b"\x0d"
"""What a client of torch's TCPStore says first; the store gives back the four bytes after a ping."""
NAMED = 4
"""Of more nodes than this, the rest is counted."""
_SHOWN = 40
"""Bytes of a stranger's answer."""


class NoMeetingError(Exception):
    """The nodes cannot meet; in words."""


class Meeting:
    """What nodes leave for each other, by topic and rank.

    Args:
        store: of all nodes.
        seconds: how long to wait for nodes at the start; later they are given as long as they may need.
    """

    def __init__(self, place: Place, store: Store, seconds: float) -> None:
        self.place = place
        self.store = PrefixStore("anon_dist/doctor", store)
        self.absent: dict[int, str] = {}
        """Nodes that did not come, or no further; where."""
        self._arrive(seconds)

    @property
    def present(self) -> list[int]:
        """Nodes that are still with us."""
        return [rank for rank in range(self.place.nodes) if rank not in self.absent]

    def tell(self, topic: str, text: str = "") -> None:
        """Leave something for the others."""
        self.store.set(f"{topic}/{self.place.rank}", text)

    def hear(self, topic: str, seconds: float, at_once: bool = False) -> dict[int, str]:
        """What each node that is present left; those that leave nothing in time are absent from now on.

        Args:
            at_once: a line says for whom it waits before `QUIET_SECONDS`.
        """
        end, waiting, found = time.monotonic() + seconds, set(self.present), dict[int, str]()
        said = time.monotonic() + (0.0 if at_once else QUIET_SECONDS)
        while waiting and time.monotonic() < end:
            for rank in [r for r in waiting if self.store.check([f"{topic}/{r}"])]:
                found[rank] = self.store.get(f"{topic}/{rank}").decode()
                waiting.discard(rank)
            if waiting and time.monotonic() >= said:
                _say(seconds, _named(waiting) + ("" if at_once else f" ({topic})"))
                said = end
            time.sleep(PAUSE if waiting else 0)
        self.absent |= dict.fromkeys(waiting, f"did not get through its part ({topic}) in {seconds:.0f} s")
        return found

    def all_at(self, topic: str, seconds: float) -> None:
        """Nobody goes on before all that are present are here."""
        self.tell(topic)
        self.hear(topic, seconds)

    def comes(self, key: str, seconds: float, what: str) -> bool:
        """Whether node 0 leaves something in time."""
        begun, said = time.monotonic(), False
        while not self.store.check([key]):
            if (waited := time.monotonic() - begun) > seconds:
                return False
            if waited > QUIET_SECONDS and not said:
                _say(seconds, what)
                said = True
            time.sleep(PAUSE)
        return True

    def leave(self, seconds: float = 10.0) -> None:
        """Node 0, which has the store, goes last."""
        self.tell("left")
        if self.place.rank == 0:
            self.hear("left", seconds)

    def _arrive(self, seconds: float) -> None:
        """Node 0 decides who has come; a node that comes later is told so."""
        self.tell("here", socket.gethostname())
        if self.place.rank == 0:
            self.hear("here", seconds, at_once=True)
            self.absent = dict.fromkeys(self.absent, f"did not come within {seconds:.0f} s")
            self.store.set("absent", ",".join(map(str, self.absent)))
            return
        if not self.comes("absent", seconds + 20, "node 0 to say which nodes have come"):
            raise NoMeetingError(f"node 0 at {self.place.address} has a store, and does not go on")
        ranks = self.store.get("absent").decode()
        self.absent = {int(rank): "did not come" for rank in ranks.split(",") if rank}
        if self.place.rank in self.absent:
            raise NoMeetingError("this node came when node 0 had waited for it long enough: raise --wait")


def meet(place: Place, seconds: float) -> Meeting:
    """Host the store, or find it.

    Raises:
        NoMeetingError: naming port, address and what is in the way.
    """
    store: Store
    if place.rank == 0 and not place.hosted:
        _check_free(place.port)
        store = _join(
            place,
            f"port {place.port} of node 0 cannot be opened at {place.address}, or that is another machine's address",
        )
    else:
        _knock(place, seconds)
        _greet(place)
        store = _join(place, f"the store at {place.address}:{place.port} lets nobody in")
    try:
        return Meeting(place, store, seconds)
    except NoMeetingError:
        raise
    except Exception as error:
        raise NoMeetingError(f"the store at {place.address}:{place.port} was lost: {_line(error)}") from None


def _join(place: Place, otherwise: str) -> Store:
    """Node 0's store, or a connection to it. In a thread: to a program that accepts and says nothing, torch listens for ever, and to an
    address that does not answer it goes back for minutes.

    Args:
        otherwise: what is to be said if it does not come about.
    """
    limit, hosts = timedelta(seconds=STORE_SECONDS), place.rank == 0 and not place.hosted
    found: list[Store | Exception] = []

    def join() -> None:
        try:
            found.append(TCPStore(place.address, place.port, is_master=hosts, timeout=limit, wait_for_workers=False))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(min(QUIET_SECONDS, STORE_SECONDS))
    if thread.is_alive():
        _say(STORE_SECONDS, f"the store at {place.address}:{place.port}")
        thread.join(STORE_SECONDS)
    if found and isinstance(found[0], Store):
        return found[0]
    what = _line(found[0]) if found and isinstance(found[0], Exception) else "it says nothing"
    raise NoMeetingError(f"{otherwise} ({what})")


def _say(seconds: float, what: str) -> None:
    print(f"waiting up to {seconds:.0f} s for {what}", file=sys.stderr, flush=True)


def _named(nodes: Iterable[int]) -> str:
    """Nodes of which the first few are named."""
    ranks = sorted(nodes)
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"node{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:NAMED]))}{more}"


def _greet(place: Place) -> None:
    """See that it is a store that listens. What torch's own client is told by another program it prints with a trace, again and again, and
    a process cannot end well meanwhile."""
    where = f"{place.address}:{place.port}"
    word = secrets.token_bytes(4)
    answer, end = b"", time.monotonic() + STORE_SECONDS
    try:
        with socket.create_connection((place.address, place.port), timeout=STORE_SECONDS) as connection:
            connection.sendall(_VALIDATE + _PING + word)
            while answer[:4] != word and len(answer) < _SHOWN and (left := end - time.monotonic()) > 0:
                connection.settimeout(left)
                if not (more := connection.recv(_SHOWN)):
                    break
                answer += more
                end = min(end, time.monotonic() + 1.0)  # what is no store's answer is shown soon
    except OSError:
        pass  # what was said so far is what counts
    if answer[:4] != word:
        said = f"its first bytes are {answer[:_SHOWN]!r}" if answer else "it says nothing"
        raise NoMeetingError(f"something else answers at {where}: {said}")


def _check_free(port: int) -> None:
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
            trial.listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return  # no IPv6 here, say; the store itself will find out
            raise NoMeetingError(f"port {port} of node 0 is in use{_holder(port)}") from None


def _holder(port: int) -> str:
    """The process that listens there, as far as one may know."""
    try:
        found = [
            c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.status == "LISTEN"
        ]
        pid = next(filter(None, found))
        return f" by process {pid} ({' '.join(psutil.Process(pid).cmdline())[:60]})"
    except (StopIteration, psutil.Error, OSError):
        return ""


def _knock(place: Place, seconds: float) -> None:
    """Wait until node 0 answers."""
    end, last, said = time.monotonic() + seconds, "no answer", False
    while (left := end - time.monotonic()) > 0:
        try:
            socket.create_connection((place.address, place.port), timeout=min(5.0, max(left, 0.5))).close()
            return
        except OSError as error:
            last = why(error)
        if not said:
            _say(seconds, f"node 0 at {place.address}:{place.port}: {last}")
            said = True
        time.sleep(0.5)
    raise NoMeetingError(f"node 0 does not answer at {place.address}:{place.port} in {seconds:.0f} s: {last}")


def why(error: OSError) -> str:
    """What it means that a connection cannot be made."""
    if isinstance(error, TimeoutError):
        return "no answer at all (packets are dropped: a firewall, or a wrong address)"
    if isinstance(error, ConnectionRefusedError):
        return "refused (the machine is there, and nobody listens)"
    if isinstance(error, socket.gaierror):
        return "its name is not known here"
    return error.strerror or str(error)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def pairs_of(nodes: Iterable[int]) -> list[list[tuple[int, int]]]:
    """Rounds in which every node meets every other once, and none two at a time."""
    ring: list[int | None] = list(nodes)
    ring += [None] * (len(ring) % 2)
    rounds = []
    for _ in range(len(ring) - 1):
        both = zip(ring[: len(ring) // 2], reversed(ring), strict=False)
        rounds.append([(min(a, b), max(a, b)) for a, b in both if a is not None and b is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return rounds
