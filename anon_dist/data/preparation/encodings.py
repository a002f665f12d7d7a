"""What a file that is no UTF-8 is, by its first bytes."""

from __future__ import annotations

import codecs

PROBE = 8192
"""Bytes that are looked at."""
UTF8_MARK = codecs.BOM_UTF8
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_UNMARKED = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")
_LEAST = 8
"""Bytes below which nothing is guessed."""


def wide_encoding(head: bytes) -> str | None:
    """The name, as iconv knows it, of an encoding of two or four bytes a character; None if the file begins like none of these.

    Args:
        head: the file's first `PROBE` bytes, or all.
    """
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    if b"\0" not in head or len(head) < _LEAST:
        return None
    return (
        max(_UNMARKED, key=lambda name: _likeness(head, name)) if any(_likeness(head, n) for n in _UNMARKED) else None
    )


def _likeness(head: bytes, name: str) -> int:
    """How many characters of ASCII it has, read so; 0 if any character is none that a text has."""
    try:
        text = codecs.getincrementaldecoder(name)().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return 0
    if not all(c.isprintable() or c.isspace() for c in text):
        return 0
    return sum(c.isascii() for c in text)
