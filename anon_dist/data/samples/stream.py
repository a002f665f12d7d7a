"""The samples of a training, position after position: from one prepared folder, or from several in given shares.

A stream begins at a position, with what has been read of each source before. When sources, shares or the length of samples change during a
training, a new stream begins where the one before ended, and each source goes on where it was: no sample comes again before its epoch is
over. What the past was stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from anon_dist.data.errors import DataError
from anon_dist.data.samples.mixture import Mixture, rates_of
from anon_dist.data.samples.order import SampleOrder
from anon_dist.data.samples.packing import Packing
from anon_dist.data.stored.shards import TokenShards

Int64 = NDArray[np.int64]
State = dict[str, Any]

REMEDIES = {
    "split": "read the split it began with",
    "num_samples": "point the run at the data it began with",
    "seed": "keep the data seed, data.seed",
    "shuffle": "keep the setting of shuffle",
}


@dataclass(frozen=True)
class Source:
    """What one prepared folder gives to a stream."""

    shards: TokenShards
    order: SampleOrder
    """Of its samples."""
    packing: Packing | None = None
    """What lies in which sample; None: the tokens one after the other, documents cut where samples end."""
    share: Fraction = Fraction(1)
    """Of the tokens, in proportion to the other sources'."""
    name: str = ""
    read: int = 0
    """Samples of it, in its order, that were read before the stream began."""
    seed: int = 0
    """Of the training: `order.seed` is this, or `own_seed`."""

    @property
    def fingerprint(self) -> str:
        """Of the prepared folder."""
        return self.shards.index.fingerprint

    @property
    def per_sample(self) -> Fraction:
        """Tokens that a sample predicts, in proportion to its places."""
        if self.packing is None:
            return Fraction(1)
        return Fraction(self.packing.targets, self.packing.num_samples * self.packing.seq_len)

    def samples(self, indices: Int64, seq_len: int) -> Int64:
        """See `TokenShards.samples` and `Packing.samples`."""
        return self.shards.samples(indices, seq_len) if self.packing is None else self.packing.samples(indices)

    def expect(self, indices: Int64, seq_len: int) -> None:
        """These samples are read next, (n,): see `TokenShards.expect`."""
        if self.shards.is_here:
            return
        if self.packing is None:
            self.shards.expect(indices * seq_len, np.full(len(indices), seq_len + 1))
        else:
            self.packing.expect(indices)

    def state(self, read: int, seq_len: int) -> State:
        """What a later stream needs to go on after so many samples."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "split": self.shards.split,
            "seq_len": seq_len,
            "packing": "concat" if self.packing is None else "best_fit",
            "num_samples": self.order.num_samples,
            "seed": self.order.seed,
            "shuffle": self.order.shuffle,
            "read": read,
        }


def own_seed(seed: int, fingerprint: str) -> int:
    """The seed of the order of one source among several: sources of one size are not to be read in one order."""
    return xxhash.xxh3_64_intdigest(f"{seed} {fingerprint}".encode()) >> 1


def make_source(
    shards: TokenShards,
    seq_len: int,
    seed: int = 0,
    *,
    packing: Packing | None = None,
    share: Fraction = Fraction(1),
    name: str = "",
    alone: bool = True,
) -> Source:
    """A source that nothing was read of yet.

    Args:
        seq_len: L ≥ 1.
        seed: of the training.
        packing: of this length.
        alone: no other source is read beside it. Its order then is that of `seed`.

    Raises:
        DataError: there is no sample of that length.
    """
    samples = shards.num_samples(seq_len) if packing is None else packing.num_samples
    if not samples:
        raise DataError(
            f"data.path = {shards.directory} has {len(shards)} training tokens, too few for data.seq_len = {seq_len}"
        )
    key = seed if alone else own_seed(seed, shards.index.fingerprint)
    return Source(shards, SampleOrder(samples, key), packing, share, name, seed=seed)


class Stream:
    """Maps positions to samples.

    Args:
        sources: one or more, of different fingerprints.
        seq_len: L, places of a sample.
        begun: the position at which it begins; those before are of streams before it.
        left: states of sources that those read and this one does not.

    Raises:
        ValueError: there is no source, one comes twice, or a share is below 2^-19 of all.
    """

    def __init__(self, sources: Sequence[Source], seq_len: int, begun: int = 0, left: Sequence[State] = ()) -> None:
        self.sources = tuple(sorted(sources, key=lambda source: source.fingerprint))  # whatever order they are named in
        if len({source.fingerprint for source in sources}) < len(sources):
            raise ValueError("Stream: two sources are the same data")
        for source in self.sources:
            if source.packing is not None and source.packing.seq_len != seq_len:
                raise ValueError(f"Stream: a packing is for samples of length {source.packing.seq_len}, not {seq_len}")
        self.seq_len, self.begun, self.left = seq_len, begun, tuple(left)
        self.mixture = Mixture(rates_of([source.share / source.per_sample for source in self.sources]))

    @property
    def packed(self) -> bool:
        """Whether samples hold whole documents."""
        return any(source.packing is not None for source in self.sources)

    @property
    def num_samples(self) -> int:
        """Of all sources together."""
        return sum(source.order.num_samples for source in self.sources)

    def places(self, positions: Int64) -> tuple[Int64, Int64]:
        """The number of each position's source, and the index of the sample in it; both in the shape of `positions` (each ≥ `begun`)."""
        number, index = self.mixture(positions - self.begun)
        for i, source in enumerate(self.sources):
            here = number == i
            if here.any():
                index[here] = source.order(source.read + index[here])
        return number, index

    def samples_at(self, number: Int64, index: Int64) -> Int64:
        """The samples of these places, (n,) each: int64 of shape (n, L + 1), or of packed ones (n, 3, L)."""
        if len(self.sources) == 1:
            return self.sources[0].samples(index, self.seq_len)
        out: Int64 | None = None
        for i, source in enumerate(self.sources):
            here = number == i
            if here.any():
                found = source.samples(index[here], self.seq_len)
                out = np.empty((len(number), *found.shape[1:]), np.int64) if out is None else out
                out[here] = found
        assert out is not None
        return out

    def expect(self, number: Int64, index: Int64) -> None:
        """The samples of these places, of any shape, are read next, in their order: what is not here is brought."""
        for i, source in enumerate(self.sources):
            source.expect(index[number == i], self.seq_len)

    def forget(self) -> None:
        """What was expected is not read any more."""
        for source in self.sources:
            source.shards.forget()

    def samples(self, positions: Int64) -> Int64:
        """The samples at these positions, (n,)."""
        return self.samples_at(*self.places(positions))

    def targets(self, start: int, count: int) -> int:
        """Tokens that the samples of `count` positions from `start` on predict."""
        if not self.packed:
            return count * self.seq_len
        number, index = self.places(start + np.arange(count))
        return sum(count_targets(source, index[number == i], self.seq_len) for i, source in enumerate(self.sources))

    def read(self, position: int) -> dict[str, int]:
        """Name → samples of that source that were read before this position."""
        counts = self.mixture.counts(position - self.begun)
        return {source.name: source.read + count for source, count in zip(self.sources, counts, strict=True)}

    def samples_of(self) -> dict[str, int]:
        """Name → samples of one epoch of that source."""
        return {source.name: source.order.num_samples for source in self.sources}

    def epochs(self, position: int) -> dict[str, float]:
        """Name → how often that source has been read before this position."""
        read = self.read(position)
        return {name: read[name] / samples for name, samples in self.samples_of().items()}

    def introduced(self, end: int) -> list[str]:
        """Lines for a person: what lies in samples, and of several sources, how often each will have been read at position `end`."""
        lines = []
        for source, rate in zip(self.sources, self.mixture.rates, strict=True):
            several = (
                f"{_called(source)}: {rate / sum(self.mixture.rates):.1%} of the samples"
                if len(self.sources) > 1
                else ""
            )
            epochs = (
                f"{self.epochs(end)[source.name]:.2f} epochs of {source.order.num_samples:,} samples" if several else ""
            )
            packed = (
                ""
                if source.packing is None
                else (
                    f"{source.order.num_samples:,} samples of whole documents; {source.packing.padding:.1%} of their places are left free"
                )
            )
            if several or packed:
                lines.append(", ".join(filter(None, (several, epochs, packed))))
        return lines

    def state(self, position: int) -> State:
        """Where training stands, and what that position is only meaningful with. Plain JSON values."""
        return {
            "cursor": position,
            "begun": self.begun,
            "seq_len": self.seq_len,
            "rates": list(self.mixture.rates),
            "sources": [source.state(source.read, self.seq_len) for source in self.sources],
            "left": list(self.left),
        }

    def after(self, state: Mapping[str, Any], intended: bool = False) -> tuple[Stream, int, list[str]]:
        """This stream's sources, going on after a state of this or another stream.

        Args:
            intended: whether sources of which nothing was read yet may be all there are, as at the start of a phase.

        Returns:
            The stream; the position; what is other than before, in sentences.

        Raises:
            DataError: the past cannot be kept: it names each difference. Or the state is none.
        """
        state = _checked(state)
        cursor, before, rates = state["cursor"], state["sources"], tuple(state["rates"])
        known = {s["fingerprint"]: s for s in [*before, *state["left"]]}
        if not intended and not any(source.fingerprint in known for source in self.sources):
            raise DataError(
                f"data: cannot resume: fingerprint is {', '.join(s.fingerprint for s in self.sources)}, the saved state has "
                f"{', '.join(known)} (point the run at the data it began with; other data may come in with some of it among data.sources)"
            )
        length = state["seq_len"]
        continued = [_continued(source, known.get(source.fingerprint), self.seq_len) for source in self.sources]
        same = [s["fingerprint"] for s in before] == [s.fingerprint for s in self.sources]
        if same and length == self.seq_len and rates == self.mixture.rates:
            return Stream(continued, length, state["begun"], state["left"]), cursor, []
        counts = Mixture(rates).counts(cursor - state["begun"])
        ended = [{**s, "read": s["read"] + count} for s, count in zip(before, counts, strict=True)]
        known |= {s["fingerprint"]: s for s in ended}
        news: list[str] = []
        present = []
        for source in continued:
            present.append(_caught_up(source, known.pop(source.fingerprint, None), self.seq_len, news))
        if not same or rates != self.mixture.rates:
            news.append(_shares_said(present, self, cursor))
        return Stream(present, self.seq_len, cursor, list(known.values())), cursor, news


