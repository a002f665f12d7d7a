"""A prepared folder at an address of an object store: its small files copied here, its shards read in pieces.

A read that fails is tried again for some minutes, each time after a longer pause, and then named. What is missing, forbidden or of another
size than the index says is named at once.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from anon_dist.data.errors import DataError, ShardError, UnpreparedError
from anon_dist.data.stored import cache
from anon_dist.data.stored.digests import file_checksum, tokenizer_hash
from anon_dist.files import write_text
from anon_dist.stores import is_address, open_store, tried

AT_START = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between attempts to read what a start needs."""
MEANWHILE = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0)
"""Seconds between attempts while a training waits: three minutes, below the ten after which a run counts as hung."""
BLOCK = 1 << 23
"""Bytes of a shard that are asked for at once."""
REMEDY = ". When the store answers again, the same command goes on from the newest checkpoint"
UPLOAD = "Copy the folder there again, all of it, from where it came from."
_T = TypeVar("_T")
_COPIES: dict[str, Path] = {}
_COPYING = threading.Lock()


class Traffic:
    """What came from stores, in this process: how a wait for it is told from a hang."""

    def __init__(self) -> None:
        self.received = 0
        """Bytes."""
        self.last = ""
        """What was asked for last, and how that went."""


TRAFFIC = Traffic()


class RemoteFolder:
    """A folder at an address.

    Args:
        failure: what is raised in place of ShardError.
        remedy: said where the store does not answer for some minutes.

    Raises:
        ShardError: fsspec does not know the address, or the package for it is not installed.
    """

    def __init__(self, address: str, failure: type[DataError] = ShardError, remedy: str = REMEDY) -> None:
        self.address, self._failure, self._remedy = address.rstrip("/"), failure, remedy
        self.store, self.root = open_store(self.address, failure)

    def sizes(self, under: str = "", pauses: Sequence[float] = AT_START) -> dict[str, int]:
        """Name → bytes of the files in a folder of it; {} if there is none.

        Raises:
            ShardError: the store does not answer.
        """

        def listed() -> dict[str, int]:
            self.store.invalidate_cache()
            try:
                found = self.store.ls(self._path(under), detail=True)
            except FileNotFoundError:
                return {}
            files = [entry for entry in found if entry["type"] == "file"]
            return {str(entry["name"]).rpartition("/")[2]: int(entry["size"] or 0) for entry in files}

        return self._tried(f"{self.address}/{under} cannot be listed", listed, pauses)

    def whole(self, file: str) -> bytes:
        """The content of a small file.

        Raises:
            FileNotFoundError: it is not there.
            ShardError: the store does not answer.
        """

        def read() -> bytes | None:
            try:
                return bytes(self.store.cat_file(self._path(file)))
            except FileNotFoundError:
                return None

        found = self._tried(f"{self.address}/{file} cannot be read", read, AT_START)
        if found is None:
            raise FileNotFoundError(f"{self.address}/{file}")
        return found

    def piece(self, file: str, start: int, end: int, size: int) -> bytes:
        """Bytes [start, end) of a file that has `size`.

        Raises:
            ShardError: it is missing, of another size, or the store does not answer for some minutes.
        """

        def read() -> bytes:
            try:
                data = bytes(self.store.cat_file(self._path(file), start=start, end=end))
            except (FileNotFoundError, PermissionError):
                raise
            except Exception as error:
                TRAFFIC.last = f"{file} ({type(error).__name__}) of {self.address}"
                self._compare(file, size)
                raise
            if len(data) != end - start:
                self._compare(file, size)
                raise OSError(f"{len(data):,} bytes came of {end - start:,}")
            return data

        TRAFFIC.last = f"{file} of {self.address}"
        data = self._tried(f"{self.address}/{file} cannot be read", read, MEANWHILE, self._remedy)
        TRAFFIC.received += len(data)
        return data

    def blocks(self, file: str, size: int) -> Iterator[bytes]:
        """A file of `size` bytes, piece by piece. Errors as of `piece`."""
        for start in range(0, size, BLOCK):
            yield self.piece(file, start, min(start + BLOCK, size), size)

    def _compare(self, file: str, size: int) -> None:
        """Tell a torn file from a line that broke.

        Raises:
            ShardError: it is there, and has another size.
        """
        with suppress(OSError, RuntimeError):
            found = int(self.store.info(self._path(file))["size"])
            if found != size:
                raise torn(f"{self.address}/{file}", found, size, self._failure)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _tried(self, what: str, action: Callable[[], _T], pauses: Sequence[float], remedy: str = "") -> _T:
        return tried(what, action, self._failure, pauses, remedy=remedy)


