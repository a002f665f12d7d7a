"""Going back from a spike to the last good checkpoint, and past the samples in between.

What was passed over is written into the run's folder at once: a run that ends before its next checkpoint passes over the same again, and
writes the record of it where its metrics lack that.
"""

from __future__ import annotations

import logging
from typing import Any

from anon_dist.agreement import agree, first_does, is_first
from anon_dist.files import write_json
from anon_dist.train.config.errors import RunError
from anon_dist.train.health.spikes import Judged
from anon_dist.train.passed_over import FILE, entries_of
from anon_dist.train.reports.metrics import Record, to_json
from anon_dist.train.resuming import resume_latest
from anon_dist.train.running import Run

log = logging.getLogger(__name__)


def rewind(run: Run, spike: Judged) -> Record | None:
    """Load the last good checkpoint, and go on from it with the samples after those that were read so far. Every rank calls it.

    A save under way must be complete.

    Returns:
        What to record; None where there is no checkpoint yet: then the run goes on, the spike's step having been none.

    Raises:
        RunError: it would be once more than `train.max_rewinds`.
        CheckpointError: no checkpoint can be loaded.
    """
    present, error = first_does(run.checkpoints.present)
    if error:
        raise RunError(f"run_dir = {run.folder} cannot be read: {error}")
    bad, cursor, count, spikes = run.step, run.loader.cursor, run.rewinds, run.spikes.found
    if not present:
        _say(
            f"step {bad} is a spike, and there is no checkpoint yet to go back to: the step was none, and the run goes on"
        )
        return None
    if count >= run.config.train.max_rewinds:
        raise RunError(
            f"step {bad} is a spike ({spike}), and the run has gone back {count} times already (train.max_rewinds). The same command would "
            f"end so again, from {present[-1]}: give it with a lower optim.lr, a higher train.max_rewinds, or train.on_spike skip, or look "
            f"at the samples up to {cursor:,}"
        )
    resume_latest(run, present)
    run.gammas.restart()
    entry: dict[str, Any] = {"from": bad, "to": run.step, "rewinds": count + 1, "cursor": cursor, "spikes": spikes}
    entry |= {"passed": cursor - run.loader.cursor, "loss": spike.loss, "norm": spike.norm}
    if run.resumed is not None:
        entry["checkpoint"] = run.resumed
    _, error = first_does(
        lambda: write_json(run.folder / FILE, [to_json(each) for each in (*entries_of(run.folder, count), entry)])
    )
    if error:
        raise RunError(f"run_dir = {run.folder} cannot be written: {error}")
    _go_on_at(run, entry)
    run.predicted, run.waited, run.skipped, run.norm, run.compared = 0, 0.0, 0, None, -1
    _say(
        f"step {bad} is a spike: {spike}. Gone back to step {run.step}, and past the {entry['passed']:,} samples since "
        f"(time {count + 1} of {run.config.train.max_rewinds})"
    )
    return _record(entry)


def _record(entry: dict[str, Any]) -> Record:
    """What the metrics say of it."""
    return {
        "step": entry["to"],
        "samples": entry["cursor"],
        "spikes": entry["spikes"],
        "rewinds": entry["rewinds"],
        "rewound_from": entry["from"],
        "samples_passed_over": entry["passed"],
        "spike_loss": entry["loss"],
        "spike_grad_norm": entry["norm"],
    }


def unrecorded(run: Run, metrics: list[Record]) -> list[Record]:
    """Records of rewinds that the metrics of the run so far lack: it was killed before they were written. For the first rank."""
    written = {record["rewinds"] for record in metrics if "rewound_from" in record}
    missing = (e for e in entries_of(run.folder, run.rewinds) if "passed" in e and e["rewinds"] not in written)
    return [_record(entry) for entry in missing]


def pass_over_again(run: Run) -> None:
    """After a resume: what a rewind passed over since the checkpoint was written. Every rank calls it."""
    entries = agree(entries_of(run.folder) if is_first() else None)
    pending = [
        e for e in entries if e["rewinds"] > run.rewinds
    ]  # `keep_history` has left only those to this checkpoint
    if pending:
        _go_on_at(run, pending[-1])
        _say(
            f"The samples up to {run.loader.cursor:,} are passed over, as before: there was a spike in step {pending[-1]['from']}."
        )


def steps_repeated(run: Run, rewinds: int) -> int:
    """By how many steps the run has gone back in so many rewinds. For the first rank."""
    return sum(entry["from"] - entry["to"] for entry in entries_of(run.folder, rewinds))


def _go_on_at(run: Run, entry: dict[str, Any]) -> None:
    run.rewinds, run.spikes.found = entry["rewinds"], entry["spikes"]  # the checkpoint is of before
    run.loader.pass_over(entry["cursor"])


def _say(text: str) -> None:
    if is_first():
        log.warning(text)
