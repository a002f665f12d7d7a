"""What a preparation shows of itself: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import Self

from tqdm import tqdm

from anon_dist.data.encode import EncodedChunk

LOG_SECONDS = 30.0


def say(message: str) -> None:
    """Tell the user one thing, above the bar if there is one."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


class Meter:
    """Counts chunks as they are written; at the end says how fast it went.

    Args:
        parts: files of the source.
    """

    def __init__(self, parts: int) -> None:
        self._parts = parts
        self._bytes = self._tokens = 0
        self._started = self._said = time.perf_counter()
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(desc="tokenising", unit="B", unit_scale=True, disable=not self._terminal)

    def count(self, chunk: EncodedChunk) -> None:
        """Count a chunk that was written."""
        self._bytes += chunk.text_bytes
        self._tokens += chunk.tokens
        self._bar.set_postfix_str(
            f"file {chunk.after.part + 1:,}/{self._parts:,}, {self._tokens:,} tokens", refresh=False
        )
        self._bar.update(chunk.text_bytes)
        if not self._terminal and time.perf_counter() - self._said > LOG_SECONDS:
            self._said = time.perf_counter()
            say(f"file {chunk.after.part + 1:,} of {self._parts:,}: {self._rates()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if kind is None and self._tokens:
            say(f"tokenised {self._rates()}")

    def _rates(self) -> str:
        seconds = max(1e-9, time.perf_counter() - self._started)
        return (
            f"{self._bytes / 1e6:,.1f} MB to {self._tokens:,} tokens in {seconds:.1f} s "
            f"({self._bytes / 1e6 / seconds:.2f} MB/s, {self._tokens / seconds:,.0f} tokens/s)"
        )
