"""The texts that a tokenizer is trained and checked on: a sample of the training documents, bounded in bytes."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator

import xxhash

from anon_dist.data.encode import is_validation
from anon_dist.data.errors import SourceError
from anon_dist.data.sources import Item, Source

REACH = 8
"""How many times the sample's size is read at most, to choose from."""


def training_sample(source: Source, limit: int, val_fraction: float) -> list[str]:
    """Training documents of the source, at most `limit` bytes together; the same ones every time.

    Of the documents read, those with the least hashes are taken. Files are visited in an order of hashes too, so that a corpus larger than
    the reach is sampled over all its files. Validation documents are left out.

    Raises:
        SourceError: there is no document to be had.
    """
    heap: list[tuple[int, int, str]] = []  # the negative hash, a tie-break, the text
    size = read = number = 0
    skipped: Counter[str] = Counter()
    for item in _scattered(source):
        if item.skipped is not None:
            skipped[item.skipped] += 1
            continue
        number += 1
        data = item.text.encode()
        if not is_validation(data, val_fraction):
            heapq.heappush(heap, (-xxhash.xxh3_64_intdigest(data), number, item.text))
            size += len(data)
        while size > limit and len(heap) > 1:
            size -= len(heapq.heappop(heap)[2].encode())
        read += len(data)
        if read >= REACH * limit:
            break
    if not number:
        raise SourceError(f"the source has no documents (skipped: {dict(skipped) or 'none'}). Give another --source.")
    return [text[:limit] for _, _, text in sorted(heap, reverse=True)]


def _scattered(source: Source) -> Iterator[Item]:
    """All items, with the files in an order of hashes."""
    for part in sorted(range(source.parts), key=lambda part: xxhash.xxh3_64_intdigest(str(part).encode())):
        yield from source.read_part(part)
