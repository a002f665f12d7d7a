"""The optimizer's state in the metrics, and warnings before it spoils a run."""

from __future__ import annotations

import logging
import math

import torch
import torch.distributed as dist

from anon_dist.engines.base import Engine
from anon_dist.optim import Anon
from anon_dist.optim.monitor import Found, GroupUpdate, measure, read, refreshes
from anon_dist.train.reports.metrics import Record

log = logging.getLogger(__name__)

OUTLIER = 100.0
"""An element of the update that is so many times the mean size is no tail of a distribution: a billion normal ones stay below 10."""
MUCH_CLIPPED = 0.1
"""More of the elements than this at the clip are a sign-based step, of another size than the learning rate was chosen for."""
SETTLED = 50
"""Steps before which nothing is said of the clip: in healthy runs it cuts off up to half of the elements in the first twenty, and then
hardly any."""
SILENCE = 50
"""Records between two warnings of a kind."""


class OptimizerWatch:
    """Metrics of an engine's Anon; of other optimizers none."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._engine, self._device = engine, device
        self._quiet: dict[str, int] = {}

    def read(self) -> Record:
        """update_rms, update_max, refreshes; for each param group i gamma/i (the one in force), precond_spread/i (standard deviation of
        log2 v), precond_age/i and, with a clip, clipped_share/i. Every rank must call it: the sums go over all ranks, in two small
        reductions.
        """
        with self._engine.whole_optimizer() as optimizer:
            if not isinstance(optimizer, Anon):
                return {}
            found, count = measure(optimizer, self._device), refreshes(optimizer)
            clips = [g["update_clip"] for g in optimizer.param_groups]
            steps = max((int(s["step"]) for s in optimizer.state.values() if s), default=0)
        groups = read(_over_ranks(found))
        elements = sum(g.elements for g in groups)
        record: Record = {
            "update_rms": math.sqrt(sum(g.square_sum for g in groups) / max(elements, 1.0)),
            "update_max": max((g.largest for g in groups), default=0.0),
            "refreshes": count,
        }
        for i, (group, clip) in enumerate(zip(groups, clips, strict=True)):
            mean = group.log_sum / max(group.moving, 1.0)
            if group.gamma is not None:
                record[f"gamma/{i}"] = group.gamma
            record[f"precond_spread/{i}"] = math.sqrt(max(group.log_square_sum / max(group.moving, 1.0) - mean**2, 0.0))
            record[f"precond_age/{i}"] = group.age
            if clip is not None:
                record[f"clipped_share/{i}"] = group.clipped / max(group.elements, 1.0)
        for kind, text in troubles(groups, clips).items():
            if steps >= SETTLED or not kind.startswith("clipped"):
                self._warn(kind, text)
        self._quiet = {kind: left - 1 for kind, left in self._quiet.items() if left > 1}
        return record

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._quiet and (not dist.is_initialized() or dist.get_rank() == 0):
            log.warning(text)
        self._quiet.setdefault(kind, SILENCE)


def _over_ranks(found: Found) -> Found:
    """Sums added, largest values compared."""
    if dist.is_initialized():
        dist.all_reduce(found[0])
        dist.all_reduce(found[1], op=dist.ReduceOp.MAX)
    return found


def troubles(groups: list[GroupUpdate], clips: list[float | None]) -> dict[str, str]:
    """What bodes ill, by kind, each with its remedy."""
    found = {}
    for i, (group, clip) in enumerate(zip(groups, clips, strict=True)):
        mean = group.size_sum / max(group.elements, 1.0)
        if clip is None and (group.gamma or 0.0) > 0.0 and group.largest > OUTLIER * mean > 0.0:
            found[f"outlier {i}"] = (
                f"param group {i}: the largest element of the update is {group.largest:.3g}, {group.largest / mean:.0f} times the mean: "
                f"a coordinate that was quiet when the preconditioner was refreshed, {group.age} steps ago, has woken up. Set "
                "optim.update_clip (1 suits γ = 1), or refresh more often (optim.refresh_ratio 1.1)"
            )
        if clip is not None and group.clipped > MUCH_CLIPPED * group.elements:
            found[f"clipped {i}"] = (
                f"param group {i}: {group.clipped / group.elements:.0%} of the update's elements are clipped at {clip}: the preconditioner "
                "is out of date, or the clip is meant for another γ. Raise optim.update_clip, or refresh more often (optim.refresh_ratio)"
            )
    return found
