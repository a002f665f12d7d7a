"""A run goes on from a checkpoint: the newest that is not damaged, here or at `checkpoint.remote`, or the one that was named."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from anon_dist.agreement import agree, first_does, is_first
from anon_dist.checkpoint.errors import CheckpointError, DamagedCheckpoint, GroupsDiffer
from anon_dist.checkpoint.keeping.folder import read_progress
from anon_dist.checkpoint.keeping.names import PROGRESS, step_of
from anon_dist.files import unused, write_text
from anon_dist.train.config.changes import changes, check_positions, check_shape, why_refused
from anon_dist.train.config.errors import RunError
from anon_dist.train.config.parsing import Config, ConfigError, to_yaml
from anon_dist.train.config.resumed import Note, forget, what_resume_comes_to
from anon_dist.train.inputs import randomness
from anon_dist.train.inputs.samples import check_repetition, enter
from anon_dist.train.optimizer.build import apply_hyperparameters, hyperparameters
from anon_dist.train.passed_over import keep_history
from anon_dist.train.reports.metrics import read_metrics
from anon_dist.train.reports.report import RESULT
from anon_dist.train.running import Run
from anon_dist.train.saves.remote import (
    check_address,
    claim,
    fetch_again,
    fetch_newest,
    fetch_older,
    set_later_aside,
)


def take_up(run: Run) -> None:
    """Go on from a checkpoint, if there is one, and put the configuration into the run's folder. Every rank calls it.

    The address becomes this start's only when nothing is left that could refuse it: another may be at work with it.
    """
    config, folder = run.config, run.folder
    data = [corpus.index.fingerprint for corpus in run.corpora]
    _in_folder(folder, run.checkpoints.clean)
    check_address(config, run.checkpoints, data)
    fetched = fetch_newest(config, run.checkpoints)
    try:
        went_back = _resume(run)
        run.plan = check_repetition(config, run.corpora, folder, run.loader.state_dict(), run.step)
    except Exception:
        if fetched is not None and is_first():  # it is not for a run that cannot go on from it
            run.checkpoints.remove(fetched)
        raise
    _in_folder(folder, lambda: keep_history(folder, run.rewinds, run.resumed, run.step, went_back))
    claim(config, run.checkpoints, data)
    _in_folder(folder, lambda: folder.mkdir(parents=True, exist_ok=True))
    _in_folder(folder, lambda: write_text(folder / "config.yaml", to_yaml(config)))


def _in_folder(folder: Path, action: Callable[[], object]) -> None:
    """Have rank 0 change something in the run's folder.

    Raises:
        RunError: it cannot; on every rank.
    """
    _, error = first_does(action)
    if error:
        raise RunError(f"run_dir = {folder} cannot be written: {error}")


def settled(config: Config) -> Config:
    """The configuration with what `resume` comes to in this start (see `what_resume_comes_to`); every rank calls it.

    Raises:
        RunError: the run's folder cannot be read.
    """
    found, error = first_does(lambda: what_resume_comes_to(config.resume, Path(config.run_dir)))
    if error:
        raise RunError(f"run_dir = {config.run_dir} cannot be read: {error}")
    resume, said = found
    if said and is_first():
        _warn(said)
    return replace(config, resume=resume)


def forget_return(config: Config) -> None:
    """If the run was started with auto, have it forget what was gone back to (see `forget`). Every rank calls it, with the folder held.

    Args:
        config: as given, before it was `settled`.

    Raises:
        RunError: the run's folder cannot be written.
    """
    if config.resume == "auto":
        _in_folder(Path(config.run_dir), lambda: forget(Path(config.run_dir)))


def _resume(run: Run) -> bool:
    """Load the checkpoint that `resume` asks for; with the hyperparameters of the present configuration.

    Returns:
        Whether the run has gone back, and later checkpoints are set aside.
    """
    present, error = first_does(run.checkpoints.present)
    if error:
        raise RunError(f"run_dir = {run.folder} cannot be read: {error}")
    if run.config.resume == "auto":
        resume_latest(run, present)
    elif run.config.resume != "never":
        return _resume_from(run, Path(run.config.resume), present)
    elif present:
        raise ConfigError(
            f"resume is never, but run_dir = {run.folder} has checkpoints; choose another run_dir, or remove it"
        )
    return False


def resume_latest(run: Run, present: list[Path]) -> None:
    """The last one that is not damaged, here or at the address; the later ones are set aside when it is loaded."""
    with run.engine.whole_optimizer() as optimizer:
        stateless, groups = not optimizer.state, copy.deepcopy(hyperparameters(optimizer, without=()))
    damaged: list[tuple[Path, DamagedCheckpoint]] = []
    while (source := _next(run, present, damaged)) is not None:
        try:
            _load(run, source)
        except DamagedCheckpoint as error:
            _forget(run, stateless, groups)
            if not fetch_again(run.config, run.checkpoints, source, error):
                damaged.append((source, error))
                continue
            _load(run, source)
        _in_folder(run.folder, lambda source=source: _set_damaged_aside(run, damaged, source))  # type: ignore[misc]
        return
    if damaged:
        reasons = "; ".join(f"{source.name}: {error.damage}" for source, error in damaged)
        raise DamagedCheckpoint(
            f"run_dir = {run.folder} has no checkpoint that can be loaded ({reasons}). They stay as they are; choose another run_dir to "
            "begin anew"
        ) from damaged[0][1]


def _next(run: Run, present: list[Path], damaged: list[tuple[Path, DamagedCheckpoint]]) -> Path | None:
    """The last one before those that are damaged; brought from the address, if that has a later one than the folder."""
    steps = [step_of(path) for path, _ in damaged]
    here = next((path for path in reversed(present) if not steps or step_of(path) < steps[-1]), None)
    if not steps:
        return here
    return fetch_older(run.config, run.checkpoints, -1 if here is None else step_of(here), steps[-1]) or here


def _forget(run: Run, stateless: bool, groups: list[dict[str, Any]]) -> None:
    """What a load that failed may have left where the next one does not write: weights and states it will overwrite."""
    with run.engine.whole_optimizer() as optimizer:
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(copy.deepcopy(values))
        if stateless:
            optimizer.state.clear()


def _set_damaged_aside(run: Run, damaged: list[tuple[Path, DamagedCheckpoint]], source: Path) -> None:
    for checkpoint, error in damaged:
        kept = run.checkpoints.set_aside(checkpoint, "damaged")
        _warn(f"{checkpoint} is damaged, and set aside as {kept.name}: {error.damage}")
    if damaged:
        recorded = max((int(record["step"]) for record in read_metrics(run.folder / "metrics.jsonl")), default=0)
        last = min(max(recorded, step_of(damaged[0][0])), run.config.train.steps)  # another run's may be among them
        _warn(f"the run goes on from {source}: steps {run.step + 1} to {last} are taken again")


def _resume_from(run: Run, source: Path, present: list[Path]) -> bool:
    """One that was named: later ones of this run are set aside, with what came of them. Whether there were any."""
    ours = agree(source.parent.resolve() == run.checkpoints.folder.resolve())
    if present and not ours and agree((source / PROGRESS).is_file()):
        raise ConfigError(
            f"resume = {source} is not of run_dir = {run.folder}, which has checkpoints of its own ({present[-1].name}); "
            "--resume auto goes on from those, or choose another run_dir"
        )
    _load(run, source)
    later = [p for p in present if p.name != source.name and step_of(p) >= run.step]
    goes_back = ours and bool(later)
    note = Note(str(source.resolve()), run.step, done=not goes_back)
    _in_folder(run.folder, lambda: note.write(run.folder))
    if goes_back:
        _in_folder(run.folder, lambda: _set_later_aside(run, later, source))
        _in_folder(run.folder, lambda: replace(note, done=True).write(run.folder))
    return goes_back


def _set_later_aside(run: Run, later: list[Path], source: Path) -> None:
    moved = []
    result, records = run.folder / RESULT, run.folder / "metrics.jsonl"
    if result.exists():  # or the run would count as finished
        moved.append(result.rename(unused(result.with_name(result.name + ".aside"))).name)
    if records.exists():  # of which what is after this step is going to be cut
        kept = unused(records.with_name(records.name + ".aside"))
        shutil.copy(records, kept)
        moved.append(kept.name)
    set_later_aside(run.config, run.step)
    moved += [run.checkpoints.set_aside(checkpoint, "aside").name for checkpoint in reversed(later)]
    _warn(
        f"going back to {source}: what came after is set aside as {', '.join(moved)}; metrics.jsonl ends at step {run.step}"
    )


def _warn(text: str) -> None:
    print(f"WARNING: {text}", flush=True)


def _load(run: Run, source: Path) -> None:
    """Weights, optimizer, data cursor, random state, step count.

    Raises:
        DamagedCheckpoint: on every rank. Everything may have been changed in part.
        CheckpointError, ConfigError, DataError: it is of another model, optimizer or corpus, or no checkpoint.
    """
    config, rank = run.config, run.accelerator.process_index
    progress = _agreed_progress(source)
    if progress["step"] > config.train.steps:
        other = "run_dir and checkpoint.remote" if config.checkpoint.remote else "run_dir"
        raise CheckpointError(
            f"{source} is past train.steps = {config.train.steps}; raise it, or choose another {other}"
        )
    check_shape(config, run.model_config.to_dict(), source, progress)
    check_positions(config, source, progress)
    news = enter(run.loader, config, run.corpora, run.folder, progress["step"], progress["data"])
    with warnings.catch_warnings():  # what this run changes is said below
        warnings.filterwarnings("ignore", "Anon: the loaded state brings its own hyperparameters")
        _load_engine(run, source, progress)
    if not randomness.load(source, rank):
        randomness.seed(config.train.seed, run.reader, progress["step"])
    say = print if run.accelerator.is_main_process else (lambda _: None)
    with run.engine.whole_optimizer() as optimizer:
        try:
            apply_hyperparameters(optimizer, run.wanted, [rule.sets for rule in run.gammas.groups], say)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"resuming {source}: {str(error).removeprefix('Anon: ')}") from None
    run.step, run.skipped = progress["step"], progress["skipped"]
    run.rewinds, run.resumed = progress.get("rewinds", 0), progress.get("id")
    try:
        run.spikes.load_state_dict(progress.get("spikes"))
    except ValueError as error:
        raise DamagedCheckpoint(f"{source / PROGRESS} is damaged: {error}") from None
    for line in (*changes(config, run.engine.name, source, progress), *news):
        say(line)
    say(f"Resuming {source} after step {run.step}, written by {progress['world_size']} ranks.")


def _load_engine(run: Run, source: Path, progress: Mapping[str, Any]) -> None:
    """Weights and optimizer; what the configuration is to blame for is said in its words."""
    try:
        run.engine.load(source)
    except GroupsDiffer as error:
        if (why := why_refused(run.config, source, progress)) is None:
            raise
        raise ConfigError(why) from error


def _agreed_progress(source: Path) -> dict[str, Any]:
    """What rank 0 reads of a checkpoint's progress, with the keys that the loop has written."""
    outcome: Any = None
    if is_first():
        try:
            outcome = read_progress(source)
            data = outcome.get("data")
            numbers = {key: outcome.get(key) for key in ("step", "skipped", "world_size")}
            numbers["data.cursor"] = data.get("cursor") if isinstance(data, dict) else None
            if wrong := [key for key, value in numbers.items() if type(value) is not int or value < 0]:
                raise DamagedCheckpoint(f"{source / PROGRESS} is damaged: {', '.join(wrong)} missing, or no count")
            if step_of(source) not in (-1, numbers["step"]):
                raise DamagedCheckpoint(
                    f"{source} is not what its name says: {PROGRESS} in it is of step {numbers['step']}"
                )
        except CheckpointError as error:
            outcome = error
    outcome = agree(outcome)
    if isinstance(outcome, CheckpointError):
        raise outcome
    return dict(outcome)
