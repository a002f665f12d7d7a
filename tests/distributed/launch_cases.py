"""Run all `case_…` functions of a script on every rank, and write what came of each; for scripts started by torchrun."""

import itertools
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from helpers import forget_accelerate

from anon_dist.checkpoint import Checkpoints
from anon_dist.engines import comparison
from anon_dist.train import loop
from anon_dist.train.config.parsing import Config
from anon_dist.train.reports import report


def run_cases(namespace: dict[str, Any], before: Callable[[], None] | None = None) -> None:
    """The cases in their order, in one process group over gloo; results in `results-RANK.json` of the folder that argv[1] names."""
    out = Path(sys.argv[1])
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    report.plot_loss = lambda *_: None  # a third of a small run's time, and looked at in tests/train
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    results = {}
    for name, case in [(k, v) for k, v in namespace.items() if k.startswith("case_")]:
        since, of_processor = time.perf_counter(), time.process_time()
        try:
            if before:
                before()
            case()
            results[name] = "passed"
        except Exception:
            results[name] = traceback.format_exc()
        used = f"{time.perf_counter() - since:.2f} s, {time.process_time() - of_processor:.2f} s of a processor"
        print(f"rank {dist.get_rank()}, {name}: {used}", flush=True)
        (out / f"results-{dist.get_rank()}.json").write_text(json.dumps(results))
        dist.barrier()
        # A rank that failed alone has compared less often than the others: the cases after it are not to fail with it.
        comparison._TURN = itertools.count(1000 * len(results))
    dist.destroy_process_group()


def run(config: Config) -> Path:
    """A run, in the process of others; its folder, once the first rank has written all of it."""
    forget_accelerate()
    folder = loop.train(config)
    dist.barrier()
    return folder


class Patch:
    """pytest's monkeypatch, outside of pytest."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def setattr(self, target: Any, name: str, value: Any) -> None:
        self._undo.append((target, name, getattr(target, name)))
        setattr(target, name, value)

    def close(self) -> None:
        for target, name, value in reversed(self._undo):
            setattr(target, name, value)


def shared_folder(parent: str) -> str:
    """A new folder, the same on every rank."""
    names = [tempfile.mkdtemp(dir=parent) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    assert names[0] is not None
    return names[0]


def step_back(folder: Path) -> Path:
    """Have a run that has ended be one that was stopped at its last checkpoint but one, which is returned."""
    dist.barrier()
    complete = Checkpoints(folder / "checkpoints", 1).complete()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(complete[-1])
        (folder / "result.json").unlink()
    dist.barrier()
    return complete[-2]


def warned_of_damage(load: Callable[[], Any]) -> bool:
    """Whether Anon warns, on this rank, that a state which is loaded is damaged."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load()
    return any("Anon: in the loaded state" in str(one.message) for one in told)


def raises(error: type[Exception], words: str, action: Callable[[], object]) -> None:
    """The action raises this error, with these words in it."""
    try:
        action()
    except error as caught:
        if words not in str(caught):
            raise
    else:
        raise AssertionError(f"no {error.__name__}")
