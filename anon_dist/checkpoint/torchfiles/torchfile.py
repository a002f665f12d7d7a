"""Files of `torch.save`: opened without running code or loading tensors, and laid out without having the tensors."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from anon_dist.checkpoint.checksums import sums_of
from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.schema import OutFile, Part, Region, Stub
from anon_dist.checkpoint.torchfiles.mapped import MappedFile, verified
from anon_dist.checkpoint.torchfiles.pickles import EMPTY, STAND_INS, ForbiddenClass, Pickler, restricted
from anon_dist.checkpoint.torchfiles.stored_zip import StoredZip

LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""The magic number that files before torch 1.6 begin with."""
_SHARDS = ("torch.distributed.tensor", "torch.distributed._tensor", "torch.distributed._shard")

_SUBCLASS = (
    "holds tensors of a subclass, as torchao's optimizers keep their states (OptimState8bit, OptimState4bit, OptimStateFp8): their "
    "numbers are read from whole files of torch.save only, and those of these classes. Save state[key].dequantize() in place of each"
)


def _nothing_else(module: str, name: str) -> None:
    """No further class; see `pickles.restricted`."""


def open_torch(
    path: Path, unsafe: bool = False, also: Callable[[str, str], Any] = _nothing_else, advice: bool = True
) -> Any:
    """What was saved with `torch.save`; its tensors are views of the mapped file.

    Classes that such files often hold (`pickles.STAND_INS`) become inert stand-ins with the attributes they had.

    Args:
        unsafe: build whatever classes the file asks for, which may run any code.
        also: see `pickles.restricted`.
        advice: whether a refusal names --unsafe.

    Raises:
        DamagedCheckpoint: no such file, or damaged.
        CheckpointError: it asks for a class that is not known.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise FileNotFoundError
        zipped = zipfile.is_zipfile(path)
        if zipped and not unsafe:
            file = MappedFile(path)
            return open_embedded(file, 0, file.size, also=also, advice=advice)
        if not zipped and not starts(path, LEGACY):
            raise pickle.UnpicklingError("it begins with neither of torch's marks")
        if sums_of(path) is not None:
            MappedFile(path).check(0, path.stat().st_size)
        # files before torch 1.6 cannot be mapped
        how = None if unsafe else restricted(also=also)
        return torch.load(path, "cpu", mmap=zipped, weights_only=False, pickle_module=how)
    except ForbiddenClass as error:
        raise _forbidden(path, error, advice) from None
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} does not exist; a complete checkpoint has it") from None
    except CheckpointError:
        raise
    except Exception as error:  # damaged files raise whatever the first wrong byte leads to
        raise _damaged(path, error) from None


def is_torch_file(path: Path) -> bool:
    """Whether a file begins as those of `torch.save` do."""
    return zipfile.is_zipfile(path) or starts(path, LEGACY)


def starts(path: Path, magic: bytes) -> bool:
    """Whether a file begins with these bytes."""
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _forbidden(path: Path, error: ForbiddenClass, advice: bool) -> CheckpointError:
    if str(error).endswith("_rebuild_wrapper_subclass") or str(error).startswith("torchao."):
        return CheckpointError(f"{path} {_SUBCLASS}")
    if str(error).startswith(_SHARDS):
        return CheckpointError(
            f"{path} holds one rank's shard of a tensor ({error}), without the others. Save with torch.distributed.checkpoint, or "
            "gather the state dictionaries first (StateDictOptions(full_state_dict=True))"
        )
    said = ". If you trust the file's origin, `anon-dist ckpt convert --unsafe` reads it" if advice else ""
    return CheckpointError(f"{path} holds an object of {error}, which could run code when read{said}")


def _damaged(path: Path, error: Exception) -> DamagedCheckpoint:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DamagedCheckpoint(
        f"{path} is damaged, truncated, or no file of torch.save: {reason}. Take another checkpoint, or copy it again"
    )


class _Slice(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: MappedFile, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seekable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """See `io.RawIOBase`."""
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        """See `io.RawIOBase`."""
        left = max(self._size - self._at, 0)
        data = self._file.read(self._start + self._at, left if size < 0 else min(size, left))
        self._at += len(data)
        return data


def open_embedded(
    file: MappedFile,
    start: int,
    size: int,
    stand_ins: Any = STAND_INS,
    also: Callable[[str, str], Any] = _nothing_else,
    advice: bool = True,
) -> Any:
    """What `torch.save` wrote into bytes [start, start + size) of a file, as `open_torch` reads it.

    Args:
        stand_ins, also: see `pickles.restricted`.
        advice: see `open_torch`.

    Raises:
        CheckpointError: see `open_torch`.
    """
    try:
        with zipfile.ZipFile(_Slice(file, start, size)) as archive:
            records = {i.filename.partition("/")[2]: i for i in archive.infolist()}
            if len(records) < len(archive.infolist()):
                raise ValueError("a record is in it twice")
            folder = archive.infolist()[0].filename.partition("/")[0]
            pickled = archive.read(f"{folder}/data.pkl")
            order = archive.read(f"{folder}/byteorder").decode() if "byteorder" in records else sys.byteorder
        if order != sys.byteorder:
            raise CheckpointError(f"{file.path} was written on a {order}-endian machine; save it again on this kind")
        found = _Embedded(file, start, size, records).load(pickled, stand_ins, also)
        torch._utils._validate_loaded_sparse_tensors()
        return found
    except ForbiddenClass as error:
        raise _forbidden(file.path, error, advice) from None
    except CheckpointError:
        raise
    except Exception as error:
        raise _damaged(file.path, error) from None


class _Embedded:
    """The records of a `torch.save` in a part of a file."""

    def __init__(self, file: MappedFile, start: int, size: int, records: Mapping[str, Any]) -> None:
        self._file, self._start, self._size, self._records = file, start, size, records
        self._storages: dict[str, Any] = {}

    def load(self, pickled: bytes, stand_ins: Any, also: Callable[[str, str], Any]) -> Any:
        """The object."""

        def known(module: str, name: str) -> Any:
            found = also(module, name)
            return _storage_kind(module, name) if found is None else found

        unpickler = restricted(stand_ins, also=known).Unpickler(io.BytesIO(pickled))
        unpickler.persistent_load = self._storage
        return unpickler.load()

    def _storage(self, saved: Any) -> Any:
        """What a tensor's reference to its storage stands for; a storage that several share is one."""
        mark, kind, key, _, numel = saved
        if mark != "storage":
            raise pickle.UnpicklingError(f"an unknown reference {mark!r}")
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        if key not in self._storages:
            record = self._records[f"data/{key}"]
            if record.compress_type != zipfile.ZIP_STORED:
                raise pickle.UnpicklingError(f"record {record.filename} is compressed, which torch.save does not do")
            header = self._start + record.header_offset
            name, extra = struct.unpack("<2H", self._file.read(header + 26, 4))
            begin, length = header + 30 + name + extra, numel * dtype.itemsize
            if length > record.file_size or begin + length > self._start + self._size:
                raise pickle.UnpicklingError(f"record {record.filename} is shorter than the tensor in it")
            self._storages[key] = self._file.tensor(torch.uint8, begin, length).untyped_storage()
        return torch.storage.TypedStorage(wrap_storage=self._storages[key], dtype=dtype, _internal=True)


