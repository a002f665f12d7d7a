"""Which of several sources each position reads: a pure function of the position, each source's count exact to one, started anywhere.

Of two sources, the first has round(n w) of the first n positions. Of more, let source i have the share w_i. Its j-th sample (from 0) may
lie in the slots from ⌊j / w_i⌋ to ⌈(j + 1) / w_i⌉ − 1: where all do, source i has ⌊n w_i⌋ or ⌈n w_i⌉ of the first n positions, for every
n. To take in each slot, of the samples that may lie there, the one with the earliest deadline finds such a sequence if there is one.

That is a loop from position 0 on. To begin elsewhere, positions are divided into blocks, whose borders have counts of their own:
- `_urgent(n)`: ⌊n w_i⌋ each, and one more for those whose next deadlines are the earliest. From there no deadline is missed. Let b > n.
  If one that was given one more is not due before b, then none is that was not given one, and those that were have at most
  ⌊b w_i⌋ − ⌊n w_i⌋ − 1 ≤ (b − n) w_i samples due each, together no more than b − n. Else no count is above b w_i, and the samples due
  are no more than Σ b w_i less the counts, which is b − n.
- The border's counts are those after the L = ⌈2 / min w⌉ slots that begin with `_urgent(border − L)`. They are reached by a sequence, so
  who comes from before finds the slots that it needs too; and farther back than L every source has had a sample since.
So by Hall's theorem each block has a sequence from the counts at its start to those at its end, and earliest deadline first finds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

LEAST_BLOCK = 1 << 12
"""Positions that are decided at once, at about 2 µs each."""
LARGEST = 1 << 30
"""Of a sum of rates, whose square fits into int64."""
RAREST = 1 << 19
"""Of so many samples at least one must be each source's: a block grows with it."""


