"""Checkpoints on other file systems and in object stores, by fsspec: `s3://bucket/run`, `gs://…`, `file:///…`, `memory://…`.

A checkpoint lies there as it does here, a folder `step-00000500` with the same files. `trainer.json` is its marker: it is written last, so
that a folder without it does not count, and removed first where a checkpoint is replaced.

A file that is what one of the last checkpoint but one was is copied within the store, where nobody reads it: so only if that one was sent
from here, never if it was such a copy itself, nor from the last. Damage there is in two checkpoints at the most, and never in the last two.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from anon_dist.checkpoint.checksums import NAME, Checksums, checksums
from anon_dist.checkpoint.errors import DamagedCheckpoint
from anon_dist.checkpoint.keeping.folder import UNFINISHED, Checkpoints
from anon_dist.checkpoint.keeping.names import PROGRESS, name_of, step_of
from anon_dist.checkpoint.keeping.store import Store
from anon_dist.files import sync_tree

_THREADS = 4
OWNER = "owner.json"
"""Whose the checkpoints at an address are; beside them."""
ASIDE = ".aside"
"""Ends the name of the marker of one that was set aside."""
PROBE = ".probe-"
"""Begins the names of the small objects by which a start finds out whether it can write there."""
_SMALL = 1 << 16
"""Bytes of a file that is not looked for among those that are there."""


class Remote:
    """The checkpoints at an address.

    Args:
        pauses: seconds between attempts, of which there is one more.

    Raises:
        CheckpointError: fsspec does not know the address, or the package for it is not installed.
    """

    def __init__(self, address: str, pauses: Sequence[float] | None = None) -> None:
        self._store = Store(address, pauses)
        self.address = self._store.address
        self._last: list[tuple[str, dict[tuple[int, str], str]]] = []
        """Of the last two checkpoints that were copied: what is in the files that were sent from here, and where these are."""
        self._sent: dict[tuple[int, str], str] = {}
        """The same of the one that is being copied."""

    @property
    def sent(self) -> int:
        """Bytes that have been sent there, and files: it grows while a copy makes progress."""
        return self._store.sent

    @property
    def left(self) -> bool:
        """Whether nothing more is copied there: `leave` was called."""
        return self._store.left

    def be_patient(self, patient: bool) -> None:
        """Whether what fails is tried again, as at first, or only once."""
        self._store.patient = patient

    def leave(self) -> None:
        """End uploads after the piece of a file that is under way: they raise CheckpointError, and so does each later one."""
        self._store.leave()

    def steps(self) -> list[int]:
        """Of the complete checkpoints, from the first.

        Raises:
            CheckpointError: the store does not answer.
        """
        store = self._store

        def found() -> list[int]:
            steps = [step_of(Path(name)) for name in store.names() if name == name_of(step_of(Path(name)))]
            return sorted(step for step in steps if store.fs.exists(store.path(name_of(step), PROGRESS)))

        return store.tried(f"{self.address} cannot be listed", found)

    def owner(self) -> dict[str, Any] | None:
        """What `own` was last given; None if there is nothing, or what nobody can read.

        Raises:
            CheckpointError: the store does not answer.
        """
        store = self._store
        said = store.tried(f"{self.address}/{OWNER} cannot be read", lambda: store.read(store.path(OWNER)))
        with suppress(ValueError):
            found = json.loads(said or b"")
            return found if isinstance(found, dict) else None
        return None

    def probe(self) -> None:
        """Write a small object there, and remove it.

        Raises:
            CheckpointError: that cannot be done.
        """
        store, name = self._store, f"{PROBE}{secrets.token_hex(4)}"

        def write() -> None:
            store.make_root()
            store.fs.pipe_file(store.path(name), b"probe")
            store.remove(store.path(name))  # another start may have cleared it away

        store.tried(f"{self.address} cannot be written", write)

    def own(self, record: dict[str, Any]) -> None:
        """Write whose the address is, over what was there. What starts left there that were killed while they looked goes.

        Raises:
            CheckpointError: nothing can be written at the address.
        """
        store = self._store

        def write() -> None:
            store.make_root()
            store.write(store.path(OWNER), (json.dumps(record) + "\n").encode())
            for name in store.names():
                if name.startswith(PROBE):
                    store.remove(store.path(name))

        store.tried(f"{self.address} cannot be written", write)

    def has(self, checkpoint: Path) -> bool:
        """Whether it is there, complete, and the one that lies here under this name."""
        marker = (checkpoint / PROGRESS).read_bytes()
        return self._marker(checkpoint.name) == marker

    def _marker(self, name: str) -> bytes | None:
        store = self._store
        return store.tried(f"{self.address}/{name} cannot be read", lambda: store.read(store.path(name, PROGRESS)))

    def upload(self, checkpoint: Path, confirm: Callable[[], None] = lambda: None) -> None:
        """Copy a complete checkpoint there; complete when this returns. Nothing is done if it is there.

        Args:
            confirm: called before each file; its errors end the copy.

        Raises:
            DamagedCheckpoint: it is not as it was written, and not copied.
            CheckpointError: the store does not take it; after several attempts.
        """
        store, name = self._store, checkpoint.name
        confirm()
        store.tried(f"{self.address} cannot be written", store.make_root)
        if (present := self._marker(name)) == (checkpoint / PROGRESS).read_bytes():
            return
        if present is not None:
            store.tried(
                f"{self.address}/{name} cannot be replaced", lambda: store.fs.rm_file(store.path(name, PROGRESS))
            )
        sums = _read(checkpoint)
        if damaged := sums.verify(_THREADS):
            raise DamagedCheckpoint(f"{checkpoint} is not copied to {self.address}: {damaged[0][1]}")
        self._last, self._sent = [known for known in self._last if known[0] != name], {}
        _each([*sums.files, NAME], lambda file: self._put(checkpoint, file, sums, confirm))
        # An earlier copy that was killed, or of another number of ranks, may have left others.
        store.tried(f"{self.address}/{name} cannot be cleared", lambda: store.clear(name, {*sums.files, NAME}))
        self._put(checkpoint, PROGRESS, sums, confirm)
        store.settle()
        self._last = [*self._last, (name, self._sent)][-2:]

    def _put(self, checkpoint: Path, name: str, sums: Checksums, confirm: Callable[[], None]) -> None:
        """Copy a file; within the store, where the last checkpoint but one has the same, sent from here."""
        store, source, target = self._store, checkpoint / name, self._store.path(checkpoint.name, name)
        size, key = source.stat().st_size, _key(sums.files[name]) if name in sums.files else None
        twin = self._last[0][1].get(key) if key and size > _SMALL and len(self._last) > 1 else None

        def put() -> None:
            store.go_on()
            confirm()
            if twin is not None and store.copy(twin, target, size):
                return
            store.send(source, target)
            if key:
                self._sent[key] = target

        store.tried(f"{source} cannot be copied to {self.address}", put)

    def fetch(self, name: str, folder: Path) -> None:
        """Copy a checkpoint into a folder, which is made.

        Raises:
            DamagedCheckpoint: it is not there as it was written.
            CheckpointError: the store does not answer.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for first in (NAME, PROGRESS):
            self._get(name, first, folder)
        try:
            sums = _read(folder)
            _each(list(sums.files), lambda file: self._get(name, file, folder))
            if damaged := sums.verify(_THREADS):
                raise DamagedCheckpoint(damaged[0][1])
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(str(error).replace(str(folder), f"{self.address}/{name}")) from None

    def _get(self, name: str, file: str, folder: Path) -> None:
        store, target = self._store, folder / file
        target.parent.mkdir(parents=True, exist_ok=True)

        def get() -> None:
            try:
                store.fs.get_file(store.path(name, file), str(target))
            except FileNotFoundError:
                raise DamagedCheckpoint(
                    f"{self.address}/{name}/{file} is missing. Take an earlier checkpoint than {name}"
                ) from None

        store.tried(f"{self.address}/{name}/{file} cannot be copied", get)

    def set_aside(self, step: int) -> None:
        """Have a checkpoint count no more: its marker gets another name; the rest stays."""
        store = self._store
        marker = store.path(name_of(step), PROGRESS)

        def move() -> None:
            with suppress(FileNotFoundError):
                store.fs.cp_file(marker, f"{marker}{ASIDE}")
                store.fs.rm_file(marker)

        store.tried(f"{self.address}/{name_of(step)} cannot be set aside", move)


def fetch_into(remote: Remote, step: int, checkpoints: Checkpoints) -> Path:
    """Bring a checkpoint here, checked, among those of a run. For one process, while no other writes.

    Raises:
        DamagedCheckpoint, CheckpointError: see `Remote.fetch`; nothing is left here.
    """
    name = name_of(step)
    unfinished = checkpoints.folder / UNFINISHED
    temporary = unfinished / "copying" / name  # where it is, if interrupted, no checkpoint to be finished
    checkpoints.clean()
    try:
        remote.fetch(name, temporary)
        sync_tree(temporary)
        return checkpoints.put_in_place(temporary.rename(unfinished / name))
    finally:
        checkpoints.clean()


def _each(names: list[str], action: Callable[[str], None]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(action, names):
            pass


def _key(file: Any) -> tuple[int, str]:
    return file.size, file.digests


def _read(folder: Path) -> Checksums:
    found = checksums(folder)
    if found is None:
        raise DamagedCheckpoint(f"{folder} has no {NAME}: it was written by an older version, and is not copied")
    return found
