"""Addresses of object stores and other file systems, by fsspec: `s3://bucket/folder`, `gs://…`, `hf://…`, `file:///…`, `memory://…`."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from anon_dist.exits import may_pass, refused
from anon_dist.outages import OUTAGES

BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "memory"})
"""Stores that have no folders to be made."""
_EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
_T = TypeVar("_T")


def is_address(text: str | Path) -> bool:
    """Whether a name is one of fsspec's, and no path."""
    return "://" in str(text)


def scheme_of(address: str) -> str:
    """What stands before `://`."""
    return address.partition("://")[0]


def store_problem(address: str) -> str:
    """Why nobody can open an address on this machine, whatever its store says: fsspec does not know the protocol, the package for it is
    not installed, or it is another folder wherever the command is given. "": none of these; the store is not asked."""
    import fsspec

    schemes = scheme_of(address).split("::")
    if schemes[-1] in ("file", "local") and not address.partition("://")[2].startswith(("/", "~")):
        return f"{address} is relative to the folder that a command is given in: write file:///… with the whole path"
    for scheme in schemes:
        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError:
            return _needs(address, scheme)
        except Exception as error:
            return f"{address} is no address that fsspec takes: {error}"
    return ""


def _needs(address: str, scheme: str) -> str:
    package = _EXTRAS.get(scheme, f"fsspec's package for {scheme}")
    return f"{address} needs {package}: pip install {package}"


def open_store(address: str, failure: type[Exception]) -> tuple[Any, str]:
    """fsspec's file system, and the path in it, without a slash at its end.

    Raises:
        failure: fsspec does not know the address, or the package for it is not installed.
    """
    import fsspec

    if problem := store_problem(address):
        raise refused(failure(problem))
    try:
        store, root = fsspec.core.url_to_fs(address, use_listings_cache=False)
    except ImportError:
        raise refused(failure(_needs(address, scheme_of(address)))) from None
    except Exception as error:
        raise failure(f"{address} is no address that fsspec takes: {error}") from None
    return store, str(root).rstrip("/")


def tried(
    what: str,
    action: Callable[[], _T],
    failure: type[Exception],
    pauses: Sequence[float],
    sleep: Callable[[float], object] | None = None,
    remedy: str = "",
) -> _T:
    """Do it, again after a while where the store fails.

    Args:
        what: failed, in words, if it does.
        pauses: seconds between attempts, of which there is one more.
        sleep: how they are spent; None: by `time.sleep`.
        remedy: said with the last error.

    Raises:
        failure: all attempts failed; naming the last error. One of its kind is raised at once; what is missing or forbidden is not
            tried again.
    """
    begun = time.monotonic()
    for pause in (*pauses, None):
        try:
            found = action()
            OUTAGES.answered(what)
            return found
        except failure:
            raise
        except Exception as error:  # each store has its own
            if _is_final(error):
                raise may_pass(failure(f"{what}: {type(error).__name__}: {error}")) from error
            if pause is None:
                attempts, took = len(pauses) + 1, time.monotonic() - begun
                raise may_pass(
                    failure(f"{what}: {type(error).__name__}: {error} (attempt {attempts}, after {took:.0f} s){remedy}")
                ) from error
            OUTAGES.failed(what, error, pause)
            (sleep or time.sleep)(pause)
    raise AssertionError


def _is_final(error: Exception) -> bool:
    """Whether the same would come of another attempt: no rights, no such bucket, no credentials."""
    final = isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError)
    read_only = isinstance(error, OSError) and error.errno == errno.EROFS
    return final or read_only or "Credentials" in type(error).__name__
