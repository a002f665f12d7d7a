"""A rank of a run that is killed at a point; `test_kills.py` starts it again and again, as a scheduler would.

The rank kills itself in the middle of what is done there, so that nothing depends on how fast it is.
"""

import io
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

from anon_dist.checkpoint.keeping import folder
from anon_dist.checkpoint.keeping.folder import Checkpoints
from anon_dist.checkpoint.keeping.names import PROGRESS
from anon_dist.checkpoint.keeping.remote import Remote
from anon_dist.train import learning, loop, rewind
from anon_dist.train import run as runs
from anon_dist.train.config.parsing import load_config
from anon_dist.train.health import hangs, spikes
from anon_dist.train.reports import report

OUT, CONFIG, POINT = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
RANK = int(os.environ["RANK"])
SPIKES = (72, 96)
"""Where the samples of steps begin whose loss is far too large, on rank 1."""
SAVE, DELETE, PUT = torch.save, folder._delete, Remote._put
begun: list[int] = []
"""The steps whose saves this start has begun."""


def second():
    """Whether this start has begun its second save: in it, or in what follows, it is killed."""
    return len(begun) >= 2


def die():
    print(f"\nKILLED, save {begun[-1:]}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def before(target, name, condition=second):
    """Be killed when the function is about to be called."""
    original = getattr(target, name)

    def patched(*args, **options):
        if condition():
            die()
        return original(*args, **options)

    setattr(target, name, patched)


def after(target, name):
    """Be killed when the function has returned."""
    original = getattr(target, name)

    def patched(*args, **options):
        original(*args, **options)
        die()

    setattr(target, name, patched)


def write_half(content, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content[: len(content) // 2])
    die()


def torn(state, path, *args, **options):
    """For `torch.save`."""
    if second() and not isinstance(path, io.BytesIO):
        content = io.BytesIO()
        SAVE(state, content, *args, **options)
        write_half(content.getvalue(), path)
    SAVE(state, path, *args, **options)


def half_copied(remote, checkpoint, name, sums, confirm):
    """For `Remote._put`, of the marker."""
    if second() and name == PROGRESS:
        write_half((checkpoint / name).read_bytes(), remote._store.path(checkpoint.name, name))
    PUT(remote, checkpoint, name, sums, confirm)


def half_removed(path):
    """For `folder._delete`, of a checkpoint."""
    if second() and path.name.endswith(".deleting") and path.is_dir():
        next(p for p in sorted(path.rglob("*")) if p.is_file()).unlink()
        die()
    DELETE(path)


def copied_in_part():
    calls = []
    before(Remote, "_put", lambda: second() and (calls.append(1), len(calls) == 3)[1])


def within(function):
    """Whether it is being called."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame is not None


def uploading():
    return threading.current_thread().name == "uploads" and second()


def stop():
    """Rank 1 is stopped in step 5, as by SIGSTOP from elsewhere, and killed when the other has ended, which waits for it."""
    hangs.ANSWER, hangs.ASK, hangs.PROXY, hangs.POLL = 4.0, 0.3, 0.7, 0.1
    stopped, original = OUT / "stopped", loop.take_step

    def state(pid, pattern):
        return re.search(pattern, Path(f"/proc/{pid}/status").read_text())[1]

    def take_step(run, *rest):
        if run.step == 4 and RANK == 1:
            if os.fork() == 0:
                while not int(state(os.getppid(), r"ShdPnd:\s*(\w+)"), 16) & 1 << signal.SIGQUIT - 1:
                    time.sleep(0.1)  # `run_ranks` sends it
                print("\nKILLED", flush=True)
                os.kill(os.getppid(), signal.SIGKILL)
                os._exit(0)
            stopped.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        elif run.step == 4:
            while not stopped.exists() or state(stopped.read_text() or "self", r"State:\s*(\w)") != "T":
                time.sleep(0.1)
            run.pulse.limit = 2.0  # of this step
        return original(run, *rest)

    loop.take_step = take_step


rewinds = rewind.rewind
POINTS = {
    "": (0, lambda: None),
    "a part is half written": (1, lambda: setattr(torch, "save", torn)),
    "all parts are there": (1, lambda: before(folder.checksums, "take")),
    "without a marker": (0, lambda: before(folder, "write_json")),
    "without a name": (0, lambda: before(Checkpoints, "_put_in_place")),
    "with a name": (0, lambda: before(Checkpoints, "prune", lambda: second() and not uploading())),
    "copied in part": (0, copied_in_part),
    "the marker copied in part": (0, lambda: setattr(Remote, "_put", half_copied)),
    "copied, and not removed": (0, lambda: before(Checkpoints, "prune", uploading)),
    "removed in part": (0, lambda: setattr(folder, "_delete", half_removed)),
    "a spike is known": (1, lambda: before(learning, "rewind", lambda: True)),
    "back to a checkpoint": (0, lambda: before(rewind, "resume_latest", lambda: True)),
    "loaded in part": (1, lambda: before(runs.randomness, "load", lambda: within(rewinds))),
    "loaded": (0, lambda: after(rewind, "resume_latest")),
    "written down": (0, lambda: after(rewind, "write_json")),
    "passed over": (1, lambda: after(rewind, "_go_on_at")),
    "stopped": (RANK, stop),
    "gone back": (1, lambda: after(learning, "rewind")),
}
"""Rank, and what it does to be killed there."""


def have_spikes():
    losses, take_step, seen = loop.Batch.losses, loop.take_step, []

    def greater(batch, model, *args, **options):
        found = losses(batch, model, *args, **options)
        return found * 200.0 if RANK == 1 and model.training and seen[-1].loader.cursor in SPIKES else found

    def told(run, *rest):
        seen.append(run)
        return take_step(run, *rest)

    loop.Batch.losses, loop.take_step, spikes.WARM = greater, told, 4


def counted(checkpoints, step, *rest):
    begun.append(step)
    if RANK == 0 and len(begun) == 3:  # however slow the copies are, they come to where the run is killed
        threading.Event().wait()
    return WRITING(checkpoints, step, *rest)


WRITING = Checkpoints.writing

if __name__ == "__main__":
    config = load_config(CONFIG)
    report.plot_loss = lambda *_: None
    if config.train.on_spike == "rewind":
        have_spikes()
    guilty, prepare = POINTS[POINT]
    if POINT:
        Checkpoints.writing = counted
    if guilty == RANK:
        prepare()
    loop.train(config)
