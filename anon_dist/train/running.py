"""A run: what it has once it is set up, and how far it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers import PretrainedConfig

from anon_dist.checkpoint import Checkpoints
from anon_dist.data import BatchLoader, Index
from anon_dist.engines.base import Engine
from anon_dist.engines.check import StateBytes
from anon_dist.engines.context import ContextParallel
from anon_dist.optim.host_copy import HostCopy
from anon_dist.train.config.parsing import Config
from anon_dist.train.config.phases import phase_at
from anon_dist.train.health.pulse import Pulse
from anon_dist.train.health.spikes import SpikeDetector
from anon_dist.train.health.stragglers import Stragglers
from anon_dist.train.inputs.corpora import Corpus, ValidationSet
from anon_dist.train.optimizer.gamma import GammaRules
from anon_dist.train.optimizer.watch import OptimizerWatch
from anon_dist.train.saves.lock import RunLock
from anon_dist.train.tasks.harness import Tasks


@dataclass
class Run:
    """What a run has once it is set up."""

    config: Config
    accelerator: Accelerator
    folder: Path
    index: Index
    """Of the first source: all have its vocabulary."""
    corpora: list[Corpus]
    sets: list[ValidationSet]
    engine: Engine
    model_config: PretrainedConfig
    loader: BatchLoader
    checkpoints: Checkpoints
    context: ContextParallel | None
    """With the ranks that share this one's sequences."""
    reader: int
    """Which of the `readers` shares of a batch this rank reads; with tensor or context parallelism, several ranks read the same."""
    readers: int
    flops_at: Mapping[int, float]
    """Per token, by the length of samples."""
    parameters: int
    state: StateBytes
    watch: OptimizerWatch
    gammas: GammaRules
    tasks: Tasks | None
    """Of lm-eval, on which the model is evaluated."""
    spikes: SpikeDetector
    wanted: list[dict[str, Any]]
    """The hyperparameters that the configuration asks for, by param group."""
    plan: list[str] = field(default_factory=list)
    """What the steps that are left read, in lines."""
    step: int = 0
    """Steps taken."""
    skipped: int = 0
    """Steps in a row whose gradient was not finite, as far as the host knows."""
    skip_is_news: bool = False
    """Whether one of them is not in the metrics yet."""
    predicted: int = 0
    """Tokens that steps since the last record predicted, over all ranks."""
    places: int = 0
    """Tokens that they could have predicted, were no places left free."""
    waited: float = 0.0
    """Seconds since then that the host waited for the device or for other ranks' losses."""
    norm: HostCopy | None = None
    """Of the last step's gradient, until the host has looked at it."""
    compared: int = -1
    """The step after which the replicas were last compared."""
    rewinds: int = 0
    """How often it has gone back from a spike."""
    resumed: str | None = None
    """The `id` of the checkpoint that was loaded last; those of earlier versions have none."""
    stragglers: Stragglers = field(default_factory=Stragglers)
    lock: RunLock | None = None
    """On the folder; of rank 0."""
    pulse: Pulse = field(default_factory=Pulse)
    """Watched by `hangs`, while a run trains."""

    @property
    def phase(self) -> Config:
        """The configuration with what holds in the phase of the last step taken."""
        return phase_at(self.config, max(0, self.step - 1))

    @property
    def flops(self) -> float:
        """Per token, at present."""
        return self.flops_at[self.loader.stream.seq_len]

    @property
    def sharing(self) -> int:
        """Ranks that share each sequence."""
        return 1 if self.context is None else self.context.ranks

    def own(self, tokens: Tensor) -> Tensor:
        """What this rank computes of sequences (B, L + 1): all, or with context parallelism its pieces."""
        return tokens if self.context is None else self.context.pieces(tokens)

    @property
    def mask_eod(self) -> int | None:
        """The token that ends a document, if attention is to stop there."""
        return self.index.eod_id if self.config.data.mask_documents else None
