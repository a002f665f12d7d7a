"""The files of a DeepSpeed checkpoint: which stage wrote them, from how many ranks, and whether all are there."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.inside import inside
from anon_dist.checkpoint.torchfiles.torchfile import open_torch

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_LATEST = ("latest", "latest_universal")


@dataclass(frozen=True)
class Files:
    """The files of one tag, by rank."""

    folder: Path
    models: list[Path]
    """One, or one for every rank (stage 3)."""
    optimizers: list[Path]
    """None, or one for every rank."""
    universal: bool
    """Whether the optimizer's tensors lie in `zero/`, whole."""
    unsafe: bool = False
    """Build whatever classes the files ask for."""

    def open(self, file: Path) -> Any:
        """What a file holds, its tensors mapped.

        Raises:
            CheckpointError: it cannot be read; naming it.
        """
        try:
            return open_torch(file, self.unsafe)
        except (zipfile.BadZipFile, SystemError) as error:
            raise DamagedCheckpoint(f"{file} is damaged: {error}") from None

    def load(self, file: Path, what: str) -> dict[str, Any]:
        """A file's object, its tensors mapped.

        Raises:
            CheckpointError: it cannot be read, or is not what DeepSpeed writes; naming it.
        """
        found = self.open(file)
        if not isinstance(found, dict):
            raise DamagedCheckpoint(f"{file}: {what} should be a dict, and this is a {type(found).__name__}")
        return found

    def load_optimizer(self, file: Path) -> dict[str, Any]:
        """The optimizer's part of a rank's file."""
        found: dict[str, Any] = need(self.load(file, "the optimizer states"), "optimizer_state_dict", file, dict)
        return found


def tag_folder(path: Path) -> Path | None:
    """The folder with the files: the path itself, the one that `latest` in it names, or the only such folder in it; else None."""
    if not path.is_dir():
        return None
    if _has_models(path):
        return path
    for name in _LATEST:
        if (path / name).is_file():
            folder = inside(path, (path / name).read_text(errors="replace").strip(), name)
            return folder if _has_models(folder) else None
    found = [folder for folder in sorted(path.iterdir()) if _has_models(folder)]
    return found[0] if len(found) == 1 else None


def _has_models(folder: Path) -> bool:
    return folder.is_dir() and any(_MODEL.fullmatch(p.name) for p in folder.iterdir())


def find(path: Path, unsafe: bool = False) -> Files:
    """The files of a checkpoint, every rank's.

    Raises:
        CheckpointError: there are none, ranks are missing, or tensor, pipeline or expert parallelism wrote them; naming the file.
    """
    folder = tag_folder(path)
    if folder is None:
        raise CheckpointError(f"{path}: no model states of DeepSpeed here, nor where a file `latest` would lead")
    if (folder / "offloaded_tensors").is_dir():
        raise CheckpointError(
            f"{folder / 'offloaded_tensors'}: states offloaded to NVMe are raw swap files, which are not supported; "
            "save with the optimizer offloaded to cpu"
        )
    names = sorted(p.name for p in folder.iterdir())
    models = [(m, name) for name in names if (m := _MODEL.fullmatch(name))]
    optimizers = [(m, name) for name in names if (m := _OPTIMIZER.fullmatch(name))]
    odd = [n for n in names if n.startswith(("layer_", "expp_rank_")) and n.endswith(".pt")]
    odd += [name for m, name in models if int(m[2])] + [name for m, name in optimizers if int(m[3])]
    if odd:
        raise CheckpointError(f"{folder / odd[0]}: written under tensor, pipeline or expert parallelism; not supported")
    if len({m[1] for m, _ in optimizers}) > 1:
        raise CheckpointError(f"{folder}: optimizer states of two precisions: {optimizers[0][1]}, {optimizers[-1][1]}")
    whole = [folder / name for m, name in models if m[1] is None]  # universal checkpoints may have both
    return Files(
        folder,
        whole or _by_rank(folder, [(int(m[1]), name) for m, name in models]),
        _by_rank(folder, [(int(m[2]), name) for m, name in optimizers]),
        (folder / "zero").is_dir(),
        unsafe,
    )


def _by_rank(folder: Path, ranked: list[tuple[int, str]]) -> list[Path]:
    """The files in the order of their ranks, 0, 1, …"""
    ranked.sort()
    for expected, (rank, name) in enumerate(ranked):
        if rank != expected:
            missing = folder / re.sub(r"pp_rank_\d+", f"pp_rank_{expected}", name)
            raise DamagedCheckpoint(f"{missing} is missing: the states of rank {expected}")
    return [folder / name for _, name in ranked]


def need(state: dict[str, Any], key: str, file: Path, kind: type | tuple[type, ...] = object) -> Any:
    """An entry of a file.

    Raises:
        CheckpointError: it is absent or of another type; naming file and key.
    """
    if key not in state or not isinstance(state[key], kind):
        is_ = f"is a {type(state[key]).__name__}" if key in state else "is absent"
        raise DamagedCheckpoint(f"{file}: {key} {is_}: damaged, or not as DeepSpeed writes it")
    return state[key]


def check_ranks(files: list[Path], world_size: int, what: str) -> None:
    """Raises `CheckpointError` unless every rank's file is there."""
    if len(files) != world_size:
        shown = files[-1].name if files else "none"
        raise DamagedCheckpoint(
            f"{files[-1].parent if files else what}: {world_size} ranks wrote this, and {len(files)} have {what}: "
            f"the last is {shown}"
        )
