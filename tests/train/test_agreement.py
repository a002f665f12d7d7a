"""What ranks, here threads, raise together when some of them fail."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, local

import pytest

from anon_dist import agreement
from anon_dist.agreement import failures, first_does_slowly
from anon_dist.checkpoint import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.together import on_every_rank


@pytest.fixture
def raised(monkeypatch):
    """A function: what each of as many ranks raises, or None, after these errors in a block."""

    def run(*errors):
        own, box, barrier = local(), [None] * len(errors), Barrier(len(errors), timeout=30)

        def from_all(value, group=None):
            box[own.rank] = value
            barrier.wait()
            found = list(box)
            barrier.wait()
            return found

        def rank(number):
            own.rank = number
            try:
                with on_every_rank():
                    if errors[number] is not None:
                        raise errors[number]
            except Exception as error:
                return error
            return None

        with monkeypatch.context() as patch, ThreadPoolExecutor(len(errors)) as pool:
            patch.setattr(agreement, "_from_all", from_all)
            return list(pool.map(rank, range(len(errors))))

    return run


def said(errors):
    return {(type(e), str(e)) for e in errors}


def test_all_say_the_same_so_that_it_need_be_said_once(raised):
    assert raised(None, None) == [None, None]
    torn, other = DamagedCheckpoint("a is torn"), CheckpointError("of another model")
    assert said(raised(None, torn, None)) == {(DamagedCheckpoint, "rank 1: a is torn")}
    assert said(raised(torn, DamagedCheckpoint("a is torn"))) == {(DamagedCheckpoint, "a is torn")}
    both = raised(torn, DamagedCheckpoint("b is torn"), None)
    assert said(both) == {(DamagedCheckpoint, "rank 0: a is torn; rank 1: b is torn")}
    # An earlier checkpoint is taken by all or by none.
    assert said(raised(torn, other)) == {(CheckpointError, "rank 0: a is torn; rank 1: of another model")}


def test_a_bug_keeps_its_type_where_it_is(raised):
    bug, one = KeyError("x"), DamagedCheckpoint("a is torn")
    errors = raised(one, bug, None)
    assert errors[1] is bug
    assert said([errors[0], errors[2]]) == {(CheckpointError, "rank 0: a is torn; rank 1: KeyError: 'x'")}


def test_one_process_raises_its_own(raised):
    error = DamagedCheckpoint("torn\nin two lines")
    assert raised(error) == [error]
    assert failures(error) == "torn"
    assert failures(None) == ""


def test_what_one_rank_does_slowly_is_progress_while_it_gets_on(monkeypatch):
    monkeypatch.setattr(agreement, "PATIENCE_SECONDS", 0.01)
    beats, enough, amounts = [], threading.Event(), itertools.count(1)

    def beat():
        beats.append(True)
        if len(beats) == 3:
            enough.set()

    assert first_does_slowly(lambda: enough.wait(60), lambda: next(amounts), beat) == (True, "")
    assert len(beats) >= 3


def test_what_stands_still_is_no_progress(monkeypatch):
    monkeypatch.setattr(agreement, "PATIENCE_SECONDS", 0.01)
    beats, enough, asked = [], threading.Event(), itertools.count(1)

    def done():
        if next(asked) == 5:
            enough.set()
        return 0

    assert first_does_slowly(lambda: enough.wait(60), done, lambda: beats.append(True)) == (True, "")
    assert not beats
