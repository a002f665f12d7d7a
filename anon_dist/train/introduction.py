"""What a run says of itself before its first step."""

from __future__ import annotations

from anon_dist.engines.padding import Padding, padding_of
from anon_dist.train.config.phases import phases_from
from anon_dist.train.inputs.corpora import remarks
from anon_dist.train.model.trainable import cpu_remarks, uses_tf32
from anon_dist.train.reports.metrics import Console
from anon_dist.train.running import Run

MUCH = 0.1
"""Share of what is moved that may be padding without a word."""


def padding_remarks(padding: Padding | None) -> list[str]:
    """A line where FSDP2 pads so much that it shows in the time of a step."""
    if padding is None or padding.share < MUCH:
        return []
    return [
        f"WARNING: {padding.share:.0%} of what the ranks gather in a step is padding: FSDP2 divides tensors by their first dimension, and "
        f"the {padding.shape[0]} of {padding.name} {padding.shape} do not divide among {padding.ranks} ranks. Take a number of ranks that "
        "divides it, or engine hsdp with such train.shard_ranks (anon-dist bench plan says what that needs)"
    ]


def introduce(run: Run, console: Console) -> None:
    """Say what is about to run."""
    config, device, ranks = run.config, run.accelerator.device, run.accelerator.num_processes
    mib, tokens = 1 << 20, run.loader.global_batch * run.loader.stream.seq_len
    planned = sum(steps * phase.train.global_batch for steps, phase in phases_from(config, 0))
    each = (corpus.train.num_samples(config.data.seq_len) for corpus in run.corpora)
    epochs = planned / (run.loader.stream.num_samples if run.loader.stream.packed else sum(each))
    padding = padding_of(run.engine.model)
    for line in (
        *cpu_remarks(config, device, run.parameters),
        *remarks(config, run.corpora, run.sets),
        *run.plan,
        *padding_remarks(padding),
    ):
        console.say(line)
    precision = config.train.precision + " (products in TF32)" * uses_tf32(config, run.accelerator)
    held = (
        f"holds {run.state.local / mib:.1f} of {run.state.whole / mib:.1f} MiB state per rank"
        if run.state.whole
        else "makes its state in the first step"
    )
    console.say(
        f"{run.parameters / 1e6:.2f}M parameters, {precision}, {run.engine.name} on {ranks} "
        f"{device.type} rank{'s' * (ranks > 1)}; {type(run.engine.optimizer).__name__} {held}; {tokens:,} tokens a step, "
        f"{config.train.steps} steps, {epochs:.2f} epochs"
    )
