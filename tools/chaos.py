#!/usr/bin/env python
"""A training on hosts of network namespaces, disturbed at random, again and again; its weights must be those of the undisturbed run.

    python tools/chaos.py --minutes 25 --seed 1          needs iproute2 and root; else: processes of one host, without lost nodes and cables

Every round is a run to its last step, with faults on the way; what a scheduler does is done here: when a fault has ended the run, what is
left of it is killed, and the same command starts it again. Nodes' launchers and ranks are forked from this process, which has imported
already what takes long; a launcher keeps the store, as torchrun's does. The table: how soon a fault was found, whether the run named what
it was and where, steps that were taken twice, whether it went on from the newest whole checkpoint, and runs that were lost for good.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from chaos_nodes import Node, import_all, start
from namespaces import Host, hosts

from anon_dist.data import PrepareConfig, prepare

STEPS, EVERY = 160, 10
TIMEOUT, LONGEST = 12.0, 45.0
"""Seconds without progress in a step, and in a start, a save and the end, after which a run is taken to hang."""
LIMIT = 120.0
"""Seconds in which a fault must be found, and a start must come to its first step. All of these are longer where `busy`."""
CONFIG = f"""
model: {{layers: 2, width: 32, heads: 2, context: 32}}
data: {{path: DATA, seq_len: 32}}
optim: {{lr: 3.0e-3, eps: 1.0e-8}}
schedule: {{warmup_steps: 3}}
train: {{steps: {STEPS}, global_batch: 6, micro_batch: MICRO, engine: ENGINE, max_skipped: 0}}
eval: {{every: 0, sequences: 4, final_sequences: 8}}
checkpoint: {{every: {EVERY}, keep: 3}}
log: {{every: 1, trackers: []}}
"""


def busy() -> float:
    """By how much longer everything may take: processes that want to run, for each processor."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


# -- faults -----------------------------------------------------------------------------------------------------------


@dataclass
class Fault:
    """What happened, and what came of it."""

    kind: str
    rank: int
    step: int
    """The last one in the metrics when it happened."""
    since: float = field(default_factory=time.monotonic)
    found: float = 0.0
    """Seconds until the run had ended of it, or gone on; of a truncated file, until the next start said so."""
    named: bool = False
    lost: int = 0
    """Steps that were taken twice."""
    older: int = 0
    """By how many steps the checkpoint that the run went on from was older than the newest that was whole."""
    for_good: bool = False
    why: str = ""


def named_rightly(fault: Fault, nodes: list[Node]) -> bool:
    """Whether what the run says, on the hosts that are left, is what happened and where."""
    victim = nodes[fault.rank]
    others = "\n".join(node.output for node in nodes if node is not victim)
    everyone = others + victim.output
    name = f"rank {fault.rank} on {victim.host.name}"
    silent = f"Stopped without a word: {name}"
    at = f"The store at {nodes[0].host.address} on {nodes[0].host.name} does not answer"
    store = fault.rank == 0 and at in others
    hangs = re.search(rf"This run (waits for|hangs on) {re.escape(name)}\b", everyone) is not None
    # Of two hosts each is cut off from the other; the one with the store is told by its address.
    far = name if fault.rank else ""
    cut = re.search(rf"cut off from the store at {re.escape(nodes[0].host.address)} on .*{re.escape(far)}", everyone)
    return {
        "rank killed": silent in others or store,  # its launcher ends, and with it the store
        "rank stopped": hangs,
        "node killed": silent in others or store,
        "cable out": hangs or cut is not None or silent in others or store,
        "launcher killed": re.search("end of (its|another node's) launcher|" + re.escape(silent), everyone) is not None,
        "disk full": "No space left on device" in everyone or "MB are free there" in everyone,
        "NaN in a gradient": "non-finite gradient" in everyone,
    }.get(fault.kind, True)


