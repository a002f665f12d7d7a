"""Whose an address is (`checkpoint.remote`): one run's, which writes so there once nothing else refuses its start.

A run is known by an id, in its folder and at the address. One whose folder is lost is known by the folder's name and by its settings: the
same command goes on from the address, on another machine too.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anon_dist.checkpoint import CheckpointError, Checkpoints
from anon_dist.checkpoint.keeping.remote import OWNER, Remote
from anon_dist.checkpoint.keeping.uploads import GoneError, TakenError
from anon_dist.files import write_json
from anon_dist.train.config.changes import recorded
from anon_dist.train.config.parsing import Config, flat

_BEGUN = time.strftime("%Y-%m-%d %H:%M:%S %z")
"""Of this process, nearly: with host and pid no other's."""
_OWN = (
    "model.",
    "optim.",
    "schedule.",
    "train.seed",
    "train.global_batch",
    "data.seq_len",
    "data.seed",
    "data.packing",
)
"""Settings by which a run is known: the others follow the machine, or are changed on the way."""


class Owner:
    """This start of a run, as the owner of an address. For one process.

    Args:
        folder: the run's.
        data: fingerprints of what it reads; none where they are not known yet.
    """

    def __init__(self, config: Config, folder: Path, data: Sequence[str] = ()) -> None:
        self._folder, self._config = folder, config
        self._record: dict[str, Any] = {
            "run_dir": str(folder.absolute()),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": _BEGUN,
            "settings": _settings(recorded(config)),
            "data": list(data),
        }

    def look(self, remote: Remote, checkpoints: Checkpoints) -> None:
        """`check`, and whether anything can be written there. Nothing is left behind.

        Raises:
            CheckpointError: it is another run's, cannot be written, or does not answer; with the remedy.
        """
        self.check(remote, checkpoints)
        with _saying_what_helps():
            remote.probe()

    def claim(self, remote: Remote, checkpoints: Checkpoints) -> str:
        """Make the address this start's, before anything is written to it.

        Returns:
            What is to be said: that what this run had copied there is gone; "" if it is not so.

        Raises:
            CheckpointError: it is another run's, cannot be written, or does not answer; with the remedy. Or the run's folder cannot
                be written.
        """
        found = self.check(remote, checkpoints)
        self._record["id"] = (found or {}).get("id") or self._here() or secrets.token_hex(8)
        self._record["data"] = self._record["data"] or (found or {}).get("data", [])
        gone = found is None and self._note().get("address") == remote.address and not remote.steps()
        with _saying_what_helps():
            remote.own(self._record)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(self._folder / OWNER, self._record | {"address": remote.address})
        except OSError as error:  # without a name it would be taken for the address's
            raise CheckpointError(f"whose it is cannot be written to {self._folder / OWNER}: {error}") from error
        if not gone:
            return ""
        return f"WARNING: {remote.address} is empty, and was this run's: checkpoints that were copied there are gone"

    def check(self, remote: Remote, checkpoints: Checkpoints) -> dict[str, Any] | None:
        """Whether the address is free, or this run's already; what its owner wrote there, if there is one.

        Raises:
            CheckpointError: it is another run's, or does not answer; with the remedy.
        """
        found = remote.owner()  # none, also where an older version wrote: the first to come has it
        here = self._here()
        if found is not None and (why := self._differs(found, here)):
            raise TakenError(
                f"{remote.address} is of the run {found.get('run_dir')}, last started on {found.get('host', 'a machine')} at "
                f"{found.get('since', 'some time')} ({why}): each run needs an address of its own",
                f"set another one; or, if this run is to go on with what is there, remove {remote.address}/{OWNER}",
            )
        if self._config.resume != "auto" and not checkpoints.present() and (steps := remote.steps()):
            raise TakenError(
                f"{remote.address} has checkpoints, up to step {steps[-1]}, and resume is {self._config.resume}",
                "set another address, or --resume auto, which goes on from them",
            )
        return found

    def confirm(self, remote: Remote) -> None:
        """To be called before anything is written there: that it is this start's still. Nothing is made there.

        Raises:
            GoneError: what `claim` wrote is not there: an unmount, say, after which copies would fill the disk below.
            TakenError: another start has made it its own.
            CheckpointError: the store does not answer.
        """
        found = remote.owner()
        if found is None:
            raise GoneError(
                f"{remote.address}/{OWNER} is gone: the place was unmounted, renamed or removed while the run was at work. Nothing is "
                "copied there now, and the checkpoints here stay. Mount it again; or, if it is to begin anew there, start the same command "
                "again"
            )
        if any(found.get(key) != self._record[key] for key in ("run_dir", "host", "process", "since")):
            raise TakenError(
                f"{remote.address} is now that of the run {found.get('run_dir')}, process {found.get('process')} on "
                f"{found.get('host')}, since {found.get('since')}: this one ends, and copies nothing more there"
            )

    def _note(self) -> dict[str, Any]:
        """What `claim` wrote into the run's folder; {} if there is nothing, or a copy of another run's."""
        try:
            found = json.loads((self._folder / OWNER).read_text())
            return dict(found) if found["run_dir"] == self._record["run_dir"] else {}
        except (OSError, ValueError, TypeError, KeyError):
            return {}

    def _here(self) -> str | None:
        """The id in the run's folder."""
        found = self._note().get("id")
        return None if found is None else str(found)

    def _differs(self, found: Mapping[str, Any], here: str | None) -> str:
        """By what the address's run is another than this; "" if it is the same."""
        if here is not None and found.get("id") == here:
            return ""
        name, own = Path(str(found.get("run_dir"))).name, Path(self._record["run_dir"]).name
        if name != own:
            return f"this one is {self._record['run_dir']}"
        settings = found.get("settings")
        if not isinstance(settings, Mapping):
            return "it does not say its settings"
        for key, value in self._record["settings"].items():
            if key in settings and settings[key] != value:
                return f"whose {key} is {settings[key]!r}, and this one's {value!r}"
        theirs, ours = found.get("data"), self._record["data"]
        if isinstance(theirs, list) and theirs and ours and not set(map(str, theirs)) & set(ours):
            return f"whose data have the fingerprint {', '.join(map(str, theirs))}, and this one's {', '.join(ours)}"
        return ""


@contextmanager
def _saying_what_helps() -> Iterator[None]:
    """A block that writes to the address."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. See to the address and to the right to write there, or leave checkpoint.remote out: checkpoints then stay in "
            "run_dir alone"
        ) from error


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flat(config).items() if key.startswith(_OWN)}
