#!/usr/bin/env python
"""What a step costs the host where tensors are tiny: CPU time of Anon's `step()` against torch's fused AdamW's, in turns, on one thread.

Lists of parameters: as many as GPT-2 small has, with the same gradients' tensors in each step, or with new ones, as after
`zero_grad(set_to_none=True)`; and 256, of which in each step a random half has a gradient.

    python tools/bench_host.py [--turns 60]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
from torch import nn

from anon_dist import Anon

ELEMENTS = 8
LISTS = {
    "148 tensors": (148, None),
    "148 tensors, new gradients in each step": (148, 148),
    "256 tensors, a random half of which has a gradient": (256, 128),
}
"""How many parameters, and how many of them get new gradients in each step; None: what they have stays."""
STEPS = 20
"""Of a turn."""


def seconds(optimizer: torch.optim.Optimizer, renewed: int | None) -> float:
    """Of CPU time, per step of a turn."""
    params, total = optimizer.param_groups[0]["params"], 0.0
    for _ in range(STEPS):
        if renewed is not None:
            optimizer.zero_grad()
            for p in random.sample(params, renewed):
                p.grad = torch.ones(ELEMENTS)
        begun = time.process_time()
        optimizer.step()
        total += time.process_time() - begun
    return total / STEPS


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--turns", type=int, default=60, help=f"of {STEPS} steps of each optimizer")
    turns = arguments.parse_args().turns
    torch.set_num_threads(1)
    print("| tensors | Anon, ms | fused AdamW, ms | ratio of a turn, median |\n|---|---|---|---|")
    for name, (count, renewed) in LISTS.items():
        pair = []
        for make in (Anon, lambda params: torch.optim.AdamW(params, fused=True)):
            pair.append(make([nn.Parameter(torch.randn(ELEMENTS)) for _ in range(count)]))
            seconds(pair[-1], count)  # the first steps, at which states are made
        times = [[seconds(optimizer, renewed) for optimizer in pair] for _ in range(turns)]
        anon, adamw = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {anon:.3f} | {adamw:.3f} | {statistics.median(a / b for a, b in times):.3f} |")


if __name__ == "__main__":
    main()
