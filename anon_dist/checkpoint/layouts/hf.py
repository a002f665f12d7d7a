"""Weights alone, as Hugging Face lays them out: safetensors files, an index when there are several, config.json."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from anon_dist.checkpoint.assemble import model_names
from anon_dist.checkpoint.beside import json_file, read_beside
from anon_dist.checkpoint.boxes import Boxes
from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.inside import inside
from anon_dist.checkpoint.json_values import loads
from anon_dist.checkpoint.layouts.statedict import interpret
from anon_dist.checkpoint.options import ReadOptions, WriteOptions
from anon_dist.checkpoint.schema import MASTER, WEIGHT, Checkpoint, Key, OutFile, Part, Region
from anon_dist.checkpoint.torchfiles.mapped import MappedFile
from anon_dist.checkpoint.torchfiles.safefile import read_header, write_header

INDEX = "model.safetensors.index.json"
SHARD = 2 * 10**9
"""Bytes after which a file is full."""


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that hold the weights.

    Raises:
        CheckpointError: the index names a file that is not there.
    """
    if path.is_file():
        return [path] if path.suffix == ".safetensors" else []
    if not (path / INDEX).is_file():
        return [path / "model.safetensors"] if (path / "model.safetensors").is_file() else []
    try:
        names = sorted(set(loads((path / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path / INDEX} cannot be read: {error}") from None
    blobs = (
        path.resolve().parents[1] / "blobs" if path.resolve().parent.name == "snapshots" else None
    )  # the hub's cache
    files = [inside(path, name, INDEX, also=blobs) for name in names]
    for file in files:
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing; {INDEX} names it")
    return files


def detect(path: Path) -> bool:
    """A safetensors file, or a folder of weights."""
    return (path.is_file() and path.suffix == ".safetensors") or (path.is_dir() and bool(weight_files(path)))


def read_weights(path: Path) -> dict[str, Boxes]:
    """Name → tensor, in the order in which they lie.

    Raises:
        CheckpointError: a file is missing or damaged, or two have a tensor of one name.
    """
    found: dict[str, Boxes] = {}
    for file_path in weight_files(path):
        file = MappedFile(file_path)
        for name, entry in read_header(file).entries.items():
            if name in found:
                raise CheckpointError(f"{file_path} has {name}, and so has another file of {path}; remove one of them")
            found[name] = Boxes.whole(file.tensor(entry.dtype, entry.start, entry.numel).view(entry.shape))
    return found


def open_hf(path: Path, options: ReadOptions) -> Checkpoint:
    """See `formats.Format`."""
    beside = read_beside(path, options.unsafe) if path.is_dir() else {}
    return interpret({"model": read_weights(path)}, str(path), options, beside, format="hf", world_size=None)


def plan(checkpoint: Checkpoint, options: WriteOptions) -> list[OutFile]:
    """The weights in their own dtype, where tied under one name; config.json if the checkpoint knows it."""
    shards: list[dict[str, Key]] = [{}]
    size = 0
    for name in model_names(checkpoint):
        key = Key(name, WEIGHT) if Key(name, WEIGHT) in checkpoint.tensors else Key(name, MASTER)
        info = checkpoint.tensors[key]
        nbytes = info.numel * info.dtype.itemsize
        if shards[-1] and size + nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = key
        size += nbytes
    if not shards[0]:
        raise CheckpointError("the checkpoint has no weights; hf holds nothing else")
    names = [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    files = [shard_file(checkpoint, n, s, {"format": "pt"}) for n, s in zip(names, shards, strict=True)]
    if len(shards) > 1:
        places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(r.part.stop * r.dtype.itemsize for f in files for r in f.regions)
        files.append(json_file(INDEX, {"metadata": {"total_size": total}, "weight_map": places}))
    config: Any = checkpoint.manifest.extras.get("model_config")
    return [*files, json_file("config.json", config)] if config else files


def shard_file(checkpoint: Checkpoint, path: str, tensors: dict[str, Key], metadata: dict[str, str]) -> OutFile:
    """A safetensors file of these tensors, wider dtypes first so that each is aligned.

    Raises:
        CheckpointError: a dtype that safetensors does not have.
    """
    infos = {name: checkpoint.tensors[key] for name, key in tensors.items()}
    ordered = sorted(infos, key=lambda n: -infos[n].dtype.itemsize)
    header, offsets = write_header({n: (infos[n].shape, infos[n].dtype) for n in ordered}, metadata)
    regions = [
        Region(Part(tensors[n], 0, infos[n].numel), infos[n].dtype, offsets[n]) for n in ordered if infos[n].numel
    ]
    size = max([len(header), *(r.offset + r.part.stop * r.dtype.itemsize for r in regions)])
    return OutFile(PurePosixPath(path), size, [(0, header)], regions)
