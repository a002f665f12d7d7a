"""Batches for training: which samples a rank reads in which micro step, and where training stands."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anon_dist.data.errors import DataError
from anon_dist.data.order import SampleOrder
from anon_dist.data.packing import Packing
from anon_dist.data.shards import TokenShards

ORDER_BLOCK = 1024
"""Positions whose order is computed at once: a few cost as much as a thousand."""


class BatchLoader(Iterator[Tensor]):
    """An endless iterator of micro-batches, int64 CPU tensors of shape (micro_batch, seq_len + 1); of a packing, (micro_batch, 3, seq_len),
    as `Packing.samples` has them.

    One optimizer step reads the next `global_batch = micro_batch · accumulation · world_size` positions of the order, those from
    `cursor` on. Micro step m of rank r reads the `micro_batch` positions that start at `cursor + (m · world_size + r) · micro_batch`: the
    ranks together read exactly the step's positions, and a single rank with the same global batch reads them in the same order.

    The cursor is the number of samples that finished steps have consumed, over all ranks, since the start of training. It moves only in
    `advance()`, which the consumer calls once after each optimizer step, when it has taken the step's `accumulation` micro-batches. What a
    background thread has read ahead, or a step has begun, does not count; a run that is resumed from `state_dict()` therefore starts
    with the first sample of the first unfinished step. Seed and corpus must stay the same over a resume; world size, micro-batch and
    accumulation may change. So may the sequence length: the cursor then goes on after as many tokens, in the order of the other samples.

        with BatchLoader(shards, SampleOrder(shards.num_samples(seq_len), seed), seq_len, micro_batch=8) as loader:
            for step in range(steps):
                for _ in range(loader.accumulation):
                    loss(next(loader)).backward()
                optimizer.step()
                loader.advance()

    Args:
        shards: the tokens.
        order: the order of the samples, for `shards.num_samples(seq_len)` samples.
        seq_len: L ≥ 1; a sample has L + 1 tokens.
        micro_batch: samples of one rank in one micro step.
        rank, world_size: this process among the data-parallel ones.
        accumulation: micro steps in an optimizer step.
        cursor: samples consumed before.
        prefetch: micro-batches that the background thread reads ahead.
        packing: what lies in which sample; None: the tokens one after the other, documents cut where samples end.
        pin_memory: whether batches lie in page-locked memory; None: if there is a CUDA device.

    Raises:
        ValueError: an argument is out of range, or the order is not one for these shards and this length.
    """

    def __init__(
        self,
        shards: TokenShards,
        order: SampleOrder,
        seq_len: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        cursor: int = 0,
        *,
        packing: Packing | None = None,
        prefetch: int = 4,
        pin_memory: bool | None = None,
    ) -> None:
        for name, value, low in (
            ("seq_len", seq_len, 1),
            ("micro_batch", micro_batch, 1),
            ("world_size", world_size, 1),
            ("accumulation", accumulation, 1),
            ("cursor", cursor, 0),
            ("prefetch", prefetch, 1),
        ):
            if value < low:
                raise ValueError(f"BatchLoader: {name} must be at least {low}, not {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"BatchLoader: rank must be in [0, {world_size}), not {rank}")
        available = shards.num_samples(seq_len) if packing is None else packing.num_samples
        if order.num_samples != available:
            raise ValueError(
                f"BatchLoader: the order is for {order.num_samples} samples, but {shards.directory} ({shards.split}) "
                f"has {available} of length {seq_len}"
            )
        if packing is not None and packing.seq_len != seq_len:
            raise ValueError(f"BatchLoader: the packing is for samples of length {packing.seq_len}, not {seq_len}")
        self.shards, self.order, self.seq_len, self.packing = shards, order, seq_len, packing
        self.micro_batch, self.rank, self.world_size, self.accumulation = micro_batch, rank, world_size, accumulation
        self._pin = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._prefetch = prefetch
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._closed = False
        self._pending: deque[Future[Tensor]] = deque()
        self._cursor = self._taken = 0
        self._start(cursor)

    @property
    def global_batch(self) -> int:
        """Samples that one optimizer step consumes, over all ranks."""
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def cursor(self) -> int:
        """Samples that finished steps have consumed, over all ranks and epochs."""
        return self._cursor

    @property
    def epoch(self) -> float:
        """How often the corpus has been read: cursor / samples."""
        return self._cursor / self.order.num_samples

    def __next__(self) -> Tensor:
        """The next micro-batch of this rank. An error of the background thread is raised here.

        Raises:
            RuntimeError: the loader is closed, or all micro-batches of the step are taken and `advance()` was not called.
        """
        if self._closed:
            raise RuntimeError("BatchLoader: the loader is closed")
        if self._taken == self.accumulation:
            raise RuntimeError(
                f"BatchLoader: the step has had its {self.accumulation} micro-batches; call advance() after the optimizer step"
            )
        self._read_ahead()
        # Taken off only when it is known to be good: going on after an error must not pass its samples over.
        batch = self._pending[0].result()
        self._pending.popleft()
        self._taken += 1
        return batch

    def advance(self) -> int:
        """Count the step as finished: move the cursor past its samples. Returns the new cursor.

        Raises:
            RuntimeError: the step's micro-batches have not all been taken, so that samples would be passed over unread.
        """
        if self._taken != self.accumulation:
            raise RuntimeError(
                f"BatchLoader: advance() after {self._taken} of {self.accumulation} micro-batches; samples would go unread"
            )
        self._cursor += self.global_batch
        self._taken = 0
        return self._cursor

    def pass_over(self, cursor: int) -> None:
        """Go on at this cursor; the samples before it that were not read never will be.

        Raises:
            ValueError: it lies behind.
        """
        if cursor < self._cursor:
            raise ValueError(f"BatchLoader: {cursor} lies before the cursor, {self._cursor}")
        self._start(cursor)

    def step_targets(self) -> int:
        """Tokens that the step in work predicts, over all ranks."""
        if self.packing is None:
            return self.global_batch * self.seq_len
        return self.packing.targets_of(self.order(self._cursor + np.arange(self.global_batch)))

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, and what that position is only meaningful with. The same on every rank; plain JSON values."""
        return {"cursor": self._cursor, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Go on from `state`; micro-batches taken since the last `advance()` are given out again, at the loaded place.

        Returns:
            What another sequence length comes to, in a sentence.

        Raises:
            DataError: the state belongs to another corpus, seed or order. It names each difference.
        """
        remedies = {
            "fingerprint": "point the run at the data it began with",
            "split": "read the split it began with",
            "num_samples": "point the run at the data it began with",
            "seed": "keep the data seed",
            "shuffle": "keep the setting of shuffle",
            "packing": "keep the setting of packing",
        }
        state = {"packing": "concat", **state}  # earlier versions had no other
        if self.packing is not None and state.get("seq_len") != self.seq_len:
            raise DataError(
                f"data: cannot resume: data.seq_len is {self.seq_len}, the saved state has {state.get('seq_len')!r}, and documents are "
                "packed into samples of one length (data.packing best_fit); keep the length"
            )
        differences = [
            f"{key} is {mine!r}, the saved state has {state.get(key)!r} ({remedies[key]})"
            for key, mine in {**self._identity(), "num_samples": self._samples_of(state)}.items()
            if key != "seq_len" and state.get(key) != mine
        ]
        if differences:
            raise DataError("data: cannot resume: " + "; ".join(differences))
        cursor = state.get("cursor")
        if not isinstance(cursor, int) or cursor < 0:
            raise DataError(f"BatchLoader: cannot resume: cursor must be an integer ≥ 0, not {cursor!r}")
        length = state["seq_len"]
        if length == self.seq_len:
            self._start(cursor)
            return None
        self._start(-(-cursor * length // self.seq_len))
        return (
            f"data.seq_len is {self.seq_len} now: the run goes on after {cursor * length:,} tokens, at sample {self._cursor:,} of the "
            f"{self.order.num_samples:,} of that length, in their order. What it has read of this epoch, "
            f"{cursor / state['num_samples'] % 1:.1%}, was in another order, and may come again"
        )

    def _samples_of(self, state: dict[str, Any]) -> int:
        """Of the sequence length in a state: 0 if that is none."""
        length = state.get("seq_len")
        if self.packing is not None and length == self.seq_len:
            return self.order.num_samples
        return self.shards.num_samples(length) if type(length) is int and length > 0 else 0

    def close(self) -> None:
        """Stop the background thread. May be called again."""
        self._closed = True
        self._drop_pending()
        self._reader.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a cursor to mean the same place."""
        return {
            "fingerprint": self.shards.index.fingerprint,
            "split": self.shards.split,
            "seq_len": self.seq_len,
            "num_samples": self.order.num_samples,
            "seed": self.order.seed,
            "shuffle": self.order.shuffle,
            "packing": "concat" if self.packing is None else "best_fit",
        }

    def _start(self, cursor: int) -> None:
        self._drop_pending()
        self._cursor, self._taken = cursor, 0
        self._indices = self._sample_indices(cursor + self.rank * self.micro_batch)

    def _sample_indices(self, position: int) -> Iterator[NDArray[np.int64]]:
        """The sample indices of each of this rank's micro-batches, from the one at `position` on; endless."""
        stride = self.world_size * self.micro_batch  # micro steps follow each other over the end of a step too
        steps = np.arange(max(1, ORDER_BLOCK // self.micro_batch))
        block = steps[:, None] * stride + np.arange(self.micro_batch)
        while True:
            yield from self.order(position + block)
            position += len(steps) * stride

    def _read_ahead(self) -> None:
        while len(self._pending) < self._prefetch:
            self._pending.append(self._reader.submit(self._read, self._indices))

    def _read(self, indices: Iterator[NDArray[np.int64]]) -> Tensor:
        """Runs in the background thread, which alone draws from `indices`."""
        chosen = next(indices)
        samples = self.shards.samples(chosen, self.seq_len) if self.packing is None else self.packing.samples(chosen)
        batch = torch.from_numpy(samples)
        return batch.pin_memory() if self._pin else batch

    def _drop_pending(self) -> None:
        for future in self._pending:
            future.cancel()
        self._pending.clear()
