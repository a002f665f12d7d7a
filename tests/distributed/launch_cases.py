"""Run all `case_…` functions of a script on every rank, and write what came of each; for scripts started by torchrun."""

import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist


def run_cases(namespace: dict[str, Any], before: Callable[[], None] | None = None) -> None:
    """The cases in their order, in one process group over gloo; results in `results-RANK.json` of the folder that argv[1] names."""
    out = Path(sys.argv[1])
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for name, case in [(k, v) for k, v in namespace.items() if k.startswith("case_")]:
        try:
            if before:
                before()
            case()
            results[name] = "passed"
        except Exception:
            results[name] = traceback.format_exc()
        (out / f"results-{dist.get_rank()}.json").write_text(json.dumps(results))
        dist.barrier()
    dist.destroy_process_group()
