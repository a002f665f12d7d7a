"""Attention that stops at the borders of documents, by a call for one document at a time: SDPA keeps its kernels without a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Spans = list[tuple[int, int, int]]
"""(row, start, end) of each document of a batch, in order."""


@dataclass
class Documents:
    """Of the batch that a model has in work."""

    spans: Spans | None = None
    """None: attention does not stop at documents."""


NONE = Documents()
ATTRIBUTE = "anon_dist_documents"
"""Of each module of a model: the one `Documents` of them all. No argument of attention: blocks that are recomputed in the backward pass see
it too, and compiled ones are not compiled anew for each batch."""


def know_documents(model: nn.Module) -> Documents:
    """Have the attention of a model look at what is returned; in place."""
    documents = Documents()
    for module in model.modules():
        setattr(module, ATTRIBUTE, documents)
    return documents


CAUSAL = "sdpa_causal"
"""Name under which `register_causal` makes transformers' SDPA known once more."""


def register_causal() -> str:
    """Make transformers' own SDPA known under the name `CAUSAL`, which is returned, so that no mask is made for it.

    None is causal, and one that is given stays. Under the name "sdpa" each forward looks in the position ids for packed sequences, for
    which the host waits for the device, and makes a dense mask of them. Not for models with sliding windows, which need the masks.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(CAUSAL, _causal_attention)
    return CAUSAL


def _causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if getattr(module, ATTRIBUTE, NONE).spans is None or attention_mask is not None:
        attended: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
        return attended, None
    return _by_document(module, query, key, value, **kwargs), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_document(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    """(B, L, heads, size) of (B, heads, L, size): attention within each document, by a call without a mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    spans = getattr(module, ATTRIBUTE).spans
    pieces = [
        sdpa_attention_forward(module, *(t[i : i + 1, :, a:b] for t in (query, key, value)), None, **kwargs)[0]
        for i, a, b in spans
    ]
    return torch.cat(pieces, 1).view(len(query), -1, *pieces[0].shape[2:])
