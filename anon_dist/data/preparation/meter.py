"""What a preparation shows of itself: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from itertools import accumulate
from typing import Self

from tqdm import tqdm

from anon_dist.data.preparation.division import Share
from anon_dist.data.preparation.encode import EncodedChunk
from anon_dist.data.preparation.sources import Source

LOG_SECONDS = 30.0


def say(message: str) -> None:
    """Tell the user one thing, above the bar if there is one."""
    tqdm.write(message.encode(errors="backslashreplace").decode(), file=sys.stdout)  # a path may be no UTF-8
    sys.stdout.flush()


class Meter:
    """Counts chunks as they are written; at the end says how fast it went.

    Args:
        source, share: what is read.
        part: of the source, where reading begins.
    """

    def __init__(self, source: Source, share: Share, part: int) -> None:
        self._source, self._share = source, share
        sizes = source.sizes[: share.end]
        self._before = list(accumulate((size or 0 for size in sizes), initial=0))
        self._known = None not in sizes
        self._begun = self._before[max(part, share.first)]
        self._documents = self._bytes = self._tokens = 0
        self._started = self._said = time.perf_counter()
        self._terminal = sys.stderr.isatty()
        total = self._before[-1] - self._before[share.first] if self._known else None
        self._bar = tqdm(
            desc="tokenising",
            total=total,
            initial=self._begun - self._before[share.first] if self._known else 0,
            unit="B",
            unit_scale=True,
            disable=not self._terminal,
            bar_format=None if self._known else "{desc}: {elapsed}{postfix}",
        )

    def count(self, chunk: EncodedChunk) -> None:
        """Count a chunk that was written."""
        self._documents += chunk.documents
        self._bytes += chunk.text_bytes
        self._tokens += chunk.tokens
        self._bar.set_postfix_str(f"{self._place(chunk.after.part)}, {self._rates()}", refresh=False)
        if self._known:
            self._bar.update(self._read(chunk.after.part) - self._before[self._share.first] - self._bar.n)
        else:
            self._bar.update(chunk.text_bytes)
        if not self._terminal and time.perf_counter() - self._said > LOG_SECONDS:
            self._said = time.perf_counter()
            say(f"{self._place(chunk.after.part)}: {self._rates()}{self._left(chunk.after.part)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if kind is None and self._tokens:
            say(f"tokenised {self._rates()}")

    def _place(self, part: int) -> str:
        return f"file {part + 1 - self._share.first:,} of {self._share.end - self._share.first:,}"

    def _read(self, part: int) -> int:
        """Bytes of files that have been read, as far as that is known; the reader is a few chunks ahead of the writer."""
        return max(self._begun, min(self._before[part] + self._source.position(), self._before[part + 1]))

    def _left(self, part: int) -> str:
        done = self._read(part) - self._begun if self._known else 0
        if done <= 0:
            return ""
        seconds = (time.perf_counter() - self._started) * (self._before[-1] - self._begun - done) / done
        begin = self._before[self._share.first]
        return f", {(self._begun + done - begin) / (self._before[-1] - begin):.0%}, {_duration(seconds)} left"

    def _rates(self) -> str:
        seconds = max(1e-9, time.perf_counter() - self._started)
        return (
            f"{self._documents:,} documents, {self._bytes / 1e6:,.1f} MB to {self._tokens:,} tokens in {seconds:.1f} s "
            f"({self._bytes / 1e6 / seconds:.2f} MB/s, {self._tokens / seconds:,.0f} tokens/s)"
        )


def _duration(seconds: float) -> str:
    """In the unit that fits: `50 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
