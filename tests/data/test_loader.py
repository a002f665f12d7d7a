"""Resume is one integer: whatever the layout, the same samples come in the same order."""

import gc
import threading
import time

import numpy as np
import pytest
import torch

from anon_dist.data import BatchLoader, SampleOrder, Stream, TokenShards, make_source

SEQ_LEN = 64


@pytest.fixture(scope="module")
def shards(prepared):
    return TokenShards(prepared)


def order_of(shards, seed=1):
    return SampleOrder(shards.num_samples(SEQ_LEN), seed)


def stream_of(shards, seq_len=SEQ_LEN, seed=1):
    return Stream([make_source(shards, seq_len, seed)], seq_len)


def run(shards, cursor, steps, micro_batch, world_size=1, accumulation=1, state=None):
    """The samples of `steps` optimizer steps in their global order, and the state after them."""
    loaders = [
        BatchLoader(stream_of(shards), micro_batch, rank, world_size, accumulation, cursor)
        for rank in range(world_size)
    ]
    samples = []
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    for _ in range(steps):
        for _ in range(accumulation):
            samples += [next(loader) for loader in loaders]
        for loader in loaders:
            loader.advance()
    states = [loader.state_dict() for loader in loaders]
    assert all(s == states[0] for s in states)
    for loader in loaders:
        loader.close()
    return torch.cat(samples), states[0]


def expected(shards, start, count):
    indices = order_of(shards)(np.arange(start, start + count))
    return torch.from_numpy(shards.samples(indices, SEQ_LEN))


def test_shape_and_order(shards):
    with BatchLoader(stream_of(shards), 3) as loader:
        batch = next(loader)
    assert batch.shape == (3, SEQ_LEN + 1)
    assert batch.dtype == torch.int64
    assert batch.device.type == "cpu"
    assert torch.equal(batch, expected(shards, 0, 3))


@pytest.mark.parametrize(
    ("micro_batch", "world_size", "accumulation"), [(12, 1, 1), (3, 4, 1), (2, 2, 3), (1, 3, 4), (4, 1, 3)]
)
def test_any_layout_reads_the_same(shards, micro_batch, world_size, accumulation):
    samples, state = run(shards, 0, 5, micro_batch, world_size, accumulation)
    assert torch.equal(samples, expected(shards, 0, 60))
    assert state["cursor"] == 60


def test_resume_twice_with_other_layouts_over_the_end_of_an_epoch(shards):
    n = shards.num_samples(SEQ_LEN)
    parts, state = [], None
    layouts = [(4, 2, 2), (3, 1, 1), (2, 5, 2)]
    # Enough of each that the epoch ends in the second and again in the third.
    for layout, share in zip(layouts, (0.6, 0.9, 0.8), strict=True):
        steps = int(share * n) // np.prod(layout)
        samples, state = run(shards, 0, int(steps), *layout, state=state)
        parts.append(samples)
    together = torch.cat(parts)
    assert 2 * n < len(together) == state["cursor"]
    assert torch.equal(together, expected(shards, 0, len(together)))


def test_every_sample_once_in_an_epoch(shards):
    n = shards.num_samples(SEQ_LEN)
    samples, _ = run(shards, 0, n, 1)
    assert torch.equal(
        samples.sort(dim=0).values, torch.from_numpy(shards.samples(np.arange(n), SEQ_LEN)).sort(dim=0).values
    )


def test_only_finished_steps_count(shards):
    with BatchLoader(stream_of(shards), 2, accumulation=2) as loader:
        assert loader.global_batch == 4
        next(loader), next(loader)
        assert loader.cursor == 0
        assert loader.advance() == 4
        next(loader)
        state = loader.state_dict()
        assert state["cursor"] == 4
        loader.load_state_dict(state)
        assert torch.equal(next(loader), expected(shards, 4, 2))


def test_advance_in_the_middle_of_a_step(shards):
    with BatchLoader(stream_of(shards), 2, accumulation=2) as loader:
        next(loader)
        with pytest.raises(RuntimeError, match="after 1 of 2"):
            loader.advance()
        next(loader)
        with pytest.raises(RuntimeError, match="call advance"):
            next(loader)


