"""Validation: the loss over the same sequences of the validation split, whatever the number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from anon_dist.data import TokenShards
from anon_dist.train.batch import Batch


@dataclass(frozen=True)
class Evaluation:
    """Validation of a model."""

    loss: float
    """Mean cross-entropy, nats per token."""
    bits_per_byte: float
    """Bits per byte of text, which compares across tokenizers."""
    sequences: int

    @property
    def perplexity(self) -> float:
        """exp(loss)"""
        return math.exp(min(self.loss, 700.0))

    def record(self, prefix: str) -> dict[str, float | int]:
        """As metrics."""
        return {
            f"{prefix}_loss": self.loss,
            f"{prefix}_perplexity": self.perplexity,
            f"{prefix}_bits_per_byte": self.bits_per_byte,
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    shards: TokenShards,
    seq_len: int,
    batch: int,
    device: torch.device,
    bytes_per_token: float,
    sequences: int = 0,
    mask_eod: int | None = None,
    reader: int = 0,
    readers: int = 1,
) -> Evaluation:
    """The loss over the first `sequences` sequences of the split (0: all of it). Every rank must call it.

    The rank takes part `reader` of `readers`; ranks that run out repeat the last sequence with weight 0, since sharded models need all
    ranks in every forward pass.
    """
    available = shards.num_samples(seq_len)
    count = min(sequences or available, available)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    for start in range(0, count, batch * readers):
        indices = np.arange(start + reader * batch, start + (reader + 1) * batch)
        tokens = torch.from_numpy(shards.samples(np.minimum(indices, count - 1), seq_len))
        weights = torch.from_numpy(indices < count).to(device, torch.float64)
        losses = Batch.of(tokens, mask_eod).losses(model, device, per_token=True).double().mean(1)
        sums += torch.stack([(losses * weights).sum(), weights.sum()])
    model.train(training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss = float(sums[0] / sums[1])
    return Evaluation(loss, loss / math.log(2.0) / bytes_per_token, count)
