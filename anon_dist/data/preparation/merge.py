"""`anon-dist data merge`: the parts that several machines prepared, as the folder that one would have made, byte for byte.

Shards are given further names (hard links), or moved where a file system has none. Before that their contents are compared with the
checksums that the parts noted. What an interrupted merge left is gone on with.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from anon_dist.data.errors import PreparationError
from anon_dist.data.preparation.finish import check_splits, make_index, say_complete
from anon_dist.data.preparation.meter import say
from anon_dist.data.preparation.parts import PART_FILE, Part
from anon_dist.data.preparation.tally import Tally
from anon_dist.data.preparation.tokenizer import Tokenizer
from anon_dist.data.preparation.versions import refuse_other_versions
from anon_dist.data.stored.blocks import SUM_BYTES, BlockDigests, blocks_of, sums_file
from anon_dist.data.stored.digests import file_checksum
from anon_dist.data.stored.index import INDEX_FILE, SPLITS, TOKENIZER_FOLDER, Index, ShardInfo, SplitInfo
from anon_dist.exits import may_pass
from anon_dist.files import InUseError, exclusive, sync, sync_tree, write_json

BUILDING = TOKENIZER_FOLDER + ".tmp"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)


def merge(
    folders: Sequence[Path], out: Path, *, check: bool = True, ignore_times: bool = False, workers: int = 1
) -> Index:
    """Make `out` of all parts of a corpus. Returns its index. Memory does not grow with the corpus.

    Args:
        check: compare all contents with the parts' checksums; else the sizes.
        ignore_times: of the source's files, as parts saw them.
        workers: threads that read and hash.

    Raises:
        PreparationError: parts are missing, or differ in settings, source or tokenizer, or read different versions of a file; a file of
            one is not as it was written; or something is in the way.
        ShardError: a folder is no finished part.
    """
    started = time.perf_counter()
    parts = _in_order(folders)
    if is_part(out):
        raise PreparationError(f"--out {out} is itself a part of a corpus. Name a new folder, beside the parts.")
    if not ignore_times:
        refuse_other_versions([folder for folder, _ in parts])
    settings, source = parts[0][1].settings, parts[0][1].source
    noted = sum((Tally.from_json(part.noted) for _, part in parts), Tally())
    spans = {name: SplitInfo((), *_totals([part.splits[name] for _, part in parts])) for name in SPLITS}
    check_splits(spans, noted, settings["val_fraction"])
    out.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(out):
            if (out / INDEX_FILE).exists():
                return _already_merged(out, parts)
            _check_parts(parts, out, check, workers)
            tokenizer = _copy_tokenizer(parts[0][0], out, settings["tokenizer"])
            splits = {name: replace(spans[name], shards=_take_shards(parts, name, out)) for name in SPLITS}
            for name in SPLITS:
                _join_sums(parts, name, out)
            index = make_index(out, tokenizer, splits, source, noted, settings)
            write_json(out / INDEX_FILE, index.to_json())
    except InUseError:
        raise may_pass(PreparationError(f"--out {out}: another process is writing it. Wait for it.")) from None
    say_complete(index, out, time.perf_counter() - started)
    compared = (
        "all shards were compared with the parts' checksums"
        if check
        else f"the shards' contents were not compared with their checksums; anon-dist data verify {out} does"
    )
    say(compared)
    if old := [str(folder) for folder, part in parts if not part.checksum]:
        say(
            f"of an earlier version, so no checksum covers their counts of documents and of bytes of text: {', '.join(old)}"
        )
    say(f"the {len(parts)} parts are not needed any more: their shards are those of {out}")
    return index


def _in_order(folders: Sequence[Path]) -> list[tuple[Path, Part]]:
    """All parts of one corpus, by number.

    Raises:
        PreparationError, ShardError: see `merge`.
    """
    found: dict[int, tuple[Path, Part]] = {}
    first = None
    for folder in folders:
        part = Part.load(folder)
        first = first or (folder, part)
        _refuse_another_corpus(*first, folder, part)
        if part.number in found:
            other = found[part.number][0]
            raise PreparationError(
                f"{folder} is given twice. Name each part once."
                if folder.resolve() == other.resolve()
                else f"{folder} is part {part.number} of {part.of}, as {other} is. Leave one out."
            )
        found[part.number] = folder, part
    if first is None:
        raise PreparationError("no parts are given. Name the folders that `anon-dist data prepare --part I/N` made.")
    if missing := [number for number in range(1, first[1].of + 1) if number not in found]:
        named = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise PreparationError(
            f"of {first[1].of} parts, {len(missing)} are not given: {named}. Name them too; --part {missing[0]}/{first[1].of} prepares the "
            "first."
        )
    return [found[number] for number in sorted(found)]


def _refuse_another_corpus(place: Path, first: Part, folder: Path, part: Part) -> None:
    mine, other = (
        {
            "the number of parts": one.of,
            **{f"--{key.replace('_', '-')}": value for key, value in one.settings.items() if key != "tokenizer"},
            **{f"the source's {key}": value for key, value in one.source.items()},
            "the tokenizer": one.tokenizer_hash,
            "--tokenizer": one.settings["tokenizer"],
            "what the tokenizer's other files, or this version of transformers, make of text": one.tokenizer_behaviour,
            "the settled share of validation": one.val_fraction,
        }
        for one in (first, part)
    )
    for what in {**mine, **other}:
        if mine.get(what) != other.get(what):
            raise PreparationError(
                f"{folder} and {place} are parts of different preparations: {what} is {_short(other.get(what))} and "
                f"{_short(mine.get(what))}. Prepare one of them again, with --overwrite and the other's options."
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _totals(splits: Sequence[SplitInfo]) -> tuple[int, int, int]:
    return (
        sum(split.tokens for split in splits),
        sum(split.documents for split in splits),
        sum(split.text_bytes for split in splits),
    )


def _copy_tokenizer(folder: Path, out: Path, spec: str) -> Tokenizer:
    if not (out / TOKENIZER_FOLDER).exists():
        shutil.rmtree(out / BUILDING, ignore_errors=True)
        shutil.copytree(folder / TOKENIZER_FOLDER, out / BUILDING)
        sync_tree(out / BUILDING)
        (out / BUILDING).rename(out / TOKENIZER_FOLDER)
    tokenizer, part = Tokenizer(out / TOKENIZER_FOLDER, spec), Part.load(folder)
    if (tokenizer.hash, tokenizer.behaviour()) != (part.tokenizer_hash, part.tokenizer_behaviour):
        raise PreparationError(
            f"{out / TOKENIZER_FOLDER} is not the tokenizer that {folder} was prepared with, or this is another version of transformers. "
            f"Remove it, if it is not yours; merge with the version that prepared the parts."
        )
    return tokenizer


def _check_parts(parts: Sequence[tuple[Path, Part]], out: Path, contents: bool, workers: int) -> None:
    """That all files of the parts are as they were written, before anything is made of them.

    Raises:
        PreparationError: naming the first that is not.
    """
    for split, folder, part in ((split, *each) for split in SPLITS for each in parts):
        wanted = SUM_BYTES * sum(map(blocks_of, part.splits[split].shards))
        path = folder / sums_file(split)
        size = path.stat().st_size if path.exists() else 0
        if size != wanted:
            raise _not_as_written(path, f"has {size:,} bytes, and should have {wanted:,}")
    places = _places(parts, out)
    for path, shard in places:
        size = path.stat().st_size if path.exists() else 0
        if size != shard.bytes:
            raise _not_as_written(path, f"has {size:,} bytes, part.json says {shard.bytes:,}")
    if not contents:
        return
    total = sum(shard.bytes for _, shard in places)
    with (
        tqdm(total=total, desc="verifying", unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        hashed = pool.map(lambda place: _sums_of(place[0], place[1], bar), places)
        for split, folder, part in ((split, *each) for split in SPLITS for each in parts):
            found = b"".join(next(hashed) for _ in part.splits[split].shards)
            path = folder / sums_file(split)
            if found and path.read_bytes() != found:
                raise _not_as_written(path, "is altered: it does not belong to the shards")


def _places(parts: Sequence[tuple[Path, Part]], out: Path) -> list[tuple[Path, ShardInfo]]:
    """Where each shard lies: in its part, or already in `out`, moved by a merge that was interrupted; split by split, in their order."""
    places = []
    for split in SPLITS:
        every = ((folder, shard) for folder, part in parts for shard in part.splits[split].shards)
        for number, (folder, shard) in enumerate(every):
            path, target = folder / shard.file, out / shard_file(split, number)
            places.append((path if path.exists() or not target.exists() else target, shard))
    return places


def _sums_of(path: Path, shard: ShardInfo, bar: tqdm[NoReturn]) -> bytes:
    """The checksums of a shard's blocks."""
    blocks = BlockDigests()
    found = file_checksum(path, blocks.update).hexdigest()
    if found != shard.xxh3_64:
        raise _not_as_written(path, f"is altered: checksum {found}, part.json says {shard.xxh3_64}")
    bar.update(shard.bytes)
    return blocks.sums()


