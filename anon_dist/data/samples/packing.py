"""Samples that hold whole documents: which go together is decided once, by best fit, and written down next to the run.

A document of n tokens, its end-of-document token among them, predicts all of them but the first: it fills n − 1 of a sample's `seq_len`
places. A longer one is cut into full samples and a rest. Rests and short documents are packed best fit, longest first, among `WINDOW`
neighbours in the corpus at a time: each goes to the sample in which least room is left, and where there is none, a new one begins. So which
sample holds what follows from the corpus and the sequence length alone; the order of the samples is `SampleOrder`'s.

Memory: some 100 bytes for each of a window's documents. On the disk, memory-mapped: 12 bytes a document, 8 a sample. Time: about 2 µs a
document, and reading the corpus once, in one process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from anon_dist.data.errors import DataError
from anon_dist.data.stored.shards import TokenShards, file_checksum

WINDOW = 1 << 20
"""Documents that are packed among each other."""
BLOCK = 1 << 22
"""Tokens that are looked through at once for the ends of documents."""
IGNORED = -100
"""The target of a place that predicts nothing."""
_FILES = {"starts": "<i8", "lengths": "<i4", "samples": "<i8"}
"""First token of each piece, its predictions, and the first piece of each sample, with a last one past the end."""
_INDEX = "packing.json"
_FORMAT = 1

Int64 = NDArray[np.int64]


class Packing:
    """What lies in which sample: reads what `pack` wrote.

    Args:
        folder: of the packing.
        shards: the tokens.
        seq_len: L, places of a sample.

    Raises:
        DataError: it is of another corpus, split or length, or damaged; or of this one, and there are no documents.
    """

    def __init__(self, folder: Path, shards: TokenShards, seq_len: int) -> None:
        try:
            index = json.loads((folder / _INDEX).read_text())
            sizes = {name: (folder / name).stat().st_size for name in _FILES}
        except (OSError, ValueError) as error:
            raise DataError(f"data.packing: {folder} cannot be read: {error}; remove it, and start again") from None
        if index.get("of") != _identity(shards, seq_len):
            raise DataError(
                f"data.packing: {folder} is of another corpus or sequence length; remove it, and start again"
            )
        for name, size in sizes.items():
            if index["files"][name] != [size, file_checksum(folder / name).hexdigest()]:
                raise DataError(f"data.packing: {folder / name} is damaged; remove {folder}, and start again")
        if not index["samples"]:
            raise DataError(f"data.packing: no document of {shards.directory} has two tokens")
        self.shards, self.seq_len = shards, seq_len
        self.num_samples: int = index["samples"]
        self.targets: int = index["targets"]
        """Predictions of all samples together."""
        self._starts, self._lengths, self._samples = (
            np.memmap(folder / name, dtype, mode="r").view(np.ndarray) for name, dtype in _FILES.items()
        )

    @property
    def padding(self) -> float:
        """Share of all places that predict nothing."""
        return 1.0 - self.targets / (self.num_samples * self.seq_len)

    def targets_of(self, indices: Int64) -> int:
        """Predictions of these samples together."""
        return int(sum(self._lengths[a:b].sum() for a, b in self._pieces(indices)))

    def samples(self, indices: Int64) -> Int64:
        """The samples at `indices`, int64 of shape (n, 3, L): tokens; the tokens they predict, or `IGNORED`; the number of each token's
        document in the sample. What documents leave free at the end is filled with end-of-document tokens, a document of their own.

        Raises:
            ShardError: a token is outside of the vocabulary.
        """
        out = np.empty((len(indices), 3, self.seq_len), np.int64)
        out[:, 0], out[:, 1], out[:, 2] = self.shards.index.eod_id, IGNORED, -1
        for row, (a, b) in zip(out, self._pieces(indices), strict=True):
            place = 0
            for number, (start, length) in enumerate(
                zip(self._starts[a:b].tolist(), self._lengths[a:b].tolist(), strict=True)
            ):
                tokens, end = self.shards.tokens(start, length + 1), place + length
                row[0, place:end], row[1, place:end], row[2, place:end] = tokens[:-1], tokens[1:], number
                place = end
        return out

    def expect(self, indices: Int64) -> None:
        """These samples are read next: see `TokenShards.expect`."""
        pieces = np.concatenate([np.arange(a, b) for a, b in self._pieces(indices)] or [np.empty(0, np.int64)])
        self.shards.expect(self._starts[pieces], self._lengths[pieces] + 1)

    def _pieces(self, indices: Int64) -> Iterator[tuple[int, int]]:
        """First piece of each sample, and the one after its last."""
        return ((int(self._samples[i]), int(self._samples[i + 1])) for i in indices)


def is_packed(folder: Path) -> bool:
    """Whether `pack` has finished there."""
    return (folder / _INDEX).is_file()


def pack(folder: Path, shards: TokenShards, seq_len: int) -> None:
    """Decide what lies in which sample, and write it into `folder`; what an interrupted call left there is written anew.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards.expect(np.array([0]), np.array([len(shards)]))
    with _Writer(folder) as writer:
        waiting: list[Int64] = []
        for pieces in _documents(shards):
            whole, rests = _cut(pieces, seq_len)
            writer.add(whole, np.arange(len(whole)))
            waiting.append(rests)
            if sum(map(len, waiting)) >= WINDOW:
                waiting = [_pack_first(writer, np.concatenate(waiting), seq_len)]
        if waiting:
            rests = np.concatenate(waiting)
            writer.add(rests, best_fit(rests[:, 1], seq_len))
    writer.finish(_identity(shards, seq_len))


