"""What one machine prepared of a corpus that several share: `part.json`, in place of an index, written last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anon_dist.data.errors import UnpreparedError
from anon_dist.data.stored.index import INDEX_FILE, Origin, SplitInfo
from anon_dist.data.stored.sealed import is_whole, sealed
from anon_dist.data.stored.typed import read_as

PART_FILE = "part.json"
PART_VERSION = 1


@dataclass(frozen=True)
class Part:
    """A finished part."""

    number: int
    """From 1."""
    of: int
    tokenizer_hash: str
    tokenizer_behaviour: Mapping[str, Any]
    val_fraction: float
    """As settled, of a small source above the setting."""
    splits: Mapping[str, SplitInfo]
    """Train and val, also where they are empty."""
    source: Mapping[str, Any]
    """What the whole source says of itself."""
    noted: Mapping[str, Any]
    """What was left out of this part, as of `Tally.to_json`."""
    settings: Mapping[str, Any]
    """As of an index: of the whole."""
    part_version: int = PART_VERSION
    checksum: str = field(default="", compare=False)
    """Of the content of `part.json`, as it was read. Empty in parts of earlier versions, whose counts nothing covers."""

    def to_json(self) -> dict[str, Any]:
        """The content of `part.json`."""
        return sealed(asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Part:
        """Read it.

        Raises:
            UnpreparedError: there is none, or it is not one that this version reads.
        """
        path = folder / PART_FILE
        try:
            content = json.loads(path.read_bytes())
            if content["part_version"] != PART_VERSION:
                raise UnpreparedError(
                    f"{path} is of another version of anon_dist. Prepare the part again with --overwrite."
                )
            part = read_as(cls, content)
            for key in ("source", "noted"):
                read_as(Origin, getattr(part, key), key)
            if not is_whole(content):
                raise UnpreparedError(
                    f"{path}: its checksum does not belong to its content; the file was edited. Prepare the part again with --overwrite."
                )
            return part
        except FileNotFoundError:
            if (folder / INDEX_FILE).exists():
                raise UnpreparedError(
                    f"{folder} is a whole corpus, and no part of one. There is nothing to merge."
                ) from None
            raise UnpreparedError(
                f"{folder} is no finished part: {path} does not exist. Give the command that prepares it again; it goes on where it was."
            ) from None
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UnpreparedError):
                raise
            raise UnpreparedError(f"{path} is damaged ({error!r}). Prepare the part again with --overwrite.") from None
