"""Which versions of a source's files a preparation reads: their times of change, or what a store says of their contents.

An unfinished folder and a part hold them in `versions.json`. So an edit that keeps a file's size is found out, before a resume or a merge
makes one corpus of two versions. One that sets the time back too is not: the inode's time of change would tell, but it is another in each
copy, and after each chmod and each hard link, all of which would be refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from anon_dist.data.errors import PreparationError
from anon_dist.data.preparation.division import Share
from anon_dist.data.preparation.meter import say
from anon_dist.data.preparation.source_files import Version
from anon_dist.data.preparation.sources import Source
from anon_dist.files import write_json

VERSIONS_FILE = "versions.json"
NAMED = 3


class Versions(NamedTuple):
    """Of the files of a source, in their order, as one preparation saw them."""

    files: list[Version]
    first: int
    end: int
    """Its share is the files from `first` to `end`."""


def load(folder: Path) -> Versions | None:
    """What is recorded there; None in folders of earlier versions.

    Raises:
        PreparationError: it is damaged.
    """
    path = folder / VERSIONS_FILE
    try:
        content = json.loads(path.read_bytes())
        return Versions([Version(*file) for file in content["files"]], int(content["first"]), int(content["end"]))
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise PreparationError(f"{path} is damaged ({error!r}). Prepare again with --overwrite.") from None


def record(folder: Path, source: Source, share: Share) -> None:
    """Write what is there now."""
    files = [list(version) for version in source.versions]
    first, end = (
        (share.first, share.end) if share.of > 1 else (0, len(files))
    )  # a limited source is of one part, not of its files
    write_json(folder / VERSIONS_FILE, {"first": first, "end": end, "files": files})


def remove(folder: Path) -> None:
    """The preparation is complete."""
    (folder / VERSIONS_FILE).unlink(missing_ok=True)


def differences(folder: Path, source: Source) -> str:
    """Which files of a source are new, gone or of another size or time since it was recorded, in words; "" where nothing was."""
    before = load(folder)
    if before is None:
        return ""
    old, new = (dict(files) for files in (before.files, source.versions))
    gone, come = [name for name in old if name not in new], [name for name in new if name not in old]
    changed = [name for name in old if name in new and old[name] != new[name]]
    said = ((gone, "gone"), (come, "new"), (changed, "changed"))
    return "; ".join(f"{_listed(names)} {word}" for names, word in said if names)


def refuse_changed(folder: Path, source: Source) -> None:
    """Refuse to go on where a file of the share is another than when the preparation began.

    Raises:
        PreparationError: naming the first such files, and the remedies.
    """
    before = load(folder)
    pairs = list(zip(before.files, source.versions, strict=False))[before.first : before.end] if before else ()
    changed = [new.name for old, new in pairs if old.stamp != new.stamp]
    if changed:
        raise PreparationError(
            f"--out {folder}: {_listed(changed)} of the source changed since the preparation began (the size is the same, not the time). "
            "Start again with --overwrite; or, if only the time is another, go on with --ignore-times."
        )


def refuse_other_versions(parts: Sequence[Path]) -> None:
    """Refuse parts of which one read a file that another saw changed later. A file that changed before its own part read it does no harm.

    Raises:
        PreparationError: naming the first such file, its part and the remedies.
    """
    read: dict[int, tuple[Path, Version]] = {}
    for folder in parts:
        if (mine := load(folder)) is not None:
            read |= {i: (folder, mine.files[i]) for i in range(mine.first, min(mine.end, len(mine.files)))}
    for other in parts:
        theirs = load(other)
        for i, version in enumerate(theirs.files if theirs else ()):
            folder, before = read.get(i, (other, version))
            if _is_older(before.stamp, version.stamp):
                raise PreparationError(
                    f"{folder} read {version.name} of the source before a change that {other} saw (the size is the same, not the time). "
                    f"Prepare {folder} again with --overwrite; or, if only the time is another, merge with --ignore-times."
                )


def warn_of_later_changes(source: Source, index: Path) -> None:
    """Of a complete folder: say which files of this machine were changed after it was prepared."""
    made = index.stat().st_mtime_ns
    later = [version.name for version in source.versions if version.stamp.isdecimal() and int(version.stamp) > made]
    if later:
        say(
            f"WARNING: {_listed(later)} of the source changed after {index.parent} was prepared "
            f"({time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(made / 1e9))}). --overwrite prepares it again"
        )


def _is_older(mine: str, other: str) -> bool:
    """Whether a stamp may be of a version before another's: times are ordered, what stores say is not."""
    with suppress(ValueError):
        return int(mine) < int(other)
    return mine != other


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more files" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
