"""The launcher (torchrun, accelerate, DeepSpeed's) that started this process: whether it still lives.

Without its launcher nobody would start, stop or wait for a rank any more. Found when the package is imported, before torch, whose import
takes seconds in which a launcher may end. What a shell started has no launcher: it may outlive the shell.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_COMMANDS = {"torchrun", "accelerate", "accelerate-launch", "deepspeed"}
_MODULES = (
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
)
_GRACE = 2.0
"""Seconds that the other ranks have to end by themselves."""
_LONGEST_END = 120.0
"""Seconds within which a launcher has ended, once a rank has failed."""
_SCRIPTS = tuple(f"/{module.replace('.', '/')}.py" for module in _MODULES)


@dataclass(frozen=True)
class Process:
    """A process, told from a later one of the same number by when it began."""

    pid: int
    began: int
    """Clock ticks since the machine did."""

    @property
    def gone(self) -> bool:
        """Whether it has ended."""
        found = _process(self.pid)
        return found is None or found[1] != self.began


@dataclass(frozen=True)
class Launcher(Process):
    """The one that started this process."""

    name: str


def this_process() -> Process:
    """The one that calls."""
    found = _process(os.getpid())
    return Process(os.getpid(), found[1] if found else 0)


def find() -> Launcher | None:
    """The nearest ancestor that is a launcher by its command; else the parent, if it is a Python program that set torch's variables."""
    pid = parent = os.getppid()
    while pid > 0 and (found := _process(pid)) is not None:
        above, began = found
        if (name := _launcher_name(_command(pid))) is not None:
            return Launcher(pid, began, name)
        pid = above
    if "TORCHELASTIC_RUN_ID" in os.environ and (found := _process(parent)) is not None:
        command = _command(parent)
        if command and os.path.basename(command[0]).startswith("python"):
            return Launcher(parent, found[1], "its launcher")
    return None


def _process(pid: int) -> tuple[int, int] | None:
    """Parent, and when it began; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else (int(fields[1]), int(fields[19]))


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _launcher_name(command: list[str]) -> str | None:
    """torchrun as such, as a script given to Python (what pip installs), or as a module."""
    if not command or command[0].startswith("-"):
        return None
    program, rest = command[0], command[1:]
    while rest and rest[0].startswith("-") and rest[0] != "-m":  # options of Python
        rest = rest[2 if rest[0] in ("-X", "-W") else 1 :]
    if os.path.basename(program).startswith("python") and rest:
        if rest[0] == "-m" and len(rest) > 1 and rest[1] in _MODULES:
            return rest[1]
        program = rest[0]
    name = os.path.basename(program)
    if name in _COMMANDS:
        return name
    return next((m for m, script in zip(_MODULES, _SCRIPTS, strict=True) if f"/{program}".endswith(script)), None)


def leave() -> None:
    """End a rank that has done its work, at once.

    gloo's threads outlive its process groups, as torch keeps device meshes. Seldom, one of them aborts the process while it shuts down
    ("terminate called without an active exception", exit code -6), and the launcher takes a finished run for a failed one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def on_one_node() -> bool:
    """Whether all ranks are on this machine, as far as the launcher says."""
    return os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1")


def tell_launcher(line: str, when: int | None = None) -> None:
    """Have torch's launchers show the line, as its handler does an error, but for the traceback.

    Args:
        when: of the error, in seconds since 1970; None: now.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": line, "timestamp": str(int(time.time()) if when is None else when)}
        Path(file).write_text(json.dumps({"message": {"message": line, "extraInfo": details}}))


def date_error(when: int) -> None:
    """Have torch's launchers take the error that they are told of for one of this second since 1970, whenever it was written."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        told = json.loads(Path(file).read_text())
        told["message"]["extraInfo"]["timestamp"] = str(when)
        dated = Path(f"{file}.dated")
        dated.write_text(json.dumps(told))
        dated.replace(file)


def end_launcher(grace: float = _GRACE) -> None:
    """After a Ctrl-C or an error at a terminal, when all is saved and said: end the launcher, which has nothing left to do but to wait.

    It would end with its own traceback, of up to fifty lines, below what the run said. Left alone where its end tells somebody
    something: where nobody looks (a job's exit code), and where other nodes' ranks meet through it.

    Args:
        grace: seconds that the other ranks have to end by themselves. 0: they wait to be ended, and say nothing when the launcher is
            gone, which would speak first if it saw one of them end.
    """
    if LAUNCHER is not None and on_one_node() and sys.stderr.isatty() and not LAUNCHER.gone:
        with contextlib.suppress(OSError):
            others = [(pid, began) for pid, began in _children(LAUNCHER.pid) if pid != os.getpid()]
            if grace:
                _end(others, grace)
            print("The launcher is ended with it, code 137: it would print a traceback of its own.", file=sys.stderr)
            sys.stdout.flush()
            os.kill(LAUNCHER.pid, signal.SIGKILL)
            _end(others, 0.0)


def _end(others: Sequence[tuple[int, int]], grace: float) -> None:
    """Wait a moment for other ranks, and end those that wait for this one: torch would print where, once the launcher is gone, through
    which they talk."""
    until = time.monotonic() + grace
    while others := [(pid, began) for pid, began in others if (_process(pid) or (0, 0))[1] == began]:
        if time.monotonic() > until:
            for pid, _ in others:
                os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.02)


def _children(parent: int) -> Iterator[tuple[int, int]]:
    """Processes of a parent that have not ended, and when they began."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (found := _process(int(entry))) is not None and found[0] == parent:
            yield int(entry), found[1]


def _say_after(found: Process, line: str) -> None:
    """Print it on the standard error once that launcher has ended. Nothing, if it lives on."""
    until = time.monotonic() + _LONGEST_END
    while not found.gone:
        if time.monotonic() > until:
            return
        time.sleep(0.02)
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


LAUNCHER = find()
if __name__ == "__main__":  # started by `refusal.say_last`
    _say_after(Process(int(sys.argv[1]), int(sys.argv[2])), sys.argv[3])
