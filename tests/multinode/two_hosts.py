"""Two hosts for real: network namespaces joined by a cable, on each of which the scripts of launch/multinode start one rank.

They share the file system, as nodes of a cluster do, and nothing of the network.
"""

import os
import secrets
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from ranks import run_ranks

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "launch" / "multinode"
SMALL = """
model: {layers: 2, width: 32, heads: 2, context: 32}
data: {path: PATH, seq_len: 32}
optim: {lr: 3.0e-3, eps: 1.0e-8}  # or elements whose gradient is rounding alone, as key biases', would take steps of full size
schedule: {warmup_steps: 3}
train: {steps: 60, global_batch: 8, micro_batch: 4}
eval: {every: 30, sequences: 16, final_sequences: 32}
checkpoint: {every: 5}
log: {every: 1, trackers: []}
"""
INTERFACE = "cable0"
"""Its name on each host."""
TIMEOUT = 20.0
"""Seconds that a rank waits for its peer, where a test lets it wait: longer than the ranks' starts lie apart on a busy machine."""


class Launch:
    """A launcher that runs; its output goes to a file, so that nothing waits for a reader."""

    def __init__(self, command: list[str], log: Path, **variables: str) -> None:
        self._log = log
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            **variables,
        }
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def until(self, text: str, seconds: float = 400) -> None:
        """Wait for the text to be printed."""
        end = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.02)

    def ends(self, seconds: float = 400) -> int:
        """Wait for the end; the exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end after {seconds} s:\n{self.output}")


@dataclass(frozen=True)
class Host:
    """A network namespace with one interface besides its own loopback; what is started in it sees its name as the host's."""

    rank: int
    name: str
    address: str

    def start(self, script: str, folder: Path, *options: str, **variables: str) -> Launch:
        """Run a script of launch/multinode here; further variables are those at its top."""
        return Launch(
            [
                *("ip", "netns", "exec", self.name, "unshare", "--uts"),
                *("sh", "-c", 'echo "$0" > /proc/sys/kernel/hostname; exec "$@"', self.name),
                *("bash", str(SCRIPTS / script), *options),
            ],
            folder / f"{script}-{self.rank}-{secrets.token_hex(2)}.log",
            **{
                **{"VENV": sys.prefix, "NODES": "2", "RANKS_PER_NODE": "1", "NODE_RANK": str(self.rank)},
                **{"MASTER_ADDR": "10.203.0.1", "INTERFACE": INTERFACE},
                **variables,
            },
        )

    def ranks(self) -> list[int]:
        """The processes that train here: what the launcher of launch/pretrain.py started."""
        pids = [int(pid) for pid in ip("netns", "pids", self.name).split()]
        parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in pids}
        leaves = [pid for pid in pids if pid not in parents.values()]
        return [p for p in leaves if "launch/pretrain.py" in Path(f"/proc/{p}/cmdline").read_text()]

    def kill(self) -> None:
        """SIGKILL to all that runs here."""
        for pid in ip("netns", "pids", self.name).split():
            os.kill(int(pid), signal.SIGKILL)

    def cable(self, state: str) -> None:
        """Pull the cable out ("down") or put it in ("up"). Nobody is told: what was sent is lost."""
        ip("-n", self.name, "link", "set", INTERFACE, state)


def ip(*arguments: str) -> str:
    """Run iproute2's `ip`."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def go_on(config: Path, run: Path, engine: str, *options: str) -> None:
    """Train to the end on two ranks of one host."""
    options = ("--config", str(config), "--run-dir", str(run), "--train.engine", engine, *options)
    log = run.with_suffix(".log")
    assert run_ranks(ROOT / "launch" / "pretrain.py", [os.environ] * 2, options, log, seconds=300), log.read_text()


def programs(folder: Path, **texts: str) -> dict[str, str]:
    """Stand-ins for programs, first in PATH."""
    (folder / "bin").mkdir()
    for name, text in texts.items():
        (folder / "bin" / name).write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
        (folder / "bin" / name).chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
