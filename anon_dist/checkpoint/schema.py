"""The one form that every optimizer checkpoint is read as and written from.

A checkpoint is a set of tensors, each known by the parameter it belongs to and the state key it has there, with its global shape whatever
ranks held of it; and a manifest of everything else. Readers (one file per format) give a `Checkpoint`; `semantics` turns one into another;
writers lay files out as literal bytes and `Region`s of tensors, which `copy` fills block by block. Nothing here knows an optimizer:
whatever states a parameter has are carried.

Elements are addressed by ranges of the row-major flattened global tensor, which ZeRO's flat partitions, FSDP2's rows and whole files
have in common.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

WEIGHT = "weight"
"""State key of a parameter's or buffer's value in the model, in the model's dtype."""
MASTER = "master"
"""State key of the float32 copy that the optimizer steps, where the checkpoint has one beside the weight."""


EXTRA = "extra"
"""State key of a large tensor in `Manifest.extras`, whose path there stands for the parameter's name."""


class Key(NamedTuple):
    """A tensor of a checkpoint."""

    parameter: str
    """Name of the parameter or buffer in the unwrapped model."""
    state: str
    """`WEIGHT`, `MASTER`, or a key of the optimizer's state, such as exp_avg."""


@dataclass(frozen=True)
class Ref:
    """Stands in a nested value for a tensor of the checkpoint."""

    key: Key


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor is, unsharded."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Elements, 1 for a 0-dim tensor."""
        return math.prod(self.shape)


@dataclass
class ParamGroup:
    """A param group of the optimizer."""

    members: list[str]
    """Parameter names, in the optimizer's order."""
    hyperparameters: dict[str, Any]
    """All keys of the group but `params`."""


@dataclass
class Manifest:
    """All of a checkpoint that is not a tensor of more than zero dimensions."""

    format: str
    """Of the source, a name of `formats.FORMATS`."""
    world_size: int | None
    """Ranks that wrote it; None where the source does not tell."""
    optimizer: str | None
    """Class name, recorded or recognised by the state's keys; None: no optimizer state."""
    groups: list[ParamGroup]
    scalars: dict[str, dict[str, Any]]
    """Parameter name → state key → 0-dim tensor or Python number: `step` and the like. Kept in the type they had. A nested
    state (a dictionary or list with tensors in it) is here too, a `Ref` in each tensor's place."""
    order: list[str]
    """Parameter names in the model's order, frozen ones included."""
    buffers: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    unsure: list[str] = field(default_factory=list)
    """Of the frozen: those that may be buffers, as the source does not tell the two apart."""
    tied: dict[str, str] = field(default_factory=dict)
    """Alias → the name under which a tied parameter is stored."""
    step: int | None = None
    """Steps of training, where the source tells."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Everything else a resume needs, by its usual name: lr_scheduler, loss_scaler, data, rng, client_state, …. Large tensors
    in it (a moving average of the weights, say) are `Ref`s."""
    inside: list[str] = field(default_factory=list)
    """Extras that a script's DCP has among its tensors, as `dcp.load` looks for them there; the others lie in files beside."""
    notes: list[str] = field(default_factory=list)
    """What a reader had to assume or leave out, for the user to see."""


class Checkpoint(ABC):
    """A checkpoint, opened: tensors are read by ranges, when asked."""

    manifest: Manifest
    tensors: Mapping[Key, TensorInfo]
    """Every tensor of one or more dimensions, and 0-dim weights."""

    @abstractmethod
    def read(self, key: Key, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor, row-major; 1-D, in the tensor's dtype, on the CPU.

        It may be a view of a mapped file: not to be written to. Safe to call from several threads.

        Raises:
            CheckpointError: the bytes are missing or damaged; naming file and tensor.
        """

    def pieces(self, key: Key, start: int, stop: int) -> Iterator[Tensor]:
        """What `read` gives, in consecutive pieces: overridden where they are views and `read` would have to put them together."""
        yield self.read(key, start, stop)

    def close(self) -> None:  # noqa: B027 - most readers have nothing to close
        """Give back files and memory."""


class Part(NamedTuple):
    """Elements [start, stop) of a tensor; with `key` None, that many of `fill` (padding)."""

    key: Key | None
    start: int
    stop: int
    fill: float = 0.0


@dataclass(frozen=True)
class Stub:
    """Stands, in an object to be written with `torch.save`, for a tensor that is filled from the source: its parts, one after the other."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Sequence[Part]


@dataclass(frozen=True)
class Region:
    """Where a part goes in a file."""

    part: Part
    dtype: torch.dtype
    """As written; the part is cast to it."""
    offset: int
    """In bytes."""


@dataclass
class OutFile:
    """A file to be written: literal bytes and regions, which do not overlap; what neither covers is zero."""

    path: PurePosixPath
    """Below the target, or the target itself as `.`."""
    size: int
    literals: list[tuple[int, bytes]]
    regions: list[Region]
    finish: Callable[[Path], None] | None = None
    """Called with the file once it is filled; for checksums."""
    observe: Callable[[int, memoryview], None] | None = None
    """Called with the offset of each block of `copy.BLOCK` bytes of a region (the last one shorter) and its bytes as they are written,
    which may be in several calls, one after the other. Not for blocks that an interrupted conversion wrote before."""
