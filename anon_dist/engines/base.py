"""What the training loop asks of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anon_dist.agreement import Group
from anon_dist.checkpoint.dcp.linking import Links
from anon_dist.engines.check import StateBytes
from anon_dist.engines.replicas import Copy
from anon_dist.optim import Anon


class Write(Protocol):
    """What is left to do of a save, on every rank."""

    def __call__(self, folder: Path, group: Group = None, links: Links | None = None) -> None:
        """Write this rank's part into an existing folder.

        Args:
            group: see `agreement.agree`.
            links: see `checkpoint.linking`.
        """


def set_learning_rates(groups: Sequence[dict[str, Any]], lr: float | Sequence[float]) -> None:
    """`lr` in all param groups, or one in each."""
    rates = [lr] * len(groups) if isinstance(lr, float) else lr
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


def settle(optimizer: Optimizer) -> None:
    """Have what an Anon does after its last step done, before its state is read."""
    if isinstance(optimizer, Anon):
        optimizer.settle()


Veto = Callable[[Tensor], Tensor]
"""Whether a step with this gradient norm, 0-dim, is to be none: 0-dim bool, on the norm's device, the same on every rank."""


def never(norm: Tensor) -> Tensor:
    """No step is to be left out."""
    return torch.zeros_like(norm, dtype=torch.bool)


class Engine(Protocol):
    """A model and its optimizer, wrapped: gradients in, steps out, the same calls on every rank."""

    name: str
    model: nn.Module
    """To call forward on."""
    optimizer: Optimizer
    """The one that steps this rank's parameters; its groups are the ones that were asked for, but see `whole_optimizer`."""

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """To hold around the forward and backward pass of a micro-batch: before the `last` of a step, ranks need not exchange gradients."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss`, a share of the step's; `last` in the step, after which ranks have exchanged theirs."""

    def step(self, lr: float | Sequence[float], clip: float | None, veto: Veto = never) -> Tensor:
        """Clip the gradients to a global norm, step with learning rate `lr`, or one for each param group, and drop the gradients.

        If the norm is not finite, or `veto` says so, no rank steps and no step count moves. `veto` is called once, with the norm, before
        anything is updated; NaN where an engine knows no more than that the gradients are not finite.

        Returns:
            The global gradient norm before clipping, the same on every rank: 0-dim, on a device that need not have computed it yet.
        """

    def whole_optimizer(self) -> AbstractContextManager[Optimizer]:
        """The optimizer with all of this rank's parameters in its groups, to look at or to `rebase`."""

    def state_bytes(self) -> StateBytes:
        """Bytes of optimizer state on this rank, and of all of it once."""

    def copies(self) -> Iterator[Copy]:
        """Weights, buffers and optimizer state of which other ranks may hold copies, for `replicas.check_replicas`."""

    def capture(self, copied: bool) -> Write:
        """Model and optimizer, as they are now, to be written by any thread.

        Args:
            copied: into host memory, so that the engine may go on while they are written: until `capture` is called again. Else it
                must stay as it is until they are.
        """

    def save(self, folder: Path) -> None:
        """Write model and optimizer into an existing folder."""

    def load(self, folder: Path) -> None:
        """Restore in place what `save` wrote.

        Raises:
            CheckpointError: it is of another model, optimizer or engine, or damaged.
        """

    def full_weights(self) -> dict[str, Tensor]:
        """The whole model in float32 on the CPU, by parameter name, on the first rank; empty on the others."""
