"""`anon-dist data prepare`: a corpus to a folder of token shards, in steps of which each can be interrupted and taken up again."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anon_dist.data.blocks import sums_file
from anon_dist.data.config import PrepareConfig
from anon_dist.data.encode import EncodedChunk, Encoder, chunks, encode_chunks
from anon_dist.data.errors import PreparationError
from anon_dist.data.index import FORMAT_VERSION, INDEX_FILE, SPLITS, TOKENIZER_FOLDER, Index
from anon_dist.data.journal import JOURNAL_FILE, Journal, Progress, refuse_differences
from anon_dist.data.meter import Meter, say
from anon_dist.data.sample import VALIDATION_TOKENS, training_sample, validation_fraction
from anon_dist.data.shards import TokenShards, file_checksum
from anon_dist.data.sources import LimitedSource, Source, open_source
from anon_dist.data.statistics import compute_statistics
from anon_dist.data.tokenizer import Tokenizer, build_tokenizer, check_spec, is_trained
from anon_dist.data.writer import SplitState, SplitWriter
from anon_dist.files import InUseError, exclusive, sync, sync_tree, write_json

COMMIT_BYTES = 64 << 20
"""Text between two commits: a killed preparation loses at most the work on so much."""
BUILDING = TOKENIZER_FOLDER + ".tmp"
CHECK_BYTES = 1 << 20
"""Text that a tokenizer which is not trained here is checked on."""


def prepare(config: PrepareConfig) -> Index:
    """Prepare the folder `config.out`, or go on with it where an earlier run was interrupted. Returns its index.

    A folder that is complete is left as it is. Memory is bounded by a few chunks of 1 MiB per worker, or the largest documents.

    Raises:
        PreparationError: a setting is out of range, the folder was begun with other settings, or a split would be empty.
        SourceError, TokenizerError: from the source and the tokenizer.
        ShardError: the folder is complete, but its shards are not as they were written.
    """
    _check(config)
    source = _source(config)
    config.out.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(config.out):
            if config.overwrite:
                _clear(config.out)
            if (config.out / INDEX_FILE).exists():
                return _already_complete(config, source)
            return _Preparation(config, source).run()
    except InUseError:
        raise PreparationError(
            f"--out {config.out}: another process is preparing it. Wait for it, or name another folder."
        ) from None


class _Preparation:
    """The steps of one run, in order: tokenizer, shards, statistics, index."""

    def __init__(self, config: PrepareConfig, source: Source) -> None:
        self.config, self.source, self.out = config, source, config.out
        self.journal = Journal(self.out, config.settings(), source.describe())
        earlier = self.journal.load()
        if earlier is None:
            _refuse_foreign_files(self.out)
            earlier = Progress(validation_fraction(source, config.val_fraction))
            self.journal.commit(earlier)
        self.progress = earlier

    def run(self) -> Index:
        """Take the steps that are left; the index of the folder, which is complete then."""
        started = time.perf_counter()
        tokenizer = self._tokenizer()
        dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._tokenise(tokenizer, dtype)
        index = self._index(tokenizer, dtype)
        write_json(self.out / INDEX_FILE, index.to_json())
        self.journal.remove()
        say(_summary(index, self.out, time.perf_counter() - started))
        if 0 < (tokens := index.splits["val"].tokens if "val" in index.splits else 0) < VALIDATION_TOKENS:
            say(
                f"WARNING: {self.out}: the validation split has {tokens:,} tokens in {index.splits['val'].documents:,} documents; below "
                f"{VALIDATION_TOKENS:,} its loss says little. Prepare more text, or with a larger --val-fraction"
            )
        return index

    def _tokenizer(self) -> Tokenizer:
        """The tokenizer of an earlier run, or a new one."""
        folder = self.out / TOKENIZER_FOLDER
        if self.progress.tokenizer_hash is not None:
            tokenizer = Tokenizer(folder, self.config.tokenizer)
            if tokenizer.hash != self.progress.tokenizer_hash:
                raise PreparationError(
                    f"{folder} was changed since the preparation began. Start again with --overwrite."
                )
            return tokenizer
        building = self.out / BUILDING
        for unfinished in (building, folder):
            shutil.rmtree(unfinished, ignore_errors=True)
        limit = int(self.config.tokenizer_sample_mb * 1e6) if is_trained(self.config.tokenizer) else CHECK_BYTES
        build_tokenizer(
            self.config.tokenizer,
            lambda: training_sample(self.source, limit, self.progress.val_fraction),
            building,
            split_digits=self.config.split_digits,
            say=say,
        )
        sync_tree(building)
        building.rename(folder)
        sync(self.out)
        tokenizer = Tokenizer(folder, self.config.tokenizer)
        self.progress = replace(self.progress, tokenizer_hash=tokenizer.hash)
        self.journal.commit(self.progress)
        return tokenizer

    def _tokenise(self, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
        """Write all documents after the last commit."""
        states = self.progress.splits
        if tokens := sum(state.tokens for state in states.values()):
            say(f"going on after {tokens:,} tokens of an interrupted preparation")
        writers = {
            name: SplitWriter(self.out, name, dtype, self.config.shard_tokens, states.get(name, SplitState()))
            for name in SPLITS
        }
        make = partial(Encoder, tokenizer.folder, tokenizer.spec, self.progress.val_fraction, dtype)
        encoded = encode_chunks(chunks(self.source.read(self.progress.cursor)), make, self.config.workers)
        try:
            self._write(encoded, writers)
        finally:
            for writer in writers.values():
                writer.close()

    def _write(self, encoded: Iterator[EncodedChunk], writers: Mapping[str, SplitWriter]) -> None:
        """Append the chunks to the shards, with a commit after each finished shard and each COMMIT_BYTES of text."""
        uncommitted = 0
        with Meter(self.source.parts) as meter:
            for chunk in encoded:
                finished = sum(writers[name].append(documents) for name, documents in chunk.splits.items())
                skipped = Counter(self.progress.skipped) + chunk.skipped
                self.progress = replace(self.progress, cursor=chunk.after, skipped=dict(sorted(skipped.items())))
                uncommitted += chunk.text_bytes
                if finished or uncommitted >= COMMIT_BYTES:
                    self._commit(writers)
                    uncommitted = 0
                meter.count(chunk)
        for writer in writers.values():
            writer.finish_shard()
        self._commit(writers)

    def _commit(self, writers: Mapping[str, SplitWriter]) -> None:
        self.progress = replace(self.progress, splits={name: writer.commit() for name, writer in writers.items()})
        self.journal.commit(self.progress)

    def _index(self, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> Index:
        """The index of the finished shards."""
        train, val = (self.progress.splits[name] for name in SPLITS)
        fraction = self.config.val_fraction
        for name, state, remedy in (
            ("train", train, "Lower --val-fraction" if val.tokens else "Give another --source"),
            ("val", val, "Raise --val-fraction or set it to 0, or take smaller documents with --text-unit"),
        ):
            if not state.tokens and (name == "train" or fraction > 0):
                raise PreparationError(
                    f"none of the source's {train.documents + val.documents} documents fell to the {name} split at "
                    f"--val-fraction {fraction} (skipped: {dict(self.progress.skipped) or 'none'}). {remedy}; with --overwrite."
                )
        return Index(
            format_version=FORMAT_VERSION,
            dtype=f"uint{8 * dtype.itemsize}",
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            tokenizer=tokenizer.spec,
            tokenizer_hash=tokenizer.hash,
            splits={
                name: replace(state.info(), sums=file_checksum(self.out / sums_file(name)).hexdigest())
                for name, state in zip(SPLITS, (train, val), strict=True)
                if state.tokens
            },
            statistics=compute_statistics(self.out, train.shards, val.shards, dtype, tokenizer.vocab_size),
            source={**self.source.describe(), "skipped": dict(self.progress.skipped)},
            settings=self.config.settings(),
            tokenizer_behaviour=tokenizer.behaviour(),
        )


def _check(config: PrepareConfig) -> None:
    for option, value, ok, allowed in (
        ("val-fraction", config.val_fraction, 0.0 <= config.val_fraction < 1.0, "in [0, 1)"),
        ("shard-tokens", config.shard_tokens, config.shard_tokens >= 1, "at least 1"),
        ("tokenizer-sample-mb", config.tokenizer_sample_mb, config.tokenizer_sample_mb > 0, "more than 0"),
        ("workers", config.workers, config.workers >= 1, "at least 1"),
        ("max-documents", config.max_documents, (config.max_documents or 1) >= 1, "at least 1"),
        ("max-bytes", config.max_bytes, (config.max_bytes or 1) >= 1, "at least 1"),
    ):
        if not ok or (value == 0 and option.startswith("max")):
            raise PreparationError(f"--{option} must be {allowed}, not {value}.")
    check_spec(config.tokenizer)
    if config.out.exists() and not config.out.is_dir():
        raise PreparationError(f"--out {config.out} is a file. Name a folder.")


def _source(config: PrepareConfig) -> Source:
    source = open_source(
        config.source,
        text_field=config.text_field,
        split=config.split,
        streaming=config.streaming,
        text_unit=config.text_unit,
    )
    if config.max_documents is None and config.max_bytes is None:
        return source
    return LimitedSource(source, config.max_documents, config.max_bytes)


def _already_complete(config: PrepareConfig, source: Source) -> Index:
    index = Index.load(config.out)
    wanted = {"settings": config.settings(), "source": source.describe()}
    refuse_differences(config.out, index.settings, index.source, wanted)
    for split in index.splits:
        TokenShards(config.out, split)
    (config.out / JOURNAL_FILE).unlink(missing_ok=True)  # a run may have been killed between its last two acts
    say(f"{config.out} is complete: {_sizes(index)}. Nothing to do.")
    return index


def _clear(out: Path) -> None:
    """Remove what a preparation writes, and nothing else. The index first: without it the folder is unfinished."""
    for path in (out / INDEX_FILE, out / JOURNAL_FILE, *_shard_files(out)):
        path.unlink(missing_ok=True)
    for name in (TOKENIZER_FOLDER, BUILDING):
        shutil.rmtree(out / name, ignore_errors=True)


def _shard_files(out: Path) -> list[Path]:
    return sorted(path for split in SPLITS for kind in ("-[0-9]*.bin", ".sums") for path in out.glob(f"{split}{kind}"))


def _refuse_foreign_files(out: Path) -> None:
    """There is no record of these: they may be someone's only copy."""
    for path in (*_shard_files(out), out / TOKENIZER_FOLDER):
        if path.exists():
            raise PreparationError(
                f"{path} is in the way, and is not from a preparation that can be continued. "
                "Use --overwrite to remove it, or another --out."
            )


def _sizes(index: Index) -> str:
    return ", ".join(f"{name} {split.tokens:,} tokens" for name, split in index.splits.items())


def _summary(index: Index, out: Path, seconds: float) -> str:
    train, statistics = index.splits["train"], index.statistics
    bigram = "" if statistics.bigram_val_loss is None else f", bigram loss {statistics.bigram_val_loss:.3f} (val)"
    skipped = ", ".join(f"{count:,} {why}" for why, count in index.source.get("skipped", {}).items())
    return (
        f"{out} is complete after {seconds:.1f} s: {_sizes(index)}, {train.bytes_per_token:.3f} bytes/token, "
        f"vocabulary {index.vocab_size:,}, {index.dtype}\n"
        f"nats/token: unigram entropy {statistics.unigram_entropy:.3f}{bigram}; fingerprint {index.fingerprint}"
        f"{f'{chr(10)}left out: {skipped}' if skipped else ''}"
    )
