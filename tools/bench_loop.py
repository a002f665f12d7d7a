#!/usr/bin/env python
"""What this package's training costs beside a plain loop: the same model, weights and batches, transformers' own forward pass, torch's
fused AdamW. The two take turns of a few steps in one process.

    python tools/bench_loop.py --data data/stdlib [--config quickstart] [--turns 6] [--turn 5]
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import math
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anon_dist.bench.clock import quartiles
from anon_dist.bench.peak import growth, lasting_bytes
from anon_dist.engines.start import start
from anon_dist.train import loop
from anon_dist.train.config.parsing import Config, find_config, load_config
from anon_dist.train.model.build import blocks
from anon_dist.train.model.flops import peak_flops
from anon_dist.train.reports.metrics import Stopwatch
from anon_dist.train.run import set_up, wanted_engine
from anon_dist.train.running import Run

WARM_UP = 5
"""Steps of each that are not counted."""


@dataclasses.dataclass
class Measured:
    """Of one of the two loops."""

    tokens_per_s: list[float] = dataclasses.field(default_factory=list)
    """Of each turn."""
    seconds: dict[str, float] = dataclasses.field(default_factory=collections.Counter)
    """Of a step, by its parts."""
    losses: list[float] = dataclasses.field(default_factory=list)
    """Of the steps that warm up."""
    peak_bytes: int = 0
    """Of weights, state and all else that is allocated at the peak of a step."""
    mfu: float | None = None
    """By the median turn; None where the device's peak is not known."""
    waits: dict[str, int] = dataclasses.field(default_factory=dict)
    """Where the host waited for the GPU in a turn, and how often; "" sums all. Empty without a GPU."""

    @property
    def speed(self) -> float:
        """Tokens per second of the median turn."""
        return statistics.median(self.tokens_per_s)

    @property
    def optimizer_share(self) -> float:
        """Of the time of a step, clipping included."""
        return self.seconds["optimizer"] / sum(self.seconds.values())


class Ours:
    """This package's loop, records of metrics among it."""

    def __init__(self, config: Config) -> None:
        accelerator, name = start(wanted_engine(config))
        self.run: Run = set_up(config, accelerator, name, Path(config.run_dir))
        self._batches = iter(self.run.loader)
        self.taken: collections.deque[Tensor] = collections.deque()
        """Batches that the other loop has not had yet."""

    def step(self, watch: Stopwatch) -> Tensor:
        """The loss, on its device."""
        done = loop.take_step(self.run, self._handed_on(), watch)
        if self.run.step % self.run.config.log.every == 0:
            loop.record_of(self.run, done, self.run.config.log.every, {"other": 1.0})
            watch.lap("logging")
        return done.losses[1]

    def _handed_on(self) -> Iterator[Tensor]:
        for batch in self._batches:
            self.taken.append(batch)
            yield batch


