"""Shards read as one sequence, and damage is named."""

import json
import shutil

import numpy as np
import pytest

from anon_dist.data import DataError, Index, ShardError, TokenShards, verify_checksums


@pytest.fixture
def folder(prepared, tmp_path):
    """A copy to damage."""
    return shutil.copytree(prepared, tmp_path / "data")


def whole(directory, split="train"):
    index = Index.load(directory)
    return np.concatenate([np.fromfile(directory / s.file, index.numpy_dtype) for s in index.splits[split].shards])


def test_tokens_across_shards(prepared):
    shards, expected = TokenShards(prepared), whole(prepared)
    assert len(shards.info.shards) > 5
    assert len(shards) == len(expected) == sum(s.tokens for s in shards.info.shards)
    for start, count in [(0, 1), (0, len(shards)), (999, 2), (1000, 1000), (500, 2700), (len(shards) - 1, 1), (7, 0)]:
        assert np.array_equal(shards.tokens(start, count), expected[start : start + count])


@pytest.mark.parametrize("seq_len", [1, 16, 333, 1000, 2500])
def test_samples(prepared, seq_len):
    shards, expected = TokenShards(prepared), whole(prepared)
    n = shards.num_samples(seq_len)
    assert n == (len(expected) - 1) // seq_len
    indices = np.array([n - 1, 0, n // 2])
    samples = shards.samples(indices, seq_len)
    assert samples.shape == (3, seq_len + 1)
    assert samples.dtype == np.int64
    for i, sample in zip(indices, samples, strict=True):
        assert np.array_equal(sample, expected[i * seq_len : (i + 1) * seq_len + 1])
        assert np.array_equal(sample, shards.sample(int(i), seq_len))


def test_too_short_for_a_sample(prepared):
    shards = TokenShards(prepared, "val")
    assert shards.num_samples(len(shards) - 1) == 1
    assert shards.num_samples(len(shards)) == 0


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 10**9), (10**9, 1)])
def test_outside(prepared, start, count):
    with pytest.raises(IndexError, match="which has"):
        TokenShards(prepared).tokens(start, count)


def test_whole_folder_verifies(prepared):
    assert verify_checksums(prepared, quiet=True) == Index.load(prepared)
    TokenShards(prepared, verify="checksum")


def test_torn_shard_is_named(folder):
    path = folder / "train-00002.bin"
    path.write_bytes(path.read_bytes()[:-3])
    for open_it in (TokenShards, verify_checksums):
        with pytest.raises(
            ShardError, match=r"train-00002\.bin is torn: 1,997 bytes, the index says 2,000\. .*--overwrite"
        ):
            open_it(folder)


def test_altered_shard_is_named(folder):
    path = folder / "train-00003.bin"
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(data)
    TokenShards(folder)
    with pytest.raises(ShardError, match=r"train-00003\.bin is altered: checksum"):
        TokenShards(folder, verify="checksum")
    with pytest.raises(ShardError, match=r"train-00003\.bin is altered"):
        verify_checksums(folder)


def test_missing_shard_is_named(folder):
    (folder / "val-00000.bin").unlink()
    TokenShards(folder)
    with pytest.raises(ShardError, match=r"val-00000\.bin is missing"):
        TokenShards(folder, "val")


def test_no_index(tmp_path):
    with pytest.raises(ShardError, match="preparation unfinished or not a data folder"):
        TokenShards(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(format_version=99), "format_version is 99"),
        (lambda c: c.pop("splits"), "missing or malformed"),
        (lambda c: c["splits"]["train"]["shards"].pop(), "fingerprint does not belong"),
    ],
)
def test_bad_index(folder, edit, message):
    path = folder / "index.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ShardError, match=message):
        Index.load(folder)


def test_index_is_not_json(folder):
    (folder / "index.json").write_text("{")
    with pytest.raises(ShardError, match="not JSON"):
        Index.load(folder)


def test_no_such_split(prepared):
    with pytest.raises(DataError, match="no split 'test', only train, val"):
        TokenShards(prepared, "test")


def test_index_round_trip(prepared):
    index = Index.load(prepared)
    assert Index.from_json(json.loads(json.dumps(index.to_json()))) == index
    assert index.fingerprint == index.compute_fingerprint()
    for split in index.splits.values():
        assert split.tokens == split.text_bytes + split.documents  # in bytes, and one end per document
        assert split.documents == sum(s.documents for s in split.shards)
