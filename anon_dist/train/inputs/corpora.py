"""The prepared folders that a run reads: those of its sources, and those that it is only validated on."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate import Accelerator

from anon_dist.agreement import all_do_slowly
from anon_dist.data import Index, TokenShards, verify_checksums
from anon_dist.data.errors import ShardError
from anon_dist.data.preparation.sample import VALIDATION_TOKENS
from anon_dist.data.stored import cache
from anon_dist.data.stored.remote import located
from anon_dist.stores import is_address
from anon_dist.train.config.parsing import Config, ConfigError, DataConfig, SourceConfig
from anon_dist.train.config.phases import phases_of
from anon_dist.train.config.sources import all_sources, called, check_present

log = logging.getLogger(__name__)
Check = Literal["read", "size"]


@dataclass(frozen=True)
class Corpus:
    """One prepared folder."""

    name: str
    """Of the source, or of the set; "" for data.path."""
    source: SourceConfig
    train: TokenShards

    @property
    def index(self) -> Index:
        """Of the folder."""
        return self.train.index


@dataclass(frozen=True)
class ValidationSet:
    """What a run is validated on."""

    name: str
    """Of the source, or of the set; "" for data.path."""
    shards: TokenShards
    weight: float
    """In the mean; 0 for what is no source."""


def use_cache(data: DataConfig) -> None:
    """Have this process keep copies of what lies at addresses where the configuration says."""
    cache.use(data.cache_dir, data.cache_bytes)


def first_path(config: Config) -> str:
    """Path or address of one of the run's prepared folders, all of which have the same tokenizer."""
    return next(iter(all_sources(config).values())).path


def first_folder(config: Config) -> Path:
    """The same as a folder here; of an address, the copy of its small files.

    Raises:
        DataError: see `located`.
    """
    return located(first_path(config))


def open_corpora(config: Config, accelerator: Accelerator) -> tuple[list[Corpus], list[ValidationSet]]:
    """The sources, and all that is validated on; their sizes checked, and their contents as they are read. Every rank calls it.

    Raises:
        ConfigError: a folder is missing, too small, the same as another, or has another tokenizer.
        DataError: see `Index.load` and `TokenShards`.
    """
    sources = all_sources(config)
    longest = _longest(config)
    check_present(config)
    check: Check = "read" if config.data.verify == "checksum" else "size"
    if check == "read":
        _check_without_sums([*(source.path for source in sources.values()), *config.eval.sets.values()], accelerator)
    corpora = [Corpus(name, source, TokenShards(source.path, "train", check)) for name, source in sources.items()]
    for i, corpus in enumerate(corpora):
        place = f"{called(corpus.name)} = {corpus.source.path}"
        _check_tokens(corpora[0].index, corpora[0].source.path, corpus.index, place)
        if same := [c for c in corpora[:i] if c.index.fingerprint == corpus.index.fingerprint]:
            raise ConfigError(f"{place} is the same data as {called(same[0].name)}; leave one out, and add its weight")
        if not corpus.index.documents_end and (config.data.mask_documents or config.data.packing == "best_fit"):
            raise ConfigError(
                f"{place}: its documents do not end with an end-of-document token, by which data.mask_documents and data.packing best_fit "
                "know them; set these to false and concat, or make the tokens again with one"
            )
        if corpus.train.num_samples(longest) < 1:
            raise ConfigError(f"{place} has {len(corpus.train)} training tokens, too few for data.seq_len = {longest}")
    return corpora, _validation_sets(config, corpora, longest, check)


def _check_without_sums(folders: Sequence[str], accelerator: Accelerator) -> None:
    """Folders of earlier versions can only be checked as a whole: the ranks of each node share the work.

    Raises:
        ShardError: on every rank, as of `verify_checksums`.
    """
    old = [path for path in dict.fromkeys(folders) if not (is_address(path) or Index.load(path).has_sums)]
    if old and accelerator.is_main_process:
        size = sum(shard.bytes for path in old for shard in Index.load(path).shards)
        log.warning(
            "%s: of an earlier version; all %.1f GB are read before the start, by all ranks. Give `anon-dist data verify FOLDER` once: "
            "after it they are checked as they are read",
            ", ".join(old),
            size / 1e9,
        )
    readers = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)

    def check() -> None:
        for path in old:
            verify_checksums(path, reader=accelerator.local_process_index % readers, readers=readers)

    if error := all_do_slowly(check):
        raise ShardError(error)


