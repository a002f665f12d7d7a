"""How a training ends that was refused: one line for all ranks of a node, which no launcher's traceback follows.

Nothing here imports torch: a mistake in the configuration is to be told before its import.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import NoReturn

from anon_dist import launcher
from anon_dist.launcher import end_launcher, on_one_node, tell_launcher

_PATIENCE = 30.0
"""Seconds that a rank leaves to the first of its node to speak for all."""


def refuse_alike(line: str, code: int) -> NoReturn:
    """End this rank, and with it those of its node, which are all refused for the same.

    The first of them speaks. The others wait until their launcher ends them, as it ended the first: one that ended before would have the
    first ended before it has spoken.
    """
    tell_launcher(line)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_PATIENCE)
    say_last(line, alike=True)
    sys.exit(code)


def say_last(line: str, alike: bool) -> None:
    """Print it, so that it stays the last: at a terminal by ending the launcher, elsewhere by printing it again below what that prints.

    Args:
        alike: whether no other rank has anything else to say.
    """
    print(line, file=sys.stderr, flush=True)
    found = launcher.LAUNCHER
    if found is None or not on_one_node():
        return
    if sys.stderr.isatty():
        if alike:
            end_launcher(grace=0.0)
    elif os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"):
        # In a session of its own: the launcher ends those of its ranks.
        command = [sys.executable, "-I", "-S", launcher.__file__, str(found.pid), str(found.began), line]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
