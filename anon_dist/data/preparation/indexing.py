"""`anon-dist data index`: a prepared folder whose shards are stretches of token files that lie elsewhere, and stay there.

All tokens are read once: for checksums, to find ids that the tokenizer has not, and for how documents end.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm

from anon_dist.data.config import IndexConfig
from anon_dist.data.errors import PreparationError
from anon_dist.data.preparation.meter import say
from anon_dist.data.preparation.statistics import compute_statistics
from anon_dist.data.preparation.tokenizer import PROBE, Tokenizer, build_tokenizer
from anon_dist.data.stored.blocks import BlockDigests, sums_file
from anon_dist.data.stored.foreign import TokenFile, find_token_files
from anon_dist.data.stored.index import (
    FORMAT_VERSION,
    INDEX_FILE,
    SPLITS,
    TOKENIZER_FOLDER,
    Index,
    ShardInfo,
    SplitInfo,
)
from anon_dist.exits import may_pass
from anon_dist.files import publish, write_json
from anon_dist.stores import is_address, scheme_of

Int64 = NDArray[np.int64]

STRETCHES = 64
"""Of the corpus, from the end of each of which validation takes its part: the order of the documents may mean something."""
READ_TOKENS = 1 << 22
SAMPLE_TOKENS = 1 << 18
"""Tokens of a split whose text is looked at."""
COPIES = {"s3": "aws s3 sync", "gs": "gcloud storage rsync --recursive"}
"""What copies a folder of a store."""
COMPARED = 100
"""Documents whose text is encoded again."""


@dataclass(frozen=True)
class Span:
    """Documents one after the other in a file."""

    file: TokenFile
    split: str
    start: int
    ends: Int64
    """Of its documents, in tokens from the start of the file."""


@dataclass(frozen=True)
class Looked:
    """What was found in a span."""

    shard: ShardInfo
    sums: bytes
    largest: int
    largest_at: int
    """The largest id, and its place in the file."""
    last: Counter[int]
    """By which token documents end."""


def index_tokens(config: IndexConfig) -> Index:
    """Write the folder `config.out`, complete or absent.

    Raises:
        PreparationError: an option is wrong, or the tokenizer is not the one of these tokens, as far as that shows.
        SourceError: the files are none that are known, or not whole.
        TokenizerError: there is no such tokenizer.
    """
    _check(config)
    files = find_token_files(config.source)
    spec = config.tokenizer or (f"hf:{files[0].tokenizer}" if files[0].tokenizer else None)
    if spec is None:
        raise PreparationError(f"{files[0].path} does not say which tokenizer made it; name it with --tokenizer")
    out = config.out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        tokenizer = build_tokenizer(spec, lambda: [PROBE], temporary / TOKENIZER_FOLDER, split_digits=False, say=say)
        index = _index(config, files, tokenizer, temporary)
        write_json(temporary / INDEX_FILE, index.to_json())
        publish(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    train, val = index.splits["train"], index.splits.get("val")
    rest = f", {val.tokens:,} for validation" if val else ""
    say(
        f"{config.out}: {train.tokens:,} tokens of {train.documents:,} documents for training{rest}, in {len(files)} files"
    )
    return index


def _check(config: IndexConfig) -> None:
    if is_address(config.source):
        folder = re.sub(r"/[^/]*(\*[^/]*|\.ds|\.bin|\.idx)$", "", config.source.rstrip("/"))
        by = COPIES.get(scheme_of(config.source))
        raise PreparationError(
            f"{config.source} is an address, and token files are read where they lie: copy them to a file system that all nodes see"
            f"{f' (`{by} {folder} DIR`)' if by else ''}, and index the copy. Folders of `anon-dist data prepare` are read from addresses"
        )
    if not 0.0 <= config.val_fraction < 1.0:
        raise PreparationError(f"--val-fraction must be in [0, 1), not {config.val_fraction}")
    if config.tokenizer is not None and config.tokenizer.startswith("spm-"):
        raise PreparationError(f"--tokenizer {config.tokenizer} would be trained; name the one that made the tokens")
    if config.out.exists():
        raise PreparationError(f"--out {config.out} is there already; name another folder, or remove it")


def _index(config: IndexConfig, files: Sequence[TokenFile], tokenizer: Tokenizer, folder: Path) -> Index:
    spans = [span for file in files for span in _spans(file, sum(f.tokens for f in files), config.val_fraction)]
    _check_splits(config, files, spans)
    looked = _look(spans, config.workers)
    _check_vocabulary(looked, tokenizer)
    _check_text(spans, tokenizer)
    ended = _documents_end(looked, tokenizer)
    splits = {}
    for split in SPLITS:
        mine = [found for span, found in zip(spans, looked, strict=True) if span.split == split]
        if mine:
            sums = b"".join(found.sums for found in mine)
            (folder / sums_file(split)).write_bytes(sums)
            shards, rate = tuple(found.shard for found in mine), _bytes_per_token(spans, split, tokenizer)
            tokens, documents = (sum(getattr(shard, what) for shard in shards) for what in ("tokens", "documents"))
            splits[split] = SplitInfo(shards, tokens, documents, round(tokens * rate), xxhash.xxh3_64_hexdigest(sums))
    train, val = (splits[name].shards if name in splits else () for name in SPLITS)
    dtype = np.dtype(files[0].dtype).newbyteorder("<")
    return Index(
        format_version=FORMAT_VERSION,
        dtype=files[0].dtype,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        tokenizer=tokenizer.spec,
        tokenizer_hash=tokenizer.hash,
        splits=splits,
        statistics=compute_statistics(folder, train, val, dtype, tokenizer.vocab_size),
        source={
            "kind": files[0].kind,
            "origin": config.source,
            "files": len(files),
            "bytes": sum(f.bytes for f in files),
        },
        settings={"source": config.source, "tokenizer": tokenizer.spec, "val_fraction": config.val_fraction},
        tokenizer_behaviour=tokenizer.behaviour(),
        documents_end=ended,
    )


def _check_splits(config: IndexConfig, files: Sequence[TokenFile], spans: Sequence[Span]) -> None:
    for split, remedy in (("train", "lower"), ("val", "raise")):
        if any(span.split == split for span in spans) or (split == "val" and not config.val_fraction):
            continue
        if split == "val" and all(len(file.ends()) == 1 for file in files):
            raise PreparationError(
                f"{config.source}: no file has more than one document, of which none can go to validation; do without it: --val-fraction 0"
            )
        raise PreparationError(f"{config.source}: no document is left for the split {split}; {remedy} --val-fraction")


def _spans(file: TokenFile, total: int, fraction: float) -> Iterator[Span]:
    """A file's stretches, each cut at a border of documents into what is trained on and, at its end, what is validated on."""
    ends = file.ends()
    if not len(ends) or ends[-1] != file.tokens:
        raise PreparationError(
            f"{file.path}: its documents end at token {ends[-1] if len(ends) else 0:,} of {file.tokens:,}"
        )
    stretches = max(1, min(int(len(ends) * fraction / 4), round(STRETCHES * file.tokens / total)))
    done = 0
    for i in range(1, stretches + 1):
        until = int(np.searchsorted(ends, file.tokens * i // stretches, side="right"))
        first = until
        if fraction and until > done:
            first = done + _nearest(ends[done:until], int(ends[until - 1]) - fraction * file.tokens / stretches)
        for split, a, b in (("train", done, first), ("val", first, until)):
            if b > a:
                yield Span(file, split, int(ends[a - 1]) if a else 0, ends[a:b])
        done = max(done, until)


def _nearest(ends: Int64, place: float) -> int:
    """How many of the documents are before the border between them that is nearest to a place."""
    after = min(int(np.searchsorted(ends, place)), len(ends) - 1)
    return after if after and place - ends[after - 1] < ends[after] - place else after + 1


def _look(spans: Sequence[Span], workers: int) -> list[Looked]:
    total = sum((int(span.ends[-1]) - span.start) * np.dtype(span.file.dtype).itemsize for span in spans)
    with (
        tqdm(total=total, desc="indexing", unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar,
        ThreadPoolExecutor(max(1, workers)) as pool,
    ):
        return list(pool.map(lambda span: _look_at(span, bar), spans))


def _look_at(span: Span, bar: tqdm[NoReturn]) -> Looked:
    digest, blocks, last = xxhash.xxh3_64(), BlockDigests(), Counter[int]()
    largest, largest_at, done = -1, 0, 0
    for at, tokens in _pieces(span):
        data = tokens.data.cast("B")
        digest.update(data)
        blocks.update(data)
        if (most := int(tokens.max())) > largest:
            largest, largest_at = most, at + int(tokens.argmax())
        upto = int(np.searchsorted(span.ends, at + len(tokens), side="right"))
        last.update(
            dict(zip(*(v.tolist() for v in np.unique_counts(tokens[span.ends[done:upto] - 1 - at])), strict=True))
        )
        done = upto
        bar.update(len(data))
    length, width = int(span.ends[-1]) - span.start, np.dtype(span.file.dtype).itemsize
    path = str(span.file.path.resolve())
    shard = ShardInfo(path, length, len(span.ends), length * width, digest.hexdigest(), span.start * width)
    return Looked(shard, blocks.sums(), largest, largest_at, last)


def _pieces(span: Span) -> Iterator[tuple[int, NDArray[Any]]]:
    """Place in the file and tokens, in order."""
    dtype = np.dtype(span.file.dtype).newbyteorder("<")
    with span.file.path.open("rb") as file:
        file.seek(span.start * dtype.itemsize)
        at, end = span.start, int(span.ends[-1])
        while at < end:
            tokens = np.frombuffer(file.read(min(READ_TOKENS, end - at) * dtype.itemsize), dtype)
            if not len(tokens):
                raise may_pass(PreparationError(f"{span.file.path} has become shorter while it was read"))
            yield at, tokens
            at += len(tokens)


def _check_vocabulary(looked: Sequence[Looked], tokenizer: Tokenizer) -> None:
    for found in looked:
        if found.largest >= tokenizer.vocab_size:
            raise PreparationError(
                f"{found.shard.file}: token {found.largest:,}, number {found.largest_at:,}, is not in the vocabulary of --tokenizer "
                f"{tokenizer.spec}, which has {tokenizer.vocab_size:,} tokens; name the one that made the files"
            )


def _documents_end(looked: Sequence[Looked], tokenizer: Tokenizer) -> bool:
    """Whether all documents end with the end-of-document token.

    Raises:
        PreparationError: all end with another.
    """
    last = sum((found.last for found in looked), Counter[int]())
    documents, ended = last.total(), last[tokenizer.eod_id]
    if ended == documents:
        return True
    other, times = last.most_common(1)[0]
    if times == documents > 1 and not ended:
        raise PreparationError(
            f"every document ends with token {other} ({tokenizer.hf.convert_ids_to_tokens(other)!r}), and the eos_token of --tokenizer "
            f"{tokenizer.spec} is {tokenizer.eod_id} ({tokenizer.hf.eos_token!r}); set that one in a copy of the tokenizer "
            "(`tokenizer.eos_token = ...; tokenizer.save_pretrained(folder)`), and use hf:folder"
        )
    say(
        f"WARNING: {documents - ended:,} of {documents:,} documents do not end with the end-of-document token, "
        f"{tokenizer.eod_id} ({tokenizer.hf.eos_token!r}): the model does not learn where they end, and data.mask_documents and "
        "data.packing best_fit are refused (Megatron-LM's --append-eod, datatrove's eos_token add it)"
    )
    return False


def _documents(spans: Sequence[Span], split: str, tokens: int) -> Iterator[NDArray[Any]]:
    """Documents from the start of each span of a split, about so many tokens in all."""
    mine = [span for span in spans if span.split == split]
    for span in mine:
        room = max(1, tokens // len(mine))
        ends = span.ends[: max(1, int(np.searchsorted(span.ends, span.start + room)))]
        length = min(int(ends[-1]) - span.start, 4 * room)
        dtype = np.dtype(span.file.dtype).newbyteorder("<")
        found = np.fromfile(span.file.path, dtype, length, offset=span.start * dtype.itemsize)
        yield from np.split(found, (ends[:-1] - span.start)[ends[:-1] - span.start < length])


def _bytes_per_token(spans: Sequence[Span], split: str, tokenizer: Tokenizer) -> float:
    """Of a sample of the split."""
    texts, tokens = 0, 0
    for document in _documents(spans, split, SAMPLE_TOKENS):
        text = document[:-1] if document[-1] == tokenizer.eod_id else document
        texts, tokens = texts + len(tokenizer.decode(text.tolist()).encode()), tokens + len(document)
    return texts / tokens


def _check_text(spans: Sequence[Span], tokenizer: Tokenizer) -> None:
    """Say so if the tokenizer makes other tokens of the documents' text."""
    same = compared = 0
    for document in _documents(spans, "train", SAMPLE_TOKENS):
        inner = document[1:-1][:256]  # without what may stand around it
        if len(inner) < 32:
            continue
        again = tokenizer.encode(tokenizer.decode(inner.tolist()))
        compared += 1
        same += bool(np.isin(inner[8:-8], again).mean() > 0.9)  # the cut may change the tokens beside it
        if compared == COMPARED:
            break
    if same < compared / 2:
        say(
            f"WARNING: of {compared} documents' text --tokenizer {tokenizer.spec} makes other tokens in {compared - same}: is it the one "
            "that made the files? A wrong one of the same size is not found in any other way"
        )
