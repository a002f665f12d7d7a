"""Documents to tokens, in order, on as many processes as are given, with a bounded number of documents in memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from anon_dist.data.errors import PreparationError, TokenizerError
from anon_dist.data.preparation.sources import START, Cursor, Item
from anon_dist.data.preparation.tally import Tally
from anon_dist.data.preparation.tokenizer import Tokenizer
from anon_dist.data.preparation.writer import EncodedDocuments
from anon_dist.exits import may_pass

CHUNK_CHARS = 1 << 20
"""Text that travels to a worker at once: a tenth of a second of its time."""
CHUNKS_PER_WORKER = 3


@dataclass(frozen=True)
class Chunk:
    """Successive documents of the source, with what was skipped between them."""

    texts: list[str]
    noted: Tally
    after: Cursor
    """The place in the source behind this chunk."""
    segment: int = 0
    """Of the source, in which all of the chunk lies."""


@dataclass(frozen=True)
class EncodedChunk:
    """A chunk as tokens, by split."""

    splits: Mapping[str, EncodedDocuments]
    noted: Tally
    after: Cursor
    segment: int = 0

    @property
    def documents(self) -> int:
        """Documents of all splits."""
        return sum(len(split.ends) for split in self.splits.values())

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the documents."""
        return sum(split.text_bytes for split in self.splits.values())

    @property
    def tokens(self) -> int:
        """Tokens, end-of-document tokens included."""
        return sum(len(split.tokens) for split in self.splits.values())


def is_validation(text: bytes, fraction: float) -> bool:
    """Whether a document, in UTF-8, belongs to the validation split: a property of its text alone, so copies stay together."""
    return xxhash.xxh3_64_intdigest(text) < int(fraction * 2.0**64)


def chunks(items: Iterable[Item], segments: Sequence[int] = (0,), limit: int | None = None) -> Iterator[Chunk]:
    """Group items into chunks of at least `limit` characters, but for the last of each segment.

    Args:
        segments: the segment of each part of the source.
    """
    limit = CHUNK_CHARS if limit is None else limit
    texts: list[str] = []
    noted, size, after = Tally(), 0, START
    for item in items:
        if (texts or noted) and segments[item.after.part] != segments[after.part]:
            yield Chunk(texts, noted, after, segments[after.part])
            texts, noted, size = [], Tally(), 0
        after = item.after
        if item.note is not None:
            noted.add(item.note.reason, item.note.place)
        if item.skipped is None:
            texts.append(item.text)
            size += len(item.text)
        if size >= limit:
            yield Chunk(texts, noted, after, segments[after.part])
            texts, noted, size = [], Tally(), 0
    if texts or noted:
        yield Chunk(texts, noted, after, segments[after.part])


class Encoder:
    """Turns chunks into tokens of the shards' dtype. Each document goes to the split that its hash says.

    Args:
        folder, spec: the tokenizer.
        val_fraction: part of the documents that goes to validation.
        dtype: dtype of the shards.
    """

    def __init__(self, folder: Path, spec: str, val_fraction: float, dtype: np.dtype[Any]) -> None:
        self._tokenizer, self._fraction, self._dtype = Tokenizer(folder, spec), val_fraction, dtype

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        """The documents of the chunk, encoded."""
        splits: dict[str, tuple[list[Any], list[int]]] = {"train": ([], []), "val": ([], [])}
        for text, ids in zip(chunk.texts, self._tokenizer.encode_all(chunk.texts), strict=True):
            data = text.encode()
            documents, sizes = splits["val" if is_validation(data, self._fraction) else "train"]
            documents.append(ids)
            sizes.append(len(data))
        encoded = {name: self._join(documents, sum(sizes)) for name, (documents, sizes) in splits.items()}
        return EncodedChunk(encoded, chunk.noted, chunk.after, chunk.segment)

    def _join(self, documents: list[Any], text_bytes: int) -> EncodedDocuments:
        ends = np.cumsum([len(ids) + 1 for ids in documents], dtype=np.int64)
        tokens = np.full(int(ends[-1]) if len(ends) else 0, self._tokenizer.eod_id, self._dtype)
        for ids, end in zip(documents, ends.tolist(), strict=True):
            if len(ids) and ids.max() >= self._tokenizer.vocab_size:
                raise TokenizerError(
                    f"tokenizer {self._tokenizer.spec}: it gave token {ids.max()}, and says it has {self._tokenizer.vocab_size}"
                )
            tokens[end - 1 - len(ids) : end - 1] = ids
        return EncodedDocuments(tokens, ends, text_bytes)


def encode_chunks(source: Iterator[Chunk], make: Callable[[], Encoder], workers: int) -> Iterator[EncodedChunk]:
    """Encode chunks on `workers` processes (1: in this one), giving the results in the order of the chunks.

    At most three chunks per worker are in memory, however slow the consumer is. `make` must be picklable.

    Raises:
        PreparationError: a worker process died.
    """
    if workers == 1:
        yield from map(make(), source)
        return
    # Not forked from this process, which may have threads of its tokenizer, of Arrow and of torch, but from one that only imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["anon_dist.data.preparation.encode", "transformers.models.auto.tokenization_auto"])
    pool = ProcessPoolExecutor(workers, context, _start_worker, (make,))
    pending: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in source:
            pending.append(pool.submit(_encode, chunk))
            if len(pending) >= CHUNKS_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise may_pass(
            PreparationError(
                "a tokenisation worker died, most often for want of memory. Run the same command with fewer --workers: "
                "it goes on where it was."
            )
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_encoder: Encoder


def _start_worker(make: Callable[[], Encoder]) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    threading.Thread(target=_follow_parent, daemon=True).start()
    _encoder = make()


def _encode(chunk: Chunk) -> EncodedChunk:
    return _encoder(chunk)


def _follow_parent() -> None:
    """End with the parent. A worker whose parent was killed would wait for work for ever: its siblings hold the queue open."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
