"""How far a preparation has come: `progress.json`, rewritten whole at each commit and removed when the index is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anon_dist.data.errors import PreparationError
from anon_dist.data.preparation.sources import START, Cursor
from anon_dist.data.preparation.writer import SplitState
from anon_dist.files import write_json

JOURNAL_FILE = "progress.json"
JOURNAL_VERSION = 2
_SINCE = {"on_bad_text": "skip"}
"""Settings that earlier versions had not, and what they did."""


@dataclass(frozen=True)
class Progress:
    """A commit: everything before `cursor` is in the shards that `splits` describe, and nothing after it."""

    val_fraction: float
    """The part of the documents that goes to validation, as settled at the beginning."""
    tokenizer_hash: str | None = None
    """The tokenizer in the folder, None before there is one."""
    cursor: Cursor = START
    noted: Mapping[str, Any] = field(default_factory=dict)
    """What of the source was left out or altered, as of `Tally.to_json`."""
    splits: Mapping[str, SplitState] = field(default_factory=dict)


class Journal:
    """The progress file of a folder, bound to the settings and the source of the preparation.

    Args:
        directory: the folder.
        settings: the settings that determine the result.
        source: the description of the source.
        named: the files by which the source differs from that of the earlier run.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        source: Mapping[str, Any],
        named: Callable[[], str] = lambda: "",
    ) -> None:
        self.path, self._named = directory / JOURNAL_FILE, named
        self._identity = {"format_version": JOURNAL_VERSION, "settings": dict(settings), "source": dict(source)}

    def load(self) -> Progress | None:
        """The last commit, None if there was no earlier run, or it came to no tokenizer.

        Raises:
            PreparationError: the earlier run had other settings or another source, or the file is not readable.
        """
        try:
            content = json.loads(self.path.read_bytes())
            if content["format_version"] != JOURNAL_VERSION:
                raise PreparationError(
                    f"{self.path} is of another version of anon_dist. Start again with --overwrite, or end it with that version."
                )
            if content["tokenizer_hash"] is None:  # nothing has been prepared that other settings could not begin with
                return None
            refuse_differences(self.path.parent, content["settings"], content["source"], self._identity, self._named)
            return Progress(
                content["val_fraction"],
                content["tokenizer_hash"],
                Cursor(*content["cursor"]),
                content["noted"],
                {name: SplitState.from_json(state) for name, state in content["splits"].items()},
            )
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise PreparationError(
                f"{self.path} is not a progress file ({error!r}). Start again with --overwrite."
            ) from None

    def commit(self, progress: Progress) -> None:
        """Record a commit. What it describes is on the disk already."""
        write_json(self.path, {**self._identity, **asdict(progress)})

    def remove(self) -> None:
        """The preparation is complete."""
        self.path.unlink(missing_ok=True)


def refuse_differences(
    directory: Path,
    settings: Mapping[str, Any],
    source: Mapping[str, Any],
    wanted: Mapping[str, Any],
    named: Callable[[], str] = lambda: "",
) -> None:
    """Refuse to go on in a folder that was begun with other settings, or from a source that has changed since.

    Args:
        named: the files by which it has, if they are known.

    Raises:
        PreparationError: naming each difference, and the remedy.
    """
    settings = {**_SINCE, **settings}
    if settings["on_bad_text"] == "fail":  # so far there was none, and the others would have done the same
        settings["on_bad_text"] = wanted["settings"].get("on_bad_text", "fail")
    differences = [
        f"--{key.replace('_', '-')} was {settings.get(key)!r}, now {value!r}"
        for key, value in wanted["settings"].items()
        if settings.get(key) != value
    ]
    if not differences:
        differences = [
            f"the source's {key} was {source.get(key)!r}, now {value!r}"
            for key, value in wanted["source"].items()
            if source.get(key) != value
        ]
        if differences and (files := named()):
            differences.append(files)
    if differences:
        raise PreparationError(
            f"--out {directory} was prepared differently: {'; '.join(differences)}. "
            "Use --overwrite to prepare it again from nothing, or another --out."
        )
