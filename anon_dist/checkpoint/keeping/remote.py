"""Checkpoints on other file systems and in object stores, by fsspec: `s3://bucket/run`, `gs://…`, `file:///…`, `memory://…`.

A checkpoint lies there as it does here, a folder `step-00000500` with the same files. `trainer.json` is its marker: it is written last, so
that a folder without it does not count, and removed first where a checkpoint is replaced.

A file that is what one of the last checkpoint but one was is copied within the store, where nobody reads it: so only if that one was sent
from here, never if it was such a copy itself, nor from the last. Damage there is in two checkpoints at the most, and never in the last two.

Object stores show a file when all of it has arrived. Elsewhere it is written under another name, and renamed.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from fsspec.callbacks import Callback

from anon_dist.checkpoint.checksums import NAME, Checksums, checksums
from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.keeping.folder import UNFINISHED, Checkpoints
from anon_dist.checkpoint.keeping.names import PROGRESS, name_of, step_of
from anon_dist.files import sync, sync_tree
from anon_dist.stores import BUCKETS, is_address, open_store, scheme_of, tried

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between attempts, of which there is one more."""
_THREADS = 4
OWNER = "owner.json"
"""Whose the checkpoints at an address are; beside them."""
_LOCAL = frozenset({"file", "local"})
_RENAMING = frozenset({"sftp", "ssh", "hdfs", "arrow_hdfs", "webhdfs", "smb"})
"""File systems whose move is a rename, of which some replace nothing."""
_PART = ".part"
"""Ends the name of a file that is being written."""
_PROBE = ".probe-"
_SMALL = 1 << 16
"""Bytes of a file that is not looked for among those that are there."""
_T = TypeVar("_T")


class _Counting(Callback):
    """Told by fsspec of each piece of a file that has been sent."""

    def __init__(self, count: Callable[[int], None]) -> None:
        super().__init__()
        self._count = count

    def relative_update(self, inc: int = 1) -> None:
        """See `fsspec.callbacks.Callback`."""
        self._count(inc)


class Remote:
    """The checkpoints at an address.

    Args:
        pauses: seconds between attempts, of which there is one more.

    Raises:
        CheckpointError: fsspec does not know the address, or the package for it is not installed.
    """

    def __init__(self, address: str, pauses: Sequence[float] | None = None) -> None:
        self.address, self._pauses = address.rstrip("/"), pauses
        self._fs, self._root = open_store(address, CheckpointError)
        self._in_bucket = scheme_of(address) in BUCKETS
        self._last: list[tuple[str, dict[tuple[int, str], str]]] = []
        """Of the last two checkpoints that were copied: what is in the files that were sent from here, and where these are."""
        self._sent: dict[tuple[int, str], str] = {}
        """The same of the one that is being copied."""
        self.sent = 0
        """Bytes that have been sent there, and files: it grows while a copy makes progress."""
        self._leaving = threading.Event()

    def steps(self) -> list[int]:
        """Of the complete checkpoints, from the first.

        Raises:
            CheckpointError: the store does not answer.
        """

        def found() -> list[int]:
            self._fs.invalidate_cache()
            try:
                names = self._fs.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
            last = {str(name).rstrip("/").rpartition("/")[2] for name in names}
            steps = [step_of(Path(name)) for name in last if name == name_of(step_of(Path(name)))]
            return sorted(step for step in steps if self._fs.exists(self._path(name_of(step), PROGRESS)))

        return self._tried(f"{self.address} cannot be listed", found)

    def owner(self) -> dict[str, Any] | None:
        """What `own` was last given; None if there is nothing, or what nobody can read.

        Raises:
            CheckpointError: the store does not answer.
        """

        def read() -> bytes:
            with suppress(FileNotFoundError):
                return bytes(self._fs.cat_file(self._path(OWNER)))
            return b""

        with suppress(ValueError):
            found = json.loads(self._tried(f"{self.address}/{OWNER} cannot be read", read))
            return found if isinstance(found, dict) else None
        return None

    def probe(self) -> None:
        """Write a small object there, and remove it.

        Raises:
            CheckpointError: that cannot be done.
        """
        path = self._path(f"{_PROBE}{secrets.token_hex(4)}")

        def write() -> None:
            if not self._in_bucket:
                self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(path, b"probe")
            with suppress(FileNotFoundError):  # another start may have cleared it away
                self._fs.rm_file(path)

        self._tried(f"{self.address} cannot be written", write)

    def own(self, record: dict[str, Any]) -> None:
        """Write whose the address is, over what was there. What starts left there that were killed while they looked goes.

        Raises:
            CheckpointError: nothing can be written at the address.
        """

        def write() -> None:
            if not self._in_bucket:
                self._fs.makedirs(self._root, exist_ok=True)
            said = (json.dumps(record) + "\n").encode()
            self._whole(self._path(OWNER), lambda path: self._fs.pipe_file(path, said))
            for path in map(str, self._fs.ls(self._root, detail=False)):
                if path.rpartition("/")[2].startswith(_PROBE):
                    with suppress(FileNotFoundError):
                        self._fs.rm_file(path)

        self._tried(f"{self.address} cannot be written", write)

    def has(self, checkpoint: Path) -> bool:
        """Whether it is there, complete, and the one that lies here under this name."""
        marker = (checkpoint / PROGRESS).read_bytes()
        return self._marker(checkpoint.name) == marker

    def _marker(self, name: str) -> bytes | None:
        def read() -> bytes | None:
            try:
                return bytes(self._fs.cat_file(self._path(name, PROGRESS)))
            except FileNotFoundError:
                return None

        return self._tried(f"{self.address}/{name} cannot be read", read)

    def upload(self, checkpoint: Path, confirm: Callable[[], None] = lambda: None) -> None:
        """Copy a complete checkpoint there; complete when this returns. Nothing is done if it is there.

        Args:
            confirm: called before each file; its errors end the copy.

        Raises:
            DamagedCheckpoint: it is not as it was written, and not copied.
            CheckpointError: the store does not take it; after several attempts.
        """
        confirm()
        if (present := self._marker(checkpoint.name)) == (checkpoint / PROGRESS).read_bytes():
            return
        if present is not None:
            self._tried(
                f"{self.address}/{checkpoint.name} cannot be replaced",
                lambda: self._fs.rm_file(self._path(checkpoint.name, PROGRESS)),
            )
        sums = _read(checkpoint)
        if damaged := sums.verify(_THREADS):
            raise DamagedCheckpoint(f"{checkpoint} is not copied to {self.address}: {damaged[0][1]}")
        self._last, self._sent = [known for known in self._last if known[0] != checkpoint.name], {}
        self._each([*sums.files, NAME], lambda name: self._put(checkpoint, name, sums, confirm))
        self._tried(
            f"{self.address}/{checkpoint.name} cannot be cleared",
            lambda: self._clear(checkpoint.name, {*sums.files, NAME}),
        )
        self._put(checkpoint, PROGRESS, sums, confirm)
        if scheme_of(self.address) in _LOCAL:
            sync(Path(self._root))
        self._last = [*self._last, (checkpoint.name, self._sent)][-2:]

    @property
    def left(self) -> bool:
        """Whether nothing more is copied there: `leave` was called."""
        return self._leaving.is_set()

    def leave(self) -> None:
        """End uploads after the piece of a file that is under way: they raise CheckpointError, and so does each later one."""
        self._leaving.set()

    def _go_on(self) -> None:
        if self.left:
            raise CheckpointError(f"what is not at {self.address} yet is left")

    def _count(self, sent: int) -> None:
        self.sent += sent
        self._go_on()

    def _pause(self, seconds: float) -> None:
        self._leaving.wait(seconds)

    def _put(self, checkpoint: Path, name: str, sums: Checksums, confirm: Callable[[], None]) -> None:
        """Copy a file; within the store, where the last checkpoint but one has the same, sent from here."""
        source, target = checkpoint / name, self._path(checkpoint.name, name)
        size, key = source.stat().st_size, _key(sums.files[name]) if name in sums.files else None
        twin = self._last[0][1].get(key) if key and size > _SMALL and len(self._last) > 1 else None

        def put() -> None:
            self._go_on()
            confirm()  # a file system may be unmounted meanwhile: the folder would be made below
            if not self._in_bucket:
                self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            if twin is not None:
                with suppress(Exception):  # it is gone, or the store cannot copy
                    self._whole(target, lambda path: self._fs.cp_file(twin, path), size)
                    return
            send = lambda path: self._fs.put_file(str(source), path, callback=_Counting(self._count))  # noqa: E731
            self._whole(target, send, size)
            self._count(1)
            if key:
                self._sent[key] = target

        self._tried(f"{source} cannot be copied to {self.address}", put)

    def _whole(self, target: str, write: Callable[[str], object], size: int | None = None) -> None:
        """Have a file there under its name when it is complete, and on the disk where that is ours.

        Args:
            write: it, under a name that it is given.
            size: its bytes, where they are to be compared.
        """
        scheme = scheme_of(self.address)
        path = target + _PART if scheme in _LOCAL | _RENAMING else target
        write(path)
        if size is not None and (there := self._size(path)) != size:
            raise OSError(f"{path} has {there} bytes there, and {size} here")
        if scheme in _LOCAL:
            sync(Path(path))
            os.replace(path, target)
            sync(Path(target).parent)
        elif path != target:
            with suppress(FileNotFoundError):
                self._fs.rm_file(target)
            self._fs.mv(path, target)

    def _clear(self, name: str, files: set[str]) -> None:
        """Take away what an earlier copy of a checkpoint left that is none of its files: it was killed, or of another number of ranks."""
        folder = self._path(name)
        self._fs.invalidate_cache()
        for path in map(str, self._fs.find(folder)):
            if path.removeprefix(folder).lstrip("/") not in files:
                self._fs.rm_file(path)
        if scheme_of(self.address) in ("s3", "s3a"):
            with suppress(Exception):  # who may write there may not always list these, for whose bytes one pays
                bucket, _, key = folder.partition("/")
                found = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/").get("Uploads") or []
                for each in found:
                    self._fs.call_s3(
                        "abort_multipart_upload", Bucket=bucket, Key=each["Key"], UploadId=each["UploadId"]
                    )

    def _size(self, path: str) -> int:
        self._fs.invalidate_cache()
        return int(self._fs.info(path)["size"])

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
            self._each(list(sums.files), lambda file: self._get(name, file, folder))
            if damaged := sums.verify(_THREADS):
                raise DamagedCheckpoint(damaged[0][1])
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(str(error).replace(str(folder), f"{self.address}/{name}")) from None

    def _get(self, name: str, file: str, folder: Path) -> None:
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)

        def get() -> None:
            try:
                self._fs.get_file(self._path(name, file), str(target))
            except FileNotFoundError:
                raise DamagedCheckpoint(
                    f"{self.address}/{name}/{file} is missing. Take an earlier checkpoint than {name}"
                ) from None

        self._tried(f"{self.address}/{name}/{file} cannot be copied", get)

    def set_aside(self, step: int) -> None:
        """Have a checkpoint count no more: its marker gets another name; the rest stays."""
        marker = self._path(name_of(step), PROGRESS)

        def move() -> None:
            with suppress(FileNotFoundError):
                self._fs.cp_file(marker, f"{marker}.aside")
                self._fs.rm_file(marker)

        self._tried(f"{self.address}/{name_of(step)} cannot be set aside", move)

    def everything(self, folder: Path) -> None:
        """Copy all that lies at the address, a checkpoint of any format, into a folder; checked if it has checksums.

        Raises:
            CheckpointError: there is nothing, or the store does not answer.
        """
        parent, _, name = self.address.rpartition("/")

        def listed() -> list[str]:
            self._fs.invalidate_cache()
            return [str(path) for path in self._fs.find(self._root)]

        paths = self._tried(f"{self.address} cannot be listed", listed)
        names = [path.removeprefix(self._root).lstrip("/") for path in paths]
        if not paths:
            raise CheckpointError(f"there is nothing at {self.address}")
        if all("/" in name for name in names) and (steps := self.steps()):
            raise CheckpointError(
                f"{self.address} is a folder of checkpoints; name one of them, such as {self.address}/{name_of(steps[-1])}"
            )
        if PROGRESS in names and NAME in names:
            Remote(parent).fetch(name, folder)
            return
        folder.mkdir(parents=True, exist_ok=True)
        for file in names:
            target = folder / (file or name)
            target.parent.mkdir(parents=True, exist_ok=True)
            path = f"{self._root}/{file}" if file else self._root
            get = lambda path=path, target=target: self._fs.get_file(path, str(target))  # noqa: E731
            self._tried(f"{self.address}/{file} cannot be copied", get)

    def _path(self, *parts: str) -> str:
        return "/".join((self._root, *parts))

    def _each(self, names: list[str], action: Callable[[str], None]) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(action, names):
                pass

    def _tried(self, what: str, action: Callable[[], _T]) -> _T:
        """Do it, again after a while where the store fails.

        Raises:
            CheckpointError: all attempts failed; naming the last error. One of our own is raised at once.
        """
        return tried(what, action, CheckpointError, PAUSES if self._pauses is None else self._pauses, self._pause)


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


@contextmanager
def at_hand(source: str) -> Iterator[Path]:
    """A checkpoint's path; of one at an address, that of a copy in a temporary folder (see TMPDIR), checked and removed afterwards.

    Raises:
        CheckpointError: see `Remote.everything`.
    """
    if not is_address(source):
        yield Path(source)
        return
    with TemporaryDirectory(prefix="anon-dist-") as folder:
        copied = Path(folder) / source.rstrip("/").rpartition("/")[2]
        Remote(source).everything(copied)
        inner = copied / copied.name
        yield inner if inner.is_file() else copied


def _key(file: Any) -> tuple[int, str]:
    return file.size, file.digests


def _read(folder: Path) -> Checksums:
    found = checksums(folder)
    if found is None:
        raise DamagedCheckpoint(f"{folder} has no {NAME}: it was written by an older version, and is not copied")
    return found
