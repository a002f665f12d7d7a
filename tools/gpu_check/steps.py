"""Parts: the optimizer by itself, and attention that ranks share."""

from __future__ import annotations

import importlib.util
import os
import re
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from found import ROOT, Found

if TYPE_CHECKING:
    import torch


def kernel(found: Found) -> None:
    """The GPU kernel's bits; on a CPU, one case in Triton's interpreter."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/optim/gpu_cases.py"]
    if found.on_gpu and importlib.util.find_spec("xdist") is not None:
        command += ["-n", "6"]
    if not found.on_gpu:
        command += ["-k", "conversions"]
    environment = {**os.environ, "TRITON_INTERPRET": "0" if found.on_gpu else "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    counts = {"PASSED": 0, "FAILED": 0, "ERROR": 0, "SKIPPED": 0}
    failed: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        # of one process: NAME PASSED [ 9%]; of several: [gw0] [ 9%] PASSED NAME
        match = re.search(r"(?:^\[gw\d+\].*?|::\S+.* )\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
        if match:
            counts[match[1]] += 1
            failed += re.findall(r"::(\S+)", line) if match[1] in ("FAILED", "ERROR") else []
            found.rows.clear()
            done = ", ".join(f"{n} {what.lower()}" for what, n in counts.items() if n)
            found.row("its bits are the CPU kernel's", done, "", f"failed: {', '.join(failed)}" if failed else "")
    found.numbers["counts"] = counts
    code = process.wait()
    if code:
        sys.exit(f"pytest ended with code {code}")


def optimizer(found: Found) -> None:
    """A step of GPT-2 small's tensors by itself, and of one large list: time of the device and of the host."""
    from anon_dist.bench.clock import measure
    from anon_dist.bench.optimizers import BASE, contestants, make, schedules, weights
    from anon_dist.bench.shape_lists import few_large, model_shapes, parameters

    small = model_shapes("gpt2-small")
    if not found.on_gpu:
        small = [[min(n, 16) for n in shape] for shape in small]
    lists = {f"{len(small)} tensors": small, "4 tensors": few_large(500_000_000 if found.on_gpu else 100_000)}
    known = {c.name: c for c in contestants()}
    shares = {steps: weights(list(schedules().values())[-1], steps) for steps in (10_000, 100_000)}
    longest = 0.0
    for title, shapes in lists.items():
        tensors = parameters(shapes, found.device)
        (base,) = make(known[BASE], tensors)[1].values()
        for name in ("Anon precond, exp_avg_sq bf16", "Anon float32"):
            if not found.has_time(f"{title}, {name}", longest):
                continue
            begun, ratios = time.perf_counter(), {}
            for kind, step in make(known[name], tensors)[1].items():
                ratio, theirs, own = measure(base, step, 15, found.device)
                host = [1e3 * host_seconds(s, found.device) for s in (step, base)]
                what = f"{title}, {name}, {kind}: ms"
                remark = f"{ratio:.3f} of AdamW's; the host {host[0]:.3f} and {host[1]:.3f} ms"
                found.row(what, f"{1e3 * own:.3f}", f"AdamW {1e3 * theirs:.3f}", remark, [own, theirs, *host])
                ratios[kind] = ratio
            for steps, share in shares.items():
                mean = sum(part * ratios[kind] for kind, part in share.items())
                found.row(f"{title}, {name}: mean of {steps:,} steps", f"{mean:.3f}", "AdamW 1")
            longest = max(longest, time.perf_counter() - begun)


def host_seconds(step: Any, device: torch.device) -> float:
    """Median time that a step keeps the host, which has nothing before it to wait for."""
    import torch

    taken = []
    for _ in range(15):
        step.prepare()
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        step.run()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def context(found: Found) -> None:
    """Context parallelism on its one rank: its attention and positions beside transformers' own."""
    import torch
    import torch.distributed as dist

    from anon_dist.engines.context import ContextParallel
    from anon_dist.train.config.parsing import ModelConfig
    from anon_dist.train.loss.attach import attach
    from anon_dist.train.loss.batch import mean_loss
    from anon_dist.train.model.build import build_model

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("nccl" if found.on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    sizes = {"layers": 2, "width": 128, "heads": 4, "kv_heads": 2, "context": 512}
    tokens = torch.randint(0, 500, (2, 513), generator=torch.Generator().manual_seed(0)).to(found.device)
    for precision, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        results = []
        for shared in (False, True):
            model = build_model(ModelConfig(family="qwen3", **sizes), 500, 0, 512, seed=1).to(found.device)
            attach(model)
            own = tokens
            if shared:
                ranks = ContextParallel(1, found.device)
                ranks.attach(model)
                own = ranks.pieces(tokens)
            with torch.autocast(found.device.type, precision, enabled=precision != torch.float32):
                loss = mean_loss(model, own)
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            results.append((float(loss), gradient))
        (loss, wanted), (other, gradient) = results
        off = float((gradient - wanted).norm() / wanted.norm())
        right = abs(other - loss) < tolerance * loss and off < tolerance
        name = str(precision).removeprefix("torch.")
        remark = f"gradients {off:.1e} apart" + ("" if right else ", TOO MUCH")
        found.row(f"loss of one rank that shares sequences, {name}", f"{other:.5f}", f"{loss:.5f}", remark)
    dist.destroy_process_group()
