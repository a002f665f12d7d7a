"""Parts: short runs of the training command, several at a time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

from check import last_line
from found import ROOT, Found

TINY = """
model: {family: llama, layers: 2, width: 256, heads: 4, kv_heads: 2, context: 512, pad_vocab_to: 512}
data: {path: DATA, seq_len: 512}
optim: {lr: 2.0e-3}
schedule: {warmup_steps: 3}
train: {steps: 20, global_batch: 8, micro_batch: 8, tf32: false}
eval: {every: 0, final_sequences: 4}
checkpoint: {every: 10}
log: {every: 1, trackers: []}
"""
TOY = ("--model.width", "64", "--data.seq-len", "64", "--model.heads", "2", "--model.kv-heads", "1", "--train.steps")
DOCUMENTS = ("--data.mask-documents", "true")
SETTINGS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "documents, sdpa": DOCUMENTS,
    "TF32": ("--train.tf32", "true"),
    "bf16": ("--train.precision", "bf16"),
    "documents, flex_attention": (*DOCUMENTS, "--model.attention", "flex_attention"),
    "documents, flash_attention_2": (*DOCUMENTS, "--model.attention", "flash_attention_2", "--train.precision", "bf16"),
    "loss liger": ("--train.loss", "liger"),
    "loss torch": ("--train.loss", "torch"),
    "fp8": ("--train.precision", "fp8"),
    "bf16-true": ("--train.precision", "bf16-true"),
    "fsdp2, offload overlap": ("--train.engine", "fsdp2", "--train.offload", "overlap"),
    "fsdp2, offload serial": ("--train.engine", "fsdp2", "--train.offload", "serial"),
    "compile whole": ("--train.compile", "whole"),
    "selective": ("--train.activation-checkpointing", "selective", "--train.compile", "blocks"),
    "budget": ("--train.activation-checkpointing", "budget", "--train.compile", "blocks"),
    "profile and snapshot": ("--log.profile-steps", "3", "4"),
    "a gamma of 0.5, in bases": ("--optim.gamma", "0.5", "--optim.basis", "columns"),
}
"""Options of one short run each; those of documents are held against theirs."""
ALIKE = {"bf16": 0.03, "bf16-true": 0.1, "fp8": 0.1, "TF32": 0.005, "documents, flash_attention_2": 0.03}
"""By how much the last loss may be another than in float32; 0.002 of all else."""
LATE = "no time"
"""What the error of a run begins with that the part's end did not let run, or finish."""
TO_TELL = 2.0
"""Seconds before the part's end that its runs end, to be told of."""
OWN_LOSS = ("float32", "documents, sdpa", "a gamma of 0.5, in bases")


BASES = ("float32", "documents, sdpa")
"""What the others are compared with."""


def settings(found: Found) -> None:
    """Each setting in a run of its own, several at a time: its last loss beside that in float32."""
    config = found.work / "tiny.yaml"
    config.write_text(TINY.replace("DATA", str(found.data)))
    chosen = SETTINGS
    if not found.on_gpu:  # compiling takes long, and the others want a GPU
        slow = ("compile whole", "selective", "budget", "documents, flex_attention")
        chosen = {name: options for name, options in SETTINGS.items() if name not in slow}
    losses: dict[str, float] = {}
    at_once = 6 if found.on_gpu else 2
    with ThreadPoolExecutor(at_once) as pool:
        runs = {pool.submit(train, found, config, name, *options): name for name, options in chosen.items()}
        bases = [run for run, name in runs.items() if name in BASES]
        for run in (*bases, *(run for run in as_completed(runs) if run not in bases)):  # one that hangs hides no other
            name = runs[run]
            losses_of_it, error = run.result()
            base = losses.get(BASES[1] if name.startswith("documents") else BASES[0])
            if error:
                found.row(name, outcome(error), "", error)
                continue
            losses[name] = last = losses_of_it[-1]
            beside, remark = "", ""
            if name not in OWN_LOSS and base is not None:
                beside, off = f"{base:.4f}", abs(last - base)
                remark = f"{off:.4f} apart" + (", TOO MUCH" if not off <= ALIKE.get(name, 0.002) else "")
            if name.startswith("profile"):
                files = sorted(p.name for p in (found.work / name / "profile").glob("*"))
                remark += f"; wrote {', '.join(files) or 'NOTHING'}"
            found.row(f"last loss: {name}", f"{last:.4f}", beside, remark, losses_of_it)


def outcome(error: str) -> str:
    """What the table says of a run that gave no losses."""
    return "refused" if error.startswith("error: ") else "–" if error.startswith(LATE) else "FAILED"


def train(found: Found, config: Path, name: str, *options: str) -> tuple[list[float], str]:
    """Losses of a run in a folder of this name, and the last line of its error."""
    folder = found.work / name
    command = [sys.executable, "launch/pretrain.py", "--config", str(config), "--run-dir", str(folder), *options]
    if not found.on_gpu:
        command += [*TOY, "12"]
    environment = {"OMP_NUM_THREADS": "2", **os.environ}  # others run beside it
    left = found.ends - time.monotonic() - TO_TELL
    if left < max(1.0, found.longest):
        takes = f"one takes {found.longest:.0f} s, and " if found.longest else ""
        return [], f"{LATE}: {takes}{max(0.0, left):.0f} s were left"
    begun = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            timeout=left if math.isfinite(left) else None,
        )
    except subprocess.TimeoutExpired:
        return [], f"{LATE}: stopped after {left:.0f} s"
    found.longest = max(found.longest, time.monotonic() - begun)
    print(f"-- {name}\n{done.stdout}", flush=True)
    if done.returncode:
        return [], last_line(done.stdout)
    with suppress(OSError, ValueError):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [record["loss"] for record in records if "loss" in record]
        return [math.nan if loss is None else loss for loss in losses], ""
    return [], "no metrics were written"


def resume(found: Found) -> None:
    """From a checkpoint in the middle of a run, to its end: the bits of the run that went on."""
    from safetensors.torch import load_file

    config = found.work / "tiny.yaml"
    config.write_text(TINY.replace("DATA", str(found.data)))
    compiled = ("--train.compile", "blocks") if found.on_gpu else ()
    exact = ("--train.deterministic", "true")
    kinds = {"float32": exact, "bf16, compiled": (*exact, "--train.precision", "bf16", *compiled)}

    def both(name: str, options: tuple[str, ...]) -> tuple[list[float], list[float], str]:
        whole, error = train(found, config, f"whole {name}", *options)
        if error:
            return whole, [], error
        middle = found.work / f"whole {name}" / "checkpoints" / "step-00000010"
        resumed, error = train(found, config, f"resumed {name}", *options, "--resume", str(middle))
        return whole, resumed, error

    with ThreadPoolExecutor(2 if found.on_gpu else 1) as pool:
        for name, run in {n: pool.submit(both, n, options) for n, options in kinds.items()}.items():
            whole, resumed, error = run.result()
            if error:
                found.row(f"resumed after step 10, {name}", "–" if error.startswith(LATE) else "FAILED", "", error)
                continue
            folders = [found.work / f"{kind} {name}" / "model" for kind in ("whole", "resumed")]
            first, second = (load_file(folder / "model.safetensors") for folder in folders)
            same = whole[10:] == resumed and all(first[k].equal(second[k]) for k in first)
            beside = f"not interrupted {whole[-1]!r}"
            remark = "the same losses and weights, bit for bit" if same else "NOT THE SAME BITS"
            found.row(f"last loss, resumed after step 10, {name}", f"{resumed[-1]!r}", beside, remark)
