"""Two hosts for real: network namespaces joined by a cable, on each of which the scripts of launch/multinode start one rank.

They share the file system, as nodes of a cluster do, and nothing of the network.
"""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import metrics
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
            VENV=sys.prefix,
            NODES="2",
            RANKS_PER_NODE="1",
            NODE_RANK=str(self.rank),
            MASTER_ADDR="10.203.0.1",
            INTERFACE=INTERFACE,
            **variables,
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


@pytest.fixture(scope="module")
def hosts():
    """Two hosts, joined; whatever still runs on them is killed in the end."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2 (the command `ip`)")
    token = secrets.token_hex(3)
    pair = [Host(i, f"anon-{token}-{i}", f"10.203.0.{i + 1}") for i in range(2)]
    first, second = pair
    made: list[Host] = []
    try:
        try:
            for host in pair:
                ip("netns", "add", host.name)
                made.append(host)
            ip(
                *("-n", first.name, "link", "add", INTERFACE, "type", "veth"),
                *("peer", "name", INTERFACE, "netns", second.name),
            )
            for host in pair:
                ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
                ip("-n", host.name, "link", "set", "lo", "up")
                host.cable("up")
            ip("netns", "exec", first.name, "true")
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield pair
    finally:
        for host in made:
            host.kill()
            ip("netns", "delete", host.name)  # the cable goes with it


@pytest.fixture(autouse=True)
def quiet(hosts):
    """No test leaves processes to the next, nor the cable out."""
    yield
    for host in hosts:
        host.kill()
        host.cable("up")


@pytest.fixture(scope="module")
def config(prepared, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("multinode") / "small.yaml"
    path.write_text(SMALL.replace("PATH", str(prepared)))
    return path


@pytest.fixture(scope="module")
def on_one_host(config, tmp_path_factory) -> Path:
    """The folder of a run of engine ddp on two ranks of one host, with all its checkpoints."""
    run = tmp_path_factory.mktemp("one-host") / "run"
    go_on(config, run, "ddp", "--checkpoint.keep", "100")
    return run


def go_on(config: Path, run: Path, engine: str, *options: str) -> None:
    """Train to the end on two ranks of one host."""
    options = ("--config", str(config), "--run-dir", str(run), "--train.engine", engine, *options)
    log = run.with_suffix(".log")
    assert run_ranks(ROOT / "launch" / "pretrain.py", [os.environ] * 2, options, log, seconds=300), log.read_text()


@pytest.fixture
def start(hosts, config, tmp_path):
    """A function that starts the test's run on both hosts."""

    def run(script: str, *options: str, engine: str = "fsdp2", **variables: str) -> list[Launch]:
        variables.setdefault("ACCELERATE_CONFIG", f"configs/accelerate/{engine}-cpu-multinode.yaml")
        options = ("--config", str(config), "--run-dir", str(tmp_path / "run"), "--train.engine", engine, *options)
        return [host.start(script, tmp_path, *options, **variables) for host in hosts]

    return run


AT_ONCE = 120.0
"""Seconds, of a very busy machine, in which ranks end that do not wait for a timeout: that is ten minutes, where not set."""
MINUTES = ("--train.timeout-minutes", str(TIMEOUT / 60))


def test_deepspeed_cut_off_ends_in_time_and_goes_on_like_one_host(start, hosts, on_one_host, tmp_path):
    are_cut_off(start("accelerate.sh", *MINUTES, engine="deepspeed"), hosts)

    finish(start("accelerate.sh", engine="deepspeed"))
    found, expected = metrics(tmp_path / "run"), metrics(on_one_host)
    # Sums in another order.
    assert [r.get("loss") for r in found] == [pytest.approx(r.get("loss"), abs=1e-4) for r in expected]


def test_whatever_befalls_a_run_it_goes_on_like_one_host(start, hosts, config, on_one_host, tmp_path):
    """Cut off, killed, stopped by a signal; with engine ddp, then fsdp2. Bit by bit like one host: the ranks do and exchange the same,
    only farther."""
    are_cut_off(start("accelerate.sh", *MINUTES, engine="ddp"), hosts)

    # By SIGKILL, as for want of memory: the system closes its connections.
    launches = start("accelerate.sh", engine="ddp")
    launches[0].until("step=24 ")
    os.kill(hosts[1].ranks()[0], signal.SIGKILL)
    assert max(ends_in_error(launch) for launch in launches) < AT_ONCE
    here, there = (launch.output for launch in launches)
    assert "Resuming" in here
    assert f"[{hosts[1].address}]" in here
    assert "node 0 " in here
    assert stopped_first(launches[0]).startswith(f"Stopped without a word: rank 1 on {hosts[1].name}; ")
    assert "Signal 9 (SIGKILL)" in there
    newest = max((tmp_path / "run" / "checkpoints").glob("step-????????")).name

    # Its host is to shut down: both write a checkpoint, together.
    here, there = start("torchrun.sh", engine="fsdp2", RENDEZVOUS="c10d")
    here.until("step=36 ")
    there.process.send_signal(signal.SIGTERM)
    # That one first: when it fails, the other's launcher waits minutes for it, and says nothing.
    assert there.ends() == 0, here.output + there.output
    assert here.ends() == 0, here.output
    assert f"resuming with engine = 'fsdp2'; {newest} had 'ddp'" in here.output
    assert "Stopped by a signal on another rank after step" in here.output

    finish(start("accelerate.sh", engine="fsdp2", RENDEZVOUS="c10d"))
    expected = tmp_path / "expected"
    shutil.copytree(on_one_host, expected)
    go_on(config, expected, "fsdp2", "--resume", str(expected / "checkpoints" / newest))
    assert metrics(tmp_path / "run") == metrics(expected)


