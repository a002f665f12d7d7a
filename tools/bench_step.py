"""Time of an optimizer's step on the CPU: Anon's variants against torch's AdamW, fused and foreach, and against what memory gives.

    python tools/bench_step.py [--elements 60e6 | --gpt2] [--pairs 20] [--repeats 5] [--json FILE]

A pair is one step of AdamW(fused=True) and, right after it, one of another; what is reported is the ratio of their times, as the median
and quartiles over repeats of each repeat's median, so that other work on the machine meets both alike. Anon's variants are plain (between
windows), accumulating (inside a window) and refreshing; which one a step takes follows from its number, which is set before each. The
means weigh the variants by how often the schedule takes each. The stream reads four arrays and writes two of them (`stream.c`); GB/s are
of the bytes that a step must move.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from anon_dist import Anon
from anon_dist.optim.hyper import schedule_of
from anon_dist.optim.kernels.build import load

SCHEDULES = {"rho=2": {"refresh_ratio": 2.0, "beta3": 0.5}, "rho=1.1": {"refresh_ratio": 1.1, "beta3": 0.8}}
WINDOWED = {"betas": (0.9, 0.95), "window": "auto", "weight_decay": 0.1}
BYTES = {"adamw fused": 28, "adamw foreach": 28, "plain": 24, "accumulating": 32, "refreshing": 36, "stream": 24}
BASE = "adamw fused"


def gpt2_small() -> list[tuple[int, ...]]:
    """The shapes of GPT-2 small's 148 parameters, 124M elements."""
    width = 768
    block = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,), (width,), (width,)]
    block += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *(12 * block), (width,), (width,)]


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    """Random ones, with gradients."""
    made = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def variant_of(plan: object) -> str:
    """The name of what a step does."""
    return "refreshing" if plan.refresh else "accumulating" if plan.accumulate else "plain"  # type: ignore[attr-defined]


def first_steps(optimizer: Anon) -> dict[str, int]:
    """A step of each variant, late enough to be none of the first."""
    schedule, found = schedule_of(optimizer.param_groups[0]), dict[str, int]()
    for step in range(20_000, 30_000):
        found.setdefault(variant_of(schedule.plan(step)), step)
    return found


def anon_step(optimizer: Anon, step: int) -> Callable[[], None]:
    """A function that takes that step, whatever was taken before."""

    def run() -> None:
        optimizer.step()

    def prepare() -> None:
        for state in optimizer.state.values():
            state["step"].fill_(step - 1)

    run.prepare = prepare  # type: ignore[attr-defined]
    return run


def stream_step(elements: int) -> Callable[[], None]:
    """A function that goes once over the arrays."""
    library = load(Path(__file__).with_name("stream.c"))
    arrays = [torch.zeros(elements) for _ in range(4)]
    arguments = [ctypes.c_void_p(a.data_ptr()) for a in arrays]

    def run() -> None:
        library.stream(*arguments, ctypes.c_int64(elements), ctypes.c_int32(torch.get_num_threads()))

    run.arrays = arrays  # type: ignore[attr-defined]  # they live as long as the function
    return run


def timed(run: Callable[[], None]) -> float:
    """Seconds."""
    getattr(run, "prepare", lambda: None)()
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def measure(base: Callable[[], None], other: Callable[[], None], pairs: int) -> tuple[float, float, float]:
    """Medians over alternating pairs: the ratio of the times, and the times of each."""
    both = np.array([(timed(base), timed(other)) for _ in range(pairs)])
    return float(np.median(both[:, 1] / both[:, 0])), *(float(x) for x in np.median(both, axis=0))