@dataclass
class Chaos:
    """The rounds, and their faults."""

    hosts: list[Host]
    own_network: bool
    work: Path
    """On a small file system, if there may be one: full disks are then real."""
    config: Path
    random: random.Random
    faults: list[Fault] = field(default_factory=list)
    alarms: int = 0
    """Runs that ended in an error with no fault."""
    rounds: int = 0
    ports: Iterator[int] = field(default_factory=lambda: iter(range(21000, 60000)))

    @property
    def kinds(self) -> list[str]:
        small = ["disk full"] if os.path.ismount(self.work) else []
        far = ["node killed", "cable out"] if self.own_network else []
        always = ["rank killed", "rank stopped", "launcher killed", "file truncated", "NaN in a gradient", "rank slow"]
        return always + far + small

    def round(self, end: float, expected: bytes | None) -> bytes | None:
        """A run to its last step; the exported weights, None if it was lost."""
        self.rounds += 1
        run = self.work / f"run-{self.rounds}"
        logs = self.config.with_name(f"logs-{self.rounds}")  # where there is room
        logs.mkdir(parents=True)
        fault: Fault | None = None
        for _ in range(200):
            here = [0, *(int(each.name.removeprefix("step-")) for each in checkpoints(run))]
            nodes, before = self._start(run, logs), step_of(run)
            if fault is not None:
                self._resumed(fault, nodes, here[-2 if fault.kind == "file truncated" else -1])
                fault = None
            while fault is None and expected is not None and time.monotonic() < end and self._some_steps(run, nodes):
                made = self._disturb(run, nodes)
                fault = None if made.kind == "rank slow" else made
            if fault is None:
                self._wait(partial(self._over, nodes), 5 * LIMIT)
            codes = [node.poll() for node in nodes]
            for node in nodes:
                node.kill()
            if (run / "result.json").exists() and codes == [0] * len(nodes):
                weights = (run / "model" / "model.safetensors").read_bytes()
                self._verdict(expected, weights)
                return weights
            if fault is None:
                self.alarms += 1
                said = [node.output[-800:] for node in nodes]
                print(
                    f"no fault, and the run ended after step {step_of(run)} (from {before}): {codes} {said}", flush=True
                )
        self._verdict(b"", b"lost")
        return None

    def _resumed(self, fault: Fault, nodes: list[Node], newest: int) -> None:
        """From where the run goes on after a fault; it should be from the `newest` step that has a whole checkpoint."""
        self._wait(lambda: "Resuming" in nodes[0].output or self._over(nodes), LIMIT)
        found = re.findall(r"Resuming \S+ after step (\d+)", nodes[0].output)
        fault.lost = max(0, fault.step - int(found[-1])) if found else fault.step
        fault.older = max(0, newest - int(found[-1] if found else 0))  # a later one may have lacked its name alone
        if fault.older:
            print(f"the run did NOT GO ON FROM step {newest}: {[node.output[-1500:] for node in nodes]}", flush=True)
        if fault.kind == "file truncated":
            fault.named, fault.found = "is damaged, and set aside" in nodes[0].output, time.monotonic() - fault.since
            if not fault.named:
                print(f"a truncated file was NOT NAMED: {nodes[0].output[-1500:]}", flush=True)

    def _some_steps(self, run: Path, nodes: list[Node]) -> bool:
        """Let some be taken; False if the run comes to its end."""
        aim = step_of(run) + self.random.randint(3, 25)
        self._wait(lambda: step_of(run) >= aim or self._over(nodes), LIMIT)
        return aim < STEPS - 5 and not any(node.poll() is not None for node in nodes)

    def _verdict(self, expected: bytes | None, weights: bytes) -> None:
        for fault in self.faults:
            if not fault.why:
                fault.why = "checked"
                fault.for_good = expected is not None and weights != expected

    def _start(self, run: Path, logs: Path) -> list[Node]:
        options, port = ["--config", str(self.config), "--run-dir", str(run)], next(self.ports)
        for name, seconds in (("timeout", TIMEOUT), ("first-timeout", LONGEST)):
            options += [f"--train.{name}-minutes", str(busy() * seconds / 60)]
        return [start(host, len(self.hosts), port, logs, options, self.own_network) for host in self.hosts]

    def _over(self, nodes: list[Node]) -> bool:
        return all(node.poll() is not None for node in nodes)

    def _wait(self, until, seconds: float) -> bool:
        stop = time.monotonic() + busy() * seconds
        while not until():
            if time.monotonic() > stop:
                return False
            time.sleep(0.02)
        return True

    def _disturb(self, run: Path, nodes: list[Node]) -> Fault:
        """A fault, and the end of the run that it brings, or its going on."""
        kinds = [
            k for k in self.kinds if k != "file truncated" or len(checkpoints(run)) > 1
        ]  # of a single one nothing would be left
        counts = {kind: sum(f.kind == kind for f in self.faults) for kind in kinds}
        kind = self.random.choice([k for k in counts if counts[k] <= min(counts.values()) + 2])
        fault = Fault(kind, self.random.randrange(len(nodes)), step_of(run))
        victim = nodes[fault.rank]
        filled = self.work / "filled"
        if kind == "rank killed":
            os.kill(victim.rank_pid, signal.SIGKILL)
        elif kind in ("rank stopped", "rank slow"):
            os.kill(victim.rank_pid, signal.SIGSTOP)
        elif kind == "launcher killed":
            os.kill(victim.pid, signal.SIGKILL)
        elif kind == "node killed":
            victim.kill()
        elif kind == "cable out":
            victim.host.cable("down")
        elif kind == "NaN in a gradient":
            os.kill(victim.rank_pid, signal.SIGUSR2)
        elif kind == "disk full":
            with contextlib.suppress(OSError), filled.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 14))
        elif kind == "file truncated":
            self._truncate(run, nodes)
        if kind == "rank slow":
            time.sleep(self.random.uniform(0.5, 2.0))
            os.kill(victim.rank_pid, signal.SIGCONT)
            self._wait(lambda: step_of(run) > fault.step + 1 or self._over(nodes), LIMIT)
            fault.named = not any(node.poll() for node in nodes)
        elif kind != "file truncated":
            self._end_of(fault, nodes)
            self._wait(lambda: named_rightly(fault, nodes), 2)
            fault.named = named_rightly(fault, nodes)
        fault.found, fault.step = time.monotonic() - fault.since, max(fault.step, step_of(run))
        filled.unlink(missing_ok=True)
        if kind == "cable out":
            victim.host.cable("up")
        self.faults.append(fault)
        later = fault.kind == "file truncated"  # it is the next start that names it
        said = "" if fault.named or later else f" NOT NAMED: {[node.output[-1500:] for node in nodes]}"
        print(
            f"{len(self.faults)}: {kind}, rank {fault.rank}, step {fault.step}, found after {fault.found:.1f} s{said}",
            flush=True,
        )
        return fault

    def _end_of(self, fault: Fault, nodes: list[Node]) -> None:
        """Wait until all ranks have ended that can: not one that is stopped."""
        left = [
            n
            for n in nodes
            if n.host.rank != fault.rank or fault.kind not in ("rank stopped", "node killed", "launcher killed")
        ]
        self._wait(lambda: all(node.poll() is not None for node in left), LIMIT)
        if fault.kind == "launcher killed":
            rank = nodes[fault.rank].rank_pid
            self._wait(lambda: not Path(f"/proc/{rank}").exists(), 20)

    def _truncate(self, run: Path, nodes: list[Node]) -> None:
        """All nodes lose power, and a file of the last checkpoint its end."""
        for node in nodes:
            node.kill()
        files = (path for path in checkpoints(run)[-1].rglob("*") if path.is_file() and path.stat().st_size > 1)
        path = self.random.choice(sorted(files))
        os.truncate(path, self.random.randrange(path.stat().st_size))


