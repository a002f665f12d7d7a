"""Data that many tests read: a few real texts, prepared once."""

import sysconfig
from pathlib import Path

import pytest

from anon_dist.data import PrepareConfig, prepare


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder of real texts: some of the standard library's sources."""
    folder = tmp_path_factory.mktemp("texts")
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))[:24]:
        (folder / source.name).write_bytes(source.read_bytes()[:20000])
    return folder


@pytest.fixture(scope="session")
def prepared(texts, tmp_path_factory) -> Path:
    """The texts as bytes, with a validation split."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(PrepareConfig(source=str(texts), tokenizer="bytes", out=out, val_fraction=0.2, workers=1))
    return out
