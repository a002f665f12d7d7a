"""The index of a prepared folder: what `index.json` holds. It is written last, so a folder that has one is complete."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash

from anon_dist.data.errors import DataError, ShardError, UnpreparedError
from anon_dist.data.stored.remote import joined, located
from anon_dist.data.stored.sealed import is_whole, sealed
from anon_dist.data.stored.typed import read_as
from anon_dist.named import named_instead
from anon_dist.stores import is_address

INDEX_FILE = "index.json"
TOKENIZER_FOLDER = "tokenizer"
FORMAT_VERSION = 1
SPLITS = ("train", "val")


@dataclass(frozen=True)
class ShardInfo:
    """One file of tokens."""

    file: str
    """Name inside the folder, such as `train-00000.bin`; or the path of a file that lies elsewhere."""
    tokens: int
    documents: int
    """Documents that end in this shard: a document may run on from one shard into the next."""
    bytes: int
    """Size of the file; of one that lies elsewhere, of the shard in it."""
    xxh3_64: str
    """Checksum of the shard, 16 hexadecimal digits."""
    start: int = 0
    """Bytes of the file before the shard."""

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is a stretch of a file that lies elsewhere."""
        return "/" in self.file


@dataclass(frozen=True)
class SplitInfo:
    """The tokens of one split: the shards end to end are one sequence, in which each document is followed by one end-of-document token."""

    shards: tuple[ShardInfo, ...]
    tokens: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents."""
    sums: str = ""
    """Checksum of the file of the blocks' checksums (see `blocks`). Empty in folders of earlier versions, which have none."""

    @property
    def bytes_per_token(self) -> float:
        """Text bytes per token, end-of-document tokens counted: what turns nats/token into bits/byte. 0.0 for an empty split."""
        return self.text_bytes / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class Statistics:
    """Losses that need no model, to hold a training curve against. In nats per token."""

    unigram_entropy: float
    """Entropy of the empirical token distribution of the training split."""
    bigram_val_loss: float | None
    """Validation cross-entropy of the add-one-smoothed bigram model of the training split; None without a validation split."""
    train_tokens: int
    """Tokens at the start of the training split that were counted."""
    val_tokens: int
    """Tokens at the start of the validation split that were scored."""
    token_cap: int
    """The most tokens of a split that are looked at."""


