"""What is recorded of steps: losses, speed, memory, and where the time went."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from anon_dist.optim.host_copy import HostCopy
from anon_dist.train.loss.attach import SUMS
from anon_dist.train.model.flops import peak_flops
from anon_dist.train.reports.metrics import PARTS, Record
from anon_dist.train.running import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What came of one step."""

    losses: Tensor
    """This rank's `loss.SUMS`, per token of the step, on the device."""
    grad_norm: HostCopy
    """Global gradient norm, before clipping."""
    lr: float
    lr_factors: list[float]
    """What each param group's is multiplied by."""


def record_of(run: Run, done: Step, steps: int, seconds: dict[str, float]) -> Record:
    """The metrics of the step just taken, which the host knows; rates and shares are means over the `steps` since the last record.

    Args:
        seconds: by part of a step, as `Stopwatch.read` gives them.
    """
    accelerator, config = run.accelerator, run.config
    begun = time.perf_counter()
    wall, tokens, ranks = max(sum(seconds.values()), 1e-9), run.predicted, accelerator.num_processes
    sums = run.stragglers.beside(done.losses.double(), wall, steps)
    if dist.is_initialized():
        dist.all_reduce(sums)
    losses, places = sums.tolist()[: len(SUMS)], sums.tolist()[len(SUMS) :]
    found = {name: loss / ranks for name, loss in zip(SUMS, losses, strict=True)}
    run.waited += time.perf_counter() - begun
    record: Record = {
        "step": run.step,
        "samples": run.loader.cursor,
        "epoch": run.loader.epoch,
        "loss": found["cross_entropy"],
        "lr": done.lr,
        "grad_norm": done.grad_norm.value(),
        "tokens_per_s": tokens / wall,
        "tokens_per_s_per_device": tokens / wall / ranks,
    }
    if config.train.z_loss:
        record["z_loss"] = config.train.z_loss * found["z"]
    if found["balance"]:
        record["balance_loss"] = found["balance"]
    if len(run.loader.stream.sources) > 1:
        record |= {f"epoch/{name}": epoch for name, epoch in run.loader.stream.epochs(run.loader.cursor).items()}
    if run.loader.stream.packed:
        record["padding_share"] = 1.0 - tokens / run.places
    if run.gammas.multiplied:
        record |= {f"lr_factor/{i}": factor for i, factor in enumerate(done.lr_factors)}
    record |= _update(run)
    if peak := peak_flops(accelerator.device):
        record["mfu"] = run.flops * tokens / wall / (peak * ranks)
    for part in PARTS:
        record[f"{part}_share"] = seconds.get(part, 0.0) / wall
    record["waiting_share"] = run.waited / wall
    record |= memory(accelerator.device)
    work, slow = run.stragglers.read(places, steps)
    record |= work
    if slow is not None and accelerator.is_main_process:
        log.warning("step %d: %s", run.step, slow)
    if run.skipped:
        record["skipped"] = run.skipped
    if run.spikes.found:
        record["spikes"] = run.spikes.found
    if run.rewinds:
        record["rewinds"] = run.rewinds
    run.predicted, run.places, run.waited = 0, 0, 0.0
    return record


def _update(run: Run) -> Record:
    """Of Anon's update; with a warning, and how much larger it is, where its size has doubled."""
    record = run.watch.read()
    if "update_rms" in record and (usual := run.spikes.update_doubled(record["update_rms"])) is not None:
        record["update_doubled"] = record["update_rms"] / usual
        if run.accelerator.is_main_process:
            log.warning(
                "step %d: the update's root mean square is %.3g, and was %.3g: spikes of the loss often follow",
                *(run.step, record["update_rms"], usual),
            )
    return record


def memory(device: torch.device) -> Record:
    """Peak memory of this process, in GB: on an accelerator allocated, and reserved from it; else resident."""
    if device.type == "cuda":
        return {
            "memory_gb": torch.cuda.max_memory_allocated(device) / 1e9,
            "memory_reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9,
        }
    import resource

    return {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