class Mixture:
    """Maps a position to a source, and to the number of that sample among the source's own.

    Over the first n positions the count of each source differs from n · share by less than one; of two sources, by no more than half, and
    so over any stretch by no more than one. Of more, over a stretch by less than two. (One that stayed below one over every stretch would
    be balanced, and for three or more sources most shares have no balanced sequence.)

    Args:
        rates: integers ≥ 1 in the proportion of the sources' shares.

    Raises:
        ValueError: there is no rate, or one is below 1 or below a `RAREST`-th of all, or the sum is above `LARGEST`.
    """

    def __init__(self, rates: Sequence[int]) -> None:
        if not rates or min(rates) < 1:
            raise ValueError(f"Mixture: rates must be integers of at least 1, not {list(rates)}")
        common = math.gcd(*rates)
        self.rates = tuple(rate // common for rate in rates)
        self._sum = sum(self.rates)
        if self._sum > LARGEST:
            raise ValueError(f"Mixture: the rates' sum must be at most {LARGEST:,}, not {self._sum:,}")
        self._reach = -(-2 * self._sum // min(self.rates))
        if self._reach > 2 * RAREST:
            raise ValueError(f"Mixture: a source has less than one of {RAREST:,} samples: rates {list(rates)}")
        self.block = max(LEAST_BLOCK, 4 * self._reach)
        self._border = lru_cache(maxsize=8)(self._counts_at_border)
        self._sources = lru_cache(maxsize=4)(self._decide)

    def __call__(self, positions: Int64) -> tuple[Int64, Int64]:
        """The source of each position, in [0, number of rates), and how many positions before it read that source; both in the shape of
        `positions` (int64, each ≥ 0).

        Raises:
            ValueError: a position is negative.
        """
        positions = np.asarray(positions, np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"Mixture: positions count from 0, not {positions.min()}")
        if len(self.rates) <= 2:
            firsts = self._firsts(positions)
            first = self._firsts(positions + 1) > firsts
            return np.where(first, 0, 1), np.where(first, firsts, positions - firsts)
        blocks, places = np.divmod(positions, self.block)
        source, number = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            chosen, numbers = self._sources(block)
            source[here], number[here] = chosen[places[here]], numbers[places[here]]
        return source, number

    def counts(self, position: int) -> list[int]:
        """How many of the first `position` positions read each source."""
        if len(self.rates) <= 2:
            firsts = int(self._firsts(np.array(position)))
            return [firsts, position - firsts][: len(self.rates)]
        block, place = divmod(position, self.block)
        before = self._border(block)
        if not place:
            return list(before)
        here = np.bincount(self._sources(block)[0][:place], minlength=len(self.rates))
        return [a + b for a, b in zip(before, here.tolist(), strict=True)]

    def _firsts(self, n: Int64) -> Int64:
        """Of at most two sources, how many of the first n positions read the first: n w, rounded to the nearest."""
        whole, rest = np.divmod(n, self._sum)
        found: Int64 = whole * self.rates[0] + (2 * rest * self.rates[0] + self._sum) // (2 * self._sum)
        return found

    def _decide(self, block: int) -> tuple[Int64, Int64]:
        """Source and number of each position of a block."""
        before, after = self._border(block), self._border(block + 1)
        start = block * self.block
        chosen = np.array(self._earliest(start, start + self.block, list(before), after), np.int64)
        numbers = np.empty(self.block, np.int64)
        for i, count in enumerate(before):
            here = np.flatnonzero(chosen == i)
            numbers[here] = count + np.arange(len(here))
        return chosen, numbers

    def _counts_at_border(self, block: int) -> tuple[int, ...]:
        """Counts before the first position of a block."""
        if block == 0:
            return (0,) * len(self.rates)
        border = block * self.block
        counts = self._urgent(border - self._reach)
        self._earliest(border - self._reach, border, counts)
        return tuple(counts)

    def _urgent(self, n: int) -> list[int]:
        """Counts over the first n positions from which no deadline is missed."""
        counts = [n * rate // self._sum for rate in self.rates]
        inside = [i for i, rate in enumerate(self.rates) if n * rate % self._sum]
        inside.sort(key=lambda i: (-(-(counts[i] + 1) * self._sum // self.rates[i]), i))
        for i in inside[: n - sum(counts)]:
            counts[i] += 1
        return counts

    def _earliest(self, start: int, end: int, counts: list[int], most: Sequence[int] | None = None) -> list[int]:
        """The source of each slot in [start, end), by the earliest deadline.

        Args:
            counts: of samples before `start`; those before `end` in the end.
            most: what they are to be then; None: it is not said.
        """
        total, rates = self._sum, self.rates
        waiting: list[tuple[int, int, int]] = []  # (first slot, deadline, source) of each source's next sample
        ready: list[tuple[int, int]] = []  # (deadline, source) of those whose first slot is past

        def come(i: int) -> None:
            j = counts[i]
            if most is None or j < most[i]:
                due = -(-(j + 1) * total // rates[i])
                heappush(waiting, (j * total // rates[i], due if most is None else min(due, end), i))

        for i in range(len(rates)):
            come(i)
        chosen = []
        for slot in range(start, end):
            while waiting and waiting[0][0] <= slot:
                _, due, i = heappop(waiting)
                heappush(ready, (due, i))
            due, i = heappop(ready)
            assert due > slot, "a sample has missed its slots"
            chosen.append(i)
            counts[i] += 1
            come(i)
        return chosen


def rates_of(shares: Sequence[Fraction]) -> list[int]:
    """Integers in the proportion of the shares (each > 0): exactly, if their sum then is at most `LARGEST`; else to a 2^-29th of all."""
    if not shares:
        return []
    common = math.lcm(*(share.denominator for share in shares))
    exact = [int(share * common) for share in shares]
    divisor = math.gcd(*exact)
    if sum(exact) // divisor <= LARGEST:
        return [rate // divisor for rate in exact]
    return [max(1, round(Fraction(rate * (LARGEST >> 1), sum(exact)))) for rate in exact]
