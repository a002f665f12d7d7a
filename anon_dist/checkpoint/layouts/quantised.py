"""States in 8, 4 and fp8 bits as torchao's optimizers keep them: read as the float32 numbers that they stand for.

torchao pickles a tensor of its own class. Neither the class nor torchao is imported: the attributes are data. Blocks of the flattened
tensor have a scale each; an element is its block's scale times what its code stands for, which is the entry of a table `qmap` (two codes to
a byte, the first in the high bits, where they have 4) or a float8 number. `dequantize` there gives the same bits.

Source: torchao/optim/subclass_8bit.py, subclass_4bit.py, subclass_fp8.py, quant_utils.py, `dequant_with_qmap`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from anon_dist.checkpoint.boxes import Boxes
from anon_dist.checkpoint.torchfiles.mapped import verified
from anon_dist.checkpoint.torchfiles.pickles import ForbiddenClass

_MODULES = ("torchao.optim", "torchao.prototype.low_bit_optim")
_KINDS = {"OptimState8bit": "subclass_8bit", "OptimState4bit": "subclass_4bit", "OptimStateFp8": "subclass_fp8"}
_PER_BYTE = {"OptimState8bit": 1, "OptimState4bit": 2, "OptimStateFp8": 1}
NOTE = (
    "states that torchao keeps in few bits are the float32 numbers here that they stand for; whether its weight decay is decoupled "
    "(AdamW…) or not (Adam…) is not recorded, and taken to be"
)


class Quantised(Boxes):
    """A quantised tensor as a float32 one.

    Raises:
        ValueError: its parts do not fit together.
    """

    def __init__(self, kind: str, attributes: Mapping[str, Any]) -> None:
        self._codes, self._scale = attributes["codes"], attributes["scale"].float()
        self._qmap, self._per_byte = attributes.get("qmap"), _PER_BYTE[kind]
        self.shape = tuple(attributes.get("_shape", self._codes.shape))
        self.dtype = torch.float32
        numel, blocks = prod(self.shape), self._scale.numel()
        bits = 8 // self._per_byte
        fits = self._codes.is_contiguous() and self._codes.numel() * self._per_byte == numel
        fits &= blocks > 0 and self._scale.dim() == 1 and numel % blocks == 0
        fits &= self._codes.dtype == (torch.float8_e4m3fn if kind == "OptimStateFp8" else torch.uint8)
        if not fits or (self._qmap is not None and self._qmap.shape != (2**bits,)):
            raise ValueError(f"an {kind} whose codes, scales and shape {self.shape} do not fit together")
        self._block = numel // blocks

    def read(self, start: int, stop: int) -> Tensor:
        """See `Boxes`."""
        if stop <= start:
            return torch.empty(0)
        first, last = start // self._per_byte, -(-stop // self._per_byte)
        codes = verified(self._codes.view(-1)[first:last])
        if self._per_byte == 2:
            codes = torch.stack([codes >> 4, codes & 15], -1).view(-1)[start - 2 * first : stop - 2 * first]
        values = codes.float() if self._qmap is None else verified(self._qmap)[codes.int()]
        return values * verified(self._scale)[torch.arange(start, stop) // self._block]

    def pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        """See `Boxes`."""
        yield self.read(start, stop)


class _Kind:
    """Stands for a class of torchao's in the pickle."""

    def __init__(self, name: str) -> None:
        self.name = name


def _wrapper(*arguments: Any) -> Any:
    """For `_rebuild_wrapper_subclass`: what it makes is empty, and its state has the contents."""
    return arguments


def _rebuild(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """For `_rebuild_from_type_v2`: of these classes by us, else by torch."""
    if isinstance(kind, _Kind) and function is _wrapper:
        return Quantised(kind.name, next(part for part in (state if isinstance(state, tuple) else (state,)) if part))
    if isinstance(kind, _Kind) or function is _wrapper:
        raise ForbiddenClass(f"torch._tensor._rebuild_from_type_v2 of {kind}")
    return torch._tensor._rebuild_from_type_v2(function, kind, arguments, state)


_BY_NAME: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_wrapper_subclass"): _wrapper,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild,
    **{(f"{package}.{module}", name): _Kind(name) for package in _MODULES for name, module in _KINDS.items()},
}


def known(module: str, name: str) -> Any:
    """For `pickles.restricted`."""
    return _BY_NAME.get((module, name))
