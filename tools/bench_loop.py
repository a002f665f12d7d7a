#!/usr/bin/env python
"""What the training loop costs around the optimizer.

One step of the loop, less clipping and optimizer, against the same of a bare loop over the same model with torch's fused AdamW; the two
alternate, in one process. Printed: medians, and the median and quartiles of the ratio of each pair.

    python tools/bench_loop.py --data data/stdlib [--pairs 40] [--config quickstart]
"""

from __future__ import annotations

import argparse
import copy
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from anon_dist.engines.start import start
from anon_dist.train import loop
from anon_dist.train.config import find_config, load_config
from anon_dist.train.metrics import Stopwatch
from anon_dist.train.run import set_up, wanted_engine


def bare_step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]) -> float:
    """Seconds of a step with nothing around it, outside of clipping and the optimizer."""
    begun = time.perf_counter()
    for batch in batches:
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        (loss / len(batches)).backward()
    seconds = time.perf_counter() - begun
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    begun = time.perf_counter()
    optimizer.zero_grad()
    return seconds + time.perf_counter() - begun


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--config", default="quickstart", help="training configuration, a name or a file")
    arguments.add_argument("--data", required=True, help="folder made by `anon-dist data prepare`")
    arguments.add_argument("--pairs", type=int, default=40, help="alternating pairs of steps")
    args = arguments.parse_args()

    config = load_config(find_config(args.config))
    config.data.path, config.train.engine, config.log.trackers = args.data, "single", ()
    config.run_dir = str(Path(tempfile.mkdtemp()) / "run")
    accelerator, name = start(wanted_engine(config))
    run = set_up(config, accelerator, name, Path(config.run_dir))
    bare = copy.deepcopy(run.engine.model)
    adamw = torch.optim.AdamW(bare.parameters(), lr=1e-3, fused=True)
    batches = [
        torch.from_numpy(run.corpora[0].train.samples(np.arange(config.train.micro_batch), config.data.seq_len)).long()
    ]
    batches *= run.loader.accumulation

    ours, theirs, data = [], [], []
    with run.loader:
        for pair in range(args.pairs + 3):
            watch = Stopwatch()
            done = loop.take_step(run, run.loader, watch)
            if run.step % config.log.every == 0:
                loop.record_of(run, done, config.log.every, {})
                watch.lap("other")
            seconds = watch.read()
            plain = bare_step(bare, adamw, batches)
            if pair >= 3:  # the first ones warm up
                ours.append(sum(seconds.values()) - seconds["optimizer"])
                theirs.append(plain)
                data.append(seconds["data"] / sum(seconds.values()))
    low, middle, high = np.quantile(np.array(ours) / np.array(theirs), [0.25, 0.5, 0.75])
    size = f"{config.train.global_batch} x {config.data.seq_len} tokens a step"
    print(
        f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, {args.config}, {size}"
    )
    print(f"outside of the optimizer: loop {1e3 * np.median(ours):.1f} ms, bare {1e3 * np.median(theirs):.1f} ms")
    print(
        f"ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f}); the loader's share of a step {100 * np.median(data):.2f}%"
    )


if __name__ == "__main__":
    main()
