"""How well a model predicts a text: bits per byte, which compares across tokenizers.

Each token of a document is predicted once, from those before it in its window; the first from the token that begins a text, which itself
is not counted, nor is one that would end the text. With windows of L tokens and a stride of S ≤ L, window k reads the L tokens from the
k·S-th on (the beginning token is the 0-th), and predicts the token after each of them. The first window counts all its predictions, a later
one those that no window before it made: the last S, or fewer at the document's end. So with S = L each window begins anew, and its first
prediction has one token before it; with S < L windows overlap, and after the first one each prediction has at least L − S + 1 tokens before
it. Documents share no window. Bits are summed over all documents, and divided by the bytes of all of them as UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from anon_dist.train.loss import evaluate


@dataclass(frozen=True)
class TextScore:
    """Of one or several documents."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    """As UTF-8."""
    nats: float = 0.0
    """−log of the probability of all tokens."""
    unknown: int = 0
    """Tokens that stand for text that the tokenizer has none for."""

    def __add__(self, other: TextScore) -> TextScore:
        return TextScore(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def _values(self) -> tuple[Any, ...]:
        return self.documents, self.tokens, self.text_bytes, self.nats, self.unknown

    @property
    def loss(self) -> float:
        """Mean cross-entropy, nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """See `evaluate.perplexity`."""
        return evaluate.perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text."""
        return evaluate.bits_per_byte(self.nats, self.text_bytes)


Window = tuple[list[int], int]
"""Tokens, one more than are read; and how many of the last of them are counted."""


def windows(tokens: list[int], length: int, stride: int) -> Iterator[Window]:
    """The windows of a document.

    Args:
        tokens: the beginning token, then the document's.
        length: most tokens that the model reads.
    """
    counted = 0
    for start in range(0, len(tokens) - 1, stride):
        window = tokens[start : start + length + 1]
        end = start + len(window) - 1
        yield window, end - counted
        counted = end
        if end == len(tokens) - 1:
            return


@torch.no_grad()
def score_text(
    model: nn.Module, tokenizer: Any, documents: Iterable[str], begin: int, length: int, stride: int, batch: int
) -> TextScore:
    """The score of all documents; empty ones count nothing.

    Args:
        begin: the token that begins a text.
        length, stride: of the windows, in tokens; 1 ≤ stride ≤ length.
        batch: windows at once.
    """
    total = TextScore()
    unknown = tokenizer.unk_token_id

    def all_windows() -> Iterator[Window]:
        """Of all documents, whose tokens and bytes are counted as they come."""
        nonlocal total
        for text in documents:
            # Text that spells a special token is text.
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            total += TextScore(1, len(ids), len(text.encode()), 0.0, ids.count(unknown))
            yield from windows([begin, *ids], length, stride)

    device = next(model.parameters()).device
    left = all_windows()
    while group := list(islice(left, batch)):
        total += TextScore(nats=_nats(model, group, begin, device))
    return total


def _nats(model: nn.Module, group: list[Window], padding: int, device: torch.device) -> float:
    longest = max(len(window) for window, _ in group)
    padded = [window + [padding] * (longest - len(window)) for window, _ in group]  # behind: nothing looks there
    places = [[len(w) - n <= i < len(w) for i in range(1, longest)] for w, n in group]
    ids, counted = torch.tensor(padded, device=device), torch.tensor(places, device=device)
    logits: Tensor = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = nn.functional.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none")
    return float(losses.double()[counted].sum())
