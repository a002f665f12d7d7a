"""Data that many tests read: a few real texts, prepared once. And the order of the tests, and how hypothesis chooses its examples."""

import os
import sysconfig
from pathlib import Path

import pytest
from hypothesis import settings
from s3 import serving

from anon_dist.data import PrepareConfig, prepare

# Its own deadline, 200 ms for an example, is one for a machine that does nothing else. Each run has the same examples, so that what fails
# fails by a change; others with `--hypothesis-profile soak`, as in `tests/run.sh --all`.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.register_profile("soak", deadline=None)
settings.load_profile("tests")

# What is in tests/site is for all processes that tests start.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [f"{Path(__file__).parent}/site", os.environ.get("PYTHONPATH")])
)

LONGEST = ("multinode", "distributed", "train", "users", "checkpoint", "sweep")
"""Folders that begin, so that at the end two workers have something to do."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    def place(item):
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return LONGEST.index(folder) if folder in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="module")
def s3():
    """A server of S3's protocol, with the bucket s3://bucket."""
    with serving() as server:
        yield server


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
