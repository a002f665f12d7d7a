"""Phases of a run: what its configuration says of the data at a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from anon_dist.train.config.errors import ConfigError
from anon_dist.train.config.fields import Config, PhaseConfig
from anon_dist.train.config.ranges import MOST_STEPS


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


def resolved(config: Config) -> Config:
    """The configuration with steps and batch as train.tokens and train.global_batch_tokens say.

    Raises:
        ConfigError: the batch is no number of samples, or the steps are none, too many, or more than the phases have.
    """
    batch, length = config.train.global_batch_tokens, config.data.seq_len
    if batch is not None:
        if not batch or batch % length:
            raise ConfigError(
                f"train.global_batch_tokens = {batch:,} is not a multiple of data.seq_len = {length}; change one of them"
            )
        config = replace(config, train=replace(config.train, global_batch=batch // length))
    if config.train.tokens is None:
        return config
    left, steps = config.train.tokens, 0
    for phase in config.data.phases or (PhaseConfig(),):
        now = _with(config, phase)
        per_step = now.train.global_batch * now.data.seq_len
        taken = -(-left // per_step) if phase.until is None else min(-(-left // per_step), phase.until - steps)
        left, steps = max(0, left - taken * per_step), steps + taken
    if left or not 1 <= steps <= MOST_STEPS:
        said = f"the phases end {left:,} tokens before" if left else f"{steps:,} steps, which are none or too many,"
        raise ConfigError(
            f"train.tokens = {config.train.tokens:,}: {said}; change it, or leave out the last phase's until"
        )
    return replace(config, train=replace(config.train, steps=steps))


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
