"""What of a source was left out or altered, by reason: how often, and the first places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

EXAMPLES = 3
REPLACED = ", replaced"
"""How the reasons of documents end that are there, with characters in place of what could not be read."""
TAKEN = ("rubbish behind packed text",)
"""Other reasons of documents that are there, without what could not be read."""
HARMLESS = (*TAKEN, "binary", "empty", "null", "hidden")
"""Reasons for which no text is lost."""
UNREAD = {"hidden_files": "hidden files", "special_files": "that are no files (links to nothing, pipes, devices)"}
"""What a source does not open: key of its description, and words."""
REMEDIES = {
    "not UTF-8": "convert them (iconv -f LATIN1 -t UTF-8), or take them with --on-bad-text replace",
    "UTF-16": "convert them (iconv -f UTF-16 -t UTF-8)",
    "UTF-32": "convert them (iconv -f UTF-32 -t UTF-8)",
    "NUL characters": "remove them (tr -d '\\000'), or take the text with --on-bad-text replace",
    "lone surrogates": "take them with --on-bad-text replace",
    "damaged": "what lies before the damage was read; fetch them again",
    "unreadable": "give yourself the right to read them",
    "no text format": "extract their text",
}
_MUCH = 0.01


class Tally:
    """Reason → count and up to three places, in the order of the source.

    Args:
        counts, examples: of earlier.
    """

    def __init__(self, counts: Mapping[str, int] = {}, examples: Mapping[str, list[str]] = {}) -> None:
        self.counts: Counter[str] = Counter(counts)
        self.examples: dict[str, list[str]] = {reason: list(places) for reason, places in examples.items()}

    def add(self, reason: str, place: str) -> None:
        """Count one, which comes after all before."""
        self.counts[reason] += 1
        places = self.examples.setdefault(reason, [])
        if place and len(places) < EXAMPLES:
            places.append(place)

    def __add__(self, later: Tally) -> Tally:
        """This and what comes after it."""
        reasons = {**self.examples, **later.examples}
        examples = {r: [*self.examples.get(r, []), *later.examples.get(r, [])][:EXAMPLES] for r in reasons}
        return Tally(self.counts + later.counts, examples)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.counts.items())) or "none"

    def to_json(self) -> dict[str, Any]:
        """The reverse of `from_json`."""
        reasons = sorted(self.counts)
        return {
            "skipped": {reason: self.counts[reason] for reason in reasons},
            "skipped_examples": {reason: self.examples[reason] for reason in reasons if self.examples.get(reason)},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Of what an index says of its source; folders of earlier versions have no examples."""
        return cls(content.get("skipped", {}), content.get("skipped_examples", {}))

    def lines(self, documents: int) -> list[str]:
        """For a person: each reason with its places, and a warning where much was lost.

        Args:
            documents: that were taken.
        """
        found = []
        for reason, count in sorted(self.counts.items()):
            places = self.examples.get(reason, [])
            more = f"; and {count - len(places):,} more" if places and count > len(places) else ""
            remedy = REMEDIES.get(reason, "")
            found.append(
                f"{'taken' if reason.endswith(REPLACED) or reason in TAKEN else 'left out'}: {count:,} {reason}"
                + (f" ({'; '.join(places)}{more})" if places else "")
                + (f": {remedy}" if remedy else "")
            )
        lost = sum(n for reason, n in self.counts.items() if reason not in HARMLESS and not reason.endswith(REPLACED))
        if lost > _MUCH * (documents + lost):
            found.append(f"WARNING: {lost / (documents + lost):.1%} of the source's documents were left out")
        return found
