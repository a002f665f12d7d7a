"""What is learnt of a source before it is tokenised: the texts for the tokenizer, and how many documents validation needs."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator

import xxhash

from anon_dist.data.errors import PreparationError, SourceError
from anon_dist.data.preparation.encode import is_validation
from anon_dist.data.preparation.sources import Item, Source
from anon_dist.data.preparation.tally import Tally

SMALL_BYTES = 64 << 20
"""A source of files up to this size is read once more, in a second or so, to give it validation documents."""
VALIDATION_TOKENS = 1 << 16
"""Below this a loss over a validation split says little: it is warned of."""
VALIDATION_BYTES = 3 * VALIDATION_TOKENS
"""Text that a small source's validation split is given, if that is not more than `MOST_VALIDATION` of the documents."""
MOST_VALIDATION = 0.1

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
    noted = Tally()
    for item in _scattered(source):
        if item.skipped is not None:
            if item.note is not None:
                noted.add(item.note.reason, item.note.place)
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
        raise SourceError(f"the source has no documents (left out: {noted}). Give another --source.")
    return [text[:limit] for _, _, text in sorted(heap, reverse=True)]


def validation_fraction(source: Source, wanted: float) -> float:
    """The fraction of documents for validation: `wanted`, or of a small source as much more as gives validation `VALIDATION_BYTES` of
    text, up to `MOST_VALIDATION` of the documents, and at least one document.

    Only sources of at most `SMALL_BYTES` are looked at. A larger one has documents enough, or too few to know beforehand.

    Raises:
        PreparationError: validation is wanted, and the source has a single document (or copies of one).
    """
    if wanted == 0.0 or int(source.describe().get("bytes", SMALL_BYTES + 1)) > SMALL_BYTES:
        return wanted
    sizes: Counter[int] = Counter()
    for item in source.read():
        if item.skipped is None:
            data = item.text.encode()
            sizes[xxhash.xxh3_64_intdigest(data)] += len(data)
    if len(sizes) == 1:
        raise PreparationError(
            "the source is a single document, of which none can go to validation. Divide its text with --text-unit paragraph or line, or "
            "do without validation with --val-fraction 0."
        )
    fraction, size = wanted, 0
    for number, (digest, length) in enumerate(sorted(sizes.items())):
        least = digest / 2.0**64
        if number and (size >= VALIDATION_BYTES or least >= MOST_VALIDATION):
            break
        while not int(fraction * 2.0**64) > digest:
            fraction = math.nextafter(max(fraction, least), 1.0)
        size += length
    return fraction


def _scattered(source: Source) -> Iterator[Item]:
    """All items, with the files in an order of hashes."""
    for part in sorted(range(source.parts), key=lambda part: xxhash.xxh3_64_intdigest(str(part).encode())):
        yield from source.read_part(part)
