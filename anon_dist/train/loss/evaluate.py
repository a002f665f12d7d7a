"""Validation: the loss over the same sequences of the validation split, whatever the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from anon_dist.data import TokenShards
from anon_dist.train.loss.batch import Batch

Int64 = NDArray[np.int64]

AHEAD = 64
"""Batches that are asked for at once where the sequences are not here."""


def perplexity(loss: float) -> float:
    """exp(loss), of nats per token; as large as a float can be where that is larger."""
    return math.exp(min(loss, 700.0))


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Of a text, or of its mean token."""
    return nats / math.log(2.0) / text_bytes


@dataclass(frozen=True)
class Evaluation:
    """Validation of a model."""

    loss: float
    """Mean cross-entropy, nats per token."""
    bits_per_byte: float
    """Bits per byte of text, which compares across tokenizers."""
    sequences: int
    bytes_per_token: float

    @property
    def perplexity(self) -> float:
        """See `perplexity`."""
        return perplexity(self.loss)

    def record(self, prefix: str, name: str = "") -> dict[str, float | int]:
        """As metrics; those of one set among several by its name."""
        behind = f"/{name}" if name else ""
        return {
            f"{prefix}_loss{behind}": self.loss,
            f"{prefix}_perplexity{behind}": self.perplexity,
            f"{prefix}_bits_per_byte{behind}": self.bits_per_byte,
        }


@torch.no_grad()
def sees_what_comes(model: nn.Module, device: torch.device, length: int, rounding: float) -> bool:
    """Whether the model's losses depend on tokens that come later: it is no causal model then. Every rank must call it.

    `rounding`: by how much, relative to a loss, they may differ all the same.
    """
    training = model.training
    model.eval()
    half = min(length, 32) // 2
    tokens = torch.arange(2 * half + 1, device=device)[None] % 7
    changed = torch.cat([tokens[:, :half], (tokens[:, half:] * 5 + 3) % 31], 1)
    losses = [Batch.of(t, None).losses(model, device, per_token=True)[0, : half - 1] for t in (tokens, changed)]
    model.train(training)
    # What differs by rounding alone: products of other shapes, where experts are chosen for later tokens.
    return bool((losses[0] - losses[1]).abs().max() > rounding * losses[0].abs().max())


@torch.no_grad()
def mixes_documents(model: nn.Module, device: torch.device, length: int, rounding: float) -> bool:
    """Whether the losses of a document depend on the one before it, which attention was told to keep apart. Every rank must call it.

    `rounding`: as of `sees_what_comes`.
    """
    training = model.training
    model.eval()
    half = min(length, 32) // 2
    tokens = 1 + torch.arange(2 * half + 1)[None] % 7
    tokens[:, half - 1] = 0  # ends the first document
    changed = tokens.clone()
    changed[:, : half - 1] = 1 + (tokens[:, : half - 1] * 5 + 3) % 30
    losses = [Batch.of(t, 0).losses(model, device, per_token=True)[0, half:] for t in (tokens, changed)]
    model.train(training)
    return bool((losses[0] - losses[1]).abs().max() > rounding * losses[0].abs().max())


@torch.no_grad()
def evaluate(
    model: nn.Module,
    shards: TokenShards,
    seq_len: int,
    batch: int,
    device: torch.device,
    sequences: int = 0,
    mask_eod: int | None = None,
    reader: int = 0,
    readers: int = 1,
    own: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> Evaluation:
    """The loss over the first `sequences` sequences of the split (0: all of it). Every rank must call it.

    The rank takes part `reader` of `readers`; ranks that run out repeat the last sequence with weight 0, since sharded models need all
    ranks in every forward pass. `own`: what it computes of sequences (B, L + 1), B rows or a multiple.
    """
    available = shards.num_samples(seq_len)
    count = min(sequences or available, available)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    for number, start in enumerate(range(0, count, batch * readers)):
        if number % AHEAD == 0 and not shards.is_here:
            _expect(
                shards, seq_len, np.arange(start, min(count, start + AHEAD * batch * readers)), batch, reader, readers
            )
        indices = np.arange(start + reader * batch, start + (reader + 1) * batch)
        tokens = torch.from_numpy(shards.samples(np.minimum(indices, count - 1), seq_len))
        weights = torch.from_numpy(indices < count).to(device, torch.float64)
        losses = Batch.of(own(tokens), mask_eod).losses(model, device, per_token=True).double()
        losses = losses.unflatten(0, (-1, batch)).mean((0, 2))
        sums += torch.stack([(losses * weights).sum(), weights.sum()])
    model.train(training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss = float(sums[0] / sums[1])
    size = shards.info.bytes_per_token
    return Evaluation(loss, bits_per_byte(loss, size), count, size)


def _expect(shards: TokenShards, seq_len: int, indices: Int64, batch: int, reader: int, readers: int) -> None:
    """Have those that this rank is going to read brought."""
    mine = indices[indices // batch % readers == reader]
    shards.expect(mine * seq_len, np.full(len(mine), seq_len + 1))


def mean(evaluations: Sequence[tuple[Evaluation, float]]) -> Evaluation:
    """Of sets with these weights, which are of their tokens."""
    total = sum(weight for _, weight in evaluations)
    loss, size = (
        sum(getattr(found, name) * weight for found, weight in evaluations) / total
        for name in ("loss", "bytes_per_token")
    )
    return Evaluation(loss, bits_per_byte(loss, size), sum(found.sequences for found, _ in evaluations), size)
