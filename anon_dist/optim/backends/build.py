"""Compiles a C source once for each kind of machine, and loads it.

The libraries lie in a folder of the user's. A library's name is a hash of all that decides its contents: source, compiler, flags, CPU. So
machines of different kinds that share a home directory do not take each other's. A library ends with the checksum of its other bytes, and
is moved into place when it is complete. A damaged one is built again.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FLAGS = (
    *("-std=c11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"),
    "-ffp-contract=off",  # bits must not depend on the compiler: no contraction to fused operations
    *("-fno-math-errno", "-fno-trapping-math"),  # these let it vectorise conditions, and change no value
)
COMPILE_SECONDS = 120
CHECKSUM_BYTES = hashlib.sha256().digest_size


class BuildError(Exception):
    """There is no compiler, or it failed, or the cache cannot be written."""


def load(source: Path) -> ctypes.CDLL:
    """The library of a C file; built if it is not in the cache.

    Raises:
        BuildError: it could not be built or loaded.
    """
    try:
        compiler = find_compiler()
        path = cache_folder() / f"{source.stem}-{_key(source, compiler)}.so"
        if not _is_whole(path):
            with _lock(path.with_suffix(".lock")):
                if not _is_whole(path):  # another process may have built it
                    _build(source, compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(str(error)) from error


def find_compiler() -> str:
    """The path of $CC, or else of cc, gcc or clang.

    Raises:
        BuildError: there is none.
    """
    wanted = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    for name in wanted:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(f"no C compiler found ({', '.join(wanted)})")


def cache_folder() -> Path:
    """$ANON_DIST_CACHE, or anon_dist in $XDG_CACHE_HOME or ~/.cache; made if missing, for this user alone."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("ANON_DIST_CACHE") or Path(base) / "anon_dist")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _key(source: Path, compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILE_SECONDS, check=True).stdout
    digest = hashlib.sha256()
    for part in (source.read_bytes(), compiler.encode(), version, " ".join(FLAGS).encode(), _cpu().encode()):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:32]


def _cpu() -> str:
    """The CPU's description, without what changes from boot to boot: -march=native depends on it."""
    kept = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part", "isa")
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    return "\n".join([platform.machine(), *(x for x in first.splitlines() if x.split("\t")[0].split(":")[0] in kept)])


def _is_whole(path: Path) -> bool:
    """Whether the library is there, and its checksum right. To load a damaged one could end the process."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    body, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    return hashlib.sha256(body).digest() == checksum


def _build(source: Path, compiler: str, path: Path) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    os.close(handle)
    built = Path(name)
    try:
        command = [compiler, *FLAGS, "-o", str(built), str(source), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        if done.returncode:
            raise BuildError(f"{compiler} failed: {(done.stderr or done.stdout).strip()[:1000]}")
        with built.open("r+b") as file:
            checksum = hashlib.sha256(file.read()).digest()
            file.write(checksum)  # the loader does not read past the end of the library
            file.flush()
            os.fsync(file.fileno())
        built.replace(path)
    finally:
        built.unlink(missing_ok=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """A `with` block for one builder at a time. Where the file system has no locks, several may build; they all build the same."""
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
