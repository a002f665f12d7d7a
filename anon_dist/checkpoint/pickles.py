"""Pickles read without running code: known harmless classes are built, foreign ones become inert stand-ins, the rest is refused."""

from __future__ import annotations

import collections
import copyreg
import pickle
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any

import torch

STAND_INS = ("deepspeed", "megatron", "accelerate", "transformers", "omegaconf", "argparse", "torch.optim", "__main__")
"""Packages whose classes are kept as `StandIn`s: their state is read, their code is not. `__main__`: the training script's own."""

_HARMLESS = {
    "collections": ("OrderedDict", "Counter", "defaultdict", "deque"),
    "builtins": ("set", "frozenset", "complex", "bytes", "bytearray", "slice", "range", "list", "dict", "tuple", "int", "float", "str",
                 "bool"),
    "_codecs": ("encode",),
    "datetime": ("datetime", "date", "timedelta", "timezone"),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "torch": ("Size", "device", "Tensor"),
    "torch.nn.parameter": ("Parameter",),
    "torch.storage": ("UntypedStorage",),
    "torch.serialization": ("_get_layout",),
    "torch._tensor": ("_rebuild_from_type_v2",),
    "torch._utils": (
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_sparse_tensor",
        "_rebuild_qtensor",
    ),
    "numpy": ("ndarray", "dtype"),
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
}  # fmt: skip
_MOVED = {
    "__builtin__": "builtins",
    "torch.tensor": "torch._tensor",
    "numpy.core.multiarray": "numpy._core.multiarray",
}


class ForbiddenClass(pickle.UnpicklingError):
    """A pickle asks for a class or function that is neither known nor kept as a stand-in; the message is its name."""


class StandIn:
    """An object of a class that is not imported: its attributes as pickled, and how it is pickled again.

    Each class has a subclass of its own, with the original's `__module__` and `__qualname__`.
    """

    _arguments: tuple[Any, ...]
    _called = False
    _items: list[Any]

    def __new__(cls, *arguments: Any) -> StandIn:
        made = super().__new__(cls)
        made.__dict__.update(_arguments=arguments, _items=[])
        return made

    def __init__(self, *arguments: Any) -> None:
        self.__dict__["_called"] = True  # by REDUCE; NEWOBJ leaves __init__ out

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        if all(part is None or isinstance(part, dict) for part in parts):
            for part in parts:
                self.__dict__.update(part or {})
        else:
            self.__dict__["_state"] = state

    def append(self, item: Any) -> None:
        """Elements of a list's subclass."""
        self._items.append(item)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Entries of a dictionary's subclass."""
        self._items.append((key, value))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        own = {k: v for k, v in self.__dict__.items() if k not in ("_arguments", "_called", "_items", "_state")}
        state = self.__dict__.get("_state", own or None)
        paired = bool(self._items) and all(isinstance(i, tuple) and len(i) == 2 for i in self._items)
        how: tuple[Any, ...] = (type(self), self._arguments)
        if not self._called:
            how = (copyreg.__newobj__, (type(self), *self._arguments))  # type: ignore[attr-defined]
        return (*how, state, None if paired else iter(self._items), iter(self._items) if paired else None)

    def __repr__(self) -> str:
        own = {k: v for k, v in self.__dict__.items() if not k.startswith("_")}
        return f"{type(self).__module__}.{type(self).__qualname__}({', '.join(map(repr, self._arguments))}{own or ''})"


def _reconstructor(cls: type, base: type, state: Any) -> Any:
    """copyreg's, for stand-ins alone."""
    if not issubclass(cls, StandIn):
        raise ForbiddenClass(f"copyreg._reconstructor of {cls.__name__}")
    return cls.__new__(cls)


def restricted(
    stand_ins: Collection[str] = STAND_INS, also: Callable[[str, str], Any] = lambda module, name: None
) -> Any:
    """A replacement for the module `pickle` that finds harmless classes only; for `torch.load(pickle_module=…)` too.

    Args:
        stand_ins: packages whose classes become `StandIn`s.
        also: further classes by module and name, None for those it does not know.
    """
    made: dict[tuple[str, str], type] = {}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            module = _MOVED.get(module, module)
            if (found := also(module, name)) is not None:
                return found
            if name in _HARMLESS.get(module, ()) or _is_value(module, name):
                return super().find_class(module, name)
            if (module, name) == ("copyreg", "_reconstructor"):
                return _reconstructor
            if any(module == p or module.startswith(p + ".") for p in stand_ins):
                attributes = {"__module__": module, "__qualname__": name}
                return made.setdefault((module, name), type(name.rpartition(".")[2], (StandIn,), attributes))
            raise ForbiddenClass(f"{module}.{name}")

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    module = ModuleType("restricted")
    module.__dict__.update(Unpickler=Unpickler, load=load, UnpicklingError=pickle.UnpicklingError)
    return module


def _is_value(module: str, name: str) -> bool:
    """A torch dtype, layout or memory format, a storage class, or numpy's class of a dtype."""
    if module == "numpy.dtypes":
        return name.isidentifier() and name.endswith("DType")
    found = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
    return isinstance(found, torch.dtype | torch.layout | torch.memory_format) or found in torch._storage_classes


_Python: Any = pickle._Pickler


class Pickler(_Python):
    """Python's pickler, which takes the classes of stand-ins too: the original's name is written, without importing it.

    Protocol 2, as torch.save.
    """

    def __init__(self, file: Any) -> None:
        super().__init__(file, protocol=2)

    def save_global(self, obj: Any, name: str | None = None) -> None:
        """See `pickle.Pickler`."""
        if isinstance(obj, type) and issubclass(obj, StandIn):
            self.write(pickle.GLOBAL + f"{obj.__module__}\n{obj.__qualname__}\n".encode())
            self.memoize(obj)
        else:
            super().save_global(obj, name)

    def save_type(self, obj: Any) -> None:
        """See `pickle.Pickler`; its table of types leads here."""
        if issubclass(obj, StandIn):
            self.save_global(obj)
        else:
            super().save_type(obj)

    dispatch = {**_Python.dispatch, type: save_type}  # noqa: RUF012


EMPTY: dict[str, Any] = collections.OrderedDict()
"""The hooks of a tensor, as torch pickles them."""