def fingerprints_of(state: Mapping[str, Any]) -> list[str]:
    """Of the data that was read up to a state; of one of an earlier version, its own."""
    entries = [*state["sources"], *state.get("left", [])] if "sources" in state else [state]
    return [entry.get("fingerprint", "") for entry in entries]


def count_targets(source: Source, indices: Int64, seq_len: int) -> int:
    """Tokens that these samples of a source predict."""
    return len(indices) * seq_len if source.packing is None else source.packing.targets_of(indices)


COUNTS = ("cursor", "begun", "seq_len")
_OF_SOURCES = ("fingerprint", "split", "seq_len", "packing", "num_samples", "seed", "shuffle", "read")


def _checked(state: Mapping[str, Any]) -> State:
    """A state with all that belongs into one.

    Raises:
        DataError: it has not.
    """
    found = dict(state)
    if "sources" not in found:  # of an earlier version, which had one
        found |= {"begun": 0, "rates": [1], "left": [], "sources": [{"packing": "concat", "read": 0, **state}]}
    wrong = [key for key in COUNTS if type(found.get(key)) is not int or found[key] < 0]
    try:
        entries = [*found["sources"], *found["left"]]
        wrong += [key for entry in entries for key in _OF_SOURCES if key not in entry]
        wrong += [key for e in entries for key in ("seq_len", "read") if type(e.get(key)) is not int or e[key] < 0]
        if not wrong and (found["seq_len"] == 0 or len(found["sources"]) != len(Mixture(found["rates"]).rates)):
            wrong = ["seq_len or rates"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"data: cannot resume: the saved state is damaged ({error!r})") from None
    if wrong or found["cursor"] < found["begun"]:
        raise DataError(f"data: cannot resume: {(wrong or ['cursor'])[0]} is missing in the saved state, or no count")
    return found


