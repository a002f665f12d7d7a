"""Anon's step replayed from CUDA graphs.

torch's capturable optimizers keep their counters on the GPU, so that one graph is right at every step. Anon's schedule is integers on the
host, which choose one of three variants of the kernel. So there is a graph for each variant, and what else changes from step to step (the
learning rate, the weight decay, bias corrections, what rounding is salted with) is written to a small tensor on the GPU that the graphs
read, by a copy from pinned memory before each replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anon_dist.optim.anon import Anon, Work
from anon_dist.optim.buckets import Bucket, step_arguments
from anon_dist.optim.kernels import choice, gpu


class GraphedStep:
    """From now on the optimizer's step replays CUDA graphs, wherever `step()` is called: here, or on the optimizer itself.

    Each kind of step (the variants of its buckets) runs without a graph when it first occurs, which compiles the kernel, is captured when
    it occurs again, and replayed from then on. A capture waits for the GPU; a replay does not. Graphs hold addresses: if a parameter, a
    gradient or a state has moved, all graphs are dropped. Keep the gradients where they are with `zero_grad(set_to_none=False)`.

    Buckets that the kernel does not take, or only as copies (see `gpu.prepare`), are updated as without graphs. The step is not to be
    called inside the capture of another graph, since the host chooses at each step.

    Args:
        optimizer: its parameters on one GPU, if its kernel is to take them.
    """

    def __init__(self, optimizer: Anon) -> None:
        self.optimizer = optimizer
        self._without_graphs = optimizer._update
        self._addresses: tuple[Any, ...] = ()
        self._seen: set[tuple[Any, ...]] = set()
        self._graphs: dict[tuple[Any, ...], tuple[Tensor, Callable[[], None]]] = {}
        optimizer._update = self._update  # type: ignore[method-assign]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """`Anon.step`."""
        return self.optimizer.step(closure) if closure is not None else self.optimizer.step()

    def _update(self, work: list[Work]) -> None:
        launches: list[gpu.Launch] = []
        buckets: list[Bucket] = []
        numbers: list[list[float]] = []
        others: list[Work] = []
        for bucket, group, fused in work:
            launch, values = _launch(bucket, group) if fused else (None, [])
            if launch is None:
                others.append((bucket, group, fused))
                continue
            launches.append(launch)
            buckets.append(bucket)
            numbers.append(values)
        if launches:
            self._replay(launches, numbers)
            for bucket in buckets:
                bucket.count()
                torch.autograd.graph.increment_version(bucket.theta)
        self._without_graphs(others)

    def _replay(self, launches: list[gpu.Launch], numbers: list[list[float]]) -> None:
        addresses = tuple(launch.columns for launch in launches)
        if addresses != self._addresses:
            self._graphs.clear()
            self._addresses = addresses
        key = tuple(launch.key for launch in launches)
        values = gpu.sent(numbers, torch.float64, launches[0].table.device)
        kinds = tuple((launch.variant, launch.dtypes, launch.stochastic) for launch in launches)
        if key in self._graphs:
            read, replay = self._graphs[key]
            read.copy_(values)
            replay()
        elif kinds in self._seen:
            read = values.clone()
            replay = _captured(launches, read)
            self._graphs[key] = read, replay
            replay()
        else:
            _launch_all(launches, values)
            self._seen.add(kinds)


def _launch(bucket: Bucket, group: dict[str, Any]) -> tuple[gpu.Launch | None, list[float]]:
    """The launch for a bucket and its numbers; None if there is none that a graph could hold."""
    if choice.kernel_for(bucket.theta[0].device) is not gpu:
        return None, []
    arguments = step_arguments(bucket, group)
    copies, launch = gpu.prepare(
        bucket.lists,
        lr=arguments["lr"],
        variant=arguments.pop("variant"),
        stochastic=arguments.pop("stochastic", frozenset()),
        exponents=arguments.pop("exponents", None),
    )
    return (None, []) if copies else (launch, gpu.step_values(**arguments))


def _captured(launches: list[gpu.Launch], values: Tensor) -> Callable[[], None]:
    """A graph of the launches, which reads `values`; to be replayed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
        _launch_all(launches, values)

    def replay(_kept: object = launches) -> None:  # the graph holds addresses of the launches' tables, not the tables
        graph.replay()

    return replay


def _launch_all(launches: list[gpu.Launch], values: Tensor) -> None:
    for i, launch in enumerate(launches):
        launch(values[i])