def remarks(config: Config, corpora: Sequence[Corpus], sets: Sequence[ValidationSet]) -> list[str]:
    """A line on each source at an address, how it is read; a warning for each source that is not validated, and for each set on which a
    loss says little."""
    far = [corpus for corpus in corpora if not corpus.train.is_here]
    read = [f"{called(c.name)} = {c.source.path}: {c.train.read_how(config.data.seq_len)}" for c in far]
    return [*read, *(f"WARNING: {line}" for line in (*_not_validated(config, corpora, sets), *_small_sets(sets)))]


def _check_tokens(first: Index, path: str, index: Index, place: str) -> None:
    """That a folder's tokens are those of the first source."""
    if (index.tokenizer_hash, index.eod_id, index.vocab_size) != (
        first.tokenizer_hash,
        first.eod_id,
        first.vocab_size,
    ):
        raise ConfigError(
            f"{place} has another tokenizer ({index.tokenizer}, {index.vocab_size:,} tokens) than {path} ({first.tokenizer}, "
            f"{first.vocab_size:,} tokens); prepare it with that one: --tokenizer hf:{shlex.quote(str(located(path) / 'tokenizer'))}"
        )


def _not_validated(config: Config, corpora: Sequence[Corpus], sets: Sequence[ValidationSet]) -> list[str]:
    """A warning for each source that has no part in val_loss."""
    validated = {each.name for each in sets if each.weight}
    found = []
    for corpus in corpora:
        if corpus.name in validated:
            continue
        place = f"{called(corpus.name)} = {corpus.source.path}"
        share = f", {corpus.source.weight:.1%} of what is trained on," if corpus.name else ""
        if "val" in corpus.index.splits:
            tokens, longest = corpus.index.split("val").tokens, _longest(config)
            what = f"has {tokens:,} tokens to validate on, too few for data.seq_len = {longest}"
        else:
            what = "has no validation split"
        left = "val_loss is the mean of the other sources" if validated else "there is no val_loss"
        found.append(
            f"{place}{share} {what}: {left}. Make it again with a larger --val-fraction, or name texts like "
            "it in eval.sets"
        )
    return found


def _longest(config: Config) -> int:
    """Tokens of a sample, of the phase that has most."""
    return max(phase.data.seq_len for _, phase in phases_of(config))


def _small_sets(sets: Sequence[ValidationSet]) -> list[str]:
    """A warning for each set on which a loss says little."""
    found = []
    for each in sets:
        if len(each.shards) < VALIDATION_TOKENS:
            place = f"{called(each.name) if each.weight else f'eval.sets.{each.name}'} = {each.shards.directory}"
            found.append(
                f"{place}: {len(each.shards):,} tokens to validate on; below {VALIDATION_TOKENS:,} its loss says little. "
                "Prepare it with more text, or a larger --val-fraction"
            )
    return found


def split_of_set(config: Config, index: Index) -> str:
    """The split of one of eval.sets that is read: what was held back for it, if that is long enough."""
    return "val" if "val" in index.splits and index.split("val").tokens > _longest(config) else "train"


def _validation_sets(config: Config, corpora: Sequence[Corpus], seq_len: int, check: Check) -> list[ValidationSet]:
    """Of each source that has a validation split long enough, and those of eval.sets."""
    found = []
    for corpus in corpora:
        if "val" in corpus.index.splits:
            shards = TokenShards(corpus.source.path, "val", check)
            if shards.num_samples(seq_len):
                found.append(ValidationSet(corpus.name, shards, corpus.source.weight))
    for name, path in config.eval.sets.items():
        place = f"eval.sets.{name} = {path}"
        if name in {corpus.name for corpus in corpora}:
            raise ConfigError(f"{place} has the name of a source; choose another")
        index = Index.load(path)
        _check_tokens(corpora[0].index, corpora[0].source.path, index, place)
        split = split_of_set(config, index)
        if split == "train" and index.fingerprint in {corpus.index.fingerprint for corpus in corpora}:
            raise ConfigError(f"{place} is trained on, and has no validation split; leave it out")
        shards = TokenShards(path, split, check)
        if not shards.num_samples(seq_len):
            raise ConfigError(f"{place} has {len(shards)} tokens, too few for data.seq_len = {seq_len}")
        found.append(ValidationSet(name, shards, 0.0))
    return found
