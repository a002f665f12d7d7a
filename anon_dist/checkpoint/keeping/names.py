"""A run's checkpoints by their names: which are complete, and which of them a run's folder stands for.

A look at names, which needs no torch: so a command line is answered before that is imported.
"""

from __future__ import annotations

import re
from pathlib import Path

PROGRESS = "trainer.json"
"""What the training loop needs to go on; the last file of a checkpoint, which without it is not complete."""
NAME = re.compile(r"step-(\d{8,})")


def step_of(checkpoint: Path) -> int:
    """The step that the name of a checkpoint says."""
    match = NAME.match(checkpoint.name)
    return int(match[1]) if match else -1


def name_of(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}"


def is_complete(checkpoint: Path) -> bool:
    """Whether its last file was written."""
    try:
        return (checkpoint / PROGRESS).is_file()
    except OSError:
        return False


def named_in(folder: Path) -> list[Path]:
    """What has a checkpoint's name in a folder, oldest first; nothing if there is no such folder."""
    try:
        entries = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((p for p in entries if NAME.fullmatch(p.name)), key=step_of)


def newest_of(run: Path) -> Path | None:
    """The newest complete checkpoint of a run's folder, or of its folder `checkpoints`."""
    for folder in (run / "checkpoints", run):
        if complete := [p for p in named_in(folder) if is_complete(p)]:
            return complete[-1]
    return None


def run_problem(path: Path) -> str | None:
    """Why a folder stands for no checkpoint: it is a run that has none yet, or one of several runs. None: it is neither."""
    if (path / "config.yaml").is_file() and (path / "run.lock").exists():
        if (path / "model" / "config.json").is_file():
            return f"{path} is a run without a checkpoint; name the model that it exported, {path / 'model'}"
        return f"{path} is a run without a checkpoint so far (checkpoint.every says when it writes one)"
    below = sorted(config.parent for config in path.glob("*/config.yaml") if (config.parent / "checkpoints").is_dir())
    return f"{path} is a folder of runs; name one of them, such as {below[0]}" if below else None
