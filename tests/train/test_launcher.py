"""Which process a rank takes for its launcher, and when that one is gone; asked of programs that are called like launchers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[2] / "anon_dist" / "launcher.py"
CHILD = f"""
import os, runpy, sys, time
found = runpy.run_path({str(LAUNCHER)!r})["LAUNCHER"]
print(found and (found.name, found.pid), os.getppid(), flush=True)
end = time.monotonic() + 20
while time.monotonic() < end and not (found and found.gone):
    time.sleep(0.02)
    if os.path.exists(sys.argv[1]):
        break
print("gone" if found and found.gone else "there", flush=True)
"""


@pytest.fixture
def programs(tmp_path):
    """Stand-ins that start what they are given, by the names of launchers."""
    (tmp_path / "child.py").write_text(CHILD)
    starter = "import subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[1:]])\n"
    module = tmp_path / "torch" / "distributed" / "run.py"
    for path in (tmp_path / "torchrun", tmp_path / "accelerate", tmp_path / "train.py", module):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(starter)
    for package in (module.parent, module.parent.parent):
        (package / "__init__.py").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("command", "name", "variables"),
    [
        ([sys.executable, "torchrun"], "torchrun", {}),
        ([sys.executable, "accelerate"], "accelerate", {}),
        ([sys.executable, "-X", "dev", "-u", "-m", "torch.distributed.run"], "torch.distributed.run", {}),
        ([sys.executable, "torch/distributed/run.py"], "torch.distributed.run", {}),
        (["sh", "-c", f'{sys.executable} torchrun "$@"; true', "sh"], "torchrun", {}),
        (
            [
                sys.executable,
                "torchrun",
                "-c",
                "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])",
            ],
            "torchrun",
            {},
        ),
        ([sys.executable, "train.py"], "its launcher", {"TORCHELASTIC_RUN_ID": "none"}),
        ([sys.executable, "train.py"], None, {}),
        (["sh", "-c", f'{sys.executable} "$@"; true', "torchrun"], None, {}),
        (["sh", "-c", f'{sys.executable} "$@"; true', "sh"], None, {"TORCHELASTIC_RUN_ID": "none"}),
    ],
)
def test_a_rank_knows_its_launcher(command, name, variables, programs):
    """The launcher alone is killed; nobody has waited for it yet, so that it is a zombie."""
    stop = programs / "stop"
    process = subprocess.Popen(
        [*command, "child.py", str(stop)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=programs,
        env={**os.environ, **variables, "PYTHONPATH": str(programs)},
        start_new_session=True,
    )
    try:
        found, parent = process.stdout.readline().rsplit(" ", 1)
        if name is None:
            assert found == "None"
            os.kill(process.pid, signal.SIGKILL)  # a shell that ends
            stop.touch()
            assert process.stdout.readline() == "there\n"
        else:
            called, pid = eval(found)
            assert called == name
            assert pid == int(parent) or "-c" in command
            os.kill(pid, signal.SIGKILL)
            assert process.stdout.readline() == "gone\n"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
