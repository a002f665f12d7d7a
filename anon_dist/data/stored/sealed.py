"""JSON files that hold a checksum of their own content: what no shard shows, such as bytes of text, cannot be edited without a word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

KEY = "checksum"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content, with its checksum."""
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return {**plain, KEY: _checksum(plain)}


def is_whole(content: Mapping[str, Any]) -> bool:
    """Whether the content, as it was read, is what was sealed. That of earlier versions has no checksum, and counts as whole."""
    return KEY not in content or content[KEY] == _checksum(content)


def _checksum(content: Mapping[str, Any]) -> str:
    """16 hexadecimal digits, of plain JSON values, however they are laid out in the file; all but the checksum itself."""
    rest = {key: value for key, value in content.items() if key != KEY}
    return xxhash.xxh3_64_hexdigest(json.dumps(rest, sort_keys=True).encode())
