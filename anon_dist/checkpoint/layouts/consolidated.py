"""Whole state dictionaries of `torch.save`: the optimizer's alone, or in a dictionary with the model's and whatever else.

Also folders in which they lie beside each other, as accelerate and transformers' Trainer write them for a model that is not sharded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from anon_dist.checkpoint.assemble import extras_and_step, model_names, model_tree, optimizer_tree, weight_key
from anon_dist.checkpoint.beside import read_beside, write_beside
from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.layouts import quantised
from anon_dist.checkpoint.layouts.hf import read_weights, shard_file, weight_files
from anon_dist.checkpoint.layouts.statedict import interpret
from anon_dist.checkpoint.options import ReadOptions, WriteOptions
from anon_dist.checkpoint.schema import Checkpoint, OutFile
from anon_dist.checkpoint.torchfiles.torchfile import is_torch_file, lay_out, open_torch

_OPTIMIZERS = ("optimizer.bin", "optimizer.pt", "optim.pt")
_MODELS = ("pytorch_model_fsdp.bin", "pytorch_model.bin", "model.pt", "model.bin")


def detect(path: Path) -> bool:
    """A file of `torch.save`, or a folder with an optimizer's."""
    if path.is_dir():
        return any((path / name).is_file() for name in _OPTIMIZERS)
    return path.is_file() and (is_torch_file(path) or path.suffix in (".pt", ".pth", ".bin", ".ckpt"))


def open_consolidated(path: Path, options: ReadOptions) -> Checkpoint:
    """See `formats.Format`.

    Raises:
        CheckpointError: see `interpret` and `open_torch`.
    """
    if path.is_dir():
        return _open_folder(path, options)
    tree = open_torch(path, options.unsafe, also=quantised.known)
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}, not a dictionary of state dictionaries")
    return interpret(tree, str(path), options, format="consolidated", world_size=None)


def _open_folder(folder: Path, options: ReadOptions) -> Checkpoint:
    optimizer = next(folder / n for n in _OPTIMIZERS if (folder / n).is_file())
    tree: dict[str, Any] = {"optimizer": open_torch(optimizer, options.unsafe, also=quantised.known)}
    if isinstance(tree["optimizer"], Mapping) and set(tree["optimizer"]) == {"optimizer"}:
        tree = dict(tree["optimizer"])
    model = next((folder / n for n in _MODELS if (folder / n).is_file()), None)
    if model is not None:
        tree["model"] = open_torch(model, options.unsafe)
    elif weight_files(folder):
        tree["model"] = read_weights(folder)
    beside, ordered = read_beside(folder, options.unsafe), model is not None
    return interpret(tree, str(optimizer), options, beside, ordered, format="consolidated", world_size=None)


def plan(checkpoint: Checkpoint, options: WriteOptions) -> list[OutFile]:
    """One file: a dictionary of `model`, `optimizer` and the extras; the optimizer's state dictionary alone if that is all there is.

    For accelerate and the Trainer a folder, as they write it where the model is not sharded.
    """
    if options.layout in ("accelerate", "trainer"):
        return _plan_folder(checkpoint, options)
    model, optimizer = model_tree(checkpoint), optimizer_tree(checkpoint, options.keyed)
    tree = {k: v for k, v in (("model", model), ("optimizer", optimizer)) if v}
    tree.update(extras_and_step(checkpoint))
    return [lay_out(PurePosixPath("."), optimizer if list(tree) == ["optimizer"] else tree)]


def _plan_folder(checkpoint: Checkpoint, options: WriteOptions) -> list[OutFile]:
    """model.safetensors, the optimizer with its parameters numbered, and what lies beside them."""
    weights = {name: weight_key(checkpoint, name) for name in model_names(checkpoint)}
    files = [shard_file(checkpoint, "model.safetensors", weights, {"format": "pt"})] if weights else []
    name = "optimizer.pt" if options.layout == "trainer" else "optimizer.bin"
    if optimizer := optimizer_tree(checkpoint, "index"):
        files.append(lay_out(PurePosixPath(name), optimizer))
    step = checkpoint.manifest.step
    return files + write_beside(extras_and_step(checkpoint), options.layout, options.world_size, step)
