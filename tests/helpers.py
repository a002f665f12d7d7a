"""What tests of whole runs share."""

import json
import os
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState
from ranks import run_ranks

from anon_dist.train import loop


def forget_accelerate():
    """accelerate keeps its state in singletons and in the environment; a run in the same process starts with none."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    for key in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_OFFLOAD_PARAMS", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(key, None)


def launch_ranks(script: Path, ranks: int, out: Path, *args: str, seconds: float = 2000) -> Path:
    """Run a script on several ranks of this machine, with `out` and `args` as arguments; its output goes to `out/log`."""
    if not run_ranks(script, [os.environ] * ranks, [str(out), *args], out / "log", seconds):
        with (out / "log").open("a") as log:
            log.write(f"\nA rank failed, or {seconds} s did not do.\n")
    return out


def assert_passed(case: str, out: Path, ranks: int) -> None:
    """That every rank wrote of this case that it passed (`launch_cases.run_cases`)."""
    for rank in range(ranks):
        path = out / f"results-{rank}.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        result = results.get(case, "was not reached:\n" + (out / "log").read_text()[-4000:])
        assert result == "passed", f"rank {rank}: {result}"


def at_step(monkeypatch, step, action):
    """Have `action()` called when the given step is about to be made."""
    original = loop.lr_factor

    def factor(current, *rest):
        if current == step:
            action()
        return original(current, *rest)

    monkeypatch.setattr(loop, "lr_factor", factor)


def metrics(folder: Path):
    """The records that do not depend on the clock."""
    keep = (
        "step",
        "samples",
        "loss",
        "val_loss",
        "final_loss",
        "grad_norm",
        "update_rms",
        "refreshes",
        "lr",
        "skipped",
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k in keep} for line in lines]


class Crash(Exception):  # noqa: N818 - it stands for a machine, not an error
    """The process ends here."""


def crash():
    raise Crash


def send(signal):
    """A function that sends this process a signal."""
    return lambda: os.kill(os.getpid(), signal)
