"""Files of `torch.save`: opened without running code or loading tensors, and laid out without having the tensors."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.pickles import EMPTY, ForbiddenClass, Pickler, restricted
from anon_dist.checkpoint.schema import OutFile, Part, Region, Stub
from anon_dist.checkpoint.stored_zip import StoredZip

_SHARDS = ("torch.distributed.tensor", "torch.distributed._tensor", "torch.distributed._shard")

_SUBCLASS = (
    "holds tensors of a subclass, as torchao's 8-bit and 4-bit optimizers keep their states (OptimState8bit, OptimState4bit): their "
    "numbers are not read here. Save state[key].dequantize() in place of each, and load it into an optimizer of full precision"
)


def open_torch(path: Path, unsafe: bool = False, also: Callable[[str, str], Any] | None = None) -> Any:
    """What was saved with `torch.save`; its tensors are views of the mapped file.

    Classes of packages that write such files (`pickles.STAND_INS`) become inert stand-ins with the attributes they had.

    Args:
        unsafe: build whatever classes the file asks for, which may run any code.
        also: see `pickles.restricted`.

    Raises:
        CheckpointError: no such file, damaged, or it asks for a class that is not known.
    """
    path = Path(path)

    def load(**how: Any) -> Any:
        mapped = zipfile.is_zipfile(path) if path.is_file() else True  # files before torch 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", mmap=mapped, **how)

    try:
        if unsafe:
            return load(weights_only=False)
        return load(weights_only=False, pickle_module=restricted(also=also)) if also else _load_safely(load)
    except ForbiddenClass as error:
        if str(error).startswith(_SHARDS):
            raise CheckpointError(
                f"{path} holds one rank's shard of a tensor ({error}), without the others. Save with torch.distributed.checkpoint, or "
                "gather the state dictionaries first (StateDictOptions(full_state_dict=True))"
            ) from None
        if str(error).endswith("_rebuild_wrapper_subclass"):
            raise CheckpointError(f"{path} {_SUBCLASS}") from None
        advice = "" if also else ". If you trust the file's origin, read it with --unsafe"
        raise CheckpointError(f"{path} holds an object of {error}, which could run code when read{advice}") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a complete checkpoint has it") from None
    except Exception as error:  # damaged files raise whatever the first wrong byte leads to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is damaged, truncated, or no file of torch.save: {reason}. Take another checkpoint, or copy it again"
        ) from None


def _load_safely(load: Callable[..., Any]) -> Any:
    try:
        return load(weights_only=True)
    except pickle.UnpicklingError:
        return load(weights_only=False, pickle_module=restricted())


def _map(path: Path, size: int) -> Any:
    return torch.UntypedStorage.from_file(str(path), False, size) if size else torch.UntypedStorage(0)


class MappedFile:
    """A file that is read where it is needed: bytes by position, tensors as views.

    Raises:
        CheckpointError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size = path.stat().st_size
            self._storage = _map(path, self.size)
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            raise CheckpointError(f"{path} cannot be opened: {reason}; a complete checkpoint has it") from None
        self._bytes: Any = torch.empty(0, dtype=torch.uint8).set_(self._storage).numpy()

    def read(self, start: int, size: int) -> bytes:
        """Bytes [start, start + size), fewer at the end of the file."""
        return bytes(self._bytes[start : start + size].tobytes())

    def tensor(self, dtype: torch.dtype, start: int, numel: int) -> Tensor:
        """Elements from the byte `start` on, 1-D; a view of the file."""
        if start + numel * dtype.itemsize > self.size:
            raise CheckpointError(f"{self.path} ends at byte {self.size}, before a tensor in it does; it is truncated")
        if not numel:
            return torch.empty(0, dtype=dtype)
        raw = self._storage[start : start + numel * dtype.itemsize]
        return torch.empty(0, dtype=dtype).set_(raw)


class _Slice(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: MappedFile, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._at, 0)
        data = self._file.read(self._start + self._at, left if size < 0 else min(size, left))
        self._at += len(data)
        return data


def open_embedded(file: MappedFile, start: int, size: int) -> Any:
    """What `torch.save` wrote into bytes [start, start + size) of a file, as `open_torch` reads it.

    Raises:
        CheckpointError: see `open_torch`.
    """
    try:
        with zipfile.ZipFile(_Slice(file, start, size)) as archive:
            records = {i.filename.partition("/")[2]: start + i.header_offset for i in archive.infolist()}
            folder = archive.infolist()[0].filename.partition("/")[0]
            pickled = archive.read(f"{folder}/data.pkl")
        return _embedded_unpickler(file, records, pickled).load()
    except ForbiddenClass as error:
        if str(error).endswith("_rebuild_wrapper_subclass"):
            raise CheckpointError(f"{file.path} {_SUBCLASS}") from None
        raise CheckpointError(f"{file.path} holds an object of {error}, which could run code when read") from None
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{file.path} is damaged at byte {start}: {error}") from None


def _embedded_unpickler(file: MappedFile, records: dict[str, int], pickled: bytes) -> Any:
    class Unpickler(restricted().Unpickler):  # type: ignore[misc]
        def find_class(self, module: str, name: str) -> Any:
            if module == "torch" and name.endswith("Storage"):
                return torch.serialization.StorageType(name) if name != "UntypedStorage" else torch.UntypedStorage
            return super().find_class(module, name)

        def persistent_load(self, saved: Any) -> Any:
            _, kind, key, _, numel = saved
            dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
            header = records[f"data/{key}"]
            name, extra = struct.unpack("<2H", file.read(header + 26, 4))
            raw = file.tensor(torch.uint8, header + 30 + name + extra, numel * dtype.itemsize).untyped_storage()
            return torch.storage.TypedStorage(wrap_storage=raw, dtype=dtype, _internal=True)

    return Unpickler(io.BytesIO(pickled))


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
            data = obj.detach().cpu().contiguous()
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
        if part.key is not None and part.stop > part.start:
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