def torn(place: str, found: int, size: int, failure: type[DataError] = ShardError) -> DataError:
    """What to say of a file of another size."""
    if failure is ShardError:
        return failure(f"{place} is torn: {found:,} bytes, the index says {size:,}. {UPLOAD}")
    return failure(f"{place} was changed meanwhile: {found:,} bytes, and {size:,} before")


def located(directory: str | Path) -> Path:
    """A prepared folder as a path: itself; or of one at an address the copy of its index and tokenizer on this machine.

    Each process asks the store once, and then keeps to what it was told.

    Raises:
        ShardError: there is no prepared folder, or the store does not answer, or the copy cannot be written.
    """
    if not is_address(directory):
        return Path(directory)
    address = str(directory).rstrip("/")
    with _COPYING:
        if address not in _COPIES:
            _COPIES[address] = _copy_small_files(RemoteFolder(address))
        return _COPIES[address]


def joined(directory: str | Path, name: str) -> str:
    """A name in a folder, which may be at an address."""
    return f"{str(directory).rstrip('/')}/{name}"


def forget_copies() -> None:
    """Have the stores asked again."""
    with _COPYING:
        _COPIES.clear()


def _copy_small_files(remote: RemoteFolder) -> Path:
    try:
        text = remote.whole("index.json").decode()
    except FileNotFoundError:
        raise UnpreparedError(
            f"not a data folder: {remote.address}/index.json does not exist. Prepare the data with `anon-dist data prepare`, and copy the "
            "folder there, index.json last"
        ) from None
    except UnicodeDecodeError:
        text = ""
    content = _json(text)
    fingerprint = content.get("fingerprint")
    if not isinstance(fingerprint, str) or not re.fullmatch(r"[0-9a-f]{32}", fingerprint):
        raise UnpreparedError(f"{remote.address}/index.json is not the index of a prepared folder. {UPLOAD}")
    place = cache.present()
    folder = place.copy_of(fingerprint)
    with place.guarded(folder / "small.lock"):
        if not (folder / "index.json").is_file() or (folder / "index.json").read_text(encoding="utf-8") != text:
            write_text(folder / "index.json", text)
        _copy_sums(remote, folder, content)
        _copy_tokenizer(remote, folder / "tokenizer", str(content.get("tokenizer_hash")))
    return folder


def _copy_sums(remote: RemoteFolder, folder: Path, content: dict[str, Any]) -> None:
    """The checksums of blocks, where the splits have them, unless they are here."""
    splits = content.get("splits")
    for name, split in splits.items() if isinstance(splits, dict) else ():
        file, digest = f"{name}.sums", split.get("sums") if isinstance(split, dict) else None
        if not digest or ((folder / file).is_file() and file_checksum(folder / file).hexdigest() == digest):
            continue
        try:
            (folder / file).write_bytes(remote.whole(file))
        except FileNotFoundError:
            raise ShardError(f"{remote.address}/{file} is missing. {UPLOAD}") from None


def _json(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _copy_tokenizer(remote: RemoteFolder, folder: Path, wanted: str) -> None:
    """Unless what is here is what is there."""
    there = remote.sizes("tokenizer")
    here = {path.name: path.stat().st_size for path in folder.iterdir()} if folder.is_dir() else {}
    if not there or (here == there and tokenizer_hash(folder) == wanted):
        return
    temporary = folder.with_name("tokenizer.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name in there:
        (temporary / name).write_bytes(remote.whole(f"tokenizer/{name}"))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
