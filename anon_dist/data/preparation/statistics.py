"""Losses that counting alone reaches: the least a trained model must beat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anon_dist.data.stored.index import ShardInfo, Statistics

TOKEN_CAP = 50_000_000
"""Tokens of a split that are counted: some 0.5 GB of pair codes, and a bigram table that has long settled."""

Tokens = NDArray[Any]


def compute_statistics(
    directory: Path,
    train: Sequence[ShardInfo],
    val: Sequence[ShardInfo],
    dtype: np.dtype[Any],
    vocab_size: int,
    *,
    cap: int = TOKEN_CAP,
) -> Statistics:
    """Statistics of the splits whose shards lie in `directory`, over at most `cap` tokens from the start of each."""
    counted, scored = read_head(directory, train, dtype, cap), read_head(directory, val, dtype, cap)
    return Statistics(
        unigram_entropy=unigram_entropy(counted),
        bigram_val_loss=bigram_loss(counted, scored, vocab_size) if len(scored) > 1 else None,
        train_tokens=len(counted),
        val_tokens=len(scored),
        token_cap=cap,
    )


def read_head(directory: Path, shards: Sequence[ShardInfo], dtype: np.dtype[Any], count: int) -> Tokens:
    """The first `count` tokens of the shards, or all if there are fewer, in `dtype`."""
    pieces: list[Tokens] = [np.empty(0, dtype)]
    for shard in shards:
        if count <= 0:
            break
        pieces.append(np.fromfile(directory / shard.file, dtype, min(count, shard.tokens), offset=shard.start))
        count -= shard.tokens
    return np.concatenate(pieces)


def unigram_entropy(tokens: Tokens) -> float:
    """−Σ p ln p of the empirical distribution of `tokens`, in nats."""
    counts = np.bincount(tokens)
    p = counts[counts > 0] / len(tokens)
    return float(-(p * np.log(p)).sum())


def bigram_loss(train: Tokens, val: Tokens, vocab_size: int) -> float:
    """Mean −ln p(y|x) over the successive pairs (x, y) of `val`, in nats per token.

    p(y|x) = (c(x, y) + 1) / (c(x) + V), with c counted over the successive pairs of `train` and V = `vocab_size`.
    """
    seen, counts = _pair_counts(train, vocab_size)
    pairs, weights = _pair_counts(val, vocab_size)
    at = np.minimum(np.searchsorted(seen, pairs), max(0, len(seen) - 1))
    joint = np.where(seen[at] == pairs, counts[at], 0) if len(seen) else np.zeros(len(pairs), np.int64)
    context = np.bincount(train[:-1], minlength=vocab_size)[(pairs // vocab_size).astype(np.int64)]
    losses = np.log(context + vocab_size) - np.log(joint + 1)
    return float((losses * weights).sum() / weights.sum())


def _pair_counts(tokens: Tokens, vocab_size: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The distinct successive pairs (x, y), ascending as x·V + y, and how often each occurs."""
    codes = tokens[:-1].astype(np.uint64)
    codes *= np.uint64(vocab_size)
    codes += tokens[1:]
    # np.unique would sort a copy.
    codes.sort()
    starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]])) if len(codes) else np.empty(0, np.int64)
    return codes[starts], np.diff(starts, append=len(codes))