def _not_as_written(path: Path, what: str) -> PreparationError:
    return PreparationError(f"{path} {what}. Prepare the part again with --overwrite.")


def shard_file(split: str, number: int) -> str:
    """Its name in a prepared folder."""
    return f"{split}-{number:05d}.bin"


def _take_shards(parts: Sequence[tuple[Path, Part]], split: str, out: Path) -> tuple[ShardInfo, ...]:
    """Have the shards of a split in `out`, numbered through; what they are there."""
    taken: list[ShardInfo] = []
    for folder, part in parts:
        for shard in part.splits[split].shards:
            new = replace(shard, file=shard_file(split, len(taken)))
            _take(folder / shard.file, out / new.file, shard)
            taken.append(new)
    if (stray := out / shard_file(split, len(taken))).exists():
        raise PreparationError(f"{stray} is in the way, and is of none of the parts. Remove it, or name another --out.")
    sync(out)
    return tuple(taken)


def _take(path: Path, target: Path, shard: ShardInfo) -> None:
    here = target.stat().st_size if target.exists() else None
    if not path.exists() and here == shard.bytes:
        return  # moved, by a merge that was interrupted
    if here is not None:
        if not target.samefile(path):
            raise PreparationError(f"{target} is in the way, and is not {path}. Remove it, or name another --out.")
        return
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise PreparationError(
                f"--out {target.parent} is on another file system than {path.parent}, and shards are not copied. Name a folder beside the "
                "parts, or move the parts first."
            ) from None
        if error.errno not in _NO_LINKS:
            raise
        path.rename(target)


def _join_sums(parts: Sequence[tuple[Path, Part]], split: str, out: Path) -> None:
    """The checksums of blocks, one part's after the other's."""
    if not any(part.splits[split].shards for _, part in parts):
        return
    temporary = out / f"{sums_file(split)}.tmp"
    with temporary.open("wb") as file:
        for folder, part in parts:
            wanted = SUM_BYTES * sum(map(blocks_of, part.splits[split].shards))
            file.write((folder / sums_file(split)).read_bytes() if wanted else b"")
    sync(temporary)
    temporary.replace(out / sums_file(split))


def _already_merged(out: Path, parts: Sequence[tuple[Path, Part]]) -> Index:
    index = Index.load(out)
    for name in SPLITS:
        wanted = [shard.xxh3_64 for _, part in parts for shard in part.splits[name].shards]
        if wanted != ([shard.xxh3_64 for shard in index.splits[name].shards] if name in index.splits else []):
            raise PreparationError(f"--out {out} is a prepared folder, of another corpus. Name another.")
    say(f"{out} is complete, and has these parts. Nothing to do.")
    return index


def is_part(folder: Path) -> bool:
    """Whether a finished part lies there."""
    return (folder / PART_FILE).is_file()
