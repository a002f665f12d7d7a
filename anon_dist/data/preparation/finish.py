"""The end of a preparation, of one machine or of the parts of several: the index, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from anon_dist.data.errors import PreparationError
from anon_dist.data.preparation.meter import say
from anon_dist.data.preparation.sample import VALIDATION_TOKENS
from anon_dist.data.preparation.statistics import compute_statistics
from anon_dist.data.preparation.tally import UNREAD, Tally
from anon_dist.data.preparation.tokenizer import Tokenizer
from anon_dist.data.stored.blocks import sums_file
from anon_dist.data.stored.index import FORMAT_VERSION, SPLITS, Index, SplitInfo
from anon_dist.data.stored.shards import file_checksum

MUCH = 0.25
"""Share of the tokens from which a validation split is warned of; small sources give a tenth of their documents."""
MUCH_MORE = 1.5
"""Of the share that was asked for; the larger of both holds."""


def dtype_of(tokenizer: Tokenizer) -> np.dtype[Any]:
    """Of the shards."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def make_index(
    folder: Path,
    tokenizer: Tokenizer,
    splits: Mapping[str, SplitInfo],
    source: Mapping[str, Any],
    noted: Tally,
    settings: Mapping[str, Any],
) -> Index:
    """The index of a folder in which all shards lie.

    Args:
        splits: all of `SPLITS`, without the checksums of their `sums`.
        source: what it says of itself.

    Raises:
        PreparationError: a split is empty.
    """
    check_splits(splits, noted, settings["val_fraction"])
    dtype = dtype_of(tokenizer)
    train, val = (splits[name] for name in SPLITS)
    return Index(
        format_version=FORMAT_VERSION,
        dtype=f"uint{8 * dtype.itemsize}",
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        tokenizer=tokenizer.spec,
        tokenizer_hash=tokenizer.hash,
        splits={
            name: replace(split, sums=file_checksum(folder / sums_file(name)).hexdigest())
            for name, split in splits.items()
            if split.tokens
        },
        statistics=compute_statistics(folder, train.shards, val.shards, dtype, tokenizer.vocab_size),
        source={**source, **noted.to_json()},
        settings=settings,
        tokenizer_behaviour=tokenizer.behaviour(),
    )


def check_splits(splits: Mapping[str, SplitInfo], noted: Tally, fraction: float) -> None:
    """Refuse splits of which one is empty.

    Raises:
        PreparationError: naming it, and the remedy.
    """
    train, val = (splits[name] for name in SPLITS)
    for name, split, remedy in (
        ("train", train, "Lower --val-fraction" if val.tokens else "Give another --source"),
        ("val", val, "Raise --val-fraction or set it to 0, or take smaller documents with --text-unit"),
    ):
        if not split.tokens and (name == "train" or fraction > 0):
            raise PreparationError(
                f"none of the source's {train.documents + val.documents} documents fell to the {name} split at "
                f"--val-fraction {fraction} (left out: {noted}). {remedy}; with --overwrite."
            )


def sizes(splits: Mapping[str, SplitInfo]) -> str:
    """Of splits, for a person."""
    return ", ".join(f"{name} {split.tokens:,} tokens" for name, split in splits.items())


def say_complete(index: Index, out: Path, seconds: float) -> None:
    """What was made, what was left out, and whether the validation split is worth anything."""
    train, statistics = index.splits["train"], index.statistics
    bigram = "" if statistics.bigram_val_loss is None else f", bigram loss {statistics.bigram_val_loss:.3f} (val)"
    say(
        f"{out} is complete after {seconds:.1f} s: {sizes(index.splits)}, {train.bytes_per_token:.3f} bytes/token, "
        f"vocabulary {index.vocab_size:,}, {index.dtype}\n"
        f"nats/token: unigram entropy {statistics.unigram_entropy:.3f}{bigram}; fingerprint {index.fingerprint}"
    )
    say_left_out(Tally.from_json(index.source), index.source, sum(split.documents for split in index.splits.values()))
    if "val" in index.splits and (warning := small_validation(index.splits["val"])):
        say(f"WARNING: {out}: {warning}. Prepare more text, or with a larger --val-fraction")
    if "val" in index.splits and (
        warning := large_validation(index.splits["val"], train, index.settings["val_fraction"])
    ):
        say(f"WARNING: {out}: {warning}. Divide them, with --text-unit or before")


def say_left_out(noted: Tally, source: Mapping[str, Any], documents: int) -> None:
    """A line for each reason."""
    for line in lines_left_out(noted, source, documents):
        say(line)


def lines_left_out(noted: Tally, source: Mapping[str, Any], documents: int) -> list[str]:
    """A line for each reason, and for each kind of file that was not opened."""
    return [
        *noted.lines(documents),
        *(f"left out: {source[key]:,} {words}" for key, words in UNREAD.items() if source.get(key)),
    ]


def small_validation(split: SplitInfo) -> str:
    """Why a loss over this split says little; "" if it does not."""
    if split.tokens >= VALIDATION_TOKENS:
        return ""
    return (
        f"the validation split has {split.tokens:,} tokens in {split.documents:,} documents; below {VALIDATION_TOKENS:,} its loss says "
        "little"
    )


def large_validation(split: SplitInfo, train: SplitInfo, fraction: float) -> str:
    """Why this split takes more from training than was meant, by `fraction`; "" if it does not."""
    share = split.tokens / (split.tokens + train.tokens)
    if share <= max(MUCH, MUCH_MORE * fraction):
        return ""
    return f"the validation split has {share:.0%} of the tokens, in {split.documents:,} documents: long ones fell to it"
