"""Initial weights, as the model's own code draws them, without the model: any rank computes any range of any parameter.

transformers initialises a model on torch's meta device while its calls are recorded: which distribution each parameter has. The numbers are
those of a stream of blocks, each from a seed of its own, so that they depend neither on who computes them nor on how parameters are cut.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization

from anon_dist.checkpoint.schema import WEIGHT, Checkpoint, Key, Manifest, TensorInfo
from anon_dist.train.config.parsing import ConfigError

BLOCK = 1 << 16
"""Elements that have a seed of their own."""

Draw = Callable[[Tensor, torch.Generator], Tensor]
"""Fills a block, in place."""


@dataclass(frozen=True)
class Fill:
    """What elements [start, stop) of a parameter, row-major, are set to."""

    start: int
    stop: int
    draw: Draw | None
    """None: `value`."""
    value: float | Tensor = 0.0
    """Or all of them, 1-D."""
    first: int = 0
    """Of the stream's blocks, which one the parameter's first element is in."""


class InitialWeights(Checkpoint):
    """Weights that are computed as they are read, in float32.

    Args:
        fills: of each parameter, in the order in which they were made; the last that touches an element counts.
        seed: of the run.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], fills: Mapping[str, list[Fill]], seed: int) -> None:
        self.manifest = Manifest("initial", None, None, [], {}, list(shapes))
        self.tensors = {Key(name, WEIGHT): TensorInfo(shape, torch.float32) for name, shape in shapes.items()}
        self._fills = fills
        self._base = int.from_bytes(hashlib.sha256(f"anon_dist {seed}".encode()).digest()[:4], "little")

    def read(self, key: Key, start: int, stop: int) -> Tensor:
        """See `Checkpoint`."""
        out = torch.empty(stop - start)
        for fill in self._fills[key.parameter]:
            low, high = max(start, fill.start), min(stop, fill.stop)
            if low >= high:
                continue
            target = out[low - start : high - start]
            if fill.draw is not None:
                self._drawn(target, low, fill)
            elif isinstance(fill.value, Tensor):
                target.copy_(fill.value[low - fill.start : high - fill.start])
            else:
                target.fill_(fill.value)
        return out

    def _drawn(self, target: Tensor, low: int, fill: Fill) -> None:
        """Elements from `low` on of a parameter that is drawn."""
        high = low + target.numel()
        edges = sorted({low, high, *range(-(-low // BLOCK) * BLOCK, high, BLOCK)})
        for begin, end in pairwise(edges):
            at = begin // BLOCK
            # The CPU's generator takes 32 bits of a seed: blocks are counted, so that no two of a model have the same.
            generator = torch.Generator().manual_seed((self._base + fill.first + at) % (1 << 32))
            assert fill.draw is not None
            block = fill.draw(torch.empty(BLOCK), generator)
            target[begin - low : end - low].copy_(block[begin - at * BLOCK : end - at * BLOCK])


def initial_weights(model: PreTrainedModel, seed: int) -> InitialWeights:
    """The weights that the model's own code gives it, and the model's buffers, which become real.

    Args:
        model: with its parameters and buffers on the meta device. Its parameters stay there.

    Raises:
        ConfigError: its code does something to a parameter that has no record here, or nothing; naming it.
    """
    recorder = _recorded(model)
    fills = recorder.numbered()
    for name, p in model.named_parameters():
        if not any((fill.start, fill.stop) == (0, p.numel()) for fill in fills.get(name, [])):
            raise ConfigError(
                f"model: {type(model).__name__} does not say how {name} is initialised, so it cannot be built in shards; start from "
                "weights instead (model.from_pretrained)"
            )
    return InitialWeights({name: tuple(p.shape) for name, p in model.named_parameters()}, fills, seed)


def make_buffers(model: PreTrainedModel) -> None:
    """Give a model on the meta device its buffers, such as rotary frequencies; its parameters stay there.

    Raises:
        ConfigError: its code does not set one.
    """
    _recorded(model)


def _recorded(model: PreTrainedModel) -> _Recorder:
    """What the model's own initialisation asks for; its buffers are real then."""
    for module in model.modules():
        module._is_hf_initialized = False
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                empty = torch.full_like(buffer, math.nan if buffer.is_floating_point() else 0, device="cpu")
                module.register_buffer(name, empty, persistent=name not in module._non_persistent_buffers_set)
    recorder = _Recorder({p: name for name, p in model.named_parameters()})
    with recorder.recording():
        model.initialize_weights()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise ConfigError(f"model: {type(model).__name__} does not set its buffer {name} when it is initialised")
    return recorder


class _Recorder:
    """What `transformers.initialization` is asked to do to parameters."""

    def __init__(self, names: Mapping[nn.Parameter, str]) -> None:
        self._names = {id(p): name for p, name in names.items()}
        self._sizes = {name: p.numel() for p, name in names.items()}
        self._fills: dict[str, list[Fill]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Calls on parameters are kept instead of done; those on other tensors are done."""
        functions, copy = initialization.TORCH_INIT_FUNCTIONS, initialization.copy_
        originals = dict(functions)
        for name in originals:
            functions[name] = self._in_place_of(name, originals[name])
        initialization.copy_ = self._in_place_of("copy_", copy)
        try:
            yield
        finally:
            functions.update(originals)
            initialization.copy_ = copy

    def numbered(self) -> dict[str, list[Fill]]:
        """The fills of each parameter, their blocks counted through."""
        first, found = 0, {}
        for name, size in self._sizes.items():
            found[name] = [
                Fill(f.start, f.stop, f.draw, f.value, first) for f in _last_only(self._fills.get(name, []), size)
            ]
            first += -(-size // BLOCK)
        return found

    def _in_place_of(self, what: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def record(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Note what a parameter, or a contiguous part of one, is filled with; fill any other tensor."""
            whole = tensor if tensor._base is None else tensor._base
            name = self._names.get(id(whole))
            if any(isinstance(x, Tensor) and x.is_meta for x in args):
                raise ConfigError(
                    f"model: {name or 'a buffer'} is initialised by {what} from what its code computes before the model has memory, which "
                    "cannot be done in shards; start from weights instead (model.from_pretrained)"
                )
            if name is None:
                return original(tensor, *args, **kwargs)
            if not tensor.is_contiguous() or what not in _MEANING:
                raise ConfigError(
                    f"model: {name} is initialised by {what} on {'a part of it' if tensor is not whole else 'it'}, which cannot be done "
                    "in shards; start from weights instead (model.from_pretrained)"
                )
            start = int(tensor.storage_offset())
            drawn = _MEANING[what](tensor, *args, **kwargs)
            draw, value = (drawn, 0.0) if callable(drawn) else (None, drawn)
            self._fills.setdefault(name, []).append(Fill(start, start + tensor.numel(), draw, value))
            return tensor

        return record


def _last_only(fills: list[Fill], size: int) -> list[Fill]:
    """Without those that a later one overwrites."""
    whole = [i for i, fill in enumerate(fills) if (fill.start, fill.stop) == (0, size)]
    return fills[whole[-1] :] if whole else fills


# -- what the functions of torch.nn.init draw ------------------------------------------------------------------------


def _normal(tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Any = None) -> Draw:
    return lambda block, stream: block.normal_(mean, std, generator=stream)


def _uniform(tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: Any = None) -> Draw:
    return lambda block, stream: block.uniform_(a, b, generator=stream)


def _truncated(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0, generator: Any = None
) -> Draw:
    """By the inverse of the distribution function, in float64: torch draws again until all elements of the whole tensor are inside."""
    low, high = (math.erf((x - mean) / (std * math.sqrt(2.0))) for x in (a, b))

    def draw(block: Tensor, stream: torch.Generator) -> Tensor:
        share = torch.empty(block.shape, dtype=torch.float64).uniform_(low, high, generator=stream)
        return block.copy_(share.erfinv_().mul_(std * math.sqrt(2.0)).add_(mean).clamp_(a, b))

    return draw


def _by_fan(normal: bool, xavier: bool) -> Callable[..., Draw]:
    """xavier_… and kaiming_…: a standard deviation that follows from the shape."""

    def made(
        tensor: Tensor, *args: Any, gain: float = 1.0, a: float = 0.0, mode: str = "fan_in", **kwargs: Any
    ) -> Draw:
        """Of a tensor's fans, as the function of this name in `torch.nn.init` takes them."""
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(tensor)
        if xavier:
            std = (args[0] if args else gain) * math.sqrt(2.0 / (fan_in + fan_out))
        else:
            scale = nn.init.calculate_gain(kwargs.get("nonlinearity", "leaky_relu"), args[0] if args else a)
            std = scale / math.sqrt(fan_in if (args[1] if len(args) > 1 else mode) == "fan_in" else fan_out)
        bound = math.sqrt(3.0) * std
        return _normal(tensor, 0.0, std) if normal else _uniform(tensor, -bound, bound)

    return made


def _copied(tensor: Tensor, other: Tensor) -> Tensor:
    return other.detach().to("cpu", torch.float32).expand(tensor.shape).reshape(-1)


_MEANING: dict[str, Callable[..., Draw | float | Tensor]] = {
    "normal_": _normal,
    "uniform_": _uniform,
    "trunc_normal_": _truncated,
    "xavier_normal_": _by_fan(normal=True, xavier=True),
    "xavier_uniform_": _by_fan(normal=False, xavier=True),
    "kaiming_normal_": _by_fan(normal=True, xavier=False),
    "kaiming_uniform_": _by_fan(normal=False, xavier=False),
    "constant_": lambda tensor, val: val,
    "ones_": lambda tensor: 1.0,
    "zeros_": lambda tensor: 0.0,
    "copy_": _copied,
}
"""By name: a draw, a value, or all elements. Of the others (orthogonal_, eye_, sparse_, dirac_) an element depends on the whole tensor."""
