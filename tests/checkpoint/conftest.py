"""Addresses of stores, for the tests of what lies at them."""

import fsspec
import pytest

from anon_dist.checkpoint.keeping import store as keeping_store


@pytest.fixture(params=["memory", "file", "s3"])
def address(request, tmp_path):
    """An empty place of each kind."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    place = {"memory": f"memory://{tmp_path}", "file": f"file://{tmp_path}/store", "s3": f"s3://bucket{tmp_path}"}
    return place[request.param]


@pytest.fixture
def at_once(monkeypatch):
    """Attempts follow each other without a pause."""
    monkeypatch.setattr(keeping_store, "PAUSES", (0.0, 0.0))
    yield
    fsspec.filesystem("memory").store.clear()
