"""A micro-batch as a model takes it: what it predicts, and where its documents lie.

Documents are kept apart by what each attention implementation wants: positions that restart (flex_attention's block mask and the masks of
other implementations are made of them by transformers, once a batch), lengths (flash_attention_2), or calls for one document at a time
(`sdpa`, which so keeps its kernels without a mask).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from anon_dist.data.samples.packing import IGNORED
from anon_dist.train.loss.documents import CAUSAL, Documents, Spans


@dataclass(frozen=True)
class Batch:
    """Samples of one micro-batch. B of them, of L tokens."""

    inputs: Tensor
    """(B, L) int64."""
    targets: Tensor
    """(B, L) int64: the token after each, or `IGNORED`."""
    starts: Tensor | None
    """(B, L) bool, on the CPU: where documents start that attention keeps apart; the first column is True. None: it keeps none apart."""

    @classmethod
    def of(cls, samples: Tensor, mask_eod: int | None) -> Batch:
        """What a `BatchLoader` or `TokenShards.samples` gave, on the CPU.

        Args:
            samples: (B, L + 1) token ids, one after the other; or (B, 3, L): inputs, targets, and the number of each token's document.
            mask_eod: keep documents apart. Without numbers they end with this token, which still belongs to them. None: do not.
        """
        if samples.ndim == 3:
            inputs, targets, documents = samples.unbind(1)
            changes = documents[:, 1:] != documents[:, :-1]
        else:
            inputs, targets = samples[:, :-1], samples[:, 1:]
            changes = inputs[:, :-1] == (-1 if mask_eod is None else mask_eod)
        starts = None if mask_eod is None else nn.functional.pad(changes, (1, 0), value=True)
        return cls(inputs, targets, starts)

    def losses(self, model: Any, device: torch.device, per_token: bool = False) -> Tensor:
        """What the forward pass of a model gives that `loss.attach` was called for, with targets: see there."""
        attention = _config_of(model)._attn_implementation
        inputs, targets = (t.to(device, non_blocking=True) for t in (self.inputs, self.targets))
        extra: dict[str, Any] = {}
        if self.starts is not None:
            spans = spans_of(self.starts)
            extra["position_ids"] = positions_of(self.starts).to(device, non_blocking=True)
            if attention == CAUSAL:
                extra["documents"] = Documents(spans)
            elif attention == "flash_attention_2":  # one row, of documents of these lengths
                inputs, targets, extra["position_ids"] = (
                    t.view(1, -1) for t in (inputs, targets, extra["position_ids"])
                )
                extra |= _lengths(spans, device)
        result: Tensor = model(input_ids=inputs, use_cache=False, targets=targets, per_token=per_token, **extra)
        return result.view_as(self.targets) if per_token else result

    @property
    def counted(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORED).sum())


def mean_loss(model: Any, samples: Tensor, mask_eod: int | None = None) -> Tensor:
    """What to minimise, per token, of samples that are on the model's device; 0-dim float32. Arguments as of `Batch.of`."""
    batch = Batch.of(samples, mask_eod)
    return batch.losses(model, samples.device)[0] / batch.counted


def positions_of(starts: Tensor) -> Tensor:
    """(B, L) int64: of each token in its document, from 0."""
    index = torch.arange(starts.shape[1])
    return index - torch.where(starts, index, 0).cummax(1).values


def spans_of(starts: Tensor) -> Spans:
    """(row, start, end) of each document, in order."""
    length = starts.shape[1]
    rows = [[*row.nonzero()[:, 0].tolist(), length] for row in starts]
    return [(i, start, end) for i, borders in enumerate(rows) for start, end in pairwise(borders)]


def _lengths(spans: Spans, device: torch.device) -> dict[str, Any]:
    """As flash attention's kernel for documents end to end takes them."""
    lengths = [end - start for _, start, end in spans]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device, non_blocking=True)
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def _config_of(model: Any) -> Any:
    """The configuration of a transformers model, which an engine may have wrapped."""
    while not hasattr(model, "config") or not hasattr(model.config, "_attn_implementation"):
        model = model.module
    return model.config
