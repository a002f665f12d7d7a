"""What joins the nodes: interfaces, ports, clocks, and how fast an all-reduce is between two of them."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from anon_dist.doctor.meeting import Meeting, pairs_of, why
from anon_dist.doctor.place import Place
from anon_dist.doctor.report import Interface, Peer

ANSWER = struct.Struct("!idQ")
"""Rank, clock, and the token of this examination: another program may listen at the port."""
REACH_SECONDS = 5.0
PORTS = 8
"""How many ports of a node are tried: a firewall may let some of the range pass."""
PAIR_SECONDS = 30.0
MEASURED_SECONDS = 0.1
"""A message is as long as takes about so long, at most `LARGEST` bytes."""
LARGEST = {"gloo": 1 << 25, "nccl": 1 << 28}
SMALLEST = 1 << 17

# -- interfaces -------------------------------------------------------------------------------------------------------


def chosen_interface(place: Place, backend: str) -> Interface:
    """The interface that gloo will take, or NCCL where a variable names one for it: the other, if that cannot be taken, since a run under
    NCCL saves through gloo. Loopback is right only for a node that is alone."""
    gloo = _chosen(place, "GLOO_SOCKET_IFNAME")
    if backend != "nccl" or not os.environ.get("NCCL_SOCKET_IFNAME"):
        return gloo
    nccl = _chosen(place, "NCCL_SOCKET_IFNAME")
    unfit = bool(gloo.problem) or (gloo.is_loopback and place.nodes > 1)
    return gloo if unfit and not nccl.problem else nccl


def _chosen(place: Place, variable: str) -> Interface:
    """By the variable, or without it by the node's own name."""
    addresses = _addresses()
    present = [name for name, found in addresses.items() if not all(map(_loops, found))]
    reachable = [f"{own} of {name}" for name in present if (own := next(filter(_reachable, addresses[name]), ""))]
    towards, looping = _towards(place, addresses), _looping(place)
    found = Interface(present=present, reachable=reachable, towards=towards, looping=looping)
    if value := os.environ.get(variable):
        found.said_by = f"{variable}={value}"
        names = _named(value, variable, addresses)
        if not names:
            found.problem = "no interface of this node has that name"
            return found
        found.name, found.address = names[0], next(iter(addresses[names[0]]), "")
        if not found.address:
            found.problem = f"{found.name} has no address"
        return found
    try:
        found.address = str(socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        found.address = "127.0.0.1"
        found.problem = "the node's own name is not known to it, so that gloo takes the loopback"
    found.name = next((name for name, own in addresses.items() if found.address in own), "")
    return found


def _addresses() -> dict[str, list[str]]:
    """IP addresses of each interface that is up, IPv4 first."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        if name in up:
            families = sorted((e.family, e.address.partition("%")[0]) for e in entries)
            found[name] = [a for f, a in families if f in (socket.AF_INET, socket.AF_INET6)]
    return found


def _named(value: str, variable: str, addresses: dict[str, list[str]]) -> list[str]:
    """The interfaces that a variable means: gloo takes whole names, NCCL beginnings, "=" whole names, "^" all but those."""
    if variable.startswith("GLOO"):
        return [name for name in value.split(",") if name in addresses]
    exact, words = value.lstrip("^").startswith("="), value.lstrip("^=").split(",")
    named = [n for n in addresses if any(n == w if exact else n.startswith(w) for w in words)]
    return [n for n in addresses if n not in named and n != "lo"] if value.startswith("^") else named


def _loops(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _reachable(address: str) -> bool:
    """Whether it is neither the loopback's nor one that is known on its own cable alone."""
    return not (_loops(address) or ip_address(address).is_link_local)


def _looping(place: Place) -> str:
    """Node 0's address, if it leads to the loopback here."""
    if place.nodes == 1 or not place.address:
        return ""
    try:
        address = str(socket.getaddrinfo(place.address, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return ""
    if not _loops(address):
        return ""
    return address if address == place.address else f"{place.address}, {address}"


def _towards(place: Place, addresses: dict[str, list[str]]) -> str:
    """The interface by which packets leave for node 0; on node 0, the one that has its address. Nothing is sent."""
    if not place.address:
        return ""
    with contextlib.suppress(OSError):
        family, kind, _, _, target = socket.getaddrinfo(place.address, place.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            own = str(probe.getsockname()[0])
        return next((name for name, found in addresses.items() if own in found), "")
    return ""


# -- ports and clocks -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(rank: int, token: int, address: str) -> Iterator[list[int]]:
    """A block in which this node answers at `PORTS` ports, spread over those that the system chooses from for gloo and NCCL; the ports."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.ExitStack() as stack:
        ports = []
        for wanted in _spread():
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            try:
                listener.bind((address, wanted))
            except OSError:  # taken; or nothing can be bound there, which the system's own choice says too
                listener.bind((address, 0))
            listener.listen(1024)
            stack.callback(_shut, listener)
            threading.Thread(target=_answer, args=(listener, rank, token), daemon=True).start()
            ports.append(listener.getsockname()[1])
        yield ports


def _spread() -> list[int]:
    """A port at random in each of as many parts of the range; 0, the system's choice, where the range is not known."""
    try:
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        return [0] * PORTS
    edges = [low + (high + 1 - low) * i // PORTS for i in range(PORTS + 1)]
    return [random.randrange(a, max(b, a + 1)) for a, b in itertools.pairwise(edges)]


def _shut(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)


def _answer(listener: socket.socket, rank: int, token: int) -> None:
    while True:
        try:
            caller, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_answer_one, args=(caller, rank, token), daemon=True).start()


def _answer_one(caller: socket.socket, rank: int, token: int) -> None:
    with caller, contextlib.suppress(OSError):
        caller.settimeout(REACH_SECONDS)
        while caller.recv(1):
            caller.sendall(ANSWER.pack(rank, time.time(), token))


def reach(addresses: dict[int, tuple[str, list[int]]], token: int) -> dict[int, Peer]:
    """Connect to other nodes, at each of their ports, and compare clocks."""
    asked = [(rank, address, port) for rank, (address, ports) in addresses.items() for port in ports]
    with ThreadPoolExecutor(max(1, min(128, len(asked)))) as pool:
        answers = list(pool.map(lambda one: _reach(one[0], one[1], one[2], token), asked))
    found = {}
    for rank, (address, _) in addresses.items():
        peers = {port: peer for (of, _, port), peer in zip(asked, answers, strict=True) if of == rank}
        found[rank] = _together(address, peers)
    return found


def _together(address: str, peers: dict[int, Peer]) -> Peer:
    """A node, by its ports."""
    if not peers:
        return Peer(problem="it has no address")
    closed = {port: peer.problem for port, peer in peers.items() if peer.problem}
    best = min(peers.values(), key=lambda peer: (bool(peer.problem), peer.rtt))
    if closed and not best.problem:
        ports = ", ".join(map(str, list(closed)[:3])) + (f" and {len(closed) - 3} more" if len(closed) > 3 else "")
        best.closed = f"{address}, port {ports}, of {len(peers)} that were tried: {next(iter(closed.values()))}"
    return best


def _reach(rank: int, address: str, port: int, token: int) -> Peer:
    try:
        with socket.create_connection((address, port), timeout=REACH_SECONDS) as connection:
            best = Peer(rtt=float("inf"))
            for _ in range(8):
                sent, began = time.time(), time.perf_counter()
                connection.sendall(b"?")
                who, clock, whose = ANSWER.unpack(_exactly(connection, ANSWER.size))
                rtt = time.perf_counter() - began
                if (who, whose) != (rank, token):
                    return Peer(problem=f"another machine answers at {address}:{port}")
                if rtt < best.rtt:
                    best = Peer(rtt=rtt, ahead=clock - sent - rtt / 2)
            return best
    except OSError as error:
        return Peer(problem=why(error))


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        if not (more := connection.recv(size - len(found))):
            raise ConnectionResetError("another program answers there")
        found += more
    return found


# -- all-reduce -------------------------------------------------------------------------------------------------------


def measure_pairs(meeting: Meeting, backend: str, peers: dict[int, Peer], fit: set[tuple[int, int]]) -> None:
    """An all-reduce between every two nodes that reach each other, into `peers`; disjoint pairs at the same time."""
    mine, device = meeting.place.rank, torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    for turn, pairs in enumerate(pairs_of(meeting.present)):
        meeting.all_at(f"all-reduces, turn {turn}", 2 * PAIR_SECONDS)
        pair = next((p for p in pairs if mine in p and p in fit), None)
        if pair is None:
            continue
        (other,) = set(pair) - {mine}
        try:
            peers[other].bandwidth = _all_reduce(meeting, pair, backend, device)
        except Exception as error:
            peers[other].slow = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _all_reduce(meeting: Meeting, pair: tuple[int, int], backend: str, device: torch.device) -> float:
    """Bytes per second: of a message, over the time of its sum on two nodes, which each send it once."""
    store = PrefixStore(f"pair/{pair[0]}/{pair[1]}", meeting.store)
    own = pair.index(meeting.place.rank)
    limit = timedelta(seconds=PAIR_SECONDS)
    dist.init_process_group(
        backend, store=store, rank=own, world_size=2, timeout=limit, device_id=device if device.type == "cuda" else None
    )
    try:
        size, best = SMALLEST, 0.0
        _timed(size, device)
        while True:
            seconds = min(_timed(size, device) for _ in range(3))
            best = max(best, size / seconds)
            if seconds >= MEASURED_SECONDS or size >= LARGEST[backend]:
                return best
            size = min(LARGEST[backend], 4 * size)
    finally:
        dist.destroy_process_group()


def _timed(size: int, device: torch.device) -> float:
    """Seconds of one, the longer of the two nodes'."""
    message = torch.zeros(size // 4, device=device)
    began = time.perf_counter()
    dist.all_reduce(message)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = torch.tensor(time.perf_counter() - began, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)
