"""The checkpoints of a run: which are complete, which is the latest, which may go."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from anon_dist.checkpoint import checksums
from anon_dist.checkpoint.checksums import PROGRESS
from anon_dist.checkpoint.errors import CheckpointError
from anon_dist.files import publish, remove, sync_tree, write_json

_NAME = re.compile(r"step-(\d{8})")


class Checkpoints:
    """Folders `step-00000500`, each complete or absent, of which the last `keep` stay.

    A checkpoint is written under a name that ends in `.tmp` and renamed when every rank's files are on the disk. All ranks must see
    the same file system, and call `writing` together.

    Args:
        folder: where they lie; made when the first is written.
        keep: how many stay, at least 1.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if _NAME.fullmatch(p.name) and (p / PROGRESS).is_file()]
        return sorted(found, key=lambda p: p.name)

    def latest(self) -> Path | None:
        """The one to resume from."""
        return next(reversed(self.complete()), None)

    def clean(self) -> None:
        """Remove what interrupted writing or deleting left behind. For one process, while no other writes."""
        for path in list(self.folder.iterdir()) if self.folder.is_dir() else ():
            target = path.with_suffix("")
            if path.suffix == ".tmp" and (path / PROGRESS).is_file() and not target.exists():
                path.rename(target)  # complete: only its name was missing
            elif path.suffix in (".tmp", ".deleting"):
                shutil.rmtree(path)

    @contextmanager
    def writing(self, step: int, progress: dict[str, Any]) -> Iterator[Path]:
        """A folder into which every rank writes its part of the checkpoint of `step`; complete when the block is left.

        Args:
            progress: what the training loop needs to go on, as JSON; rank 0's is written.
        """
        target = self.folder / f"step-{step:08d}"
        temporary = target.with_name(target.name + ".tmp")
        first = not dist.is_initialized() or dist.get_rank() == 0
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        _barrier()
        yield temporary
        _barrier()
        sums = checksums.take(temporary)
        if first:
            sealed = checksums.seal(temporary, sums, progress)
            sync_tree(temporary)
            write_json(temporary / PROGRESS, sealed)  # what has it is complete
            publish(temporary, target)
            for old in [p for p in self.complete()[: -self.keep] if p != target]:
                remove(old)
        _barrier()


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """What `Checkpoints.writing` was given.

    Raises:
        CheckpointError: the folder is no complete checkpoint.
        DamagedCheckpoint: it was one.
    """
    try:
        return checksums.unsealed(checkpoint / PROGRESS)[0]
    except OSError as error:
        raise CheckpointError(f"{checkpoint} is no complete checkpoint of a training run: {error}") from None


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
