"""`--resume FOLDER` is done once: whoever gives it again, as launchers and batch systems do, goes on from what came after.

A note in the run's folder says which checkpoint was asked for, and whether all that the start does with it is done.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from anon_dist.checkpoint.keeping.names import is_complete, named_in, step_of
from anon_dist.files import write_text

NOTE = "resumed.json"


@dataclass(frozen=True)
class Note:
    """Of the last start that was given a checkpoint by name."""

    resume: str
    """The checkpoint's folder, resolved."""
    step: int
    done: bool
    """False while what came after it is being set aside."""

    def write(self, run_dir: Path) -> None:
        """Into the run's folder."""
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / NOTE, json.dumps(asdict(self)) + "\n")


def note_of(run_dir: Path) -> Note | None:
    """None where there is none, or none that can be read."""
    try:
        return Note(**json.loads((run_dir / NOTE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def what_resume_comes_to(resume: str, run_dir: Path) -> tuple[str, str]:
    """`resume` for this start, and what is to be said about it ("": nothing).

    - A named checkpoint that an earlier start went on from, and that checkpoints came after: auto.
    - auto, where a start was killed while it went back: the checkpoint to which it did.

    Nothing is changed: another start may be at work in the folder.
    """
    note = note_of(run_dir)
    if note is None or resume == "never":
        return resume, ""
    if resume == "auto":
        if _is_over(note):
            return resume, ""
        return note.resume, f"an earlier start ended while it went back to {note.resume}, which is done now"
    came_after = any(step_of(p) > note.step for p in named_in(run_dir / "checkpoints") if is_complete(p))
    if note.resume != str(Path(resume).resolve()) or not note.done or not came_after:
        return resume, ""
    return "auto", (
        f"resume = {resume} was done by an earlier start, so this one goes on from what came after. To go back to it again, remove "
        f"{run_dir / NOTE}"
    )


def forget(run_dir: Path) -> None:
    """After a start with auto the same name is a new wish. For who holds the folder: a start that is refused leaves the note to the run."""
    note = note_of(run_dir)
    if note is not None and _is_over(note):
        (run_dir / NOTE).unlink(missing_ok=True)


def _is_over(note: Note) -> bool:
    return note.done or not Path(note.resume).is_dir()