def _pack_first(writer: _Writer, rests: Int64, seq_len: int) -> Int64:
    """Full windows of them; returns those that are left."""
    while len(rests) >= WINDOW:
        writer.add(rests[:WINDOW], best_fit(rests[:WINDOW, 1], seq_len))
        rests = rests[WINDOW:]
    return rests


def best_fit(lengths: Int64, room: int) -> Int64:
    """The number of the bin that each length goes to: longest first, each to the fullest bin that takes it, else to a new one.

    Args:
        lengths: (n,), in [1, room].
    """
    found = np.empty(len(lengths), np.int64)
    bins: list[list[int]] = [[] for _ in range(room)]  # by the room that is left
    some = count = 0  # a bit for each room that a bin has left
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        if fits := some >> length:
            left = length + (fits & -fits).bit_length() - 1
            chosen = bins[left].pop()
            if not bins[left]:
                some ^= 1 << left
        else:
            left, chosen, count = room, count, count + 1
        found[i] = chosen
        if left := left - length:
            bins[left].append(chosen)
            some |= 1 << left
    return found


def _documents(shards: TokenShards) -> Iterator[Int64]:
    """(first token, predictions) of each document that predicts any, (n, 2), a block of tokens at a time, in the corpus's order."""
    begun, total = 0, len(shards)
    for at in range(0, total, BLOCK):
        ends = at + np.flatnonzero(shards.tokens(at, min(BLOCK, total - at)) == shards.index.eod_id)
        starts = np.concatenate([[begun], ends + 1]).astype(np.int64)
        lengths = ends - starts[:-1]
        begun = int(starts[-1])
        yield np.stack([starts[:-1], lengths], 1)[lengths > 0]
    if total - begun > 1:  # a corpus whose last document has no end
        yield np.array([[begun, total - begun - 1]], np.int64)


def _cut(pieces: Int64, seq_len: int) -> tuple[Int64, Int64]:
    """Those of exactly `seq_len` predictions, and what is left of the documents."""
    full = pieces[:, 1] // seq_len
    number = np.arange(full.sum()) - np.repeat(full.cumsum() - full, full)
    whole = np.stack([np.repeat(pieces[:, 0], full) + number * seq_len, np.full(len(number), seq_len)], 1)
    rests = np.stack([pieces[:, 0] + full * seq_len, pieces[:, 1] - full * seq_len], 1)
    return whole.astype(np.int64), rests[rests[:, 1] > 0]


class _Writer:
    """Of the files of a packing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / _INDEX).unlink(missing_ok=True)
        self._files: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in _FILES}
        self._pieces = self._samples = self._targets = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._write("samples", np.array([self._pieces]))
        for file in self._files.values():
            file.close()

    def add(self, pieces: Int64, bins: Int64) -> None:
        """Samples of these pieces, (n, 2), by the number of each one's bin, in [0, number of bins); in the corpus's order inside."""
        order = np.argsort(bins, kind="stable")
        sizes = np.bincount(bins)
        self._write("starts", pieces[order, 0])
        self._write("lengths", pieces[order, 1])
        self._write("samples", self._pieces + sizes.cumsum() - sizes)
        self._pieces += len(pieces)
        self._samples += len(sizes)
        self._targets += int(pieces[:, 1].sum())

    def finish(self, identity: dict[str, Any]) -> None:
        """Write the index, with which the packing is complete."""
        files = {
            name: [(self._folder / name).stat().st_size, file_checksum(self._folder / name).hexdigest()]
            for name in _FILES
        }
        index = {"of": identity, "samples": self._samples, "targets": self._targets, "files": files}
        partial = self._folder / f"{_INDEX}.partial"
        partial.write_text(json.dumps(index, indent=1) + "\n")
        partial.replace(self._folder / _INDEX)

    def _write(self, name: str, values: NDArray[Any]) -> None:
        values.astype(_FILES[name]).tofile(self._files[name])


def _identity(shards: TokenShards, seq_len: int) -> dict[str, Any]:
    """What a packing follows from."""
    return {
        "format": _FORMAT,
        "fingerprint": shards.index.fingerprint,
        "split": shards.split,
        "seq_len": seq_len,
        "window": WINDOW,
        "block": BLOCK,  # of the corpus, after whose full samples those of rests come
    }
