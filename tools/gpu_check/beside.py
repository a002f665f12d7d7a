"""Parts: trainings beside a plain loop and beside what `anon-dist bench plan` says."""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING

from found import Found, configuration, forget_accelerate

if TYPE_CHECKING:
    from anon_dist.bench.memory import Job
    from anon_dist.train.config.parsing import Config

TURNS, TURN = 6, 5
"""30 steps of each loop."""


def pair(found: Found, preset: str, compiled: bool) -> None:
    """A model's training by this package, and by a plain loop with torch's fused AdamW, in turns."""
    import bench_loop

    config = configuration(found, preset, train_compile="blocks" if compiled else "none")
    ours, plain, run = bench_loop.compare(config, TURNS, TURN, lambda text: print(text, flush=True), found.ends - 2.0)
    low, middle, high = bench_loop.ratios(ours, plain)
    size = f"{run.parameters / 1e6:.1f}M parameters, {config.train.micro_batch} x {config.data.seq_len} tokens a step"
    remark = f"{middle:.3f} times as fast (quartiles {low:.3f} to {high:.3f}); {size}, bf16"
    if (turns := len(ours.tokens_per_s)) < TURNS:
        remark += f"; {turns} of {TURNS} turns, for want of time"
    both = {"ours": vars(ours), "plain": vars(plain), "ratio": [low, middle, high]}
    found.row("tokens/s", f"{ours.speed:,.0f}", f"plain loop {plain.speed:,.0f}", remark, both)
    mfu = [f"{m.mfu:.1%}" if m.mfu is not None else "?" for m in (ours, plain)]
    found.row("MFU", mfu[0], f"plain loop {mfu[1]}", "" if ours.mfu else "the device's peak is not known")
    for name, m in (("this package", ours), ("plain loop", plain)):
        parts = ", ".join(f"{part} {1e3 * s:.2f}" for part, s in m.seconds.items())
        found.row(f"ms of a step, {name}", f"{1e3 * sum(m.seconds.values()):.2f}", "", parts)
    ms = [1e3 * m.seconds["optimizer"] for m in (ours, plain)]
    shares = [f"{m.optimizer_share:.1%} of a step" for m in (ours, plain)]
    remark = "clipping included; in a run's first steps Anon refreshes at each (part optimizer: at its others)"
    found.row("optimizer, ms", f"{ms[0]:.2f} ({shares[0]})", f"plain loop {ms[1]:.2f} ({shares[1]})", remark)
    first = ours.losses[0], plain.losses[0]
    verdict = "the same" if abs(first[0] - first[1]) < 0.01 else "NOT THE SAME"
    found.row("loss of the first step", f"{first[0]:.4f}", f"plain loop {first[1]:.4f}", verdict)
    planned = predicted(job(config, found))
    peaks = f"plain loop {plain.peak_bytes / 1e9:.3f}; bench plan says {planned / 1e9:.3f}"
    share = f"{ours.peak_bytes / planned:.2f} of the plan's"
    found.row("peak memory, GB", f"{ours.peak_bytes / 1e9:.3f}", peaks, share, [ours.peak_bytes, planned])
    if not found.on_gpu:
        found.row("waits for the GPU, a step", "–", "–", "there is no GPU")
        return
    counts = [f"{m.waits.pop('') / TURN:.1f}" for m in (ours, plain)]
    where = ", ".join(f"{place} {n}" for place, n in list(ours.waits.items())[:4])
    found.row("waits for the GPU, a step", counts[0], f"plain loop {counts[1]}", where and f"in {TURN} steps: {where}")


def job(config: Config, found: Found) -> Job:
    """What `bench plan` is asked about a configuration."""
    from anon_dist.bench.memory import Job
    from anon_dist.bench.shapes import shape_of

    t = config.train
    return Job(
        shape_of(config.model, 257),
        ranks=1,
        micro_batch=t.micro_batch,
        seq_len=config.data.seq_len,
        bf16=t.precision == "bf16",
        checkpointing=t.activation_checkpointing,
        whole_logits=t.loss == "whole",
        device=found.device.type,
        compiled=t.compile != "none",
    )


def predicted(wanted: Job) -> float:
    """Bytes at the peak, with the presets' optimizer."""
    from anon_dist.bench.options import Hardware
    from anon_dist.bench.plan import predict

    return predict("ddp", "anon-columns", wanted, Hardware(), 0.4, 1000).memory.device


def memory(found: Found) -> None:
    """Peaks of a step under settings that save memory, beside what the plan says."""
    import torch
    from bench_loop import Ours

    from anon_dist.bench.peak import growth, lasting_bytes
    from anon_dist.train.reports.metrics import Stopwatch

    layers = 4 if found.on_gpu else 2
    longest = 0.0
    for name, changes in (
        ("selective checkpointing", {"train_activation_checkpointing": "selective"}),
        ("full checkpointing", {"train_activation_checkpointing": "full"}),
        ("whole logits", {"train_activation_checkpointing": "full", "train_loss": "whole"}),
        ("fp32", {"train_precision": "fp32"}),
    ):
        what = f"peak memory, GB: qwen3-1b of {layers} layers, {name}"
        if not found.has_time(what, longest):
            continue
        begun = time.monotonic()
        config = configuration(found, "qwen3-1b", model_layers=layers, **changes)
        config.run_dir += name
        ours = Ours(config)
        watch = Stopwatch(ours.run.accelerator.device)
        with ours.run.loader:
            for _ in range(2):
                ours.step(watch)
            with growth(found.device) as most:
                ours.step(watch)
        peak = lasting_bytes(ours.run.engine.model, ours.run.engine.optimizer) + most()
        planned = predicted(job(config, found))
        remark = f"{peak / planned:.2f} of the plan's"
        found.row(what, f"{peak / 1e9:.3f}", f"bench plan says {planned / 1e9:.3f}", remark, [peak, planned])
        del ours
        gc.collect()
        torch.cuda.empty_cache()
        forget_accelerate()
        longest = max(longest, time.monotonic() - begun)
