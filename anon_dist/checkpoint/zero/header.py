"""What the model states of a DeepSpeed checkpoint say: names, shapes, buffers, counters, schedule, the user's own entries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.schema import WEIGHT, Key, Manifest, ParamGroup, TensorInfo
from anon_dist.checkpoint.torchfiles.pickles import StandIn
from anon_dist.checkpoint.zero.files import Files, need
from anon_dist.checkpoint.zero.pieces import Pieces, entire

ENGINE_KEYS = (
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params"),
    *("frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps"),
    *("global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version"),
    "universal_checkpoint_info",
)
"""What the engine writes (engine.py, `_common_checkpoint_state`); every other entry is the user's `client_state`."""
CARRIED = "anon_dist"
"""Entry of what we write and DeepSpeed has no place for."""
KNOWN = (
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    "ds_config",
    "skipped_steps",
    "global_samples",
    "client_state",
    "loss_scaler",
    "buffer_names",
    "shared_params",
    "model_extra_state",
)
"""Extras that have a place of their own. Formats that tell neither buffers nor tied weights from parameters still carry extras, and so
the names of both."""


@dataclass
class Header:
    """The model states of rank 0."""

    file: Path
    state: dict[str, Any]
    module: Mapping[str, Tensor]
    shapes: list[dict[str, tuple[int, ...]]]
    """Names and shapes of each group (stage 3: sub-group) of the optimizer, in the buffer's order; empty at stage 0."""
    frozen: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    buffers: list[str]

    @property
    def world_size(self) -> int:
        """Ranks that wrote it."""
        return int(need(self.state, "dp_world_size", self.file, int))

    @property
    def names(self) -> list[str]:
        """Parameters in the model's order, each once."""
        return [n for n in self.module if n not in self.tied and n not in self.buffers]

    @property
    def zero_config(self) -> dict[str, Any]:
        """`zero_optimization` of the configuration that wrote it."""
        config = self.state.get("ds_config")
        found = config.get("zero_optimization") if isinstance(config, dict) else None
        return found if isinstance(found, dict) else {}

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's, unsharded."""
        for known in (*self.shapes, self.frozen):
            if name in known:
                return known[name]
        return tuple(self.module[name].shape)


def read_header(files: Files, file: Path) -> Header:
    """Raises `CheckpointError` where the file is not what DeepSpeed writes."""
    state = files.load(file, "the model states")
    if state.get("mp_world_size", 1) != 1:
        raise CheckpointError(f"{file}: written under tensor parallelism (mp_world_size {state['mp_world_size']})")
    saved = need(state, "module", file, dict)
    module = {str(n): t for n, t in saved.items() if isinstance(t, Tensor)}
    buffers = list(state.get("buffer_names") or ())
    shapes = [_shapes(group) for group in state.get("param_shapes") or ()]
    tied = {str(k): str(v) for k, v in (state.get("shared_params") or {}).items()}
    tied = tied or _aliases({n: t for n, t in module.items() if n not in buffers})
    frozen = _shapes(state.get("frozen_param_shapes") or {})
    header = Header(file, state, module, shapes, frozen, tied, buffers)
    if shapes and not frozen:  # stage 1 does not say
        trained = {n for group in shapes for n in group}
        header.frozen = {n: tuple(module[n].shape) for n in header.names if n not in trained}
    return header


def _shapes(group: Mapping[str, Iterable[int]]) -> dict[str, tuple[int, ...]]:
    return {str(name): tuple(int(n) for n in shape) for name, shape in group.items()}


def _aliases(module: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of the same elements of the same storage → the first of them."""
    first: dict[tuple[Any, ...], str] = {}
    found = {}
    for name, t in module.items():
        place = (t.untyped_storage().data_ptr(), t.storage_offset(), tuple(t.shape))
        if t.numel() and first.setdefault(place, name) != name:
            found[name] = first[place]
    return found


def opened(header: Header, name: str, groups: list[ParamGroup], scalars: dict[str, dict[str, Any]]) -> Pieces:
    """A checkpoint without tensors yet, with all that the model states tell, and the optimizer's groups and scalars.

    `scalars` may be filled later.
    """
    state = header.state
    trained = {m for group in groups for m in group.members}
    found = Pieces(
        Manifest(
            format=name,
            world_size=header.world_size,
            optimizer=None,
            groups=groups,
            scalars=scalars,
            order=header.names,
            buffers=list(header.buffers),
            frozen=[n for n in header.names if n not in trained] if groups else list(header.frozen),
            tied=dict(header.tied),
            step=state.get("global_steps"),
        )
    )
    extras = {
        k: state[k] for k in KNOWN if state.get(k) not in (None, [], {}) and k not in ("client_state", "loss_scaler")
    }
    carried = state.get(CARRIED)
    carried = carried if isinstance(carried, dict) else {}
    found.manifest.optimizer, found.manifest.unsure = carried.get("optimizer"), list(carried.get("unsure") or ())
    if found.manifest.unsure:
        extras.pop("buffer_names", None)  # which would say that these are none
    elif isinstance(state.get("buffer_names"), list) and found.manifest.frozen:
        extras["buffer_names"] = list(header.buffers)  # if there are none, the frozen are sure not to be buffers
    if header.tied:
        extras["shared_params"] = dict(header.tied)
    if others := {n: v for n, v in state["module"].items() if not isinstance(v, Tensor)}:
        extras["model_extra_state"] = others  # what modules save by get_extra_state
    if client := {k: v for k, v in state.items() if k not in ENGINE_KEYS and k != CARRIED}:
        extras["client_state"] = client
    found.manifest.extras = {k: found.add_nested(k, v, header.file) for k, v in extras.items()}
    return found


def add_module(found: Pieces, header: Header, names: Iterable[str]) -> None:
    """Weights and buffers that lie whole in the model states."""
    for name in names:
        value = header.module[name]
        info = TensorInfo(header.shape(name) if name not in header.buffers else tuple(value.shape), value.dtype)
        found.add(Key(name, WEIGHT), info, entire(value, header.file))


def add_scaler(found: Pieces, scaler: Any) -> None:
    """The loss scaler, an object that the engine pickled or a dict, as a dict of its attributes."""
    if scaler is not None and not isinstance(scaler, dict):
        kind = type(scaler)
        attributes = {k: v for k, v in vars(scaler).items() if not k.startswith("_")}
        scaler = {"class": f"{kind.__module__}.{kind.__qualname__}", **attributes}
    if scaler is not None:
        found.manifest.extras["loss_scaler"] = scaler


def is_number(value: Any) -> bool:
    """Whether a state is one number for all of a parameter: a 0-dim tensor or a Python number."""
    return value.dim() == 0 if isinstance(value, Tensor) else isinstance(value, (int, float, bool))


def fresh(value: Any) -> Any:
    """A number of its own: optimizers count in place, and a `step` that several parameters share would run ahead."""
    return value.clone() if isinstance(value, Tensor) else value


def same_number(a: Any, b: Any) -> bool:
    """Equality of two numbers, NaN equal to itself."""
    a, b = (float(v) for v in (a, b))
    return a == b or (math.isnan(a) and math.isnan(b))


def number(value: Any) -> int:
    """An integer, or a member of an enumeration that was pickled by its value."""
    if isinstance(value, StandIn):
        value = value._arguments[0]
    return int(value)
