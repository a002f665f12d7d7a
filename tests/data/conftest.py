"""A small corpus, and the folder that a preparation of it makes."""

import itertools
import random

import pytest

from anon_dist.data import PrepareConfig, prepare

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "naïve",
    "Ünïcode",
    "漢字",
    "travels\tfar",
    "",
    "12",
    "345",
    "self.assertEqual(x, None)",
]
SYLLABLES = ["ka", "lo", "mi", "tu", "ren", "sa", "pel", "dor", "vi", "qua"]
WORDS += ["".join(syllables) for syllables in itertools.product(SYLLABLES, repeat=3)][::3]


def document(seed: int) -> str:
    rng = random.Random(seed)
    lines = [
        " " * rng.choice([0, 4, 8]) + " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))
        for _ in range(rng.randint(1, 16))
    ]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 80 text files, two of which have the same text."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(80):
        (folder / f"{i:03d}.txt").write_text(document(min(i, 78)), "utf-8", newline="")
    return folder


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory):
    """The corpus as bytes, in shards of 1,000 tokens."""
    out = tmp_path_factory.mktemp("prepared")
    prepare(
        PrepareConfig(source=str(corpus), out=out, tokenizer="bytes", val_fraction=0.1, shard_tokens=1000, workers=1)
    )
    return out
