"""What is said of a store that fails: little, and all that matters."""

import logging

import pytest

from anon_dist import outages
from anon_dist.outages import Outages


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(outages.time, "monotonic", lambda: now[0])
    return now


def test_an_outage_is_said_at_growing_intervals_and_its_end_with_its_duration(clock, caplog):
    """Three minutes of it, 16 attempts a second."""
    found = Outages()
    for i in range(180 * 16):
        found.failed(f"s3://bucket/corpus/train-{i % 7:05d}.bin cannot be read", ConnectionError("refused"), 60.0)
        clock[0] += 1 / 16
    found.answered("s3://bucket/corpus/train-00003.bin cannot be read")
    found.answered("s3://bucket/corpus/train-00004.bin cannot be read")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 5
    assert (
        lines[0] == "s3://bucket/corpus/train-00000.bin cannot be read: ConnectionError: refused; trying again in 60 s"
    )
    assert [line.rpartition("trying again. ")[2] for line in lines[1:4]] == [
        "240 attempts at s3://bucket failed in the last 15 s",
        "480 attempts at s3://bucket failed in the last 30 s",
        "960 attempts at s3://bucket failed in the last 60 s",
    ]
    assert lines[4] == "s3://bucket answers again, after 180 s and 2880 attempts"


def test_stores_and_kinds_of_errors_are_told_apart(clock, caplog):
    found = Outages()
    for error in (TimeoutError("slow"), OSError("4 bytes came of 9"), TimeoutError("slow")):
        found.failed("s3://one/x cannot be read", error, 1.0)
    found.answered("s3://two/x cannot be read")
    found.failed("s3://two/x cannot be read", TimeoutError("slow"), 1.0)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[1:3] for line in lines] == [
        ["//one/x cannot be read", " TimeoutError"],
        ["//one/x cannot be read", " OSError"],
        ["//two/x cannot be read", " TimeoutError"],
    ]


def test_a_store_that_fails_now_and_then_is_no_flood(clock, caplog):
    """Every other attempt, for ten minutes; later it is news again."""
    caplog.set_level(logging.WARNING)
    found = Outages()
    for _ in range(3000):
        found.failed("gs://b/x", OSError("503"), 1.0)
        clock[0] += 0.1
        found.answered("gs://b/x")
        clock[0] += 0.1
    assert 6 <= len(caplog.records) <= 16
    caplog.clear()
    clock[0] += 601
    found.failed("gs://b/x", OSError("503"), 1.0)
    assert "trying again in 1 s" in caplog.text


def test_what_another_thread_was_given_at_once_is_no_end_of_an_outage(clock, caplog):
    """A full disk takes small files, and is read."""
    found = Outages()
    found.failed("file://disk/large", OSError("No space left on device"), 1.0)
    clock[0] += 0.1
    found.answered("file://disk/small")
    assert "answers again" not in caplog.text
    clock[0] += 1.0
    found.answered("file://disk/large")
    assert caplog.text.count("file://disk answers again, after 1 s and 1 attempts") == 1