class Plain:
    """As one writes it down: autocast, whole logits, clipping by torch, AdamW(fused=True)."""

    def __init__(self, ours: Ours) -> None:
        from transformers import AutoModelForCausalLM

        run = ours.run
        self._config, self._device, self._taken = run.config, run.accelerator.device, ours.taken
        with self._device:
            shape = copy.deepcopy(run.model_config)
            self.model = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa", dtype=torch.float32)
        weights = dict(run.engine.model.named_parameters())
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(weights[name])
        if self._config.train.compile == "blocks":
            for block in blocks(self.model):
                block.compile()
        elif self._config.train.compile == "whole":
            self.model.compile()
        o = self._config.optim
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, fused=True
        )

    def step(self, watch: Stopwatch) -> Tensor:
        """The loss, on its device."""
        half = self._config.train.precision == "bf16"
        batches = [self._taken.popleft() for _ in range(self._config.train.global_batch // len(self._taken[0]))]
        total = torch.zeros((), device=self._device)
        for batch in batches:
            tokens = batch.to(self._device, non_blocking=True)
            watch.lap("data")
            with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
                logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()) / len(batches)
            del logits
            watch.lap("forward")
            loss.backward()
            total += loss.detach()
            watch.lap("backward")
        if self._config.train.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._config.train.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        watch.lap("optimizer")
        return total


Step = Callable[[Stopwatch], Tensor]


def compare(
    config: Config, turns: int, turn: int, say: Callable[[str], None] = lambda _: None, ends: float = math.inf
) -> tuple[Measured, Measured, Run]:
    """This package's loop and the plain one, in turns.

    Args:
        config: engine single, one process.
        turns: of each, after the steps that warm up.
        turn: steps of a turn.
        say: told what comes next.
        ends: by `time.monotonic`, when all is to be done: turns, but not the first, are left out for it.
    """
    found = Measured(), Measured()
    ours = Ours(config)
    device = ours.run.accelerator.device
    watch = Stopwatch(device)
    with ours.run.loader:
        say("this package's loop warms up")
        engine = ours.run.engine
        plain = Plain(ours)  # before the weights it takes are trained
        _warm_up(found[0], ours.step, watch, device, lambda: lasting_bytes(engine.model, engine.optimizer))
        say("the plain loop warms up")
        _warm_up(found[1], plain.step, watch, device, lambda: lasting_bytes(plain.model, plain.optimizer))
        tokens = turn * config.train.global_batch * config.data.seq_len
        done, longest = 0, 0.0
        while done < turns and (
            not done or time.monotonic() + 2 * longest < ends
        ):  # what comes after takes a turn more
            begun = time.monotonic()
            for measured, step in zip(found, (ours.step, plain.step), strict=True):
                measured.tokens_per_s.append(tokens / _timed(step, turn, watch, device, measured.seconds))
            done, longest = done + 1, max(longest, time.monotonic() - begun)
        for measured, step in zip(found, (ours.step, plain.step), strict=True):
            measured.seconds = {part: s / (done * turn) for part, s in measured.seconds.items()}
            if (peak := peak_flops(device)) is not None:
                measured.mfu = measured.speed * ours.run.flops / peak
            if device.type == "cuda":
                measured.waits = waits(lambda step=step: [step(watch) for _ in range(turn)])
    return *found, ours.run


def _timed(step: Step, count: int, watch: Stopwatch, device: torch.device, parts: dict[str, float]) -> float:
    """Seconds of so many steps, from a device that has nothing to do to one that is done; `parts` grow by their own."""
    _wait(device)
    watch.read()
    begun = time.perf_counter()
    watch.skip()
    for _ in range(count):
        step(watch)
    _wait(device)
    seconds = time.perf_counter() - begun
    for part, took in watch.read().items():
        parts[part] = parts.get(part, 0.0) + took
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _warm_up(found: Measured, step: Step, watch: Stopwatch, device: torch.device, lasting: Callable[[], int]) -> None:
    """Losses, and the peak of the last of the steps."""
    losses = [step(watch) for _ in range(WARM_UP - 1)]
    with growth(device) as most:
        losses.append(step(watch))
    found.losses, found.peak_bytes = [float(loss) for loss in losses], lasting() + most()
    watch.read()


def waits(run: Callable[[], Any]) -> dict[str, int]:
    """How often the host waits for the GPU in it, by where, as torch warns of it; "" sums all."""
    torch.cuda.synchronize()
    found: collections.Counter[str] = collections.Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            found[f"{Path(warning.filename).name}:{warning.lineno}"] += 1
    return {"": sum(found.values()), **dict(found.most_common())}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--config", default="quickstart", help="training configuration, a name or a file")
    arguments.add_argument("--data", required=True, help="folder made by `anon-dist data prepare`")
    arguments.add_argument("--turns", type=int, default=6, help="of each")
    arguments.add_argument("--turn", type=int, default=5, help="steps of a turn")
    args = arguments.parse_args()
    config = load_config(find_config(args.config))
    config.data.path, config.train.engine, config.log.trackers = args.data, "single", ()
    with tempfile.TemporaryDirectory() as folder:
        config.run_dir = str(Path(folder) / "run")
        ours, plain, run = compare(config, args.turns, args.turn)
    size = f"{config.train.global_batch} x {config.data.seq_len} tokens a step"
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(f"{where}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, {args.config}, {size}")
    for name, found in ((f"this package, {type(run.engine.optimizer).__name__}", ours), ("plain loop, AdamW", plain)):
        parts = ", ".join(f"{part} {1e3 * s:.1f}" for part, s in found.seconds.items())
        print(f"{name}: {found.speed:,.0f} tokens/s, {found.peak_bytes / 1e9:.2f} GB; ms of a step: {parts}")
    low, middle, high = ratios(ours, plain)
    print(f"speed of the first over the second: {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


def ratios(ours: Measured, plain: Measured) -> list[float]:
    """Of the speeds, turn by turn: lower quartile, median, upper quartile."""
    return quartiles([a / b for a, b in zip(ours.tokens_per_s, plain.tokens_per_s, strict=True)])


if __name__ == "__main__":
    main()
