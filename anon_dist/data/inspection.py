"""`anon-dist data inspect`: what a prepared folder, or a part of one, holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from anon_dist.data.config import InspectConfig
from anon_dist.data.preparation.finish import dtype_of, lines_left_out, small_validation
from anon_dist.data.preparation.parts import PART_FILE, Part
from anon_dist.data.preparation.tally import Tally
from anon_dist.data.preparation.tokenizer import Tokenizer
from anon_dist.data.samples.stretches import Stretches
from anon_dist.data.stored.index import TOKENIZER_FOLDER, Index, Origin, SplitInfo
from anon_dist.data.stored.typed import read_as

BLOCK_BYTES = 1 << 24
SHOWN_CHARS = 400
"""Of a sample, in the text; `--json` has all of it."""
BAR = 40


@dataclass(frozen=True)
class Content:
    """What the index, or the part's file, says."""

    folder: str
    """Or address."""
    shards: Stretches
    title: str
    tokenizer: Tokenizer
    splits: Mapping[str, SplitInfo]
    source: Mapping[str, Any]
    settings: Mapping[str, Any]
    noted: Tally
    index: Index | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the shards."""
        return dtype_of(self.tokenizer)


@dataclass(frozen=True)
class Lengths:
    """Of the documents of a split, their end-of-document tokens included: how many have from 2^i to 2^(i+1) − 1 tokens."""

    counts: list[int]
    least: int
    most: int
    median: int
    """Of the power of two: at least half of the documents have at most as many tokens as the upper end of its bin."""

    def to_json(self) -> dict[str, Any]:
        """Bins by their first length."""
        bins = {str(1 << i): count for i, count in enumerate(self.counts)}
        return {"bins": bins, "least": self.least, "most": self.most, "median_at_most": self.median}


def open_content(folder: str) -> Content:
    """Read what a folder, or an address of one, says of itself.

    Raises:
        DataError: it is neither a prepared folder nor a finished part, or its tokenizer is not what it was.
    """
    here, shards = Path(folder), Stretches(folder)
    if shards.is_here and (here / PART_FILE).is_file():
        part = Part.load(here)
        tokenizer = Tokenizer(here / TOKENIZER_FOLDER, part.settings["tokenizer"])
        title = f"part {part.number} of {part.of}"
        noted = Tally.from_json(part.noted)
        splits = {name: split for name, split in part.splits.items() if split.tokens}
        return Content(folder, shards, title, tokenizer, splits, part.source, part.settings, noted, None)
    index = Index.load(folder)
    noted = Tally.from_json(index.source)
    shards.check_sizes(index.shards)
    return Content(
        folder, shards, "complete", Tokenizer.of(folder), index.splits, index.source, index.settings, noted, index
    )


def documents(content: Content, split: str) -> Iterator[NDArray[np.int64]]:
    """Lengths of the documents of a split, in their order, a block of tokens at a time; tokens without an end count as a document."""
    begun = 0
    info = content.splits[split]
    total = sum(shard.bytes for shard in info.shards)
    hide = not sys.stderr.isatty()
    with tqdm(total=total, desc=f"reading {split}", unit="B", unit_scale=True, disable=hide, leave=False) as bar:
        for shard in info.shards:
            for data in content.shards.pieces(shard, BLOCK_BYTES):
                tokens = np.frombuffer(data, content.dtype)
                ends = np.flatnonzero(tokens == content.tokenizer.eod_id) + 1
                if len(ends):
                    lengths = np.diff(ends, prepend=0)
                    lengths[0] += begun
                    yield lengths
                begun = len(tokens) - int(ends[-1]) if len(ends) else begun + len(tokens)
                bar.update(len(data))
    if begun:
        yield np.array([begun])


def lengths_of(content: Content, split: str) -> Lengths:
    """Reads the whole split, in constant memory."""
    counts = np.zeros(48, np.int64)
    least, most = 1 << 62, 0
    for block in documents(content, split):
        counts += np.bincount(np.frexp(block)[1] - 1, minlength=48)
        least, most = min(least, int(block.min())), max(most, int(block.max()))
    kept = counts[: int(most).bit_length()]
    half = int(np.searchsorted(np.cumsum(kept), (kept.sum() + 1) // 2))
    return Lengths(kept.tolist(), least, most, min(most, (2 << half) - 1))


def samples(content: Content, split: str, count: int) -> list[dict[str, Any]]:
    """The first documents that begin at evenly spread places of the split, decoded: at most 4,096 tokens of each."""
    info, found = content.splits[split], []
    for i in range(count):
        at = info.tokens * i // count
        tokens = _tokens(content, info, at, 1 << 16)
        if i:  # go on to where a document begins
            ends = np.flatnonzero(tokens == content.tokenizer.eod_id)
            skip = int(ends[0]) + 1 if len(ends) else 0
            at, tokens = at + skip, tokens[skip:]
        ends = np.flatnonzero(tokens == content.tokenizer.eod_id)
        document = tokens[: int(ends[0])] if len(ends) else tokens
        if len(tokens):
            text = content.tokenizer.decode(document[:4096].tolist())
            found.append({"token": at, "text": text, "whole": bool(len(ends)) and len(document) <= 4096})
    return found


def _tokens(content: Content, info: SplitInfo, start: int, count: int) -> NDArray[Any]:
    """Tokens from a place on, over the borders of shards."""
    pieces = [np.empty(0, content.dtype)]
    for shard in info.shards:
        if start < shard.tokens and count > 0:
            size = content.dtype.itemsize
            data = content.shards.read(shard, start * size, count * size)
            piece = np.frombuffer(data, content.dtype)
            pieces.append(piece)
            count -= len(piece)
            start = 0
        else:
            start = max(0, start - shard.tokens)
    return np.concatenate(pieces)


def inspect(config: InspectConfig) -> None:
    """Print it, as text or as JSON, and make the picture.

    Raises:
        DataError: see `open_content`.
        OSError: the picture cannot be written.
    """
    content = open_content(config.folder)
    lengths = {split: lengths_of(content, split) for split in content.splits}
    shown = {split: samples(content, split, config.samples) for split in content.splits} if config.samples else {}
    if config.plot is not None:
        plot_lengths(config.plot, lengths, config.folder)
    if config.json:
        print(json.dumps(_as_json(content, lengths, shown), indent=1, ensure_ascii=False))
        return
    print("\n".join([*_head(content), *_histogram(lengths), *_shown(shown)]))


def _as_json(content: Content, lengths: Mapping[str, Lengths], shown: Mapping[str, Any]) -> dict[str, Any]:
    index = content.index
    return {
        "folder": content.folder,
        "kind": content.title,
        "fingerprint": index.fingerprint if index else None,
        "dtype": f"uint{8 * content.dtype.itemsize}",
        "tokenizer": {
            "spec": content.tokenizer.spec,
            "vocab_size": content.tokenizer.vocab_size,
            "eod_id": content.tokenizer.eod_id,
            "hash": content.tokenizer.hash,
        },
        "splits": {
            name: {
                "tokens": split.tokens,
                "documents": split.documents,
                "text_bytes": split.text_bytes,
                "bytes_per_token": round(split.bytes_per_token, 6),
                "shards": len(split.shards),
                "bytes": sum(shard.bytes for shard in split.shards),
                "lengths": lengths[name].to_json(),
            }
            for name, split in content.splits.items()
        },
        "source": {k: v for k, v in content.source.items() if not k.startswith("skipped")},
        **content.noted.to_json(),
        "settings": dict(content.settings),
        "statistics": None if index is None else vars(index.statistics),
        "samples": dict(shown),
    }


def _head(content: Content) -> list[str]:
    tokenizer, index = content.tokenizer, content.index
    lines = [
        f"{content.folder}: {content.title}{f', fingerprint {index.fingerprint}' if index else ''}",
        f"source      {_source(read_as(Origin, content.source))}",
        f"tokenizer   {tokenizer.spec}: {tokenizer.vocab_size:,} tokens, end of document {tokenizer.eod_id}",
    ]
    for name, split in content.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        lines.append(
            f"{name:<11} {split.tokens:,} tokens in {split.documents:,} documents, {split.text_bytes / 1e6:,.1f} MB of text "
            f"({split.bytes_per_token:.3f} bytes/token), {len(split.shards):,} shards of {size / 1e6:,.1f} MB"
        )
    if index is not None:
        statistics = index.statistics
        bigram = "" if statistics.bigram_val_loss is None else f", bigram loss {statistics.bigram_val_loss:.3f} (val)"
        lines.append(f"nats/token  unigram entropy {statistics.unigram_entropy:.3f}{bigram}")
    documents = sum(split.documents for split in content.splits.values())
    lines += lines_left_out(content.noted, content.source, documents)
    if index is not None and "val" in content.splits and (warning := small_validation(content.splits["val"])):
        lines.append(f"WARNING: {warning}")
    return lines


def _source(origin: Origin) -> str:
    if origin.kind == "several":
        return " + ".join(map(_source, origin.sources))
    if origin.kind == "hf":
        return f"hf:{origin.name}"
    return f"{origin.origin} ({origin.files:,} files, {origin.bytes / 1e6:,.1f} MB)"


def _histogram(lengths: Mapping[str, Lengths]) -> list[str]:
    lines = []
    for split, found in lengths.items():
        lines.append(
            f"\ntokens in a document ({split}; from {found.least:,} to {found.most:,}, half at most {found.median:,})"
        )
        highest, first = max(found.counts), next(i for i, count in enumerate(found.counts) if count)
        for i, count in enumerate(found.counts[first:], first):
            bar = "█" * -(-BAR * count // highest)
            lines.append(f"{1 << i:>10,} to {(2 << i) - 1:>10,}  {bar:<{BAR}} {count:,}")
    return lines


def _shown(shown: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    lines = []
    for split, found in shown.items():
        for sample in found:
            text = sample["text"]
            more = "" if sample["whole"] and len(text) <= SHOWN_CHARS else " …"
            lines += [f"\n--- {split}, document at token {sample['token']:,}", text[:SHOWN_CHARS] + more]
    return lines


def plot_lengths(path: Path, lengths: Mapping[str, Lengths], title: str) -> None:
    """How many documents have how many tokens, as a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for split, found in lengths.items():
        edges = [1 << i for i in range(len(found.counts) + 1)]
        axes.stairs(found.counts, edges, label=split, fill=True, alpha=0.5)
    axes.set(xscale="log", yscale="log", xlabel="tokens in a document", ylabel="documents", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
