"""`anon-dist data prepare`: a corpus to a folder of token shards, in steps of which each can be interrupted and taken up again."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anon_dist.data.config import PrepareConfig
from anon_dist.data.errors import PreparationError
from anon_dist.data.preparation.division import Share, parse_part, segments, share
from anon_dist.data.preparation.encode import EncodedChunk, Encoder, chunks, encode_chunks
from anon_dist.data.preparation.finish import dtype_of, make_index, say_complete, say_left_out, sizes
from anon_dist.data.preparation.journal import JOURNAL_FILE, Journal, Progress, refuse_differences
from anon_dist.data.preparation.meter import Meter, say
from anon_dist.data.preparation.parts import PART_FILE, Part
from anon_dist.data.preparation.place import check_out
from anon_dist.data.preparation.sample import training_sample, validation_fraction
from anon_dist.data.preparation.sources import FileSource, LimitedSource, SeveralSources, Source, open_source
from anon_dist.data.preparation.tally import Tally
from anon_dist.data.preparation.tokenizer import Tokenizer, build_tokenizer, check_spec, is_trained
from anon_dist.data.preparation.versions import (
    VERSIONS_FILE,
    differences,
    record,
    refuse_changed,
    remove,
    warn_of_later_changes,
)
from anon_dist.data.preparation.writer import SplitState, SplitWriter
from anon_dist.data.stored.index import INDEX_FILE, SPLITS, TOKENIZER_FOLDER, Index, SplitInfo
from anon_dist.data.stored.shards import TokenShards
from anon_dist.exits import may_pass
from anon_dist.files import InUseError, exclusive, sync, sync_tree, write_json

COMMIT_BYTES = 64 << 20
"""Text between two commits: a killed preparation loses at most the work on so much."""
BUILDING = TOKENIZER_FOLDER + ".tmp"
CHECK_BYTES = 1 << 20
"""Text that a tokenizer which is not trained here is checked on."""


def prepare(config: PrepareConfig) -> Index | None:
    """Prepare the folder `config.out`, or go on with it where an earlier run was interrupted.

    Returns:
        Its index; None for a part, or if only the tokenizer was wanted.

    A folder that is complete is left as it is. Memory is bounded by a few chunks of 1 MiB per worker, or the largest documents.

    Raises:
        PreparationError: a setting is out of range, the folder was begun with other settings, or a split would be empty.
        SourceError, TokenizerError: from the source and the tokenizer.
        ShardError: the folder is complete, but its shards are not as they were written.
    """
    _check(config)
    source = _source(config)
    check_out(config.out, source)
    mine = share(config.part, source, segments(source, config.shard_tokens))
    config.out.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(config.out):
            if config.overwrite:
                _clear(config.out)
            if (config.out / (PART_FILE if config.part else INDEX_FILE)).exists():
                return _already_complete(config, source)
            return _Preparation(config, source, mine).run()
    except InUseError:
        raise may_pass(
            PreparationError(
                f"--out {config.out}: another process is preparing it. Wait for it, or name another folder."
            )
        ) from None


class _Preparation:
    """The steps of one run, in order: tokenizer, shards, statistics, index."""

    def __init__(self, config: PrepareConfig, source: Source, mine: Share) -> None:
        self.config, self.source, self.share, self.out = config, source, mine, config.out
        named = partial(differences, self.out, source)
        self.journal = Journal(self.out, _identity(config), source.describe(), named)
        earlier = self.journal.load()
        if earlier is None:
            if not self.journal.path.exists():
                _refuse_foreign_files(self.out)
            earlier = Progress(validation_fraction(source, config.val_fraction))
            record(self.out, source, mine)
            self.journal.commit(earlier)
        elif config.ignore_times or not (self.out / VERSIONS_FILE).exists():
            record(self.out, source, mine)
        refuse_changed(self.out, source)
        self.progress = earlier

    def run(self) -> Index | None:
        """Take the steps that are left; the index of the folder, which is complete then."""
        started = time.perf_counter()
        tokenizer = self._tokenizer()
        if self.config.only_tokenizer:
            say(f"{tokenizer.folder} is there: --tokenizer hf:{tokenizer.folder}")
            return None
        self._tokenise(tokenizer, dtype_of(tokenizer))
        splits = {name: self.progress.splits[name].info() for name in SPLITS}
        noted, source, settings = Tally.from_json(self.progress.noted), self.source.describe(), self.config.settings()
        if self.config.part:
            self._finish_part(tokenizer, splits, noted)
            return None
        index = make_index(self.out, tokenizer, splits, source, noted, settings)
        write_json(self.out / INDEX_FILE, index.to_json())
        self.journal.remove()
        remove(self.out)
        say_complete(index, self.out, time.perf_counter() - started)
        return index

    def _finish_part(self, tokenizer: Tokenizer, splits: Mapping[str, SplitInfo], noted: Tally) -> None:
        part = Part(
            self.share.number,
            self.share.of,
            tokenizer.hash,
            tokenizer.behaviour(),
            self.progress.val_fraction,
            splits,
            self.source.describe(),
            noted.to_json(),
            self.config.settings(),
        )
        write_json(self.out / PART_FILE, part.to_json())
        self.journal.remove()
        say(f"{self.out} is part {self.share.number} of {self.share.of}: {sizes(splits)}")
        say_left_out(noted, {}, sum(split.documents for split in splits.values()))

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
        segment_of = segments(self.source, self.config.shard_tokens)
        items = self.share.read(self.source, self.progress.cursor)
        encoded = encode_chunks(chunks(items, segment_of), make, self.config.workers)
        try:
            self._write(encoded, writers, segment_of)
        finally:
            for writer in writers.values():
                writer.close()

    def _write(
        self, encoded: Iterator[EncodedChunk], writers: Mapping[str, SplitWriter], segment_of: Sequence[int]
    ) -> None:
        """Append the chunks to the shards, with a commit after each finished shard and each COMMIT_BYTES of text."""
        uncommitted = 0
        noted, part = Tally.from_json(self.progress.noted), max(self.progress.cursor.part, self.share.first)
        with Meter(self.source, self.share, part) as meter:
            for chunk in encoded:
                begins = chunk.segment != segment_of[part]
                if begins:
                    for writer in writers.values():
                        writer.finish_shard()
                finished = sum(writers[name].append(documents) for name, documents in chunk.splits.items())
                noted, part = noted + chunk.noted, chunk.after.part
                self.progress = replace(self.progress, cursor=chunk.after, noted=noted.to_json())
                uncommitted += chunk.text_bytes
                if begins or finished or uncommitted >= COMMIT_BYTES:
                    self._commit(writers)
                    uncommitted = 0
                meter.count(chunk)
        for writer in writers.values():
            writer.finish_shard()
        self._commit(writers)

    def _commit(self, writers: Mapping[str, SplitWriter]) -> None:
        self.progress = replace(self.progress, splits={name: writer.commit() for name, writer in writers.items()})
        self.journal.commit(self.progress)


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
    if not all(spec.strip() for spec in config.source):
        raise PreparationError("--source '' names nothing. Give a path, a glob, an address, hf:NAME or stdlib.")
    if repeated := [spec for spec, count in Counter(config.source).items() if count > 1]:
        raise PreparationError(f"--source {repeated[0]} comes twice; give it once.")
    if config.part:
        parse_part(config.part)
        if is_trained(config.tokenizer):
            raise PreparationError(
                f"--part {config.part}: a tokenizer that each machine trains may differ. Make it once, with the same options, "
                f"--only-tokenizer in place of --part, and --out TOK; then give the parts --tokenizer hf:TOK/tokenizer."
            )
    if config.out.exists() and not config.out.is_dir():
        raise PreparationError(f"--out {config.out} is a file. Name a folder.")


def _source(config: PrepareConfig) -> Source:
    sources = [
        open_source(
            spec,
            text_field=config.text_field,
            split=config.split,
            streaming=config.streaming,
            text_unit=config.text_unit,
            on_bad_text=config.on_bad_text,
        )
        for spec in config.source
    ]
    if len(sources) > 1:
        _refuse_overlap(config.source, sources)
    source = sources[0] if len(sources) == 1 else SeveralSources(sources)
    if config.max_documents is None and config.max_bytes is None:
        return source
    return LimitedSource(source, config.max_documents, config.max_bytes)


def _refuse_overlap(specs: Sequence[str], sources: Sequence[Source]) -> None:
    """A file that two sources have would be read twice."""
    taken: dict[str, int] = {}
    for number, source in enumerate(sources):
        files = source.files if isinstance(source, FileSource) else []
        own = {os.path.realpath(path) if isinstance(path, Path) else str(path) for path in files}
        if twice := sorted(path for path in own if path in taken):
            more = f" and {len(twice) - 1:,} more" if len(twice) > 1 else ""
            raise PreparationError(
                f"--source {specs[taken[twice[0]]]} and --source {specs[number]} both have {twice[0]}{more}; it would be read "
                "twice. Give sources that have no file in common."
            )
        taken |= dict.fromkeys(own, number)


def _identity(config: PrepareConfig) -> dict[str, Any]:
    """The settings that an unfinished folder is bound to."""
    return {**config.settings(), **({"part": config.part} if config.part else {})}


def _already_complete(config: PrepareConfig, source: Source) -> Index | None:
    wanted = {"settings": _identity(config), "source": source.describe()}
    if config.part:
        part = Part.load(config.out)
        settings = {**part.settings, "part": f"{part.number}/{part.of}"}
        refuse_differences(config.out, settings, part.source, wanted)
        if not config.ignore_times:
            refuse_changed(config.out, source)
        index, splits = None, part.splits
    else:
        index = Index.load(config.out)
        refuse_differences(config.out, index.settings, index.source, wanted)
        splits = index.splits
        for split in splits:
            TokenShards(config.out, split)
        remove(config.out)  # a run may have been killed between its last acts
    (config.out / JOURNAL_FILE).unlink(missing_ok=True)
    say(f"{config.out} is complete: {sizes(splits)}. Nothing to do.")
    if not config.part and not config.ignore_times:
        warn_of_later_changes(source, config.out / INDEX_FILE)
    return index


def _clear(out: Path) -> None:
    """Remove what a preparation writes, and nothing else. The index first: without it the folder is unfinished."""
    for path in (out / INDEX_FILE, out / PART_FILE, out / JOURNAL_FILE, out / VERSIONS_FILE, *_shard_files(out)):
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