def _storage_kind(module: str, name: str) -> Any:
    """The classes of storages, as `torch.load` maps them."""
    if module in ("torch", "torch.cuda") and name in _STORAGES:
        return torch.UntypedStorage if name == "UntypedStorage" else torch.serialization.StorageType(name)
    return None


_STORAGES = {"UntypedStorage", *torch.storage._dtype_to_storage_type_map().values()}


def to_bytes(obj: Any) -> bytes:
    """What `torch.save` writes; without stubs."""
    laid_out = lay_out(PurePosixPath("."), obj)
    whole = bytearray(laid_out.size)
    for offset, data in laid_out.literals:
        whole[offset : offset + len(data)] = data
    return bytes(whole)


def lay_out(path: PurePosixPath, obj: Any) -> OutFile:
    """The file that `torch.save(obj)` writes, if the `Stub`s in `obj` were tensors. No tensor is allocated for them.

    The same `Stub` object in two places is one tensor, as with `torch.save`. Literal tensors are written as they are, each with no more
    of its storage than it shows. `StandIn`s are written as what they stand for.
    """
    pickled = _Pickler()
    pickled.dump(obj)
    data = pickled.file.getvalue()
    container, regions = StoredZip(), list[Region]()
    container.add("data.pkl", data)
    container.add(".format_version", b"1")
    container.add(".storage_alignment", b"64")
    container.add("byteorder", sys.byteorder.encode())
    for number, content in enumerate(pickled.storages):
        if isinstance(content, Stub):
            start = container.reserve(f"data/{number}", _numel(content.shape) * content.dtype.itemsize)
            regions += _regions(path, content, start)
        else:
            container.add(f"data/{number}", content)
    container.add("version", b"3\n")
    container.add(".data/serialization_id", str(int(hashlib.sha1(data).hexdigest(), 16) % 10**40).zfill(40).encode())
    container.close()
    return OutFile(path, container.end, container.literals, regions)