def are_cut_off(launches: list[Launch], hosts: list[Host]) -> None:
    """Nothing closes the connections when the cable is pulled: each host has lost the other, and hears nothing."""
    launches[0].until("step=12 ")
    hosts[1].cable("down")
    assert max(ends_in_error(launch) for launch in launches) < TIMEOUT + AT_ONCE
    # They do see the same folder, and so each other's reports.
    assert "This run waits, all in the same collective: the network, or a device, hangs." in launches[0].output
    assert f"cut off from the store at {hosts[0].address}: ranks 1\n" in launches[0].output
    hosts[1].cable("up")


def finish(launches: list[Launch]) -> None:
    """Wait for the end of a resumed run."""
    assert [launch.ends() for launch in launches] == [0, 0], launches[0].output + launches[1].output
    assert "Resuming" in launches[0].output


def test_a_rank_that_raises_is_named_on_every_host(hosts, config, tmp_path):
    """The host that has the store raises what nobody expects, at the first step."""
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent("""
            import sys

            def break_off(event, arguments):
                if event == "open" and str(arguments[0]).endswith("metrics.jsonl") and "a" in str(arguments[1]):
                    raise ArithmeticError("metrics")

            sys.addaudithook(break_off)
        """)
    )
    broken = {"PYTHONPATH": f"{tmp_path}:{os.environ['PYTHONPATH']}"}
    launches = [
        host.start("torchrun.sh", tmp_path, "--config", str(config), "--run-dir", str(tmp_path / "run"), **variables)
        for host, variables in zip(hosts, (broken, {}), strict=True)
    ]
    launches[0].until("ArithmeticError: ")
    assert max(ends_in_error(launch) for launch in launches) < AT_ONCE
    here, there = (stopped_first(launch) for launch in launches)
    assert here == f"The first of 2 ranks to fail was this one, rank 0 on {hosts[0].name}."
    assert there.startswith(f"The first of 2 ranks to fail was rank 0 on {hosts[0].name} at ")
    assert "(ArithmeticError: " in there
    assert "Connection closed by peer" in launches[1].output


def stopped_first(launch: Launch) -> str:
    """What a rank's note says: under its traceback, and again in the report of its launcher."""
    lines = [re.sub(r"^\[rank\d+\]:", "", line).strip() for line in launch.output.splitlines()]
    begins = ("The first of ", "Stopped without a word", "The store at ")
    notes = [line for line in lines if line.startswith(begins)]
    assert len(notes) == 2, launch.output
    assert notes[0] == notes[1]
    return notes[0]


def ends_in_error(launch: Launch) -> float:
    """Wait for an end in an error; the seconds it took."""
    since = time.monotonic()
    assert launch.ends() != 0, launch.output
    return time.monotonic() - since


@pytest.mark.slow
def test_slurm_stops_a_run_before_the_limit_and_queues_it_again(hosts, config, tmp_path):
    """The batch script, with stand-ins for srun (a task per host, signals passed on to all) and scontrol."""
    programs = {
        "srun": f"""
            import os, signal, subprocess, sys
            task = [word for i, word in enumerate(sys.argv[1:]) if "bash" in sys.argv[1 : i + 2]]
            tasks = [
                subprocess.Popen(["ip", "netns", "exec", host, *task], env={{**os.environ, "SLURM_NODEID": str(i)}})
                for i, host in enumerate({[host.name for host in hosts]})
            ]
            signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
            sys.exit(max(task.wait() for task in tasks))
        """,
        "scontrol": f"""
            import sys
            if sys.argv[1:] == ["show", "hostnames", "node-[1-2]"]:
                print("{hosts[0].address}\\n{hosts[1].address}")
            else:
                print("scontrol", *sys.argv[1:])
        """,
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
        (tmp_path / "bin" / name).chmod(0o755)
    job = Launch(
        ["bash", str(SCRIPTS / "slurm.sbatch"), "--config", str(config), "--run-dir", str(tmp_path / "run")],
        tmp_path / "log",
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        VENV=sys.prefix,
        ACCELERATE_CONFIG="configs/accelerate/fsdp2-cpu-multinode.yaml",
        INTERFACE=INTERFACE,
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_ID="7",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="node-[1-2]",
        SLURM_GPUS_ON_NODE="1",
    )
    job.until("step=5 ")
    job.process.send_signal(signal.SIGUSR1)
    assert job.ends() == 0, job.output
    assert "Stopped by SIGUSR1 after step" in job.output
    assert "scontrol requeue 7" in job.output
