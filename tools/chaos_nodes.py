"""Launchers and ranks of tools/chaos.py, forked from a process that has imported already what takes long."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCH_CPP_LOG_LEVEL": "ERROR"}

from namespaces import INTERFACE, Host
from torch.distributed import TCPStore

from anon_dist import launcher
from anon_dist.cli import train
from anon_dist.train import loop
from anon_dist.train.health import signals

IMPORTS = (
    "transformers.models.gpt2.modeling_gpt2",
    "accelerate",
    "deepspeed",
    "matplotlib.pyplot",
    "anon_dist.checkpoint.convert",
)
"""What each rank would import anew, and a busy machine takes long for."""
LIBC = ctypes.CDLL(None, use_errno=True)
NEW_NET, NEW_UTS = 0x40000000, 0x04000000


def import_all() -> None:
    """Before the first fork."""
    for name in IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


@dataclass
class Node:
    """A launcher that runs on a host, and its rank."""

    host: Host
    pid: int
    log: Path
    rank_file: Path
    code: int | None = None

    @property
    def rank_pid(self) -> int:
        """Of the process that trains; 0 while there is none."""
        try:
            return int(self.rank_file.read_text())
        except (OSError, ValueError):
            return 0

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def poll(self) -> int | None:
        """The launcher's exit code, once it has ended."""
        if self.code is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.code = os.waitstatus_to_exitcode(ended[1])
        return self.code

    def kill(self) -> None:
        """SIGKILL to launcher and rank."""
        for pid in (self.pid if self.poll() is None else 0, self.rank_pid):
            with contextlib.suppress(ProcessLookupError):
                if pid:
                    os.kill(pid, signal.SIGKILL)
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def start(host: Host, ranks: int, port: int, folder: Path, options: list[str], own_network: bool) -> Node:
    """Fork a launcher on a host, as torchrun is one: it has a rank, on node 0 the store, and ends when its rank has."""
    token = f"{host.rank}-{time.monotonic_ns()}"
    node = Node(host, 0, folder / f"{token}.log", folder / f"{token}.pid")
    node.log.touch()
    node.pid = os.fork()
    if node.pid:
        return node
    code = 70
    try:
        log = os.open(node.log, os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if own_network:
            net = os.open(f"/var/run/netns/{host.name}", os.O_RDONLY)
            if LIBC.setns(net, NEW_NET) or LIBC.unshare(NEW_UTS):
                raise OSError(ctypes.get_errno(), "setns")
            socket.sethostname(host.name)
            os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
        code = _launch(host, ranks, port, node.rank_file, options)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _launch(host: Host, ranks: int, port: int, rank_file: Path, options: list[str]) -> int:
    """What the forked launcher does."""
    address = host.address.rpartition(".")[0] + ".1"
    os.environ |= {"RANK": str(host.rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"GROUP_RANK": str(host.rank), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "chaos"}
    pid = os.fork()
    if pid == 0:
        _train(options)
    rank_file.write_text(str(pid))
    store = TCPStore(address, port, is_master=True, wait_for_workers=False) if host.rank == 0 else None
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if store is not None:
        time.sleep(1)  # other ranks still read who stopped first
    return code if code >= 0 else 128 - code


def _train(options: list[str]) -> None:
    """The rank. It knows its launcher by its parent, as a new process would."""
    code = 1
    try:
        signals.LAUNCHER = launcher.Launcher(os.getppid(), launcher._process(os.getppid())[1], "its launcher")
        loop._gradients = poisoned(loop._gradients)
        train(options, prog="chaos")
        code = 0
    except SystemExit as ended:
        print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def poisoned(original):
    """Gradients as they are, but for one that SIGUSR2 makes NaN, before it is summed with the other ranks'."""
    wanted, hooked = [], []

    def spoil(gradient):
        if wanted:
            wanted.clear()
            return gradient * float("nan")
        return gradient

    def gradients(run, batches, watch):
        if not hooked:
            hooked.append(next(iter(run.engine.model.parameters())).register_hook(spoil))
        return original(run, batches, watch)

    signal.signal(signal.SIGUSR2, lambda *_: wanted.append(True))
    return gradients
