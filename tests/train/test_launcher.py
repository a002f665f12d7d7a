"""Which process a rank takes for its launcher, and when that one is gone; asked of programs that are called like launchers."""

import contextlib
import os
import signal
import subprocess
import sys
import time
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


INTERRUPTED = f"""
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
found = runpy.run_path({str(LAUNCHER)!r})
os.kill(os.getppid(), signal.SIGINT)
print("Stopped", flush=True)
found["end_launcher"](grace=0.1)
"""
WAITING = """
import subprocess, sys
other = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"])
open("other", "w").write(str(other.pid))
child = subprocess.Popen([sys.executable, *sys.argv[1:]])
while True:
    try:
        child.wait()
        other.kill()
        break
    except KeyboardInterrupt as error:
        interrupted = error
raise interrupted
"""


def _ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("nodes", [1, 2])
def test_an_interrupted_launcher_adds_nothing_on_a_terminal(terminal, nodes, tmp_path):
    """Elsewhere, and where other nodes' ranks meet through it, it ends as it likes."""
    (tmp_path / "torchrun").write_text(WAITING)
    (tmp_path / "child.py").write_text(INTERRUPTED)
    ours, theirs = os.openpty() if terminal else os.pipe()
    process = subprocess.Popen(
        [sys.executable, "torchrun", "child.py"],
        stdout=theirs,
        stderr=theirs,
        cwd=tmp_path,
        env={**os.environ, "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": str(nodes)},
        start_new_session=True,
    )
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while part := os.read(ours, 1 << 16):
            text += part
    os.close(ours)
    lines = text.decode().split("\n")
    assert lines[0].strip() == "Stopped"
    if terminal and nodes == 1:
        assert process.wait() == -signal.SIGKILL
        until, other = time.monotonic() + 30, int((tmp_path / "other").read_text())
        while not _ended(other):  # a rank that waited for the first; it sleeps for longer
            assert time.monotonic() < until
            time.sleep(0.01)
        assert (lines[1][:35], lines[2:]) == ("The launcher is ended with it, code", [""])
    else:
        assert process.wait() in (1, -signal.SIGINT)
        assert "Traceback" in text.decode()
