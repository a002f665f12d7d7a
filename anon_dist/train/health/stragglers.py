"""How long each rank works on a step, and how long it waits for the others; told with the losses, in the same reduction.

Ranks that train together take the same time for a step. The slow one is the one that waits least.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from anon_dist.train.reports.metrics import Record

SLOWER = 1.1
"""A host is slow that works so many times as long as the median of the others,"""
LONG = 100
"""over so many steps."""


class Stragglers:
    """Counts this rank's waiting between records, and says who was slow.

    On CPUs the host waits: in `Work.wait`, and DDP at the end of its backward pass, in code that is not Python's. On GPUs the device does,
    and torch's flight recorder knows how long its collectives took. (That has not been run.)
    """

    def __init__(self) -> None:
        self.waited = 0.0
        """Seconds, since the last record."""
        self._rank, self._hosts = 0, [socket.gethostname()]
        if dist.is_initialized():
            self._rank, self._hosts = dist.get_rank(), [""] * dist.get_world_size()
            dist.all_gather_object(self._hosts, socket.gethostname())
        self._last_gradient = 0.0
        self._recorded = -1
        self._recent: deque[tuple[int, list[float]]] = deque()
        """Of the last records, which cover `LONG` steps: how many steps each is of, and each rank's work."""
        self._unjudged = 0

    @contextmanager
    def watching(self, model: nn.Module, device: torch.device) -> Iterator[None]:
        """A block in which the waiting is counted."""
        if len(self._hosts) == 1:
            yield
            return
        if device.type != "cpu":
            self._device_waits()  # what was before
            yield
            return
        hooks = (
            [p.register_post_accumulate_grad_hook(self._gradient) for p in model.parameters()] if _is_ddp(model) else []
        )
        kind: Any = dist.Work
        original = kind.wait
        kind.wait = self._timed(original)
        try:
            yield
        finally:
            kind.wait = original
            for hook in hooks:
                hook.remove()

    def _timed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        thread = threading.get_ident()

        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:  # a save in the background keeps no step waiting
                return wait(*args, **kwargs)
            begun = time.perf_counter()
            try:
                return wait(*args, **kwargs)
            finally:
                self.waited += time.perf_counter() - begun

        return timed

    def _gradient(self, _: Tensor) -> None:
        self._last_gradient = time.perf_counter()

    def backward_is_over(self) -> None:
        """A backward pass in which ranks exchanged gradients is done: DDP has waited since the last gradient."""
        if self._last_gradient:
            self.waited += time.perf_counter() - self._last_gradient
            self._last_gradient = 0.0

    def _device_waits(self) -> float:
        """Seconds that collectives took that are not counted yet."""
        seconds = 0.0
        if (dump := getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)) is not None:
            with suppress(Exception):
                for entry in json.loads(dump(True, False))["entries"]:
                    if entry["record_id"] > self._recorded and entry.get("duration_ms") is not None:
                        seconds += entry["duration_ms"] / 1e3
                        self._recorded = entry["record_id"]
        return seconds

    # -- records ----------------------------------------------------------------------------------

    def beside(self, losses: Tensor, wall: float, steps: int) -> Tensor:
        """The losses, and behind them a place for each rank's seconds of work and of waiting a step, of which this one fills its own: to be
        added up over ranks. The count begins anew.

        Args:
            losses: float64 (n,).
            wall: seconds that the steps took.
        """
        waited, self.waited = self.waited, 0.0
        if losses.is_cuda:
            waited = self._device_waits()
        waited = min(waited, wall)
        places = torch.zeros(2, len(self._hosts), dtype=torch.float64)
        places[:, self._rank] = torch.tensor([wall - waited, waited], dtype=torch.float64) / max(steps, 1)
        return torch.cat([losses, places.flatten().to(losses.device, non_blocking=True)])

    def read(self, places: list[float], steps: int) -> tuple[Record, str | None]:
        """What of the sums is behind the losses: as metrics; and, on the first rank, a line if one host has been slow for long."""
        work, waits = places[: len(self._hosts)], places[len(self._hosts) :]
        slowest = max(range(len(work)), key=work.__getitem__)
        if len(work) == 1:
            return {}, None
        record: Record = {
            "work_s_min": min(work),
            "work_s_median": median(work),
            "work_s_max": work[slowest],
            "slowest_rank": slowest,
            "slowest_host": self._hosts[slowest],
            "peers_wait_s": median(waits),
        }
        return record, self._line(work, steps) if self._rank == 0 else None

    def _line(self, work: list[float], steps: int) -> str | None:
        """Each rank's usual work in both halves of the last `LONG` steps, of two records at least, is compared: one step, or record, may be
        slow by chance. A tenth of that passes between two looks, each of which may be a false alarm; after a line all begins anew."""
        recent = self._recent
        recent.append((steps, work))
        self._unjudged += steps
        while len(recent) > 2 and sum(count for count, _ in recent) - recent[0][0] >= LONG:
            recent.popleft()
        covered = sum(count for count, _ in recent)
        if len(recent) < 2 or covered < LONG or self._unjudged < LONG / 10:
            return None
        self._unjudged = 0
        records, half = [work for _, work in recent], len(recent) // 2
        parts = [self._slowest(records[:half]), self._slowest(records[half:])]
        name, seconds, others = self._slowest(records)
        if any(part[0] != name or part[1] < SLOWER * part[2] for part in parts):
            return None
        recent.clear()
        return f"{name} was the slowest over the last {covered} steps: {seconds:.4g} s of work a step, the others {others:.4g} s"

    def _slowest(self, records: list[list[float]]) -> tuple[str, float, float]:
        """The host, or of a single one the rank, that usually works longest in these records; how long, and the median of the others."""
        several = len(set(self._hosts)) > 1
        names = self._hosts if several else [f"rank {rank} on {host}" for rank, host in enumerate(self._hosts)]
        longest: dict[str, float] = {}
        for name, values in zip(names, zip(*records, strict=True), strict=True):
            longest[name] = max(longest.get(name, 0.0), _usual(values))
        name = max(longest, key=longest.__getitem__)
        return name, longest[name], median(seconds for other, seconds in longest.items() if other != name)


def _usual(values: Sequence[float]) -> float:
    """The mean without the fifth that is least and that which is greatest, of which the latter is rounded up: of two, the lesser."""
    ordered, number = sorted(values), len(values)
    kept = ordered[number // 5 : max(number // 5 + 1, number - -(-number // 5))]
    return sum(kept) / len(kept)


def time_collectives() -> None:
    """Have NCCL note how long they take; before process groups are made."""
    if torch.cuda.is_available():
        os.environ.setdefault("TORCH_NCCL_ENABLE_TIMING", "1")


def _is_ddp(model: nn.Module) -> bool:
    return isinstance(model, DistributedDataParallel)
