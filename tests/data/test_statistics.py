"""The counted losses against the definitions, and where they are known."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from anon_dist.data import Index
from anon_dist.data.preparation.statistics import bigram_loss, compute_statistics, read_head, unigram_entropy


def slow_bigram_loss(train, val, vocab):
    pairs, contexts = Counter(pairwise(train)), Counter(train[:-1])
    losses = [math.log((contexts[x] + vocab) / (pairs[x, y] + 1)) for x, y in pairwise(val)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("vocab", "dtype"), [(5, "<u2"), (65_536, "<u2"), (200_000, "<u4")])
def test_against_the_definition(vocab, dtype):
    rng = np.random.default_rng(0)
    train, val = (np.minimum(rng.geometric(0.3, n), vocab).astype(dtype) - 1 for n in (500, 200))
    val[-1] = vocab - 1  # not seen in training
    assert bigram_loss(train, val, vocab) == pytest.approx(slow_bigram_loss(train.tolist(), val.tolist(), vocab))
    counts = Counter(train.tolist())
    assert unigram_entropy(train) == pytest.approx(-sum(c / 500 * math.log(c / 500) for c in counts.values()))


def test_known_values():
    assert unigram_entropy(np.arange(8, dtype=np.uint16)) == pytest.approx(math.log(8))
    assert bigram_loss(np.array([0], np.uint16), np.array([1, 2, 3], np.uint16), 10) == pytest.approx(math.log(10))


def test_cap(prepared):
    index = Index.load(prepared)
    shards = index.splits["train"].shards
    whole = read_head(prepared, shards, index.numpy_dtype, 10**9)
    assert len(whole) == index.splits["train"].tokens
    assert np.array_equal(read_head(prepared, shards, index.numpy_dtype, 2500), whole[:2500])
    capped = compute_statistics(prepared, shards, index.splits["val"].shards, index.numpy_dtype, 257, cap=2500)
    assert (capped.train_tokens, capped.token_cap) == (2500, 2500)
    assert capped.unigram_entropy == pytest.approx(unigram_entropy(whole[:2500]))
    assert index.statistics.token_cap == 50_000_000
    assert 1.0 < index.statistics.bigram_val_loss < math.log(257)
