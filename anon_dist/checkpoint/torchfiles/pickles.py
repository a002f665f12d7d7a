"""Pickles read without running code: known harmless classes are built, foreign ones become inert stand-ins, the rest is refused.

Classes and functions are known by their exact names, and nothing that is found by name can be given attributes.
"""

from __future__ import annotations

import collections
import copyreg
import enum
import importlib
import pickle
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch

ANY_NAME = ("*",)
"""Of a module of `STAND_INS`: any class, but none of another's attributes."""
_MEGATRON = ("ModelType", "LayerType", "AttnType", "AttnMaskType", "AttnBackend", "PositionEmbeddingType", "InitType")
_OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}
STAND_INS: Mapping[str, Collection[str]] = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler", "LossScalerBase"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.runtime.zero.offload_config": ("OffloadDeviceEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
    "megatron.enums": _MEGATRON,
    "megatron.model.enums": _MEGATRON,
    "megatron.core.enums": _MEGATRON,
    "megatron.core.transformer.enums": _MEGATRON,
    "accelerate.data_loader": ("SeedableRandomSampler",),
    "accelerate.utils.dataclasses": ("DistributedType", "PrecisionType"),
    "transformers.trainer_utils": ("IntervalStrategy", "SaveStrategy", "SchedulerType", "HubStrategy"),
    "transformers.training_args": ("OptimizerNames", "TrainingArguments"),
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.nodes": (
        "AnyNode",
        "StringNode",
        "IntegerNode",
        "FloatNode",
        "BooleanNode",
        "BytesNode",
        "PathNode",
        "EnumNode",
    ),
    "typing": ("Any", "Dict", "List"),
    "argparse": ("Namespace",),
    "__main__": ANY_NAME,  # the training script's own
    "torch.optim.lr_scheduler": tuple(torch.optim.lr_scheduler.__all__),
    **{f"torch.optim.{module}": (name,) for module, name in _OPTIMIZERS.items()},
}
"""Module → names of classes that are kept as `StandIn`s: their state is read, their code is not. Exact names: what is written again by its
name may be executed by whoever reads it."""

_HARMLESS = {
    "collections": ("OrderedDict", "Counter", "defaultdict", "deque"),
    "builtins": ("set", "frozenset", "complex", "bytes", "bytearray", "slice", "range", "list", "dict", "tuple", "int", "float", "str",
                 "bool"),
    "_codecs": ("encode",),
    "datetime": ("datetime", "date", "timedelta", "timezone"),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "torch": ("Size", "device", "Tensor"),
    "torch.nn.parameter": ("Parameter", "Buffer"),
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
        "_rebuild_nested_tensor",
        "_rebuild_meta_tensor_no_storage",
        "_rebuild_device_tensor_from_cpu_tensor",
    ),
    "numpy": ("dtype",),
    "numpy._core.multiarray": ("scalar",),
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
    _member: str
    """Of an enumeration, if it was pickled by its member's name."""
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
        if "_member" in self.__dict__:
            return getattr, (type(self), self._member)
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


_STAGES = ("disabled", "optimizer_states", "gradients", "weights")
"""DeepSpeed's names of ZeRO's stages 0 to 3."""


def _member(cls: Any = None, name: Any = None) -> Any:
    """`getattr` as Python 3.11.0 to 3.11.3 pickle a member of an enumeration; of nothing else."""
    if isinstance(cls, enum.EnumMeta) and name in cls.__members__:
        return cls[name]
    if (
        isinstance(cls, type)
        and issubclass(cls, StandIn)
        and isinstance(name, str)
        and name.isidentifier()
        and name[0] != "_"
    ):
        if cls.__qualname__ == "ZeroStageEnum" and name in _STAGES:
            return cls(_STAGES.index(name))  # as other versions of Python pickle it
        found = cls.__new__(cls)
        found.__dict__["_member"] = name
        return found
    raise ForbiddenClass(f"builtins.getattr of {getattr(cls, '__qualname__', cls)}")


_NDARRAY = object()
"""Stands for numpy.ndarray, which takes bytes for pointers if it is called with them."""


def _array(cls: Any, shape: Any, kind: Any) -> Any:
    """numpy's `_reconstruct`: an empty array, whose state is set next."""
    if cls is not _NDARRAY:
        raise ForbiddenClass(f"numpy's _reconstruct of {cls}")
    return np.empty(0, dtype=np.int8)


_REPLACED: Mapping[tuple[str, str], Any] = {
    ("builtins", "getattr"): _member,
    ("copyreg", "_reconstructor"): _reconstructor,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy._core.multiarray", "_reconstruct"): _array,
}
_Slow: Any = pickle._Unpickler  # Python's own: what C's does when it sets attributes cannot be overridden


def restricted(
    stand_ins: Mapping[str, Collection[str]] = STAND_INS, also: Callable[[str, str], Any] = lambda module, name: None
) -> Any:
    """A replacement for the module `pickle` that finds harmless classes only; for `torch.load(pickle_module=…)` too.

    Args:
        stand_ins: module → names of classes that become `StandIn`s.
        also: further classes by module and name, None for those it does not know.
    """
    made: dict[tuple[str, str], type] = {}

    class Unpickler(_Slow):
        def find_class(self, module: str, name: str) -> Any:
            """The class or function that a pickle may have under this name, or a stand-in; raises `ForbiddenClass` for any other."""
            module = _MOVED.get(module, module)
            if (found := also(module, name)) is not None:
                return found
            if name in _HARMLESS.get(module, ()) or _is_value(module, name):
                return getattr(importlib.import_module(module), name)
            if (module, name) in _REPLACED:
                return _REPLACED[module, name]
            names = stand_ins.get(module, ())
            if name in names or (names is ANY_NAME and name.isidentifier()):
                attributes = {"__module__": module, "__qualname__": name}
                return made.setdefault((module, name), type(name, (StandIn,), attributes))
            raise ForbiddenClass(f"{module}.{name}")

        def get_extension(self, code: int) -> None:
            """Raises `ForbiddenClass`: a number does not say what is asked for."""
            raise ForbiddenClass(f"copyreg's extension {code}")

        def load_build(self) -> None:
            """As `pickle`'s, once the state is known to change nothing but the object."""
            _check_state(self.stack[-2], self.stack[-1])
            _Slow.load_build(self)

        dispatch = {**_Slow.dispatch, pickle.BUILD[0]: load_build}  # noqa: RUF012

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    module = ModuleType("restricted")
    module.__dict__.update(Unpickler=Unpickler, load=load, UnpicklingError=pickle.UnpicklingError)
    return module


def _check_state(obj: Any, state: Any) -> None:
    """Raises `ForbiddenClass` where setting an object's state would change what others do, or how memory is read."""
    if isinstance(obj, type | ModuleType) or callable(obj):
        raise ForbiddenClass(f"a state for {getattr(obj, '__qualname__', obj)}")
    if isinstance(obj, np.dtype):  # flags and fields that do not fit would have bytes taken for pointers
        _, _, subtype, names, fields, _, _, flags, *_ = state
        usual = np.dtype(obj.str).flags if obj.names is None else None
        if not (subtype is None and names is None and fields is None and flags == usual):
            raise ForbiddenClass("numpy.dtype with fields or flags of its own")


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
