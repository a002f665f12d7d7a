"""Whatever befalls a run on two hosts, it says which rank stopped first, and goes on like one host."""

import math
import os
import re
import shutil
import signal
import textwrap
import time

import pytest
from helpers import metrics
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from two_hosts import TIMEOUT, Host, Launch, go_on

from anon_dist.doctor.storage import checkpoint_bytes
from anon_dist.train.config.parsing import load_config

pytestmark = pytest.mark.usefixtures("quiet")


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
    assert "Stopped by SIGTERM on rank " in here.output

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
    cut = (
        f"cut off from the store at {hosts[0].address} on {hosts[0].name}: rank 1 on {hosts[1].name}. No progress for "
    )
    assert f"This run waits: {cut}" in launches[0].output
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


def test_the_doctor_knows_what_a_checkpoint_takes(config, on_one_host):
    """All tensors that are in a real one, by its own index, but for the steps' counters; the rest of it is small."""
    wanted = checkpoint_bytes(load_config(config), 257)
    newest = max((on_one_host / "checkpoints").glob("step-????????"))
    entries = FileSystemReader(newest).read_metadata().state_dict_metadata.values()
    tensors = [e for e in entries if isinstance(e, TensorStorageMetadata)]
    held = sum(math.prod(e.size) * e.properties.dtype.itemsize for e in tensors if e.size)
    assert wanted == held
    assert sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) < held + 500_000
