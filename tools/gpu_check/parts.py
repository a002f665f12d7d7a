"""One part of `tools/gpu_check.sh`, in a process of its own: its rows and numbers go to a file as they are found.

python tools/gpu_check/parts.py NAME --work FOLDER --out FILE [--device cpu] [--seconds 60]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from functools import partial
from pathlib import Path

from beside import memory, pair
from found import ROOT, Found
from steps import context, kernel, optimizer
from trainings import resume, settings


def machine(found: Found) -> None:
    """What it runs on, and the corpus of the other parts: pieces of the standard library's sources, as bytes."""
    import torch
    import transformers

    from anon_dist.bench.machine import machine as this_machine
    from anon_dist.data import PrepareConfig, prepare

    where = this_machine(found.device)
    found.row("device", where.device, remark=where.line())
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "cuda": str(torch.version.cuda)}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    versions["commit"] = commit.strip() or "unknown"
    found.row("versions", ", ".join(f"{k} {v}" for k, v in versions.items()), numbers=versions)
    documents = []
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = source.read_text(errors="ignore")
        documents += [text[i : i + 300 + 37 * (i % 41)] for i in range(0, len(text), 2000)]
    corpus = found.work / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents if text.strip()))
    size = 2_000_000 if found.on_gpu else 200_000
    prepare(PrepareConfig(source=str(corpus), tokenizer="bytes", out=found.data, max_bytes=size, workers=1))


FUNCTIONS = {
    "machine": machine,
    "kernel": kernel,
    "settings": settings,
    "resume": resume,
    "optimizer": optimizer,
    "memory": memory,
    "context": context,
    **{
        f"{preset}{'-compiled' * compiled}": partial(pair, preset=preset, compiled=compiled)
        for preset in ("gpt2-small", "qwen3-1b")
        for compiled in (False, True)
    },
}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("name", choices=FUNCTIONS)
    arguments.add_argument("--device", default="auto")
    arguments.add_argument("--work", type=Path, required=True)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--seconds", type=float, default=600.0)
    args = arguments.parse_args()
    ends = time.monotonic() + args.seconds
    sys.path.insert(0, str(ROOT / "tools"))
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no GPU")
    FUNCTIONS[args.name](Found(args.out, args.work, torch.cuda.is_available(), ends))


if __name__ == "__main__":
    main()
