"""JSON read as dataclasses, by their annotations: what was edited is refused with the key at fault."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, TypeVar, cast

T = TypeVar("T")


@cache
def _reader(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def read_as(kind: type[T], content: Any, key: str = "") -> T:
    """The dataclass that plain JSON values spell; keys that a later version may have added are left out.

    Args:
        key: where `content` lies, for messages.

    Raises:
        ValueError: a key is missing or of another type; it is named, with what it must be.
    """
    from pydantic import ValidationError

    reader = _reader(cast(Any, kind))
    # As JSON, whose lists are tuples; but it has no names that are not UTF-8, which therefore are taken from the content itself.
    text = json.dumps(content, ensure_ascii=False).encode(errors="replace")
    try:
        reader.validate_json(text, strict=True)
        found: T = reader.validate_python(content)
        return found
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, ((key,) if key else ()) + first["loc"]))
        what = "is missing" if first["type"] == "missing" else first["msg"].replace("Input should", "must")
        raise ValueError(f"{place or 'the whole'} {what}") from None
