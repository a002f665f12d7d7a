"""Hosts that are real to the kernel, on one machine: network namespaces at a switch. For tools/chaos.py and tests/multinode.

They share the file system, as nodes of a cluster do, and nothing of the network. Needs iproute2 and root.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

INTERFACE = "cable0"
"""Its name on each host."""


@dataclass(frozen=True)
class Host:
    """A network namespace with one interface besides its own loopback; what is started in it sees its name as the host's."""

    rank: int
    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """What runs a command there."""
        return [
            *("ip", "netns", "exec", self.name, "unshare", "--uts"),
            *("sh", "-c", 'echo "$0" > /proc/sys/kernel/hostname; exec "$@"', self.name),
            *words,
        ]

    def pids(self) -> list[int]:
        """All that runs there."""
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """SIGKILL to all of it."""
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)

    def cable(self, state: str) -> None:
        """Pull the cable out ("down") or put it in ("up"). Nobody is told: what was sent is lost."""
        ip("-n", self.name, "link", "set", INTERFACE, state)


def ip(*arguments: str) -> str:
    """Run iproute2's `ip`.

    Raises:
        OSError: it failed, or is not there.
    """
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def hosts(number: int) -> Iterator[list[Host]]:
    """So many hosts at a switch; whatever still runs on them is killed in the end.

    Raises:
        OSError: namespaces cannot be made here.
    """
    token = secrets.token_hex(3)
    switch, made = f"anon-{token}-switch", list[str]()
    all_hosts = [Host(i, f"anon-{token}-{i}", f"10.203.0.{i + 1}") for i in range(number)]
    try:
        for name in (switch, *(host.name for host in all_hosts)):
            ip("netns", "add", name)
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", switch, "link", "add", "switch", "type", "bridge")
        ip("-n", switch, "link", "set", "switch", "up")
        for host in all_hosts:
            ends = ("type", "veth", "peer", "name", f"port{host.rank}", "netns", switch)
            ip("-n", host.name, "link", "add", INTERFACE, *ends)
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            ip("-n", switch, "link", "set", f"port{host.rank}", "master", "switch", "up")
            host.cable("up")
        ip("netns", "exec", switch, "true")
        yield all_hosts
    finally:
        for name in made:
            for pid in ip("netns", "pids", name).split():
                os.kill(int(pid), signal.SIGKILL)
            ip("netns", "delete", name)  # its cable goes with it
