"""A run's checkpoints at another address (`checkpoint.remote`): fetched at its start, copied there while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from anon_dist.agreement import first_does_slowly, is_first
from anon_dist.checkpoint import Checkpoints, DamagedCheckpoint
from anon_dist.checkpoint.keeping.names import step_of
from anon_dist.checkpoint.keeping.remote import Remote, fetch_into
from anon_dist.checkpoint.keeping.uploads import Uploads
from anon_dist.stores import store_problem
from anon_dist.train.config.errors import ConfigError, RunError
from anon_dist.train.config.parsing import CheckpointConfig, Config
from anon_dist.train.health.pulse import Pulse
from anon_dist.train.saves.owner import Owner


def checkpoints_of(folder: Path, config: CheckpointConfig) -> Checkpoints:
    """Those in a run's folder."""
    return Checkpoints(folder / "checkpoints", config.keep, config.keep_every, config.keep_steps)


def check_address(config: Config, checkpoints: Checkpoints, data: Sequence[str] = ()) -> None:
    """See that the address, if there is one, is this run's or nobody's, and can be written; nothing of it is changed. Every rank must call
    it, before anything else here.

    Args:
        data: fingerprints of what the run reads, as far as they are known.

    Raises:
        ConfigError: fsspec does not know the address, or the package for it is not installed; on every rank.
        RunError: it is another run's, or nothing can be written there; on every rank.
    """
    if (address := config.checkpoint.remote) is not None:
        problem, error = first_does_slowly(lambda: store_problem(address))
        if problem or error:
            raise ConfigError(f"checkpoint.remote: {problem or error}")
    _first(config, lambda remote: Owner(config, Path(config.run_dir), data).look(remote, checkpoints))


def claim(config: Config, checkpoints: Checkpoints, data: Sequence[str] = ()) -> None:
    """Make the address, if there is one, this start's: another that is at work with it ends. Every rank must call it, before anything is
    written there. Arguments and errors as of `check_address`."""
    said = _first(config, lambda remote: Owner(config, Path(config.run_dir), data).claim(remote, checkpoints))
    if said and is_first():
        _say(said)


def fetch_newest(config: Config, checkpoints: Checkpoints) -> Path | None:
    """If the address has a newer checkpoint than the folder, bring the newest that is as it was written. Every rank must call it.

    Returns:
        What was brought.

    Raises:
        RunError: the address does not answer; on every rank.
    """
    if config.resume != "auto":
        return None

    def fetch(remote: Remote) -> Path | None:
        latest = checkpoints.latest()
        return _fetch_between(remote, checkpoints, -1 if latest is None else step_of(latest))

    return cast("Path | None", _first(config, fetch))


def fetch_older(config: Config, checkpoints: Checkpoints, above: int, below: int) -> Path | None:
    """Of the checkpoints of steps between these two, bring the newest that is as it was written. The rest as of `fetch_newest`."""
    return cast("Path | None", _first(config, lambda remote: _fetch_between(remote, checkpoints, above, below)))


def fetch_again(config: Config, checkpoints: Checkpoints, damaged: Path, error: DamagedCheckpoint) -> bool:
    """Whether a damaged checkpoint was set aside, and replaced by the one at the address. Every rank must call it."""

    def fetch(remote: Remote) -> bool:
        if step_of(damaged) not in remote.steps():
            return False
        kept = checkpoints.set_aside(damaged, "damaged")
        try:
            fetch_into(remote, step_of(damaged), checkpoints)
        except DamagedCheckpoint as another:
            kept.rename(damaged)
            _say(f"WARNING: {damaged} is damaged, and so is its copy: {another.damage}")
            return False
        _say(f"WARNING: {damaged} is damaged, and set aside as {kept.name}: {error.damage}")
        _say(f"{damaged.name} has been copied from {remote.address}")
        return True

    return bool(_first(config, fetch))


def set_later_aside(config: Config, step: int) -> None:
    """Have those of later steps count no more at the address. For one process.

    Raises:
        OSError: the address does not answer.
    """
    if config.checkpoint.remote is None:
        return
    try:
        remote = Remote(config.checkpoint.remote)
        for later in [s for s in remote.steps() if s > step]:
            remote.set_aside(later)
    except RuntimeError as error:
        raise OSError(str(error)) from error


def uploads_of(config: Config, checkpoints: Checkpoints) -> Uploads | None:
    """What copies a run's checkpoints to the address, on the first rank, if there is one; at work on what is not there yet.

    Raises:
        RunError: the address is none, or does not answer; on every rank. Every rank must call it.
    """
    _first(config, Remote.steps)
    if config.checkpoint.remote is None or not is_first():
        return None
    owner = Owner(config, Path(config.run_dir))
    uploads = Uploads(Remote(config.checkpoint.remote), checkpoints, owner.confirm)
    uploads.look()
    return uploads


def finish_uploads(
    config: Config, uploads: Uploads | None, pulse: Pulse, step: int, leave: Callable[[], bool] = lambda: False
) -> bool:
    """Wait until all is there; what arrives is a sign of progress. Every rank must call it.

    Args:
        leave: asked about once a second, with the same answer on every rank: whether to leave the rest to the next start.

    Returns:
        Whether all is there.

    Raises:
        RunError: something could not be copied; on every rank.
    """
    address = config.checkpoint.remote
    if address is None:
        return True
    copying = f"copying to {address}"

    def finish() -> bool:
        if uploads is not None:
            uploads.finish(lambda count: _say(f"Copying {count} checkpoint{'s' * (count != 1)} to {address} …"))
        return True

    with pulse.phase(copying, step, long=True):
        there, error = first_does_slowly(
            finish, lambda: uploads.sent if uploads is not None else 0, lambda: pulse.beat(copying), leave
        )
    if error:
        raise RunError(error)
    if not there and uploads is not None:
        uploads.leave()
    return bool(there)


def is_there(config: Config) -> bool:
    """Whether the last step's checkpoint is at the address too, if there is one. For one process.

    Raises:
        CheckpointError: the address does not answer.
    """
    address = config.checkpoint.remote
    return address is None or any(step >= config.train.steps for step in Remote(address).steps())


def _first(config: Config, action: Callable[[Remote], Any]) -> Any:
    """Done by the first rank, if there is an address; the others wait.

    Raises:
        RunError: it failed; on every rank.
    """
    address = config.checkpoint.remote
    if address is None:
        return None
    found, error = first_does_slowly(lambda: action(Remote(address)))
    if error:
        raise RunError(f"checkpoint.remote: {error}")
    return found


def _fetch_between(remote: Remote, checkpoints: Checkpoints, above: int, below: int | None = None) -> Path | None:
    for step in reversed(remote.steps()):
        if step <= above:
            return None
        if below is not None and step >= below:
            continue
        try:
            fetched = fetch_into(remote, step, checkpoints)
        except DamagedCheckpoint as error:
            _say(f"WARNING: {error.damage}")
            continue
        _say(f"{fetched.name} has been copied from {remote.address}")
        return fetched
    return None


def _say(text: str) -> None:
    print(text, flush=True)
