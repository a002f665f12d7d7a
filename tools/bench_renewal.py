#!/usr/bin/env python
"""What bases cost beside a training step, GPT-2 small's shapes: CPU time on one thread.

Of an optimizer's step, of the renewal after a refresh, and of the forward and backward passes over the tokens of a step. The passes are
measured on one sequence. The last column is the mean of a whole step of training over 10,000 steps, with the refreshes of the presets, by
that of torch's fused AdamW.

    python tools/bench_renewal.py [--tokens 8192] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from anon_dist.bench.optimizers import BASE, PRESET, Contestant, anon_settings, contestants, make, weights
from anon_dist.bench.shape_lists import VOCABULARY
from anon_dist.optim import Anon
from anon_dist.train.config.families import model_config
from anon_dist.train.config.parsing import find_config, load_config

STEPS = 10_000
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


def model_and_tokens() -> tuple[nn.Module, Tensor]:
    """transformers' own model of the preset, in float32, and one sequence."""
    from transformers import AutoModelForCausalLM

    config = replace(load_config(find_config(PRESET)).model, pad_vocab_to=1)
    shape = model_config(config, VOCABULARY[config.family], 0)
    return AutoModelForCausalLM.from_config(shape), torch.randint(shape.vocab_size, (1, shape.n_positions))


def passes(model: nn.Module, tokens: Tensor, dtype: torch.dtype | None) -> float:
    """Seconds of CPU time, forward and backward. Leaves gradients."""
    model.zero_grad()
    begun = time.process_time()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    return time.process_time() - begun


def steps(contestant: Contestant, params: list[nn.Parameter], repeats: int) -> tuple[float, float]:
    """Seconds of CPU time of a step in a window, and of the renewal after a refresh."""
    optimizer, kinds = make(contestant, params)
    assert isinstance(optimizer, Anon)
    step, renewal = [], []
    for _ in range(repeats):
        for name, times, run in (("accumulating", step, optimizer.step), ("refreshing", renewal, optimizer.settle)):
            kinds[name].prepare()
            optimizer.step() if name == "refreshing" else None
            begun = time.process_time()
            run()
            times.append(time.process_time() - begun)
    return statistics.median(step), statistics.median(renewal)


def adamw(params: list[nn.Parameter], repeats: int) -> float:
    """Seconds of CPU time of a step of torch's fused AdamW."""
    (step,) = make(next(c for c in contestants() if c.name == BASE), params)[1].values()
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        step.run()
        times.append(time.process_time() - begun)
    return statistics.median(times)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--tokens", type=int, default=8192, help="of a training step, on one rank")
    arguments.add_argument("--repeats", type=int, default=3, help="of which the median is taken")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = anon_settings(load_config(find_config(PRESET)).optim)
    model, tokens = model_and_tokens()
    of_tokens = {
        name: statistics.median(passes(model, tokens, dtype) for _ in range(given.repeats))
        * given.tokens
        / tokens.numel()
        for name, dtype in PRECISIONS.items()
    }
    base, renewed = adamw(list(model.parameters()), given.repeats), weights(settings, STEPS)["refreshing"]
    print(f"torch's fused AdamW: {base:.2f} s a step; renewals: {renewed:.1%} of the first {STEPS:,} steps\n")
    print(
        f"| bases | passes in | {given.tokens:,} tokens, s | step, s | renewal, s | renewal / (tokens + step) | mean / AdamW's |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for contestant in contestants():
        if not contestant.name.endswith("turned"):
            continue
        step, renewal = steps(contestant, list(model.parameters()), given.repeats)
        for name, seconds in of_tokens.items():
            share, mean = renewal / (seconds + step), (seconds + step + renewed * renewal) / (seconds + base)
            numbers = f"{seconds:.1f} | {step:.2f} | {renewal:.2f} | {share:.1%} | {mean:.3f}"
            print(f"| {contestant.name} | {name} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
