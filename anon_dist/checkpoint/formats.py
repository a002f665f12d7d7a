"""The formats, by name: how each is recognised, opened, and laid out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anon_dist.checkpoint.dcp import format as dcp_format
from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.checkpoint.keeping.names import newest_of
from anon_dist.checkpoint.layouts import canonical, consolidated, hf, rank_files
from anon_dist.checkpoint.options import ReadOptions, WriteOptions
from anon_dist.checkpoint.schema import Checkpoint, OutFile
from anon_dist.checkpoint.torchfiles import rank_local


@dataclass(frozen=True)
class Format:
    """A way checkpoints lie on the disk."""

    looks: str
    """What it is recognised by, for messages."""
    detect: Callable[[Path, ReadOptions], bool]
    open: Callable[[Path, ReadOptions], Checkpoint]
    plan: Callable[[Checkpoint, WriteOptions], list[OutFile]] | None
    """None where the format is only read."""


def _by_name(detect: Callable[[Path], bool]) -> Callable[[Path, ReadOptions], bool]:
    """A format that is recognised without reading any pickle."""
    return lambda path, _: detect(path)


_OWN = {
    "canonical": Format(
        "manifest.json and index.json", _by_name(canonical.detect), canonical.open_canonical, canonical.plan
    ),
    "dcp": Format(".metadata and *.distcp", _by_name(dcp_format.detect), dcp_format.open_dcp, dcp_format.plan),
    "consolidated": Format(
        "a file of torch.save, or optimizer.bin or optimizer.pt",
        _by_name(consolidated.detect),
        consolidated.open_consolidated,
        consolidated.plan,
    ),
    "rank_files": Format("optimizer_0_rank*.bin", _by_name(rank_files.detect), rank_files.open_rank_files, None),
    "hf": Format("*.safetensors", _by_name(hf.detect), hf.open_hf, hf.plan),
}


def formats() -> dict[str, Format]:
    """All of them, in the order in which they are tried."""
    try:
        zero = importlib.import_module("anon_dist.checkpoint.zero")
    except ModuleNotFoundError as error:
        if error.name != "anon_dist.checkpoint.zero":
            raise
        return dict(_OWN)
    found: dict[str, Format] = {"canonical": _OWN["canonical"], **zero.FORMATS, **_OWN}
    return found


def detect(path: Path, options: ReadOptions | None = None) -> str:
    """The name of the format of a file or folder.

    Raises:
        CheckpointError: it is none of them; saying what was looked for.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; name a checkpoint's file or folder")
    for name, known in formats().items():
        if known.detect(path, options or ReadOptions()):
            return name
    if path.is_dir():
        inside = newest_of(path)
        if inside is not None:
            raise CheckpointError(f"{path} is a folder of checkpoints; name one of them, such as {inside}")
    looked = "; ".join(f"{name}: {known.looks}" for name, known in formats().items())
    raise CheckpointError(f"{path} is no checkpoint of a known format. Looked for {looked}")


def open_checkpoint(path: Path, options: ReadOptions | None = None) -> Checkpoint:
    """A checkpoint of any format, which is detected.

    Raises:
        CheckpointError: it is of no known format, damaged, incomplete, or needs more to be read than is given.
    """
    return formats()[detect(path, options)].open(path, options or ReadOptions())


def plan(checkpoint: Checkpoint, name: str, options: WriteOptions) -> list[OutFile]:
    """The files of a checkpoint in the named format.

    Raises:
        CheckpointError: no such format, it is only read, or it cannot hold something.
    """
    known = formats()
    if name not in known:
        raise CheckpointError(f"--to {name} is no format; there are {', '.join(known)}")
    planner = known[name].plan
    if planner is None:
        raise CheckpointError(f"--to {name} is only read; write {', '.join(n for n, f in known.items() if f.plan)}")
    files = planner(rank_local.prepared(checkpoint, name, options.allow_loss), options)
    if options.layout == "trainer" and "trainer_state" not in checkpoint.manifest.extras and name != "hf":
        checkpoint.manifest.notes.append(
            "trainer_state.json is made up of the step alone: the Trainer takes logging_steps, save_steps and eval_steps from it, "
            "which are its defaults (500) then; write yours into it"
        )
    return files