def checkpoints(run: Path) -> list[Path]:
    """Those that are there, oldest first."""
    return sorted((run / "checkpoints").glob("step-????????"))


def step_of(run: Path) -> int:
    """The last one in the metrics."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines[-3:] if line.endswith("}")), default=0)
    except (OSError, ValueError):
        return 0


# -- command ----------------------------------------------------------------------------------------------------------


def table(chaos: Chaos) -> str:
    """A line per kind."""
    by_kind = {kind: [f for f in chaos.faults if f.kind == kind] for kind in {f.kind for f in chaos.faults}}
    lines = [
        "| fault | times | found after, s (median, most) | named rightly | steps taken twice (median, most) "
        "| from an older checkpoint | lost for good |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, found in [*sorted(by_kind.items()), ("all", chaos.faults)]:
        seconds, lost = [f.found for f in found], [f.lost for f in found]
        lines.append(
            f"| {kind} | {len(found)} | {statistics.median(seconds):.1f}, {max(seconds):.1f} | {sum(f.named for f in found)} "
            f"| {statistics.median(lost):.0f}, {max(lost)} | {sum(f.older != 0 for f in found)} | {sum(f.for_good for f in found)} |"
        )
    return "\n".join(lines)


@contextlib.contextmanager
def places(number: int) -> Iterator[tuple[list[Host], bool]]:
    """Hosts of their own networks, or names for processes of this one."""
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(hosts(number))
        except OSError as error:
            print(f"no namespaces ({error}): processes of one host; no node or cable is lost")
            yield [Host(i, socket.gethostname(), "127.0.0.1") for i in range(number)], False
            return
        yield found, True


@contextlib.contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """A folder on a small file system of its own, where that may be made."""
    out.mkdir(parents=True, exist_ok=True)
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", out], capture_output=True).returncode == 0
    )
    try:
        yield out
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", out], check=True)


def apart(action: Callable[[], object]) -> None:
    """Do it in a process of its own."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("a part of the preparation failed")


