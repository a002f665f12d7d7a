"""Ranks of this machine, forked from processes that have imported already what takes long.

Torch, transformers and accelerate take seconds of every new process, of every rank of every launch. Rank r of each launch is forked from
the r-th of a few processes that are kept, for all of pytest's workers: they share nothing with each other (not the order of sets either,
which is a process's own), and a rank is in nothing but imports different from a new process. What launchers do besides is for the tests
that start runs as users do.
"""

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import random
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy

IMPORTS = ("transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama", "accelerate")
IMPORTS += ("transformers.trainer", "anon_dist.train.loop", "anon_dist.checkpoint.convert", "helpers")
IMPORTS += ("deepspeed", "deepspeed.runtime.zero.muon.original_muon")
"""Those that there are. accelerate imports DeepSpeed in every run, and DeepSpeed's Muon torch's compiler, whatever the optimizer."""


class Parent:
    """A process that forks one rank at a time, for this worker: a fork itself of one that has imported, which the first worker starts."""

    def __init__(self, rank: int) -> None:
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
        self._name = f"anon-dist-tests-{run}-{rank}"
        self._server: subprocess.Popen | None = None
        self._ready = False
        self._connect()

    def _connect(self) -> None:
        # What torch and DeepSpeed read when they are imported.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, __file__, self._name]
        self._socket = socket.socket(socket.AF_UNIX)
        while self._socket.connect_ex(f"\0{self._name}") != 0:
            if self._server is None or self._server.poll() is not None:
                self._server = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
            time.sleep(0.05)
        self._file = self._socket.makefile("rb", buffering=0)  # `select` knows of no buffer

    def _wait(self) -> None:
        """Until all is imported."""
        while not self._ready:
            self._ready = bool(self._file.readline())
            if not self._ready:  # it ended just now, as the last worker left it
                if self._server is not None and self._server.wait() != 0:
                    raise RuntimeError("the process that forks ranks could not begin")
                self._connect()

    def start(self, script: Path, arguments: Sequence[str], log: Path, variables: dict[str, str]) -> None:
        """Have the script run, with this environment; its output is appended to the log."""
        self._wait()
        request = {"script": str(script), "arguments": arguments, "log": str(log), "variables": variables}
        self._socket.sendall(json.dumps({**request, "folder": os.getcwd()}).encode() + b"\n")
        self.pid = self.code()

    def fileno(self) -> int:
        """For `select`: readable when the rank has ended."""
        return self._socket.fileno()

    def code(self) -> int:
        """The exit code of a rank that has ended."""
        answer = self._file.readline()
        if not answer:
            raise RuntimeError("the process that forks ranks has ended itself")
        return int(answer)


PARENTS: list[Parent] = []
"""Of ranks 0, 1, …"""


def run_ranks(
    script: Path, environments: Sequence[Mapping[str, str]], arguments: Sequence[str], log: Path, seconds: float
) -> bool:
    """Run a script on as many ranks of this machine as there are environments, completed to what torchrun's ranks have; one has no peers.

    Returns:
        Whether all ended well. Where one does not, or in time, the others are ended too; what each did then is in the log.
    """
    from torch.distributed import TCPStore

    ranks = len(environments)
    while len(PARENTS) < ranks:
        PARENTS.append(Parent(len(PARENTS)))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    elastic = {"USE_AGENT_STORE": "True", "RESTART_COUNT": "0", "MAX_RESTARTS": "0", "RUN_ID": "tests"}
    common |= {f"TORCHELASTIC_{key}": value for key, value in elastic.items()}
    running = PARENTS[:ranks]
    for rank, (parent, own) in enumerate(zip(running, environments, strict=True)):
        place = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        parent.start(script, arguments, log, {**own, **place, "OMP_NUM_THREADS": "1"})
    well, end = True, time.monotonic() + seconds
    try:
        while running:
            ended, _, _ = select.select(running, [], [], max(0.0, end - time.monotonic()))
            codes = [parent.code() for parent in ended]
            well = well and bool(codes) and not any(codes)
            running = [parent for parent in running if parent not in ended]
            if not well:
                break
    finally:
        for parent in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(parent.pid, signal.SIGQUIT)
        for parent in running:
            parent.code()
    return well


def _serve(address: str) -> None:
    """Import, and fork a parent for each worker that connects, until none is left."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(f"\0{address}")
    except OSError:  # another worker has been faster
        return
    listener.listen()
    os.dup2(2, 1)
    for name in IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    names = {t: Path(f"/proc/self/task/{t}/comm").read_text().strip() for t in os.listdir("/proc/self/task")}
    threads = {name for t, name in names.items() if int(t) != os.getpid()}
    if threads - {"jemalloc_bg_thd"}:  # pyarrow's, which sees to forks itself
        sys.exit(f"an import has started threads, which do not survive a fork: {threads}")
    parents: set[int] = set()
    while True:
        connecting, _, _ = select.select([listener], [], [], 1.0)
        if connecting:
            worker, _ = listener.accept()
            pid = os.fork()
            if pid == 0:
                listener.close()
                _fork_ranks(worker)
            parents.add(pid)
            worker.close()
        parents = {pid for pid in parents if os.waitpid(pid, os.WNOHANG) == (0, 0)}
        if not parents:
            return


def _fork_ranks(worker: socket.socket) -> None:
    """A parent: a request is a line, answered by the rank's process and, when it has ended, by its exit code."""
    _end_with_parent()
    worker.sendall(b"ready\n")
    for line in worker.makefile("r"):
        pid = os.fork()
        if pid == 0:
            os.close(worker.fileno())
            _run(**json.loads(line))
        worker.sendall(f"{pid}\n".encode())
        rank = os.pidfd_open(pid)
        ended, _, _ = select.select([rank, worker], [], [])
        if rank not in ended:  # the worker is no more
            os.kill(pid, signal.SIGKILL)
        os.close(rank)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(BrokenPipeError):
            worker.sendall(f"{code}\n".encode())
    os._exit(0)


def _run(script: str, arguments: list[str], log: str, variables: dict[str, str], folder: str) -> None:
    """A rank: as if the script had just been started."""
    _end_with_parent()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.register(signal.SIGQUIT, chain=True)
    random.seed()
    numpy.random.seed()
    sys.argv[:] = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    code = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with_parent() -> None:
    """SIGKILL to this process when the one ends that made it (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    _serve(sys.argv[1])
