"""Time and memory of an optimizer's step: Anon's variants and other optimizers, against torch's fused AdamW and against what memory gives.

A pair is one step of torch's AdamW(fused=True) and, right after it, one of another; what is reported is the ratio of their times, as the
median and quartiles over repeats of each repeat's median, so that other work on the machine meets both alike. Anon's steps are plain
(between windows), accumulating (inside a window) and refreshing; which one a step takes follows from its number, which is set before each.
The means over a run weigh them by how often the schedule takes each. GB/s are of the bytes that a step must move.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from fnmatch import fnmatch

import torch

from anon_dist.bench.clock import Step, measure, quartiles, stream, timed
from anon_dist.bench.machine import machine
from anon_dist.bench.optimizers import (
    BASE,
    Contestant,
    UnavailableError,
    contestants,
    make,
    schedules,
    state_bytes,
    weights,
)
from anon_dist.bench.options import StepOptions
from anon_dist.bench.peak import in_fresh_process, working_bytes
from anon_dist.bench.shape_lists import Shapes, default_sizes, few_large, model_shapes, parameters
from anon_dist.bench.step_report import plot, show
from anon_dist.bench.step_result import MEAN_STEPS, Mean, Measured, Result, Row
from anon_dist.optim import Anon
from anon_dist.optim.backends.build import BuildError
from anon_dist.train.config.parsing import ConfigError
from anon_dist.usage import ending

STREAM = {"cpu": "stream, 4 read 2 written", "cuda": "torch copy"}
SLOW = 3.0
"""Those that take so many times AdamW's time are given a fifth of the pairs."""


def bench(options: StepOptions) -> Result:
    """Measure what the options ask for.

    Raises:
        ConfigError: an option has a value that cannot be; the message says which.
    """
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device")
    if min(options.pairs, options.repeats) < 1 or any(n < 1 for n in options.sizes):
        raise ConfigError("--pairs, --repeats and --sizes must be at least 1")
    chosen = [
        c for c in contestants() if not options.only or any(fnmatch(c.name.lower(), p.lower()) for p in options.only)
    ]
    if not chosen:
        raise ConfigError(
            f"--only {' '.join(options.only)} matches none of: {', '.join(c.name for c in contestants())}"
        )
    lists: dict[str, Shapes] = {f"{int(n):,} elements": few_large(int(n)) for n in options.sizes}
    lists |= {name: model_shapes(name) for name in options.tensors}
    lists = lists or {f"{n:,} elements": few_large(n) for n in default_sizes(device)}
    where = machine(device)
    measured = []
    for name, shapes in lists.items():
        _say(name)
        measured.append(
            _measure_list(name, shapes, chosen, options, device, options.memory and name == list(lists)[-1])
        )
    where.load_after = machine(device).load_before
    return Result(where, options.pairs, options.repeats, measured)


def _measure_list(
    title: str, shapes: Shapes, chosen: list[Contestant], options: StepOptions, device: torch.device, memory: bool
) -> Measured:
    tensors = parameters(shapes, device)
    found = Measured(title, len(tensors), sum(p.numel() for p in tensors))
    (base,) = make(next(c for c in contestants() if c.name == BASE), tensors)[1].values()
    flow: list[float] | None = None
    working: dict[str, int] = {}
    try:
        flow = _measure_steps(
            found, STREAM[device.type], {"": stream(found.elements, device)}, base, options, device, None
        )[""]
    except BuildError as error:
        found.unavailable[STREAM[device.type]] = str(error)
    for contestant in chosen:
        try:
            optimizer, steps = make(contestant, tensors)
        except UnavailableError as error:
            found.unavailable[contestant.name] = str(error)
            continue
        _say(f"  {contestant.name}")
        ratios = _measure_steps(found, contestant.name, steps, base, options, device, flow)
        found.state_bytes[contestant.name] = sum(state_bytes(optimizer).values()) / found.elements
        if isinstance(optimizer, Anon):
            found.means += _means(contestant.name, ratios)
        if memory and device.type == "cuda":
            working[contestant.name] = working_bytes(steps.values(), device)
    if memory and device.type == "cpu":
        _say("  memory")
        working = in_fresh_process(list(found.state_bytes), shapes)
    for name, state in found.state_bytes.items() if memory else ():
        found.peak_bytes[name] = state + working[name] / found.elements if name in working else None
    return found


def _measure_steps(
    found: Measured,
    name: str,
    steps: dict[str, Step],
    base: Step,
    options: StepOptions,
    device: torch.device,
    flow: list[float] | None,
) -> dict[str, list[float]]:
    """Append the rows; each step's ratio to the base in each repeat."""
    ratios: dict[str, list[float]] = {step: [] for step in steps}
    seconds: dict[str, list[float]] = {step: [] for step in steps}
    slow = {k for k, step in steps.items() if timed(step, device) > SLOW * timed(base, device)}
    for _ in range(options.repeats):
        for key, step in steps.items():
            ratio, _, own = measure(base, step, -(-options.pairs // 5) if key in slow else options.pairs, device)
            ratios[key].append(ratio)
            seconds[key].append(own)
    for key, step in steps.items():
        relative, absolute = quartiles(ratios[key]), quartiles(seconds[key])
        share = None
        if flow:  # bytes per second over the stream's, each next to the same AdamW
            streamed = 24 if device.type == "cpu" else 8
            share = (step.moved / relative[1]) / (streamed / quartiles(flow)[1])
        speed = step.moved * found.elements / absolute[1] / 1e9
        found.rows.append(Row(name, key, relative, [1e3 * x for x in absolute], step.moved, speed, share))
    return ratios


def _means(name: str, ratios: dict[str, list[float]]) -> list[Mean]:
    repeats = range(len(ratios["plain"]))
    made = []
    for schedule, settings in schedules().items():
        for steps in MEAN_STEPS:
            shares = weights(settings, steps)
            means = [sum(share * ratios[step][i] for step, share in shares.items()) for i in repeats]
            made.append(Mean(name, schedule, steps, quartiles(means)))
    return made


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(options: StepOptions) -> None:
    """`anon-dist bench step`"""
    with ending(ConfigError):
        result = bench(options)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n")
    if options.plot:
        plot(result, options.plot)
