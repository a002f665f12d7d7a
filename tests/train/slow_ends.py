"""launch/pretrain.py, on whose last moments a signal falls: see `test_finishing.py`."""

import os
import signal
import threading
import time

from anon_dist.checkpoint.keeping.remote import Remote
from anon_dist.cli import train
from anon_dist.launcher import leave
from anon_dist.train import finishing

MOMENT, SENDER, RANK = os.environ.get("MOMENT"), os.environ.get("SENDER"), os.environ.get("RANK", "0")
"""What a signal falls on; the rank that sends it to itself, or none, if it comes from outside."""
LAST = 8
"""The run's last step."""


SENT = threading.Lock()


def here() -> None:
    """At the moment; once, of the threads that copy a checkpoint's files."""
    if not SENT.acquire(blocking=False):
        return
    if RANK == SENDER:
        os.kill(os.getpid(), signal.SIGUSR1)
    elif RANK == "0" and SENDER is None:
        print("HERE", flush=True)


validate, put = finishing.validate, Remote._put


def long_validation(run, sequences, prefix, look):
    """Its first batch alone takes a minute, unless it is left."""
    pauses = iter(range(6000))

    def long_look():
        here()
        for _ in pauses:
            look()
            time.sleep(0.01)
        look()

    return validate(run, sequences, prefix, long_look)


def long_put(remote, checkpoint, name, sums, confirm):
    """The copy of the last checkpoint takes a minute from when the results are there, unless it is left."""
    if checkpoint.name == f"step-{LAST:08d}":
        result = checkpoint.parents[1] / "result.json"
        end = time.monotonic() + 200
        while not result.exists() and time.monotonic() < end:
            time.sleep(0.01)
        here()
        end = time.monotonic() + 60
        while not remote.left and time.monotonic() < end:
            time.sleep(0.01)
    put(remote, checkpoint, name, sums, confirm)


if __name__ == "__main__":
    if MOMENT == "validation":
        finishing.validate = long_validation
    elif MOMENT == "copying":
        Remote._put = long_put
    train(prog="launch/pretrain.py")
    leave()
