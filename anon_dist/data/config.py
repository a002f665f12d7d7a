"""The options of `anon-dist data prepare`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

TextUnit = Literal["file", "paragraph", "line"]


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Tokenise a corpus into memory-mapped shards.

    A preparation that was interrupted goes on when the same command is given again, and ends with the same bytes as one that was not.
    """

    out: Path
    """Folder to write. It is complete when it holds `index.json`."""
    source: str = "stdlib"
    """`stdlib` (the Python standard library's sources); a file, folder or glob of text, JSON Lines or parquet, plain or in `.gz` or `.zst`,
    here or at an address such as `s3://bucket/texts`;
    or `hf:NAME[:CONFIG]`, a dataset of the Hugging Face hub or a local folder that `datasets` loads."""
    tokenizer: str = "spm-bpe:4096"
    """`spm-bpe:SIZE` or `spm-unigram:SIZE`, trained on the corpus with SentencePiece; a SentencePiece `.model` file; `hf:NAME_OR_FOLDER`;
    or `bytes`."""
    text_field: str = "text"
    """Field of JSON Lines, parquet and `hf:` sources that holds the text."""
    text_unit: TextUnit = "file"
    """What of a plain-text file is one document. A single large file needs `paragraph` or `line`, or no document is left for validation."""
    split: str = "train"
    """Split of an `hf:` dataset."""
    streaming: bool = False
    """Stream an `hf:` dataset instead of downloading it first."""
    max_documents: int | None = None
    """Stop after so many documents."""
    max_bytes: int | None = None
    """Stop after the document that brings the text to so many bytes."""
    val_fraction: float = 0.01
    """Part of the documents, chosen by a hash of their text, that goes to the validation split. 0 for none. Of a small source (up
    to 64 MB) more goes there: 150 kB of text, up to a tenth of the documents, and at least one document."""
    shard_tokens: int = 2**26
    """Tokens in a shard file."""
    tokenizer_sample_mb: float = 16.0
    """Megabytes of text that a SentencePiece tokenizer is trained on. A unigram tokenizer takes ten times as long as BPE."""
    split_digits: bool = True
    """Whether a trained tokenizer spells numbers digit by digit."""
    workers: int = field(default_factory=_cpu_count)
    """Tokenisation processes (default: one per available core). The result does not depend on it. 1 works in the calling process; more
    need a main script that can be imported, with its work under `if __name__ == "__main__"`."""
    overwrite: bool = False
    """Remove what an earlier preparation left in the folder, finished or not, and start from nothing."""

    def settings(self) -> dict[str, Any]:
        """The settings that determine the result, as plain JSON values."""
        free = ("out", "streaming", "workers", "overwrite")
        return {name: value for name, value in vars(self).items() if name not in free}


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Compare all contents of a prepared folder with its checksums.

    A training does so too, with what it reads, when it reads it. Of a folder of an earlier version it has to read everything before it
    starts; here such a folder gets checksums of its blocks, after which trainings start at once.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Made by `anon-dist data prepare`."""
    workers: int = field(default_factory=_cpu_count)
    """Threads that read (default: one per available core)."""


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Make a folder that trainings read of token files of datatrove or Megatron-LM. The tokens stay where they are."""

    source: Annotated[str, tyro.conf.Positional]
    """A folder, a file, a glob of `.ds` files (datatrove), or of `.bin` files with their `.idx` (Megatron-LM); or Megatron-LM's prefix."""
    out: Path
    """Folder to write; it holds the index and the tokenizer."""
    tokenizer: str | None = None
    """The tokenizer that made the tokens: `hf:NAME_OR_FOLDER`, a SentencePiece `.model` file, or `bytes`. None: the one that datatrove's
    metadata name."""
    val_fraction: float = 0.01
    """Part of the tokens that goes to validation: whole documents, from the ends of 64 equal stretches of the corpus. 0 for none."""
    workers: int = field(default_factory=_cpu_count)
    """Threads that read (default: one per available core)."""