def run(minutes: float, seed: int, number: int, engine: str, faults: int) -> Chaos:
    """Disturb runs for so long, or until there were so many faults; the last one is finished."""
    import_all()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        found, own_network = stack.enter_context(places(number))
        work = stack.enter_context(workplace(folder / "small"))
        texts = folder / "texts"
        texts.mkdir()
        for source in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-b]*.py"))[:12]:
            (texts / source.name).write_bytes(source.read_bytes()[:20000])
        prepared = PrepareConfig(source=str(texts), tokenizer="bytes", out=folder / "data", val_fraction=0.2, workers=1)
        apart(partial(prepare, prepared))  # it starts threads, which do not survive a fork
        config = folder / "chaos.yaml"
        config.write_text(
            CONFIG.replace("DATA", str(folder / "data")).replace("ENGINE", engine).replace("MICRO", str(6 // number))
        )
        chaos = Chaos(found, own_network, work, config, random.Random(seed))
        expected = chaos.round(0.0, None)
        if expected is None:
            raise RuntimeError("the undisturbed run did not end")
        end = time.monotonic() + timedelta(minutes=minutes).total_seconds()
        while time.monotonic() < end and len(chaos.faults) < faults:
            chaos.round(end, expected)
            subprocess.run(["rm", "-rf", work / f"run-{chaos.rounds}"], check=True)
        return chaos


def main() -> None:
    """Run it, and print the table; exit code 1 if a run was lost, went on from too old a checkpoint, or a fault was not named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25.0, help="how long faults are made")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--hosts", type=int, default=2, choices=(2, 3), help="with a rank each")
    parser.add_argument("--engine", default="ddp", help="train.engine")
    parser.add_argument("--faults", type=int, default=10**9, help="no round begins after so many")
    given = parser.parse_args()
    chaos = run(given.minutes, given.seed, given.hosts, given.engine, given.faults)
    print(
        f"\n{len(chaos.faults)} faults in {chaos.rounds - 1} runs of {STEPS} steps; {chaos.alarms} runs ended without one\n"
    )
    print(table(chaos))
    sys.exit(any(f.for_good or f.older or not f.named for f in chaos.faults))


if __name__ == "__main__":
    main()