def test_another_sequence_length_goes_on_after_as_many_tokens(shards):
    with BatchLoader(stream_of(shards), 2) as loader:
        for _ in range(5):
            next(loader)
            loader.advance()
        state = loader.state_dict()
        assert loader.load_state_dict(state) == []
    length = SEQ_LEN + 5
    order = SampleOrder(shards.num_samples(length), 1)
    with BatchLoader(stream_of(shards, length), 2) as longer:
        (news,) = longer.load_state_dict(state)
        (read,) = longer.stream.read(longer.cursor).values()
        assert longer.cursor == 10  # samples of any length
        assert (read - 1) * length < 10 * SEQ_LEN <= read * length
        assert f"goes on after {10 * SEQ_LEN} tokens, at sample {read} of" in news
        indices = order(np.arange(read, read + 2))
        assert torch.equal(next(longer), torch.from_numpy(shards.samples(indices, length)))
        # and back, where the place is that of the tokens again
        with BatchLoader(stream_of(shards), 2) as again:
            again.load_state_dict(longer.state_dict())
            assert list(again.stream.read(again.cursor).values()) == [-(-read * length // SEQ_LEN)]


def before(state):
    """The state as versions without mixtures wrote it."""
    return {"cursor": state["cursor"]} | {k: v for k, v in state["sources"][0].items() if k not in ("name", "read")}


def test_states_of_earlier_versions_load(shards):
    with BatchLoader(stream_of(shards), 2) as loader:
        old = {**before(loader.state_dict()), "cursor": 16}
        for state in (old, {key: value for key, value in old.items() if key != "packing"}):
            assert loader.load_state_dict(state) == []
            assert loader.cursor == 16
            assert torch.equal(next(loader), expected(shards, 16, 2))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fingerprint", "x"),
        ("seq_len", 32),
        ("seed", 2),
        ("num_samples", 5),
        ("shuffle", False),
        ("split", "val"),
        ("cursor", -1),
    ],
)
def test_a_foreign_state_is_refused(shards, key, value):
    with BatchLoader(stream_of(shards), 2) as loader:
        state = loader.state_dict()
        old, now = {**before(state), key: value}, {**state, key: value}
        if key != "cursor":
            now = {**state, "sources": [{**state["sources"][0], key: value}]}
        named = "num_samples" if key == "seq_len" else key  # which then is not that of the length
        for wrong in (old, now):
            with pytest.raises(ValueError, match=f"cannot resume: {named}"):
                loader.load_state_dict(wrong)
        for less in ({k: v for k, v in old.items() if k != key}, {k: v for k, v in state.items() if k != "rates"}):
            with pytest.raises(ValueError, match="cannot resume: "):
                loader.load_state_dict(less)
        assert torch.equal(next(loader), expected(shards, 0, 2))


def test_an_error_of_the_thread_reaches_the_consumer_and_skips_nothing(shards, monkeypatch):
    real, first = shards.samples, expected(shards, 0, 2)
    calls = 0

    def failing(indices, seq_len):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError("disk gone")
        return real(indices, seq_len)

    monkeypatch.setattr(shards, "samples", failing)
    with BatchLoader(stream_of(shards), 2) as loader:
        assert torch.equal(next(loader), first)
        loader.advance()
        for _ in range(2):
            with pytest.raises(OSError, match="disk gone"):
                next(loader)


def started_since(before):
    """Threads that were not there; those of other tests may end meanwhile."""
    return set(threading.enumerate()) - before


def test_close(shards):
    before = set(threading.enumerate())
    loader = BatchLoader(stream_of(shards), 2)
    next(loader)
    assert started_since(before)
    loader.close()
    loader.close()
    assert not started_since(before)
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_a_forgotten_loader_goes_away(shards):
    before = set(threading.enumerate())
    next(BatchLoader(stream_of(shards), 2))
    deadline = time.monotonic() + 60
    while started_since(before) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not started_since(before)


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch": 0},
        {"world_size": 0},
        {"rank": 2, "world_size": 2},
        {"accumulation": 0},
        {"cursor": -1},
        {"prefetch": 0},
    ],
)
def test_arguments_out_of_range(shards, change):
    with pytest.raises(ValueError, match="BatchLoader: "):
        BatchLoader(stream_of(shards), **{"micro_batch": 2, **change})


def test_a_length_that_no_sample_has(shards):
    with pytest.raises(ValueError, match=r"too few for data\.seq_len = 1000000000"):
        make_source(shards, 10**9)
