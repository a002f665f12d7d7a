"""How a source divides: into segments, at whose ends shards end too, and these among machines.

Where segments lie follows from the sizes of the files and `shard_tokens` alone. So a machine that prepares some of them writes the same
shards for them as one that prepares all, and merging is a matter of names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from anon_dist.data.errors import PreparationError
from anon_dist.data.preparation.sources import START, Cursor, Item, Source

BYTES_PER_SHARD_TOKEN = 16
"""A segment ends with the file that brings it to so many bytes for each token of a shard: four shards of text, more where it is packed."""


@dataclass(frozen=True)
class Share:
    """Successive parts of a source, those of whole segments."""

    number: int
    """From 1."""
    of: int
    first: int
    """The first part of the source that is in it."""
    end: int
    """The part behind the last."""

    def read(self, source: Source, start: Cursor = START) -> Iterator[Item]:
        """The items of the share, from `start` on."""
        for part in range(max(start.part, self.first), self.end):
            yield from source.read_part(part, start.item if part == start.part else 0)


def segments(source: Source, shard_tokens: int) -> list[int]:
    """The number of the segment that each part of the source lies in, ascending from 0."""
    found, number, size = [], 0, 0
    for part in source.sizes:
        found.append(number)
        size += BYTES_PER_SHARD_TOKEN * shard_tokens if part is None else part
        if size >= BYTES_PER_SHARD_TOKEN * shard_tokens:
            number, size = number + 1, 0
    return found


def share(wanted: str | None, source: Source, segment_of: Sequence[int]) -> Share:
    """The share that `I/N` names; None: all.

    Raises:
        PreparationError: it names none, or the source does not divide into so many.
    """
    if wanted is None:
        return Share(1, 1, 0, source.parts)
    number, of = parse_part(wanted)
    count = segment_of[-1] + 1 if segment_of else 0
    if of > count:
        remedy = (
            "An hf: data set and --max-documents or --max-bytes are one share: fetch its files, and name their folder"
            if None in source.sizes
            else "Shares are whole files: take fewer, divide large files, or lower --shard-tokens"
        )
        raise PreparationError(f"--part {wanted}: the source divides into {count} at most. {remedy}.")
    low, high = count * (number - 1) // of, count * number // of
    inside = [part for part, segment in enumerate(segment_of) if low <= segment < high]
    return Share(number, of, inside[0], inside[-1] + 1)


def parse_part(wanted: str) -> tuple[int, int]:
    """The numbers of `I/N`.

    Raises:
        PreparationError: it is not of that form, or I not in [1, N].
    """
    number, _, of = wanted.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise PreparationError(f"--part {wanted} must be I/N with 1 ≤ I ≤ N, such as 3/16.")
    return int(number), int(of)
