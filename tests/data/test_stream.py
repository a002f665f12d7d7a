"""Mixtures of prepared folders, counted sample by sample: whatever the ranks, the resumes, and what comes in or changes on the way."""

import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from anon_dist.data import (
    BatchLoader,
    DataError,
    Packing,
    PrepareConfig,
    SampleOrder,
    Stream,
    TokenShards,
    make_source,
    pack,
    prepare,
)

L = 32
NAMES = ("web", "code", "maths")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name → training tokens, of three sizes."""
    found = {}
    for i, (name, documents) in enumerate(zip(NAMES, (30, 12, 3), strict=True)):
        source, out = tmp_path_factory.mktemp("source") / "a.jsonl", tmp_path_factory.mktemp("out")
        lines = (" ".join(map(str, np.random.default_rng([i, n]).integers(0, 10**6, 40))) for n in range(documents))
        source.write_text("\n".join(json.dumps({"text": line[: 20 + 9 * n]}) for n, line in enumerate(lines)))
        prepare(PrepareConfig(source=str(source), out=out, tokenizer="bytes", val_fraction=0.0, workers=1))
        found[name] = TokenShards(out)
    return found


def stream_of(folders, shares, seq_len=L, seed=5, packings=None):
    """Name → share."""
    return Stream(
        [
            make_source(
                folders[name],
                seq_len,
                seed,
                share=Fraction(share),
                name=name,
                alone=len(shares) == 1,
                packing=(packings or {}).get(name),
            )
            for name, share in shares.items()
        ],
        seq_len,
    )


def steps(stream, state, count, micro_batch, ranks=1, rounds=1):
    """Samples of `count` steps in their global order, and the state after them."""
    loaders = [BatchLoader(stream, micro_batch, rank, ranks, rounds) for rank in range(ranks)]
    for loader in loaders if state is not None else ():
        loader.load_state_dict(json.loads(json.dumps(state)))
    found = []
    for _ in range(count):
        found += [next(loader) for _ in range(rounds) for loader in loaders]
        assert len({loader.advance() for loader in loaders}) == 1
    after = [loader.state_dict() for loader in loaders]
    assert all(other == after[0] for other in after)
    for loader in loaders:
        loader.close()
    return torch.cat(found), after[0]


@pytest.fixture(scope="module")
def where(folders):
    """Tokens of a sample → name and index."""
    return {
        tuple(folders[name].sample(i, L).tolist()): (name, i)
        for name in NAMES
        for i in range(folders[name].num_samples(L))
    }


def drawn(where, samples):
    """Name → indices of its samples in the order in which they came; each sample is found by its tokens, in all folders."""
    found = {name: [] for name in NAMES}
    for sample in samples.tolist():
        name, i = where[tuple(sample)]
        found[name].append(i)
    return found


def check_epochs(found, folders):
    """No sample comes again before all of its source have come."""
    for name, indices in found.items():
        n = folders[name].num_samples(L)
        for start in range(0, len(indices), n):
            epoch = indices[start : start + n]
            assert len(set(epoch)) == len(epoch), name


SHARES = {"web": "0.5", "code": "0.2", "maths": "0.3"}


def test_a_mixture_is_the_same_on_any_ranks_and_after_a_resume_on_others(folders, where):
    stream = stream_of(folders, SHARES)
    whole, end = steps(stream, None, 75, 8)
    found = drawn(where, whole)
    counts = np.cumsum([[len(v) for v in drawn(where, s[None]).values()] for s in whole], 0)
    shares = np.array([float(SHARES[name]) for name in NAMES])
    assert (abs(counts - np.arange(1, len(whole) + 1)[:, None] * shares) < 1.0).all()
    check_epochs(found, folders)
    epochs = stream.epochs(600)
    for name in NAMES:
        assert epochs[name] == len(found[name]) / folders[name].num_samples(L)
        assert len(found[name]) == stream.read(600)[name]
    assert max(epochs.values()) > 2

    for layout in ((4, 2, 1), (1, 4, 2), (2, 2, 2)):
        assert torch.equal(steps(stream, None, 75, *layout)[0], whole)
    first, state = steps(stream, None, 30, 2, 2, 2)
    second, state = steps(stream_of(folders, dict(reversed(SHARES.items()))), state, 20, 2, 5, 1)  # otherwise named
    third, state = steps(stream_of(folders, SHARES), state, 20, 4, 1, 2)
    assert torch.equal(torch.cat([first, second, third]), whole)
    assert state["cursor"] == end["cursor"] == 600


def test_one_source_is_read_in_the_order_that_it_always_had(folders):
    shards = folders["web"]
    samples, _ = steps(stream_of(folders, {"web": 1}), None, 10, 8)
    indices = SampleOrder(shards.num_samples(L), 5)(np.arange(80))
    assert torch.equal(samples, torch.from_numpy(shards.samples(indices, L)))


def test_sources_of_one_size_are_not_read_in_one_order(folders):
    orders = [source.order.seed for source in stream_of(folders, SHARES).sources]
    assert len(set(orders)) == 3


def test_a_source_that_comes_in_leaves_the_past_as_it_is(folders, where):
    """From one to two, other shares, and back: every source goes on where it was."""
    alone = stream_of(folders, {"web": 1})
    first, state = steps(alone, None, 5, 8)
    assert torch.equal(first, steps(alone, None, 20, 8)[0][:40])
    two = stream_of(folders, {"web": "0.75", "code": "0.25"})
    _, cursor, news = two.after(state)
    assert cursor == 40
    assert "From sample 40 on, shares of the samples: " in news[0]
    assert "data.sources.code 0.25 (after 0.00 epochs)" in news[0]
    second, state = steps(two, state, 5, 8)
    third, state = steps(stream_of(folders, {"web": "0.25", "code": "0.75"}), state, 5, 8)
    fourth, state = steps(stream_of(folders, {"code": 1}), state, 2, 8)
    assert [s["name"] for s in state["left"]] == ["web"]
    fifth, state = steps(stream_of(folders, {"web": "0.5", "code": "0.5"}), state, 5, 8)
    together = drawn(where, torch.cat([first, second, third, fourth, fifth]))
    check_epochs(together, folders)
    counts = [[len(v) for v in drawn(where, part).values()][:2] for part in (first, second, third, fourth, fifth)]
    assert counts == [[40, 0], [30, 10], [10, 30], [0, 16], [20, 20]]
    assert together["web"] == drawn(where, steps(alone, None, 13, 8)[0])["web"][:100]  # web's own order, never left


def test_what_cannot_be_kept_is_refused(folders):
    _, state = steps(stream_of(folders, SHARES), None, 1, 8)
    with pytest.raises(
        DataError, match=r"data\.sources\.web: cannot resume: seed is 6, .*\(keep the data seed, data\.seed\)"
    ):
        stream_of(folders, {"web": 1}, seed=6).after(state)
    _, state = steps(stream_of(folders, {"web": 1}), None, 1, 8)
    with pytest.raises(DataError, match=r"fingerprint is .*other data may come in with some of it among data\.sources"):
        stream_of(folders, {"code": 1}).after(state)
    begun, cursor, _ = stream_of(folders, {"code": 1}).after(state, intended=True)
    assert (cursor, begun.read(cursor), begun.left[0]["name"]) == (8, {"code": 0}, "web")
    for damage in (
        {"cursor": "x"},
        {"rates": [0]},
        {"rates": [1, 1]},
        {"sources": [{}]},
        {"sources": 3},
        {"begun": 99},
    ):
        with pytest.raises(DataError, match="cannot resume: "):
            stream_of(folders, {"web": 1}).after({**state, **damage})


def test_shares_are_of_the_tokens_that_packed_samples_predict(folders, tmp_path):
    packings = {}
    for name in NAMES:
        pack(tmp_path / name, folders[name], 200)
        packings[name] = Packing(tmp_path / name, folders[name], 200)
    stream = stream_of(folders, SHARES, 200, packings=packings)
    found = Counter()
    number, index = stream.places(np.arange(3000))
    for i, source in enumerate(stream.sources):
        found[source.name] += source.packing.targets_of(index[number == i])
    assert len({p.padding for p in packings.values()}) == 3
    for name in NAMES:
        assert found[name] / found.total() == pytest.approx(float(SHARES[name]), abs=2e-3)
    assert stream.targets(0, 3000) == found.total()


def test_the_same_data_twice_and_none(folders):
    with pytest.raises(ValueError, match="two sources are the same data"):
        Stream([make_source(folders["web"], L), make_source(folders["web"], L)], L)
    with pytest.raises(ValueError, match="Mixture: "):
        Stream([], L)
