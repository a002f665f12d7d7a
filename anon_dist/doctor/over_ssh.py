"""The doctor on every node, started over ssh from one: what the nodes cannot tell each other, this one hears all the same."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from anon_dist.doctor.options import Doctor
from anon_dist.doctor.place import PORT, PlaceError, backend_variables
from anon_dist.doctor.report import Report

REPORTS = "ANON_DIST_DOCTOR_REPORTS"
"""Set for a node's process that prints its report, after `MARK`, in place of a screen."""
MARK = "anon-dist doctor's report:"
LONGEST = 600.0
"""Seconds after the waiting, in which a node's examination must be done."""


def names_of(nodes: str) -> list[str]:
    """Of a list with commas, or a host file.

    Raises:
        PlaceError: there is none, or one comes twice.
    """
    path = Path(nodes)
    if path.is_file():
        lines = [line.partition("#")[0].split() for line in path.read_text().splitlines()]
        names = [words[0] for words in lines if words]
    else:
        names = [name.strip() for name in nodes.split(",") if name.strip()]
    if not names:
        raise PlaceError(f"--nodes {nodes} names no node")
    if twice := [name for name in names if names.count(name) > 1]:
        raise PlaceError(f"--nodes names {twice[0]} twice")
    return names


def examine_all(options: Doctor, rest: Sequence[str]) -> tuple[dict[int, Report], dict[int, str], dict[int, str]]:
    """Start it on each node, and wait.

    Returns:
        Reports, why the others have none, and the nodes' names, by rank.

    Raises:
        PlaceError: the first node's name leads nowhere from here, and no --master-addr is given.
    """
    names = names_of(options.nodes or "")
    address = options.master_addr or _address_of(names[0])
    count = f"{len(names)} node{'s' * (len(names) > 1)}"
    print(f"waiting up to {options.wait + LONGEST:.0f} s for {count}, over ssh", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(len(names)) as pool:
        found = list(pool.map(lambda rank: _examine(options, rest, names, rank, address), range(len(names))))
    reports = {rank: report for rank, report in enumerate(found) if isinstance(report, Report)}
    absent = {rank: why for rank, why in enumerate(found) if isinstance(why, str)}
    return reports, absent, dict(enumerate(names))


def _address_of(name: str) -> str:
    try:
        address = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        address = ""
    if not address or address.startswith("127.") or address == "::1":
        what = f"leads to {address}" if address else "is no name that is known"
        raise PlaceError(f"{name} {what} here; give --master-addr, an address of {name} that all nodes reach")
    return address


def _examine(options: Doctor, rest: Sequence[str], names: Sequence[str], rank: int, address: str) -> Report | str:
    """A node's report, or what came instead."""
    own = ["--node-rank", str(rank), "--num-nodes", str(len(names)), "--wait", str(options.wait)]
    own += ["--master-addr", address, "--master-port", str(options.master_port or PORT)]
    variables = {**backend_variables(), REPORTS: "1"}
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    words = shlex.join([sys.executable, "-m", "anon_dist.cli", "doctor", *own, *rest])
    command = [*shlex.split(options.ssh), names[rank], f"cd {shlex.quote(str(Path.cwd()))} && env {settings} {words}"]
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=options.wait + LONGEST
        )
    except subprocess.TimeoutExpired:
        return f"not done after {time.monotonic() - began:.0f} s"
    except OSError as error:
        return str(error)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if lines:
        return Report.from_json(lines[-1].removeprefix(MARK))
    last = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
    return f"exit code {done.returncode}: {last[:200]}"
