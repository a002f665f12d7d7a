"""Which node this is, of how many, and where they meet: as options or launchers say."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from anon_dist.doctor.options import Doctor

PORT = 29500


class PlaceError(ValueError):
    """Nobody says which node this is, or where node 0 is."""


@dataclass(frozen=True)
class Place:
    """A node among those that are looked at."""

    rank: int = 0
    nodes: int = 1
    address: str = ""
    """Of node 0; "" of a node that is alone."""
    port: int = PORT
    hosted: bool = False
    """A launcher keeps the store at that address already."""


def find(options: Doctor, variables: Mapping[str, str]) -> Place | None:
    """This process's place; None where another process of its node does the work.

    Raises:
        PlaceError: something is missing.
    """
    if options.node_rank is not None:
        if options.num_nodes is None:
            raise PlaceError("--node-rank needs --num-nodes")
        if not 0 <= options.node_rank < options.num_nodes:
            raise PlaceError(f"--node-rank must be from 0 to {options.num_nodes - 1}, not {options.node_rank}")
        return _at(options.node_rank, options.num_nodes, options, variables)
    if "RANK" in variables and "WORLD_SIZE" in variables:
        if variables.get("LOCAL_RANK", "0") != "0":
            return None
        local = int(variables.get("LOCAL_WORLD_SIZE") or variables.get("LOCAL_SIZE") or 1)  # torch's, DeepSpeed's name
        rank = variables.get("GROUP_RANK") or variables.get("CROSS_RANK") or int(variables["RANK"]) // local
        hosted = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return _at(int(rank), int(variables["WORLD_SIZE"]) // local, options, variables, hosted)
    if "SLURM_STEP_NUM_NODES" in variables:  # of srun's tasks; a batch script has only the job's
        if variables.get("SLURM_LOCALID", "0") != "0":
            return None
        first = variables.get("MASTER_ADDR") or _first_of(variables.get("SLURM_STEP_NODELIST", ""))
        port = variables.get("MASTER_PORT") or str(20000 + int(variables.get("SLURM_JOB_ID", "0")) % 10000)
        given = {**variables, "MASTER_ADDR": first, "MASTER_PORT": port}
        return _at(int(variables["SLURM_NODEID"]), int(variables["SLURM_STEP_NUM_NODES"]), options, given)
    return Place()


def _at(rank: int, nodes: int, options: Doctor, variables: Mapping[str, str], hosted: bool = False) -> Place:
    if nodes == 1:
        return Place()
    address = options.master_addr or variables.get("MASTER_ADDR", "")
    if not address:
        raise PlaceError(
            "where is node 0? Give --master-addr, an address of it that all nodes reach, or set MASTER_ADDR"
        )
    return Place(rank, nodes, address, options.master_port or int(variables.get("MASTER_PORT") or PORT), hosted)


def is_known(name: str) -> bool:
    """Whether a name of a node, or an address, leads anywhere from here."""
    try:
        return bool(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))
    except OSError:
        return False


def _first_of(node_list: str) -> str:
    """The first name of `node-[1-4]`, as Slurm spells it."""
    command = ["scontrol", "show", "hostnames", node_list]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise PlaceError(f"which node of {node_list!r} is the first? {error}; set MASTER_ADDR") from None


def backend_variables() -> dict[str, str]:
    """What nodes that are reached over ssh are to have of this one's environment."""
    kept = ("GLOO_", "NCCL_", "PYTHON", "ANON_DIST_", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    return {name: value for name, value in os.environ.items() if name.startswith(kept)}