class _Storage:
    """Stands for a storage in the pickle."""

    def __init__(self, number: int, kind: Any, size: int) -> None:
        self.pickled = ("storage", kind, str(number), "cpu", size)


class _Pickler(Pickler):
    """Writes tensors and stubs as torch does: as references to numbered storages, which it collects."""

    def __init__(self) -> None:
        self.file = io.BytesIO()
        super().__init__(self.file)
        self.storages: list[bytes | Stub] = []

    def persistent_id(self, obj: Any) -> Any:
        """See `pickle.Pickler`."""
        return obj.pickled if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: Any) -> Any:
        """See `pickle.Pickler`."""
        if isinstance(obj, Stub):
            return self._tensor(obj, obj.shape, obj.dtype)
        if type(obj) is torch.nn.Parameter:
            return torch._utils._rebuild_parameter, (obj.detach(), obj.requires_grad, EMPTY)
        if type(obj) is Tensor:
            data = verified(obj).detach().cpu().contiguous()
            content = data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b""
            return self._tensor(content, tuple(data.shape), data.dtype)
        return NotImplemented

    def _tensor(self, content: bytes | Stub, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, Any]:
        number, numel = len(self.storages), _numel(shape)
        self.storages.append(content)
        if (
            dtype not in torch.storage._dtype_to_storage_type_map()
        ):  # float8 and younger: bytes, and the dtype beside them
            storage = _Storage(number, torch.UntypedStorage, numel * dtype.itemsize)
            return torch._utils._rebuild_tensor_v3, (storage, 0, shape, _strides(shape), False, EMPTY, dtype)
        storage = _Storage(number, getattr(torch, torch.storage._dtype_to_storage_type_map()[dtype]), numel)
        return torch._utils._rebuild_tensor_v2, (storage, 0, shape, _strides(shape), False, EMPTY)


def _regions(path: PurePosixPath, stub: Stub, start: int) -> list[Region]:
    regions, offset = [], start
    for part in stub.parts:
        if (part.key is not None or part.fill) and part.stop > part.start:
            regions.append(Region(Part(*part), stub.dtype, offset))
        offset += (part.stop - part.start) * stub.dtype.itemsize
    wanted = _numel(stub.shape) * stub.dtype.itemsize
    if offset - start != wanted:
        raise ValueError(f"{path}: parts of {offset - start} bytes for a tensor of shape {stub.shape}, {wanted} bytes")
    return regions


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [0] * len(shape), 1
    for i in reversed(range(len(shape))):
        strides[i], step = step, step * max(shape[i], 1)
    return tuple(strides)
