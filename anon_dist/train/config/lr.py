"""The learning rate as a pure function of the step, so that there is no scheduler state to save or to step wrongly."""

from __future__ import annotations

import math

from anon_dist.train.config.parsing import ScheduleConfig


def lr_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """Share of the peak learning rate at `step`, counted from 1 to `steps`.

    Linear warm-up that reaches 1 at `warmup_steps`; then cosine, linear or no decay to `min_ratio`, reached at the last step; wsd
    (warm-up, stable, decay; arXiv 2404.06395) stays at 1 until the last `decay_fraction` of all steps and falls linearly.
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.decay == "constant":
        return 1.0
    start = config.warmup_steps
    if config.decay == "wsd":
        start = max(start, round(steps * (1.0 - config.decay_fraction)))
    progress = min(1.0, max(0, step - start) / max(1, steps - start))
    share = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.decay == "cosine" else 1.0 - progress
    return config.min_ratio + (1.0 - config.min_ratio) * share
