"""A checkpoint of any format at an address, copied here to be read.

Which one is meant is decided by the names that lie there, as for a folder of this machine: nothing is copied before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from anon_dist.checkpoint.checksums import NAME as SUMS
from anon_dist.checkpoint.checksums import are_sums
from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.keeping.names import NAME, PROGRESS, step_of
from anon_dist.checkpoint.keeping.remote import ASIDE, OWNER, PROBE, Remote
from anon_dist.checkpoint.keeping.store import Store
from anon_dist.stores import is_address

_IN_RUN = rf"(?:checkpoints/)?{NAME.pattern}"
_MARKER = re.compile(rf"({_IN_RUN})/{re.escape(PROGRESS)}")
_RUNS_MARKER = re.compile(rf"([^/]+)/{_IN_RUN}/{re.escape(PROGRESS)}")
_LOOKS = 100
"""Folders at the most whose markers are asked for, one by one: in a long row of others' there is none."""


@contextmanager
def at_hand(source: str, say: Callable[[str, str], object] = lambda run, newest: None) -> Iterator[Path]:
    """A checkpoint's path; of one at an address, that of a copy in a temporary folder (see TMPDIR), checked and removed afterwards.

    Args:
        say: told of an address of a run or a folder of checkpoints, and of that of the newest complete one, which is taken.

    Raises:
        CheckpointError: there is nothing, or nothing that is a checkpoint; or the store does not answer.
        DamagedCheckpoint: it is not there as it was written, or not complete.
    """
    if not is_address(source):
        yield Path(source)
        return
    store = Store(source)
    names = _listed(store)
    if newest := _newest(store.address, names):
        say(store.address, f"{store.address}/{newest}")
        store = Store(f"{store.address}/{newest}")
        names = [name.removeprefix(f"{newest}/") for name in names if name.startswith(f"{newest}/")]
    elif PROGRESS not in names:
        _check_foreign(store, names)
    with TemporaryDirectory(prefix="anon-dist-") as folder:
        copied = Path(folder) / store.address.rpartition("/")[2]
        _copy(store, names, copied)
        inner = copied / copied.name
        at = inner if inner.is_file() else copied
        with _called(at, store.address):
            yield at


@contextmanager
def _called(copied: Path, address: str) -> Iterator[None]:
    """A block whose errors name the address, where they would name the copy: that is gone when they are read."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        error.args = tuple(_named(arg, copied, address) for arg in error.args)
        if isinstance(error, OSError) and error.filename is not None:
            error.filename = _named(error.filename, copied, address)
        raise


def _named(said: object, copied: Path, address: str) -> object:
    return str(said).replace(str(copied), address) if isinstance(said, str | Path) else said


def _listed(store: Store) -> list[str]:
    names = store.tried(f"{store.address} cannot be listed", store.files)
    if not names:
        raise CheckpointError(f"there is nothing at {store.address}")
    return names


def _newest(address: str, names: list[str]) -> str | None:
    """Of a run or a folder of checkpoints, the newest complete one; None: it is neither, but what is to be read.

    Raises:
        CheckpointError: it is a folder of runs, or of checkpoints of which none is known to be complete.
        DamagedCheckpoint: it is a run's, and none is complete.
    """
    found = [match for name in names if (match := _MARKER.fullmatch(name))]
    if found:
        return max(found, key=lambda match: (match[1].startswith("checkpoints/"), int(match[2])))[1]
    if runs := sorted(match[1] for name in names if (match := _RUNS_MARKER.fullmatch(name))):
        raise CheckpointError(f"{address} is a folder of runs; name one of them, such as {address}/{runs[0]}")
    tops = {name.partition("/")[0] for name in names if "/" in name}
    own = {name for name in names if name.startswith((OWNER, PROBE))}
    steps = {int(match[1]): top for top in tops if (match := NAME.fullmatch(top))}
    if OWNER in own and all("/" in name or name in own for name in names):
        if not steps:
            raise CheckpointError(f"{address} is a run's, and has no checkpoint so far")
        last = steps[max(steps)]
        raise DamagedCheckpoint(
            f"{address} holds no complete checkpoint: the upload of {last} was cut short, or is still under way"
        )
    if steps and set(steps.values()) == tops and all("/" in name for name in names):
        raise CheckpointError(
            f"{address} is a folder of checkpoints; name one of them, such as {address}/{steps[max(steps)]}"
        )
    return None


def _check_foreign(store: Store, names: list[str]) -> None:
    """Raises `DamagedCheckpoint` if what has no marker is a training's checkpoint: those of others never have one.

    Ours is what has our checksums, or a checkpoint's name beside a run's others: what an upload begins with, others write too.
    """
    parent, _, own_name = store.address.rpartition("/")
    newest, of_run = None, False
    if NAME.fullmatch(own_name):
        with suppress(CheckpointError):  # who may read the checkpoint may not always list what is around it
            around = Store(f"{parent}/")
            newest, of_run = around.tried(f"{parent} cannot be listed", lambda: _beside(around))
    ours = newest is not None or of_run
    if not ours and SUMS in names:
        sums = store.tried(f"{store.address}/{SUMS} cannot be read", lambda: store.read(store.path(SUMS)))
        ours = are_sums(sums or b"")
    if not ours:
        return
    if PROGRESS + ASIDE in names:
        raise DamagedCheckpoint(
            f"{store.address} does not count: its run went on from an earlier one, and {PROGRESS} there is {PROGRESS}{ASIDE} now"
        )
    rest = f"the newest complete one beside it is {parent}/{newest}" if newest else "there is no complete one beside it"
    raise DamagedCheckpoint(
        f"{store.address} is incomplete (no {PROGRESS}): its upload was cut short, or is still under way; {rest}"
    )


def _beside(around: Store) -> tuple[str | None, bool]:
    """The newest complete checkpoint of a folder, and whether the folder is a run's."""
    names = around.names()
    steps = sorted((name for name in names if NAME.fullmatch(name)), key=lambda name: step_of(Path(name)))
    complete = (name for name in reversed(steps[-_LOOKS:]) if around.fs.exists(around.path(name, PROGRESS)))
    return next(complete, None), OWNER in names


def _copy(store: Store, names: list[str], folder: Path) -> None:
    """Copy all that lies at an address into a folder; checked if it has checksums."""
    parent, _, own_name = store.address.rpartition("/")
    if PROGRESS in names and SUMS in names:
        Remote(f"{parent}/").fetch(own_name, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        target = folder / (name or own_name)
        target.parent.mkdir(parents=True, exist_ok=True)
        path = store.path(name) if name else store.root
        get = lambda path=path, target=target: store.fs.get_file(path, str(target))  # noqa: E731
        store.tried(f"{store.address}/{name} cannot be copied", get)