def state_bytes(optimizer: Optimizer, elements: int) -> float:
    """Of the optimizer's state, per element."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) / elements


def weights(hyper: dict[str, object], steps: int) -> dict[str, float]:
    """How often the schedule takes each variant, of all steps."""
    schedule = schedule_of(Anon([torch.zeros(1)], **WINDOWED, **hyper).param_groups[0])  # type: ignore[arg-type]
    counted = Counter(variant_of(schedule.plan(t)) for t in range(1, steps + 1))
    return {name: count / steps for name, count in counted.items()}


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return [float(q) for q in np.quantile(values, [0.25, 0.5, 0.75])]


def bench(shapes: list[tuple[int, ...]], pairs: int, repeats: int) -> dict[str, object]:
    """All measurements of one list of tensors, as printed and written."""
    elements = sum(int(np.prod(shape)) for shape in shapes)
    tensors = parameters(shapes)
    adamw = torch.optim.AdamW(tensors, weight_decay=0.1, fused=True)
    foreach = torch.optim.AdamW(tensors, weight_decay=0.1, foreach=True)
    anon = Anon(tensors, **WINDOWED, **SCHEDULES["rho=1.1"], fused=True)  # type: ignore[arg-type]
    anon.init_state()
    runs: dict[str, Callable[[], None]] = {
        name: anon_step(anon, step) for name, step in sorted(first_steps(anon).items())
    }
    runs |= {"stream": stream_step(elements), "adamw foreach": foreach.step}
    for run in (adamw.step, *runs.values()):
        timed(run)  # allocates state, compiles
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in (BASE, *runs)}
    load_before = os.getloadavg()[0]
    for _ in range(repeats):
        for name, run in runs.items():
            ratio, base, other = measure(adamw.step, run, max(2, pairs // 5) if name == "adamw foreach" else pairs)
            ratios[name].append(ratio)
            seconds[BASE].append(base)
            seconds[name].append(other)
    rows = {
        name: {
            "ratio": quartiles(ratios[name]) if name in ratios else [1.0] * 3,
            "milliseconds": [1e3 * q for q in quartiles(seconds[name])],
            "GB/s": BYTES[name] * elements / 1e9 / quartiles(seconds[name])[1],
        }
        for name in seconds
    }
    means = {
        f"{name}, {steps} steps": quartiles(
            [
                sum(w * ratios[v][i] for v, w in weights(hyper, steps).items())  # type: ignore[arg-type]
                for i in range(repeats)
            ]
        )
        for name, hyper in SCHEDULES.items()
        for steps in (10_000, 100_000)
    }
    # bytes per second of the plain step over the stream's, each next to the same AdamW
    share = quartiles([s / p for s, p in zip(ratios["stream"], ratios["plain"], strict=True)])
    return {
        "elements": elements,
        "tensors": len(shapes),
        "rows": rows,
        "means": means,
        "plain step's share of the stream": share,
        "state bytes per parameter": {"anon": state_bytes(anon, elements), "adamw": state_bytes(adamw, elements)},
        "load average": [load_before, os.getloadavg()[0]],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": processor(),
        "pairs": pairs,
        "repeats": repeats,
    }


def processor() -> str:
    """Its name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def show(result: dict[str, object]) -> None:
    """As a table."""
    print(
        "{tensors} tensor(s), {elements:,} elements; {processor}, {threads} threads, torch {torch}; ".format(**result)
        + "{repeats} repeats of {pairs} pairs; ".format(**result)
        + "load average {:.1f} to {:.1f}".format(*result["load average"])  # type: ignore[misc]
    )
    print(f"{'':26} {'ratio':>6} {'quartiles':>14} {'ms':>8} {'GB/s':>6}")
    for name, row in result["rows"].items():  # type: ignore[attr-defined]
        low, middle, high = row["ratio"]
        print(f"{name:26} {middle:6.3f} {low:6.3f}–{high:.3f} {row['milliseconds'][1]:10.1f} {row['GB/s']:6.1f}")
    for name, (low, middle, high) in result["means"].items():  # type: ignore[attr-defined]
        print(f"mean {name:21} {middle:6.3f} {low:6.3f}–{high:.3f}")
    low, middle, high = result["plain step's share of the stream"]  # type: ignore[misc]
    print(f"{'share of the stream':26} {middle:6.3f} {low:6.3f}–{high:.3f}")
    print("state: anon {anon:.1f}, adamw {adamw:.1f} bytes per parameter".format(**result["state bytes per parameter"]))  # type: ignore[arg-type]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--elements", type=float, default=60e6, help="of the one tensor")
    arguments.add_argument("--gpt2", action="store_true", help="GPT-2 small's list of tensors instead")
    arguments.add_argument("--pairs", type=int, default=20)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--json", type=Path, help="file to write the numbers to")
    args = arguments.parse_args()
    result = bench(gpt2_small() if args.gpt2 else [(int(args.elements),)], args.pairs, args.repeats)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