@dataclass(frozen=True)
class Origin:
    """What is shown of `Index.source`, which may hold more."""

    kind: str = ""
    origin: str = ""
    name: str = ""
    files: int = 0
    bytes: int = 0
    hidden_files: int = 0
    special_files: int = 0
    sources: tuple[Origin, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)
    skipped_examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Behaviour:
    """What is compared of `Index.tokenizer_behaviour`."""

    special_tokens: Mapping[str, tuple[str, Any]] | None = None
    probe: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Index:
    """Everything known of a prepared folder."""

    format_version: int
    dtype: str
    """`uint16` or `uint32`, little-endian."""
    vocab_size: int
    """One more than the largest token id that the tokenizer can give."""
    eod_id: int
    """Id of the end-of-document token, one of which follows each document."""
    tokenizer: str
    """The tokenizer as it was asked for, such as `spm-bpe:4096`. Its files lie in the folder `tokenizer`."""
    tokenizer_hash: str
    splits: Mapping[str, SplitInfo]
    """`train`, and `val` unless it was switched off."""
    statistics: Statistics
    source: Mapping[str, Any]
    """Where the documents came from, and what was skipped there."""
    settings: Mapping[str, Any]
    """The settings of the preparation that determine its result."""
    fingerprint: str = field(default="")
    """Hash of all that determines the tokens: shard checksums, order, dtype and tokenizer. Computed when left empty."""

    tokenizer_behaviour: Mapping[str, Any] = field(default_factory=dict)
    """See `Tokenizer.behaviour`. Empty in folders of earlier versions."""

    documents_end: bool = True
    """Whether each document ends with `eod_id`: those of other tools may not."""

    checksum: str = field(default="", compare=False)
    """Of the content of `index.json`, as it was read. Empty in folders of earlier versions, whose counts nothing covers."""

    def __post_init__(self) -> None:
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", self.compute_fingerprint())

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype of the shard files."""
        return np.dtype(self.dtype).newbyteorder("<")

    @cached_property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The shards of all splits."""
        return tuple(shard for split in self.splits.values() for shard in split.shards)

    @property
    def has_sums(self) -> bool:
        """Whether the contents can be checked as they are read, and need not be all at once."""
        return all(split.sums for split in self.splits.values())

    def compute_fingerprint(self) -> str:
        """The fingerprint that belongs to the shards and tokenizer named here, 32 hexadecimal digits."""
        parts = {
            "dtype": self.dtype,
            "eod_id": self.eod_id,
            "tokenizer": self.tokenizer_hash,
            "splits": {name: [[s.tokens, s.xxh3_64] for s in split.shards] for name, split in self.splits.items()},
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())

    def to_json(self) -> dict[str, Any]:
        """The content of `index.json`."""
        content = asdict(self)
        for name, split in self.splits.items():
            content["splits"][name]["bytes_per_token"] = round(split.bytes_per_token, 6)
            for shard in content["splits"][name]["shards"]:
                if not shard["start"]:  # earlier versions do not know it
                    del shard["start"]
        return sealed(content)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The reverse of `to_json`.

        Raises:
            ValueError: see `read_as`.
        """
        return read_as(cls, content)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read the index of a prepared folder, which may be at an address.

        Raises:
            UnpreparedError: there is no index, or it is not one that this version reads.
            ShardError: it cannot be read.
        """
        path = joined(directory, INDEX_FILE) if is_address(directory) else Path(directory) / INDEX_FILE
        here = located(directory) / INDEX_FILE
        try:
            content = json.loads(here.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise UnpreparedError(_why_absent(directory, path)) from None
        except OSError as error:
            raise ShardError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise UnpreparedError(f"{path} is not JSON ({error}). Prepare the folder again with --overwrite.") from None
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise UnpreparedError(
                f"{path}: format_version is {version!r}, this version reads {FORMAT_VERSION}. Prepare again."
            )
        try:
            index = cls.from_json(content)
            read_as(Origin, index.source, "source")
            read_as(Behaviour, index.tokenizer_behaviour, "tokenizer_behaviour")
        except ValueError as error:
            raise UnpreparedError(f"{path}: {error}; the file was edited. Prepare again with --overwrite.") from None
        index._refuse_edited(path)
        if not is_whole(content):
            raise UnpreparedError(
                f"{path}: its checksum does not belong to its content; the file was edited. Copy it again, or prepare again."
            )
        return index

    def _refuse_edited(self, path: str | Path) -> None:
        """Refuse values that no preparation writes, or that do not belong together."""
        most = {"uint16": 1 << 16, "uint32": 1 << 32}.get(self.dtype, 0)
        if not 0 <= self.eod_id < self.vocab_size <= most:
            raise UnpreparedError(
                f"{path}: eod_id = {self.eod_id!r} must be below vocab_size = {self.vocab_size!r}, and that fit dtype = {self.dtype!r}; "
                "the file was edited. Prepare again."
            )
        for name, split in self.splits.items():
            counts, tokens = (split.tokens, split.documents, split.text_bytes), sum(s.tokens for s in split.shards)
            if min(counts) < 0 or split.tokens != tokens:
                raise UnpreparedError(
                    f"{path}: splits.{name} has {counts} tokens, documents and bytes of text, and its shards {tokens} tokens; the file was "
                    "edited. Prepare again."
                )
        if self.fingerprint != self.compute_fingerprint():
            raise UnpreparedError(
                f"{path}: the fingerprint does not belong to the shards listed; the file was edited. Prepare again."
            )

    def split(self, name: str) -> SplitInfo:
        """The split of that name.

        Raises:
            DataError: there is none.
        """
        if name not in self.splits:
            remedy = " Prepare with --val-fraction > 0 to have one." if name == "val" else ""
            raise DataError(f"the data has no split {name!r}, only {', '.join(self.splits)}.{remedy}")
        return self.splits[name]


def _why_absent(directory: str | Path, path: str | Path) -> str:
    """What a folder without an index is, and what to do."""
    if (Path(directory) / "part.json").is_file():
        return f"{directory} is a part of a corpus. Merge all its parts: `anon-dist data merge PART… --out DIR`."
    if re.match(r"\w+:/\w", str(directory)):  # as a path, it has lost a slash
        address = re.sub(r"^(\w+):/", r"\1://", str(directory))
        return f"{directory} is no folder; an address has two slashes: {address}"
    if Path(directory).is_file():
        return f"{directory} is a file; {named_instead(directory)}"
    return (
        f"preparation unfinished or not a data folder: {path} does not exist. "
        f"`anon-dist data prepare --source … --out {directory}` makes it, or goes on, with the settings it was begun with."
    )
