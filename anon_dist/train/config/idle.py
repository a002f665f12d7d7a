"""Flags of a command line that would do nothing, because the configuration says otherwise what they say."""

from __future__ import annotations

from collections.abc import Sequence

from anon_dist.train.config.errors import ConfigError
from anon_dist.train.config.fields import Config
from anon_dist.usage import values_of


def refuse_idle(config: Config, args: Sequence[str]) -> None:
    """Refuse them, before anything is made of the configuration.

    Raises:
        ConfigError: naming the flag, what is in its way, and the flag that takes that away.
    """
    for flag, over in (("steps", "tokens"), ("global-batch", "global_batch_tokens")):
        said = getattr(config.train, over)
        if said is not None and values_of(args, f"--train.{flag}"):
            raise ConfigError(
                f"--train.{flag} does nothing, as train.{over} = {said} says it; give --train.{over} None"
            )
    each = bool(config.data.phases) and all(phase.sources for phase in config.data.phases)
    if each and values_of(args, "--data.sources"):
        raise ConfigError("--data.sources does nothing, as each of data.phases has its own; give --data.phases []")
    if (each or config.data.sources) and values_of(args, "--data.path"):
        over, nothing = ("data.phases", "[]") if each else ("data.sources", "{}")
        raise ConfigError(f"--data.path does nothing, as {over} says what is read; give --{over} '{nothing}'")
