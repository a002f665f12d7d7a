"""Python values in JSON without loss: tuples, integer keys, 0-dim tensors; what JSON cannot say goes to a list of its own."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from anon_dist.checkpoint.schema import Key, Ref


def loads(text: str | bytes) -> Any:
    """What a JSON text says, if each key is there once; Python's own would take the last.

    Raises:
        ValueError: it is no JSON, or a key is there twice; naming it.
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has {next(k for i, k in enumerate(keys) if k in keys[:i])!r} twice")
    return found


def encode(value: Any, beyond: list[Any]) -> Any:
    """The value for JSON. What is none is appended to `beyond`, and its place there is noted."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [encode(v, beyond) for v in value]
    if type(value) is dict and all(type(k) is str and not k.startswith("$") for k in value):
        return {k: encode(v, beyond) for k, v in value.items()}
    if type(value) is dict and all(type(k) in (int, str) for k in value):
        return {"$items": [[k, encode(v, beyond)] for k, v in value.items()]}
    if type(value) is tuple:
        return {"$tuple": [encode(v, beyond) for v in value]}
    if type(value) is Ref:
        return {"$ref": list(value.key)}
    if type(value) is Tensor and value.ndim == 0:
        data = value.detach().cpu().reshape(1).view(torch.uint8).numpy().tobytes()
        return {"$tensor": [str(value.dtype).removeprefix("torch."), data.hex(), str(value.item())]}
    beyond.append(value)
    return {"$beyond": len(beyond) - 1}


def decode(value: Any, beyond: list[Any]) -> Any:
    """The value that `encode` was given."""
    if isinstance(value, list):
        return [decode(v, beyond) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not (tag := next(iter(value))).startswith("$"):
        return {k: decode(v, beyond) for k, v in value.items()}
    inner = value[tag]
    if tag == "$items":
        return {k: decode(v, beyond) for k, v in inner}
    if tag == "$tuple":
        return tuple(decode(v, beyond) for v in inner)
    if tag == "$ref":
        return Ref(Key(*inner))
    if tag == "$tensor":
        data = torch.frombuffer(bytearray.fromhex(inner[1]), dtype=torch.uint8)
        return data.view(getattr(torch, inner[0])).reshape(())
    return beyond[inner]
