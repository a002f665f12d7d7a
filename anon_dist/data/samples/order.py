"""The order of samples: a pure function of (seed, epoch, position) that needs no memory and can start anywhere.

Each epoch visits every sample once, in the order of a keyed permutation of [0, N): a Feistel network permutes the smallest power of two
that holds N, and a value that falls outside [0, N) is sent through again until it falls inside ("cycle walking").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]

ROUNDS = 6
"""Even, so that halves of unequal width are back in their places at the end."""
MIN_BITS = 8
"""Below this a half would hold too few values for the rounds to mix: a short epoch walks a few more times instead."""
MAX_SAMPLES = 1 << 48
"""So that positions stay far from the end of int64 for every epoch count anyone will see."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(x: UInt64) -> UInt64:
    """The output function of SplitMix64, a bijection of 64-bit words in which every input bit moves every output bit."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SampleOrder:
    """Maps a position in training to the sample that is read there.

    Positions count over epochs without end: position p is number p mod N of epoch p div N, and each epoch has an order of its own.

    Args:
        num_samples: N ≥ 1, the samples of one epoch.
        seed: any integer in [0, 2^63).
        shuffle: False for the sequential order 0, 1, …, N − 1 in every epoch; the seed is then without effect.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, num_samples: int, seed: int, *, shuffle: bool = True) -> None:
        if not 1 <= num_samples <= MAX_SAMPLES:
            hint = " (is the split shorter than seq_len + 1 tokens?)" if num_samples == 0 else ""
            raise ValueError(f"SampleOrder: num_samples must be in [1, 2^48], not {num_samples}{hint}")
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"SampleOrder: seed must be in [0, 2^63), not {seed}")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        bits = max(MIN_BITS, (num_samples - 1).bit_length())
        self._widths = (bits // 2, bits - bits // 2)

    def __call__(self, positions: Int64) -> Int64:
        """Sample indices in [0, N), int64, in the shape of `positions` (int64, each ≥ 0).

        Raises:
            ValueError: a position is negative.
        """
        positions = np.asarray(positions, np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"SampleOrder: positions count from 0, not {positions.min()}")
        epoch, index = np.divmod(positions, self.num_samples)
        if not self.shuffle or self.num_samples == 1:
            return index
        shape = index.shape
        keys = self._keys(epoch.ravel().astype(np.uint64))
        return self._walk(index.ravel().astype(np.uint64), keys).astype(np.int64).reshape(shape)

    def _keys(self, epoch: UInt64) -> UInt64:
        """Round keys, (ROUNDS, n), of each element's epoch."""
        base = splitmix64(splitmix64(np.full_like(epoch, self.seed)) ^ epoch)
        return splitmix64(base + np.arange(ROUNDS, dtype=np.uint64)[:, None] * _GOLDEN)

    def _walk(self, index: UInt64, keys: UInt64) -> UInt64:
        out = self._permute(index, keys)
        outside = np.flatnonzero(out >= self.num_samples)
        while outside.size:
            walked = self._permute(out[outside], keys[:, outside])
            out[outside] = walked
            outside = outside[walked >= self.num_samples]
        return out

    def _permute(self, index: UInt64, keys: UInt64) -> UInt64:
        """One pass of the network over [0, 2^bits). The halves swap widths every round."""
        left_bits, right_bits = self._widths
        left, right = index >> np.uint64(right_bits), index & np.uint64((1 << right_bits) - 1)
        for key in keys:
            # The high bits of the hash: its strongest.
            hashed = splitmix64(right ^ key) >> np.uint64(64 - left_bits)
            left, right = right, left ^ hashed
            left_bits, right_bits = right_bits, left_bits
        return (left << np.uint64(right_bits)) | right
