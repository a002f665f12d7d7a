"""Phases of a run: what its configuration says of the data at a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from anon_dist.train.config import Config, PhaseConfig


def phases_of(config: Config) -> list[tuple[int, Config]]:
    """The last step of each phase, with the configuration that holds until then: a run without phases has one."""
    if not config.data.phases:
        return [(config.train.steps, config)]
    return [(min(p.until or config.train.steps, config.train.steps), _with(config, p)) for p in config.data.phases]


def phase_at(config: Config, step: int) -> Config:
    """The configuration that holds for the step after `step` steps, of a run that is at its end the last."""
    found = phases_of(config)
    return next((phase for until, phase in found if step < until), found[-1][1])


def phases_from(config: Config, step: int) -> Iterator[tuple[int, Config]]:
    """Number of steps that each phase has left after `step` steps, of those that have any."""
    for until, phase in phases_of(config):
        if until > step:
            yield until - step, phase
            step = until


def _with(config: Config, phase: PhaseConfig) -> Config:
    data, train = config.data, config.train
    length = phase.seq_len or data.seq_len
    batch = phase.global_batch or train.global_batch * data.seq_len // length
    micro = phase.micro_batch or max(1, train.micro_batch * data.seq_len // length)
    return replace(
        config,
        data=replace(data, sources=phase.sources or data.sources, seq_len=length),
        train=replace(train, global_batch=batch, micro_batch=micro),
    )
