"""Batches for training: which samples a rank reads in which micro step, and where training stands."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anon_dist.data.samples.stream import Stream

Int64 = NDArray[np.int64]

ORDER_BLOCK = 1024
"""Positions whose order is computed at once: a few cost as much as a thousand."""
WAIT = 1.0
"""Seconds between two calls of `on_wait`."""
GIVE_UP = 0.1
"""Seconds after which a loader that is closed has what is still being read given up."""


class BatchLoader(Iterator[Tensor]):
    """An endless iterator of micro-batches, int64 CPU tensors of shape (micro_batch, seq_len + 1); of a packing, (micro_batch, 3, seq_len),
    as `Packing.samples` has them.

    One optimizer step reads the next `global_batch = micro_batch · accumulation · world_size` positions of the stream, those from
    `cursor` on. Micro step m of rank r reads the `micro_batch` positions that start at `cursor + (m · world_size + r) · micro_batch`: the
    ranks together read exactly the step's positions, and a single rank with the same global batch reads them in the same order.

    The cursor is the number of samples that finished steps have consumed, over all ranks, since the start of training. It moves only in
    `advance()`, which the consumer calls once after each optimizer step, when it has taken the step's `accumulation` micro-batches. What a
    background thread has read ahead, or a step has begun, does not count; a run that is resumed from `state_dict()` therefore starts
    with the first sample of the first unfinished step. World size, micro-batch and accumulation may change over a resume; what else may:
    see `Stream.after`.

        with BatchLoader(Stream([make_source(shards, seq_len, seed)], seq_len), micro_batch=8) as loader:
            for step in range(steps):
                for _ in range(loader.accumulation):
                    loss(next(loader)).backward()
                optimizer.step()
                loader.advance()

    Args:
        stream: the samples.
        micro_batch: samples of one rank in one micro step.
        rank, world_size: this process among the data-parallel ones.
        accumulation: micro steps in an optimizer step.
        cursor: samples consumed before. None: the stream is at its beginning.
        prefetch: micro-batches that the background thread reads ahead.
        pin_memory: whether batches lie in page-locked memory; None: if there is a CUDA device.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        stream: Stream,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        cursor: int | None = None,
        *,
        prefetch: int = 4,
        pin_memory: bool | None = None,
    ) -> None:
        cursor = stream.begun if cursor is None else cursor
        for name, value, low in (
            ("micro_batch", micro_batch, 1),
            ("world_size", world_size, 1),
            ("accumulation", accumulation, 1),
            ("cursor", cursor, stream.begun),
            ("prefetch", prefetch, 1),
        ):
            if value < low:
                raise ValueError(f"BatchLoader: {name} must be at least {low}, not {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"BatchLoader: rank must be in [0, {world_size}), not {rank}")
        self.stream = stream
        self.micro_batch, self.rank, self.world_size, self.accumulation = micro_batch, rank, world_size, accumulation
        self._pin = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._prefetch = prefetch
        self.on_wait: Callable[[], object] | None = None
        """Called each second in which the next micro-batch is not there yet."""
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
        """How often the sources together have been read."""
        return sum(self.stream.read(self._cursor).values()) / self.stream.num_samples

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
        batch = self._awaited(self._pending[0])
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
        self._drop_pending()
        self._reader.submit(self.stream.forget)
        self._start(cursor)

    def step_targets(self) -> int:
        """Tokens that the step in work predicts, over all ranks."""
        return self.stream.targets(self._cursor, self.global_batch)

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, and what that position is only meaningful with. The same on every rank; plain JSON values."""
        return self.stream.state(self._cursor)

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Go on from `state`, as `enter` does; micro-batches taken since the last `advance()` are given out again, at the loaded place."""
        return self.enter(self.stream, self.micro_batch, self.accumulation, state, intended=False)

    def enter(
        self,
        stream: Stream,
        micro_batch: int,
        accumulation: int,
        state: dict[str, Any] | None = None,
        *,
        intended: bool = True,
    ) -> list[str]:
        """Go on with the sources, shares and length of another stream, and with another batch; between steps.

        Args:
            stream, micro_batch, accumulation: as of the class.
            state: where to go on from. None: from where training stands.
            intended: see `Stream.after`.

        Returns:
            What is other than before, in sentences: the length of samples, sources, or their shares.

        Raises:
            DataError: see `Stream.after`.
            RuntimeError: a step is in work.
        """
        if state is None and self._taken:
            raise RuntimeError("BatchLoader: enter() in the middle of a step")
        before = self.stream
        self.stream, cursor, news = stream.after(self.state_dict() if state is None else state, intended)
        self._drop_pending()
        self._reader.submit(before.forget)  # after what the thread is at
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self._start(cursor)
        return news

    def close(self) -> None:
        """Stop the background thread. May be called again."""
        self._closed = True
        running = self._drop_pending()
        while wait(running, GIVE_UP).not_done:  # it may be waiting for a store
            self.stream.forget()
        self._reader.shutdown(wait=True, cancel_futures=True)
        self.stream.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, cursor: int) -> None:
        self._drop_pending()
        self._cursor, self._taken = cursor, 0
        self._places = self._places_from(self.stream, cursor + self.rank * self.micro_batch)

    def _places_from(self, stream: Stream, position: int) -> Iterator[tuple[Int64, Int64]]:
        """What `Stream.places` says of each of this rank's micro-batches, from the one at `position` on; endless."""
        stride = self.world_size * self.micro_batch  # micro steps follow each other over the end of a step too
        steps = np.arange(max(1, ORDER_BLOCK // self.micro_batch))
        block = steps[:, None] * stride + np.arange(self.micro_batch)
        coming: tuple[Int64, Int64] | None = None
        while True:
            # One block ahead, for sources that are not here.
            present, coming = coming, stream.places(position + block)
            stream.expect(*coming)
            position += len(steps) * stride
            if present is not None:
                yield from zip(*present, strict=True)

    def _read_ahead(self) -> None:
        while len(self._pending) < self._prefetch:
            self._pending.append(self._reader.submit(self._read, self.stream, self._places))

    def _read(self, stream: Stream, places: Iterator[tuple[Int64, Int64]]) -> Tensor:
        """Runs in the background thread, which alone draws from `places`."""
        batch = torch.from_numpy(stream.samples_at(*next(places)))
        return batch.pin_memory() if self._pin else batch

    def _awaited(self, batch: Future[Tensor]) -> Tensor:
        while self.on_wait is not None:
            try:
                return batch.result(timeout=WAIT)
            except TimeoutError:
                if batch.done():  # it is an error of the thread
                    break
                self.on_wait()
        return batch.result()

    def _drop_pending(self) -> list[Future[Tensor]]:
        """Forget what was to be read; returns what the thread is at, and what it has done."""
        begun = [future for future in self._pending if not future.cancel()]
        self._pending.clear()
        return begun
