"""Files that are read where they are needed: mapped, and checked against their checksums as they are read."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anon_dist.checkpoint.checksums import BLOCK, FileSums, sums_of
from anon_dist.checkpoint.errors import DamagedCheckpoint


def _map(path: Path, size: int) -> Any:
    return torch.UntypedStorage.from_file(str(path), False, size) if size else torch.UntypedStorage(0)


class MappedFile:
    """A file that is read where it is needed: bytes by position, tensors as views.

    If its checkpoint has checksums, bytes are checked as they are read, and the elements of a tensor by `verified`.

    Raises:
        DamagedCheckpoint: it cannot be opened, or is not of the size it had.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sums = sums_of(path)
        try:
            self.size = path.stat().st_size
            self._storage = _map(path, self.size)
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            raise DamagedCheckpoint(f"{path} cannot be opened: {reason}; a complete checkpoint has it") from None
        if self._sums is not None and self.size != self._sums.size:
            raise self._sums.damaged(f"it has {self.size} bytes, and had {self._sums.size}")
        self._bytes: Any = torch.empty(0, dtype=torch.uint8).set_(self._storage).numpy()
        self._checked = bytearray(len(self._sums.starts) if self._sums is not None else 0)

    def expect(self, sums: FileSums) -> None:
        """From now on bytes are checked against these: of a format that keeps the checksums in the file itself."""
        self._sums, self._checked = sums, bytearray(len(sums.starts))

    def check(self, start: int, stop: int) -> None:
        """Compare the blocks in which bytes [start, stop) lie with their checksums, those that have not been yet.

        Raises:
            DamagedCheckpoint: one differs.
        """
        if self._sums is None:
            return
        if stop - start > BLOCK:
            will_need(self._storage.data_ptr() + start, min(stop, self.size) - start)
        for index in self._sums.blocks(start, stop):
            if not self._checked[index]:
                first, last = self._sums.bounds(index)
                self._sums.check(index, self._bytes[first:last])
                self._checked[index] = 1

    def read(self, start: int, size: int) -> bytes:
        """Bytes [start, start + size), fewer at the end of the file."""
        self.check(start, start + size)
        return bytes(self._bytes[start : start + size].tobytes())

    def tensor(self, dtype: torch.dtype, start: int, numel: int) -> Tensor:
        """Elements from the byte `start` on, 1-D; a view of the file, to be given to `verified` before it is used, if it is large."""
        stop = start + numel * dtype.itemsize
        if start < 0 or numel < 0 or stop > self.size:
            raise DamagedCheckpoint(
                f"{self.path} ends at byte {self.size}, before a tensor in it does; it is truncated"
            )
        if not numel:
            return torch.empty(0, dtype=dtype)
        raw: Any = self._storage[start:stop]
        if self._sums is not None:
            if stop - start <= _SMALL:
                self.check(start, stop)
            else:
                raw.mapped = (self, start)  # views of the tensor share the storage
        return torch.empty(0, dtype=dtype).set_(raw)


_libc = ctypes.CDLL(None, use_errno=True)
_PAGE, _WILLNEED = os.sysconf("SC_PAGE_SIZE"), 3


def will_need(address: int, size: int) -> None:
    """Have a mapped file's pages read in one go, not one fault after the other."""
    start = address // _PAGE * _PAGE
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + size - start), _WILLNEED)


_SMALL = 1 << 16
"""Bytes of a tensor that is checked when it is opened."""
_PIECE = 4 << 20
"""Bytes that are checked, and then copied, at a time: they are still in the processor's cache."""


def verified(tensor: Tensor) -> Tensor:
    """The same tensor, once the blocks of the file that it is a view of have been compared with their checksums, if there are any.

    Raises:
        DamagedCheckpoint: one differs; naming the file.
    """
    mapped = getattr(tensor.untyped_storage(), "mapped", None)
    if mapped is not None and tensor.numel():
        file, begin = mapped
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = begin + tensor.storage_offset() * tensor.itemsize
        file.check(start, start + (last + 1) * tensor.itemsize)
    return tensor


def copy_verified(target: Tensor, source: Tensor) -> None:
    """`target.copy_(source)`, of one shape, checked and copied piece by piece."""
    if source.dim() == 0 or source.nbytes <= _PIECE:
        target.copy_(verified(source))
        return
    rows = max(1, _PIECE * len(source) // source.nbytes)
    for start in range(0, len(source), rows):
        target[start : start + rows].copy_(verified(source[start : start + rows]))