def _continued(source: Source, saved: State | None, seq_len: int) -> Source:
    """The source in the order in which it was begun, with what had been read before the stream that a state is of."""
    if saved is None:
        return source
    packing = "concat" if source.packing is None else "best_fit"
    if saved["packing"] != packing:
        raise DataError(
            f"{_called(source)}: cannot resume: packing is {packing!r}, the saved state has {saved['packing']!r} (keep the setting of "
            "data.packing)"
        )
    if source.packing is not None and saved["seq_len"] != seq_len:
        raise DataError(
            f"{_called(source)}: cannot resume: data.seq_len is {seq_len}, the saved state has {saved['seq_len']!r}, and documents are "
            "packed into samples of one length (data.packing best_fit); keep the length"
        )
    begun_as = saved["seed"] if saved["seed"] in (source.seed, own_seed(source.seed, source.fingerprint)) else None
    length = saved["seq_len"]
    there = source.shards.num_samples(length) if source.packing is None else source.packing.num_samples
    mine: State = {
        "split": source.shards.split,
        "num_samples": there,
        "seed": source.seed if begun_as is None else begun_as,
        "shuffle": source.order.shuffle,
    }
    differences = [
        f"{key} is {value!r}, the saved state has {saved[key]!r} ({REMEDIES[key]})"
        for key, value in mine.items()
        if saved[key] != value
    ]
    if differences:
        raise DataError(f"{_called(source)}: cannot resume: " + "; ".join(differences))
    order = SampleOrder(source.order.num_samples, mine["seed"], shuffle=source.order.shuffle)
    return replace(source, order=order, read=saved["read"])


def _caught_up(source: Source, ended: State | None, seq_len: int, news: list[str]) -> Source:
    """The source after what was read of it, in samples of the present length."""
    if ended is None:
        return replace(source, read=0)
    read, length = ended["read"], ended["seq_len"]
    if length == seq_len:
        return replace(source, read=read)
    now = -(-read * length // seq_len)
    if read:
        news.append(
            f"{_called(source)}: data.seq_len is {seq_len} now: the run goes on after {read * length:,} tokens, at sample {now:,} of the "
            f"{source.order.num_samples:,} of that length, in their order. What it has read of this epoch, "
            f"{read / ended['num_samples'] % 1:.1%}, was in another order, and may come again"
        )
    return replace(source, read=now)


def _shares_said(sources: Sequence[Source], stream: Stream, cursor: int) -> str:
    shares = [rate / sum(stream.mixture.rates) for rate in stream.mixture.rates]
    said = ", ".join(
        f"{_called(source)} {share:.4g} (after {source.read / source.order.num_samples:.2f} epochs)"
        for source, share in zip(sources, shares, strict=True)
    )
    return f"From sample {cursor:,} on, shares of the samples: {said}"


def _called(source: Source) -> str:
    return f"data.sources.{source.name}" if source.name else "data"
