"""`rewinds.json` of a run's folder: by which rewinds samples were passed over, in their order. For one process.

An entry is of the history of a checkpoint that was written after it, which says how many rewinds there had been, or of the checkpoint
to which it went back, whose id it has. Others are of steps that the run has left behind: what they passed over is to be read.
"""

from __future__ import annotations

import json
import logging
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from anon_dist.files import unused, write_json
from anon_dist.train.reports.metrics import from_json, to_json

log = logging.getLogger(__name__)

FILE = "rewinds.json"
"""Of the run's folder: by which the samples were passed over, in their order; how many spikes there had been; and what the last one was."""
Entry = dict[str, Any]


def entries_of(folder: Path, count: int | None = None) -> list[Entry]:
    """Those until there had been so many rewinds; what a damaged file says is lost."""
    try:
        entries = [_entry(from_json(found)) for found in json.loads((folder / FILE).read_text())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        _say(folder / FILE, repr(error))
        return []
    return [entry for entry in entries if count is None or entry["rewinds"] <= count]


@cache
def _say(path: Path, error: str) -> None:
    """Once for each error: a start reads the file several times."""
    log.warning("%s cannot be read, and is left out of account: %s", path, error)


def keep_history(folder: Path, count: int, checkpoint: str | None, step: int, went_back: bool) -> None:
    """Leave out what is not of the history of the checkpoint that the run goes on from; and say so.

    Args:
        count: of the rewinds before it was written.
        checkpoint, step: its id and its step.
        went_back: whether what came after it was set aside, so that no rewind to it counts either.

    Raises:
        OSError: the file cannot be written.
    """
    entries = entries_of(folder)
    history = sum(entry["rewinds"] <= count for entry in entries)
    to_it = [i for i in range(history, len(entries)) if not went_back and _went_to(entries[i], checkpoint, step)]
    kept = entries[: to_it[-1] + 1 if to_it else history]
    if len(kept) == len(entries):
        return
    aside = unused(folder / f"{FILE}.aside")
    shutil.copy(folder / FILE, aside)
    write_json(folder / FILE, [to_json(entry) for entry in kept])
    steps = ", ".join(f"{entry['from']} to {entry['to']}" for entry in entries[len(kept) :])
    print(
        f"WARNING: {FILE}: going back from step {steps} is not of the history of step {step}, and counts no more ({aside.name} has it)",
        flush=True,
    )


def _went_to(entry: Entry, checkpoint: str | None, step: int) -> bool:
    """Whether it went back to this checkpoint. Those of earlier versions have no id."""
    of = entry.get("checkpoint")
    return bool(of == checkpoint if of is not None and checkpoint is not None else entry["to"] == step)


def _entry(found: Any) -> Entry:
    entry: Entry = {key: int(found[key]) for key in ("from", "to", "rewinds", "cursor")}
    entry["spikes"] = int(found.get("spikes", entry["rewinds"]))  # earlier versions: each rewind was one
    if "passed" in found:  # which they did not say either
        entry |= {"passed": int(found["passed"]), "loss": float(found["loss"]), "norm": float(found["norm"])}
    if "checkpoint" in found:
        entry["checkpoint"] = str(found["checkpoint"])
    return entry
