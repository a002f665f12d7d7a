"""The options of `anon-dist doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class Doctor:
    """Check this machine, or all nodes of a run and what joins them, before a training: versions, devices, network, run_dir, speed.

    Start it as the training will be started: `srun anon-dist doctor`, `torchrun … -m anon_dist.cli doctor`, on every node with --node-rank,
    or on one with --nodes, over ssh. Further options are those of `anon-dist train` (--config, --run-dir, --checkpoint.keep): they say
    which folder is tried, which data must be there and how much room checkpoints take. Exit code 0: all is
    well; 1: something is not, or the nodes did not meet; 2: the options are wrong.
    """

    nodes: str | None = None
    """Nodes to reach over ssh, separated by commas, or a host file of DeepSpeed's; the first one is node 0. They have this folder and this
    Python under the same paths."""
    ssh: str = "ssh -o BatchMode=yes -o ConnectTimeout=10"
    """Program that is given a node's name and a shell command."""
    node_rank: int | None = None
    """Without ssh, on every node: its number, from 0. None: as torchrun, accelerate, DeepSpeed's launcher or srun say."""
    num_nodes: int | None = None
    """With --node-rank: how many."""
    master_addr: str | None = None
    """An address of node 0 that all nodes reach. None: MASTER_ADDR, or the first node's name."""
    master_port: int | None = None
    """A free port there. None: MASTER_PORT, or 29500."""
    wait: float = 60.0
    """Seconds that nodes wait for each other at the start."""
    json: Path | None = None
    """File for all that was found and measured."""
