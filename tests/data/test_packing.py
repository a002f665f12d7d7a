"""Packed samples hold whole documents, every one once, wherever a run is interrupted and on however many ranks."""

import json

import numpy as np
import pytest
import torch

from anon_dist.data import (
    BatchLoader,
    DataError,
    Packing,
    PrepareConfig,
    Stream,
    TokenShards,
    make_source,
    pack,
    prepare,
)
from anon_dist.data.samples import packing

SEQ_LEN = 100
IGNORED = -100


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """300 documents, the longest of several samples, in shards that cut some; an empty one among them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    lengths = [
        *rng.integers(1, 60, 200),
        *rng.integers(60, 350, 100),
        SEQ_LEN - 1,
        SEQ_LEN,
        2 * SEQ_LEN,
        2 * SEQ_LEN + 1,
    ]
    lines = ["".join(rng.choice(list("abcdefgh"), n)) for n in rng.permutation(lengths)]
    (source / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    options = {"val_fraction": 0.0, "shard_tokens": 1000, "workers": 1}
    prepare(PrepareConfig(source=str(source), out=out / "data", tokenizer="bytes", **options))
    return TokenShards(out / "data")


@pytest.fixture(params=[1 << 20, 64], ids=["one window", "windows"])
def packed(request, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", request.param)
    monkeypatch.setattr(packing, "BLOCK", 777)
    pack(tmp_path / "packing", shards, SEQ_LEN)
    return Packing(tmp_path / "packing", shards, SEQ_LEN)


def documents_of(shards):
    tokens = shards.tokens(0, len(shards))
    return [d for d in np.split(tokens, np.flatnonzero(tokens == shards.index.eod_id) + 1) if len(d)]


def naive_best_fit(lengths, room):
    """Fill of each bin, looking at all of them for each length."""
    left = []
    for n in sorted(lengths, reverse=True):
        fitting = [i for i, free in enumerate(left) if free >= n]
        if fitting:
            left[min(fitting, key=lambda i: left[i])] -= n
        else:
            left.append(room - n)
    return sorted(room - free for free in left)


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_is_what_a_naive_search_finds(seed):
    rng = np.random.default_rng(seed)
    room = int(rng.integers(1, 64))
    lengths = rng.integers(1, room + 1, int(rng.integers(1, 200)))
    bins = packing.best_fit(lengths, room)
    assert sorted(set(bins)) == list(range(bins.max() + 1))
    assert sorted(np.bincount(bins, lengths).astype(int)) == naive_best_fit(lengths.tolist(), room)


def test_every_document_is_predicted_once_and_cut_only_where_it_is_too_long(shards, packed):
    samples = packed.samples(np.arange(packed.num_samples))
    assert samples.shape == (packed.num_samples, 3, SEQ_LEN)
    pieces, free = [], 0
    for inputs, targets, numbers in samples:
        for number in sorted(set(numbers) - {-1}):
            places = np.flatnonzero(numbers == number)
            assert (np.diff(places) == 1).all()
            assert (inputs[places[1:]] == targets[places[:-1]]).all()
            pieces.append(np.append(inputs[places[0]], targets[places]).tolist())
        assert (targets[numbers == -1] == IGNORED).all()
        assert (targets[numbers != -1] != IGNORED).all()
        free += int((numbers == -1).sum())
    expected = []
    for document in documents_of(shards):
        starts = range(0, len(document) - 1, SEQ_LEN)
        expected += [document[at : at + SEQ_LEN + 1].tolist() for at in starts]
    assert sorted(pieces) == sorted(expected)
    assert packed.padding == pytest.approx(free / samples[:, 1].size)
    assert packed.padding < 0.05
    assert packed.targets_of(np.arange(packed.num_samples)) == packed.targets == samples[:, 1].size - free
    assert max(map(len, pieces)) == SEQ_LEN + 1


def read(shards, packed, cursor, steps, micro_batch, ranks, rounds):
    stream = Stream([make_source(shards, SEQ_LEN, 3, packing=packed)], SEQ_LEN)
    loaders = [BatchLoader(stream, micro_batch, rank, ranks, rounds, cursor) for rank in range(ranks)]
    found, counts = [], []
    for _ in range(steps):
        counts.append({loader.step_targets() for loader in loaders})
        step = [next(loader) for _ in range(rounds) for loader in loaders]
        assert counts.pop() == {int((torch.cat(step)[:, 1] != IGNORED).sum())}
        found += step
        cursors = {loader.advance() for loader in loaders}
    state = loaders[0].state_dict()
    for loader in loaders:
        loader.close()
    assert cursors == {cursor + steps * micro_batch * ranks * rounds}
    return torch.cat(found), state


def test_the_samples_are_the_same_on_any_ranks_and_after_a_resume(shards, packed):
    whole, state = read(shards, packed, 0, 12, 8, 1, 1)
    for layout in ((4, 2, 1), (1, 4, 2), (2, 2, 2)):
        assert torch.equal(read(shards, packed, 0, 12, *layout)[0], whole)
    later, _ = read(shards, packed, 40, 7, 2, 4, 1)
    assert torch.equal(later, whole[40:])
    with pytest.raises(
        DataError, match=r"packing is 'concat', the saved state has 'best_fit' \(keep the setting of data\.packing"
    ):
        Stream([make_source(shards, SEQ_LEN, 3)], SEQ_LEN).after(state)


def test_the_packing_is_a_function_of_the_corpus(shards, packed, tmp_path):
    pack(tmp_path / "again", shards, SEQ_LEN)
    for file in (tmp_path / "packing").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_another_corpus_or_length_and_damage_are_refused(shards, packed, prepared, tmp_path):
    with pytest.raises(DataError, match="is of another corpus or sequence length; remove it"):
        Packing(tmp_path / "packing", TokenShards(prepared), SEQ_LEN)
    with pytest.raises(DataError, match="is of another corpus or sequence length; remove it"):
        Packing(tmp_path / "packing", shards, SEQ_LEN + 1)
    file = tmp_path / "packing" / "starts"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="starts is damaged; remove"):
        Packing(tmp_path / "packing", shards, SEQ_LEN)
    file.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        Packing(tmp_path / "packing", shards, SEQ_LEN)
