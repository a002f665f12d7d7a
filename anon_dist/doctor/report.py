"""What a node found out, as the nodes tell each other."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Self


@dataclass
class Interface:
    """The network interface that gloo or NCCL will take on a node."""

    name: str = ""
    """"": none has the address."""
    address: str = ""
    said_by: str = ""
    """The variable that names it; "": nothing does, and the library chooses."""
    problem: str = ""
    """Why it cannot be taken."""
    towards: str = ""
    """The interface by which packets leave for node 0."""
    present: list[str] = field(default_factory=list)
    """All of the node's but the loopback."""
    reachable: list[str] = field(default_factory=list)
    """Addresses by which others may reach the node, each with its interface."""
    looping: str = ""
    """What MASTER_ADDR is here, if it leads to the loopback."""

    @property
    def is_loopback(self) -> bool:
        """Whether no other machine can reach it."""
        return self.address.startswith("127.") or self.address == "::1"


@dataclass
class Peer:
    """Another node, as it was reached at the address of its interface."""

    problem: str = ""
    closed: str = ""
    """Which of its ports were not reached, and why, if others were."""
    rtt: float = 0.0
    """Seconds there and back, the shortest."""
    ahead: float = 0.0
    """Seconds that its clock is ahead, to half the round trip."""
    bandwidth: float = 0.0
    """Bytes per second of an all-reduce between the two; 0: not measured."""
    slow: str = ""
    """Why the all-reduce failed."""


@dataclass
class Folder:
    """run_dir, on a node."""

    problem: str = ""
    unseen: list[int] = field(default_factory=list)
    """Nodes whose file is not there."""
    device: str = ""
    """The file system: what is mounted, of which type."""
    written: float = 0.0
    """Bytes per second, with fsync."""
    sync: float = 0.0
    """Seconds of an fsync of 4 KiB; the median."""
    free: int = 0
    """Bytes."""
    checkpoints: int = 0
    """Complete ones that are there."""


@dataclass
class Report:
    """All of a node's."""

    rank: int
    host: str
    versions: dict[str, str] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    """Names of the GPUs; of the CPU where there is none."""
    gpus: int = 0
    driver: str = ""
    device_problem: str = ""
    backend: str = "gloo"
    interface: Interface = field(default_factory=Interface)
    meeting: str = ""
    """Why this node could not meet the others."""
    absent: dict[int, str] = field(default_factory=dict)
    """Nodes that node 0 waited for in vain, or that stopped on the way, and where."""
    peers: dict[int, Peer] = field(default_factory=dict)
    folder: Folder | None = None
    """None: no run_dir was named."""
    remote: str = ""
    """checkpoint.remote, where node 0 could write; "": none was named."""
    remote_problem: str = ""
    remote_remedy: str = ""
    data: str = ""
    """Fingerprints of the data; "": none was named."""
    data_problem: str = ""
    data_remedy: str = ""
    flops: list[float] = field(default_factory=list)
    """Operations per second of a matrix product, of each device."""
    kernel: str = ""
    """The optimizer's backend."""
    kernel_problem: str = ""
    unimportable: dict[str, str] = field(default_factory=dict)
    """Packages that do not import, and why."""

    def to_json(self) -> str:
        """On a line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The reverse."""
        content: dict[str, Any] = json.loads(text)
        content["interface"] = Interface(**content["interface"])
        content["absent"] = {int(rank): what for rank, what in content["absent"].items()}
        content["peers"] = {int(rank): Peer(**peer) for rank, peer in content["peers"].items()}
        content["folder"] = content["folder"] and Folder(**content["folder"])
        return cls(**content)
