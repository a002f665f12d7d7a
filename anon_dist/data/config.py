"""The options of `anon-dist data prepare`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from anon_dist.named import need_data, need_picture
from anon_dist.usage import UsageError

TextUnit = Literal["file", "paragraph", "line"]
OnBadText = Literal["skip", "replace", "fail"]


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Tokenise a corpus into shards.

    A preparation that was interrupted goes on when the same command is given again, and ends with the same bytes as one that was not.
    """

    out: Path
    """Folder to write. It is complete when it holds `index.json`."""
    source: tyro.conf.UseAppendAction[Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE")]] = ()
    """`stdlib` (the Python standard library's sources); a file, folder or glob of text, JSON Lines, parquet or Arrow, plain or in `.gz` or
    `.zst`, here or at an address such as `s3://bucket/texts`; or `hf:NAME[:CONFIG]`, a dataset of the Hugging Face hub or a local folder
    that `datasets` loads. Given several times: one after the other, as one corpus. Not given: `stdlib`. In Python one of them may be a
    plain string."""
    tokenizer: str = "spm-bpe:4096"
    """`spm-bpe:SIZE` or `spm-unigram:SIZE`, trained on the corpus with SentencePiece; a SentencePiece `.model` file; `hf:NAME_OR_FOLDER`;
    or `bytes`."""
    text_field: str = "text"
    """Field of JSON Lines, parquet, Arrow and `hf:` sources that holds the text; `a.b` is `b` of the record in `a`."""
    text_unit: TextUnit = "file"
    """What of a plain-text file is one document. A single large file needs `paragraph` or `line`, or no document is left for validation."""
    on_bad_text: OnBadText = "skip"
    """What is not UTF-8, lone surrogates, JSON lines that are none, records without the field, damaged files: `skip` leaves them out,
    `replace` puts U+FFFD for characters that are not UTF-8 or lone surrogates, and leaves the others out; both say how many, and where.
    `fail` stops there; with `skip` or `replace` in its place the command goes on."""
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
    to 64 MB) more goes there: 200 kB of text, up to a tenth of the documents, and at least one document."""
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

    ignore_times: bool = False
    """Go on although files of the source have other times of change than when the preparation began: copies that did not keep them, say.
    Their sizes are compared in any case."""

    part: str | None = None
    """`I/N`, such as `3/16`: prepare the I-th of N shares of the source, each on a machine of its own; `anon-dist data merge` makes one
    folder of them. Every machine must see the whole source. Shares are whole files."""
    only_tokenizer: bool = False
    """Stop when the tokenizer is there, in the folder `tokenizer` of --out. The same command without this goes on."""

    def __post_init__(self) -> None:
        given: Any = "stdlib" if self.source == () else self.source
        object.__setattr__(self, "source", (given,) if isinstance(given, str) else tuple(given))

    def settings(self) -> dict[str, Any]:
        """The settings that determine the result, as plain JSON values."""
        free = ("out", "streaming", "workers", "overwrite", "ignore_times", "part", "only_tokenizer")
        settings = {name: value for name, value in vars(self).items() if name not in free}
        return {**settings, "source": self.source[0] if len(self.source) == 1 else list(self.source)}


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Make one prepared folder of the parts that several machines prepared: byte for byte the one that a single machine would have made.

    Shards are not copied: they get a further name, or are moved where a file system has no hard links. An interrupted merge goes on when
    the same command is given again.
    """

    parts: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """All the folders that `anon-dist data prepare --part I/N` made, in any order."""
    out: Path
    """Folder to write, on the parts' file system."""
    verify: bool = True
    """Read all shards, and compare them with the checksums that their parts noted, before anything is written. Without it an altered shard
    is found out when a training reads it."""
    ignore_times: bool = False
    """Merge although parts saw other times of change of a file that one of them read: each machine had a copy of the source, say."""
    workers: int = field(default_factory=_cpu_count)
    """Threads that read (default: one per available core)."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what a prepared folder, or a part of one, holds: sizes, source, tokenizer, what was left out, and how long documents are."""

    folder: Annotated[str, tyro.conf.Positional]
    """Made by `anon-dist data prepare` or `merge`; or the address of a prepared folder, all of which is read."""
    samples: int = 2
    """Documents of each split that are shown, from all over it. 0 for none."""
    plot: Path | None = None
    """Picture to write of the documents' lengths, such as `lengths.png`."""
    json: bool = False
    """Print all as JSON."""

    def check(self) -> None:
        """Look at what can be told before anything is read.

        Raises:
            UsageError: the folder is none of prepared data, or the picture or the number of samples is none.
        """
        need_data(self.folder)
        if self.plot is not None:
            need_picture(self.plot, "--plot")
        if self.samples < 0:
            raise UsageError(f"--samples must be at least 0, not {self.samples}")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Compare all contents of a prepared folder with its checksums.

    A training does so too, with what it reads, when it reads it. Of a folder of an earlier version it has to read everything before it
    starts; here such a folder gets checksums of its blocks, after which trainings start at once.
    """

    folder: Annotated[str, tyro.conf.Positional]
    """Made by `anon-dist data prepare`; or its address, where all is read and nothing kept."""
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
