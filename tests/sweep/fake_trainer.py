"""Stands for `anon-dist train` in tests of the scheduler: the loss is a formula, and some learning rates do harm.

It keeps the loop's contract: metrics.jsonl, result.json, exit code 0 and a checkpoint on SIGTERM, no step taken twice, one run in a folder.

What a test wants to happen during a run is waited for, however long it takes: a run that is `HELD` stays at step 5 until it is told to
end or there is a file `go` beside the cells, a hopeless one until it is told to end.
"""

import fcntl
import json
import math
import signal
import sys
import time
from pathlib import Path

import yaml

CRASH, DIVERGE, HOPELESS = 0.5, 0.25, 0.125
"""Learning rates that do so, half-way."""

HELD = "held"
"""As the configuration's `log.project`."""

IN_USE = 75
"""As `anon_dist.train.config.errors` has it, without waiting for torch."""

PATIENCE = 120.0
"""Seconds; then a run that waits goes on, and the test fails."""


def final_loss(gamma: float, lr: float, seed: int) -> float:
    if lr == HOPELESS:
        return 9.0
    return 2.0 + 0.1 * (math.log10(lr) + 2.5) ** 2 + (gamma - 0.5) ** 2 / 10 + 0.01 * seed


def main() -> None:
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    folder, steps, held = Path(config["run_dir"]), config["train"]["steps"], config["log"]["project"] == HELD
    optim, told = config["optim"], []
    lock = (folder / "fake.lock").open("w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"error: run_dir = {folder} is in use by process 7 on node-b")
        sys.exit(IN_USE)
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    checkpoint = folder / "checkpoints" / "step"
    checkpoint.parent.mkdir(exist_ok=True)
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    gamma = optim["gamma"] if optim["name"] == "anon" else 0.9
    last = final_loss(gamma, optim["lr"], config["train"]["seed"])
    with (folder / "metrics.jsonl").open("a", buffering=1) as metrics:
        while step < steps:
            step += 1
            loss = last + 1.0 / step
            if optim["lr"] == DIVERGE and step > steps // 2:
                print("error: 3 steps in a row had a non-finite gradient")
                sys.exit(1)
            if optim["lr"] == CRASH and step > steps // 2 and not (folder.parent / "mended").exists():
                raise RuntimeError("the disk is full")
            metrics.write(json.dumps({"step": step, "loss": loss, "update_max": 1.0, "precond_spread/0": gamma}) + "\n")
            metrics.write(json.dumps({"step": step, "val_loss": loss}) + "\n")
            waiting = step == 5 and (held or optim["lr"] == HOPELESS)
            until = time.monotonic() + PATIENCE
            while waiting and not told and time.monotonic() < until and not (held and (folder.parent / "go").exists()):
                time.sleep(0.02)  # the same again, so that the scheduler looks again
                metrics.write(json.dumps({"step": step, "val_loss": loss}) + "\n")
            if told:
                checkpoint.write_text(str(step))
                print(f"Stopped after step {step}")
                return
    result = {"step": steps, "final_loss": last, "final_bits_per_byte": last / 2}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
