#!/usr/bin/env python
"""What the renewal of bases costs beside a training step, GPT-2 small's shapes: CPU time on one thread.

Of an optimizer's step, of the renewal after a refresh, and of the forward and backward passes over the tokens of a step. The passes are
measured on one sequence.

    python tools/bench_renewal.py [--tokens 8192] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from anon_dist.bench.optimizers import PRESET, Contestant, contestants, make
from anon_dist.bench.shape_lists import VOCABULARY
from anon_dist.optim import Anon
from anon_dist.train.config.families import model_config
from anon_dist.train.config.parsing import find_config, load_config

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
    """Seconds of CPU time of a plain step, and of the renewal after a refresh."""
    optimizer, kinds = make(contestant, params)
    assert isinstance(optimizer, Anon)
    plain, renewal = [], []
    for _ in range(repeats):
        for name, times, run in (("plain", plain, optimizer.step), ("refreshing", renewal, optimizer.settle)):
            kinds[name].prepare()
            optimizer.step() if name == "refreshing" else None
            begun = time.process_time()
            run()
            times.append(time.process_time() - begun)
    return statistics.median(plain), statistics.median(renewal)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--tokens", type=int, default=8192, help="of a training step, on one rank")
    arguments.add_argument("--repeats", type=int, default=3, help="of which the median is taken")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokens = model_and_tokens()
    of_tokens = {
        name: statistics.median(passes(model, tokens, dtype) for _ in range(given.repeats))
        * given.tokens
        / tokens.numel()
        for name, dtype in PRECISIONS.items()
    }
    print(
        f"| bases | passes in | {given.tokens:,} tokens, s | plain step, s | renewal, s | renewal / (tokens + step) |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    for contestant in contestants():
        if not contestant.name.endswith("turned"):
            continue
        step, renewal = steps(contestant, list(model.parameters()), given.repeats)
        for name, seconds in of_tokens.items():
            share = renewal / (seconds + step)
            print(
                f"| {contestant.name} | {name} | {seconds:.1f} | {step:.2f} | {renewal:.2f} | {share:.1%} |", flush=True
            )


if __name__ == "__main__":
    main()
