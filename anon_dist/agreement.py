"""What one rank knows or meets, made known to all: ranks go on together, or end together by the same error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

Group = dist.ProcessGroup | None
PATIENCE_SECONDS = 1.0
"""Between two words of the first rank to others that wait for it."""
NAMED = 4
"""Of more ranks that failed than this, the rest is counted."""


def is_first() -> bool:
    """Whether this is rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def agree(value: Any, group: Group = None) -> Any:
    """Rank 0's value, on every rank: others may see a shared folder a little later. Every rank must call it.

    Args:
        group: of all ranks, through which they talk; None: the one by which they compute.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=group)
    return box[0]


def failures(error: Exception | None, group: Group = None) -> str:
    """What went wrong on which ranks, the same text on every rank; "" if nothing did. Every rank must call it.

    Args:
        error: of this rank.
        group: see `agree`.
    """
    return _told(_from_all(None if error is None else describe(error), group))


@contextmanager
def together(general: type[Exception], special: type[Exception], group: Group = None) -> Iterator[None]:
    """A block without communication, that succeeds on every rank or raises on every rank. Every rank must enter it.

    Args:
        group: see `agree`.

    Raises:
        general, special: by the same text on every rank. `special`, a kind of `general`, where it is the error of all that failed. A rank
            whose error is of another type raises that, the others `general`.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    found = _from_all(None if failed is None else (isinstance(failed, special), describe(failed)), group)
    if failed is not None and (len(found) == 1 or not isinstance(failed, general)):
        raise failed
    if what := _told([text and text[1] for text in found]):
        alike = all(text[0] for text in found if text is not None)
        raise (special if alike else general)(what) from failed


def _from_all(value: Any, group: Group = None) -> list[Any]:
    """What each rank has."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=group)
    return found


def _told(found: Sequence[str | None]) -> str:
    """The ranks' texts in one, which ranks have not where all have the same."""
    by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(found):
        if text is not None:
            by_text.setdefault(text, []).append(rank)
    if list(by_text.values()) == [list(range(len(found)))]:
        return next(iter(by_text))
    parts = [f"{_ranks(ranks)}: {text}" for text, ranks in by_text.items()]
    more = len(parts) - NAMED
    return "; ".join(parts[:NAMED]) + (f"; and {more} more" if more > 0 else "")


def first_does(action: Callable[[], Any]) -> tuple[Any, str]:
    """Rank 0 does something with files; every rank gets what came of it. Every rank must call it.

    Returns:
        What the action returned, "" if all is well; None, the text of its OSError or ValueError otherwise.
    """
    outcome: tuple[Any, str] = (None, "")
    if is_first():
        try:
            outcome = (action(), "")
        except (OSError, ValueError) as error:
            outcome = (None, describe(error))
    agreed: tuple[Any, str] = agree(outcome)
    return agreed


class _Aside:
    """An action in a thread of its own, while its rank goes on talking to the others."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._action = action
        self._outcome: tuple[Any, str] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome = (self._action(), "")
        except Exception as error:
            self._outcome = (None, describe(error))

    def wait(self) -> tuple[Any, str] | None:
        """What it returned, and the text of its error; None if it is at work still, after `PATIENCE_SECONDS`."""
        self._thread.join(PATIENCE_SECONDS)
        return self._outcome


def first_does_slowly(
    action: Callable[[], Any],
    done: Callable[[], int] = int,
    beat: Callable[[], None] = lambda: None,
    leave: Callable[[], bool] = lambda: False,
) -> tuple[Any, str]:
    """`first_does` something that may take longer than ranks wait for each other; it may raise any error.

    Args:
        done: on rank 0, how much it has done; more than a second before is progress.
        beat: called on every rank when there was progress.
        leave: asked on every rank, about once a second, with the same answer on all: whether to wait no longer. The action itself goes on,
            and (None, "") is returned.
    """
    aside, before = _Aside(action) if is_first() else None, 0
    while True:
        outcome, now = agree((aside.wait(), done()) if aside else None)
        if outcome is not None:
            return outcome[0], outcome[1]
        if now > before:
            before = now
            beat()
        if leave():
            return None, ""


def all_do_slowly(action: Callable[[], Any], group: Group = None) -> str:
    """Each rank does its share of something that may take longer than ranks wait for each other; it may raise any error.

    Args:
        group: see `agree`.

    Returns:
        As of `failures`. Every rank must call it.
    """
    aside = _Aside(action)
    while True:
        outcome = aside.wait()
        found = _from_all(None if outcome is None else outcome[1], group)
        if None not in found:
            return _told([text or None for text in found])


def describe(error: BaseException) -> str:
    """An error in a line; without its type where the words are meant for users."""
    lines = str(error).strip().splitlines()
    if lines and (isinstance(error, OSError) or type(error).__module__.startswith("anon_dist.")):
        return lines[0][:1000]
    return f"{type(error).__name__}: {lines[0][:500]}" if lines else type(error).__name__


def _ranks(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:NAMED]))
    return f"rank{'s' * (len(ranks) > 1)} {named}{f' and {len(ranks) - NAMED} more' if len(ranks) > NAMED else ''}"
