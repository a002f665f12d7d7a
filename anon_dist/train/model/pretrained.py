"""Weights of a pretrained Hugging Face model, read from its files range by range, so that a rank reads what it keeps."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.schema import WEIGHT, Checkpoint, Key, Manifest, TensorInfo
from anon_dist.train.config.errors import ConfigError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class HeldWeights(Checkpoint):
    """Weights that lie in memory."""

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        self.manifest = Manifest("held", None, None, [], {}, list(held))
        self.tensors = {Key(name, WEIGHT): TensorInfo(tuple(p.shape), p.dtype) for name, p in held.items()}
        self._held = held

    def read(self, key: Key, start: int, stop: int) -> Tensor:
        """See `Checkpoint`."""
        return self._held[key.parameter].reshape(-1)[start:stop]


class SavedWeights(Checkpoint):
    """Weights in safetensors files, mapped."""

    def __init__(self, files: Mapping[str, Path], infos: Mapping[str, TensorInfo]) -> None:
        self.manifest = Manifest("safetensors", None, None, [], {}, list(files))
        self.tensors = {Key(name, WEIGHT): info for name, info in infos.items()}
        self._files = files

    def read(self, key: Key, start: int, stop: int) -> Tensor:
        """See `Checkpoint`."""
        shape = self.tensors[key].shape
        row = self.tensors[key].numel // shape[0] if shape and shape[0] else 1
        first, last = start // row, -(-stop // row)
        try:
            with safe_open(self._files[key.parameter], "pt") as file:
                rows: Tensor = file.get_slice(key.parameter)[first:last] if shape else file.get_tensor(key.parameter)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._files[key.parameter]}: {key.parameter}: {error}") from None
        return rows.reshape(-1)[start - first * row : stop - first * row].to(torch.float32)

    def digests(self) -> dict[str, int]:
        """CRC-32 of each parameter's values."""
        found = {}
        for key, info in self.tensors.items():
            crc = 0
            for start in range(0, info.numel, _PIECE):
                crc = zlib.crc32(self.read(key, start, min(info.numel, start + _PIECE)).numpy().tobytes(), crc)
            found[key.parameter] = crc
        return found


_PIECE = 1 << 22
"""Elements that are read at once to be compared."""


def saved_weights(source: str, model: nn.Module) -> SavedWeights | None:
    """The weights in a folder of safetensors files; None where it is none, or its tensors are not the model's parameters by their names.

    Raises:
        ConfigError: they are by their names, and not by their shapes.
        OSError, ValueError: a file cannot be read.
    """
    folder = Path(source)
    if (folder / INDEX).is_file():
        where = {name: folder / file for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items()}
    elif (folder / SINGLE).is_file():
        with safe_open(folder / SINGLE, "pt") as file:
            where = dict.fromkeys(file.keys(), folder / SINGLE)
    else:
        return None
    files, infos = {}, {}
    if any(name not in where for name, _ in model.named_parameters()):
        return None
    for name, p in model.named_parameters():
        with safe_open(where[name], "pt") as file:
            shape = tuple(file.get_slice(name).get_shape())
        if shape != tuple(p.shape):
            raise ConfigError(
                f"model.from_pretrained = {source}: {name} has shape {shape} in {where[name].name}, and by config.json {tuple(p.shape)}; "
                "put the config.json of these weights in its place"
            )
        files[name], infos[name] = where[name], TensorInfo(shape, torch.float32)
    return SavedWeights(files, infos)
