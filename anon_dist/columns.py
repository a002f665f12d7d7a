"""Text in as many columns as the terminal has."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence

_LEAST = 40
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def width() -> int:
    """Columns; 80 where there is no terminal, and COLUMNS does not say."""
    return max(_LEAST, shutil.get_terminal_size().columns)


def filled(text: str) -> str:
    """Lines that are longer are broken, and lose their colours. Those of boxes are left alone."""
    return "\n".join(map(_filled, text.split("\n")))


def _filled(line: str) -> str:
    plain = _COLOURS.sub("", line)
    if len(plain) <= width() or plain[0] in "╭│╰":
        return line
    return _fill(plain, "", " " * 7 if plain.startswith("usage:") else "")


def listing(rows: Sequence[tuple[str, str]]) -> str:
    """Names, and beside each what it is."""
    most = max(len(name) for name, _ in rows)
    return "\n".join(_fill(text, f"  {name:<{most}}   ", " " * (most + 5)) for name, text in rows)


def _fill(text: str, first: str, others: str) -> str:
    return textwrap.fill(
        text,
        width(),
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )
