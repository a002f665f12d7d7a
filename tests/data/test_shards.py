"""Shards read as one sequence, and damage is named."""

import errno
import json
import os
import shutil

import numpy as np
import pytest

from anon_dist.cli import main
from anon_dist.data import (
    DataError,
    Index,
    PrepareConfig,
    ShardError,
    TokenizerError,
    TokenShards,
    prepare,
    verify_checksums,
)
from anon_dist.data.verify import verify


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


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """A folder whose shards have several blocks: 300,000 tokens of 2 bytes each."""
    out = tmp_path_factory.mktemp("blocks")
    lines = [json.dumps({"text": f"{i} " * 3000}) for i in range(120)]
    (out / "a.jsonl").write_text("\n".join(lines))
    prepare(
        PrepareConfig(source=str(out / "a.jsonl"), out=out / "data", tokenizer="bytes", shard_tokens=300_000, workers=1)
    )
    return out / "data"


@pytest.mark.parametrize(
    ("byte", "block"), [(0, "0 to 131,072"), (262_143, "131,072 to 262,144"), (599_999, "524,288 to 600,000")]
)
def test_an_altered_block_is_refused_when_it_is_first_read(blocks, tmp_path, byte, block):
    folder = shutil.copytree(blocks, tmp_path / "data")
    flip(folder / "train-00001.bin", byte)
    shards, token = TokenShards(folder, verify="read"), 300_000 + byte // 2
    begin, end = (int(number.replace(",", "")) // 2 for number in block.split(" to "))
    shards.tokens(0, 300_000 + begin)  # all before it, over the border of the shards
    if end < 300_000:
        shards.tokens(300_000 + end, 300_000 - end)
    for start, count in ((token, 1), (299_999, 2) if begin == 0 else (300_000 + begin - 1, 2)):
        with pytest.raises(
            ShardError, match=rf"train-00001\.bin is altered: bytes {block} have checksum \w+, train\.sums"
        ):
            shards.tokens(start, count)
    flip(folder / "train-00001.bin", byte)  # mended: what failed before is compared again
    assert len(shards.tokens(token, 1)) == 1


def test_a_shard_that_is_cut_while_it_is_read_is_named(blocks, tmp_path):
    """Of a map of it the process would die; what is deleted is there for those that read it."""
    folder = shutil.copytree(blocks, tmp_path / "data")
    readers = [TokenShards(folder, verify=how) for how in ("read", "size")]
    expected = [shards.tokens(300_000, 300_000) for shards in readers]
    os.truncate(folder / "train-00001.bin", 262_144)
    for shards in readers:
        assert np.array_equal(shards.tokens(300_000, 131_072), expected[0][:131_072])
        with pytest.raises(
            ShardError,
            match=r"train-00001\.bin was cut: 262,144 bytes of 600,000 are left\. Copy it again .*--overwrite",
        ):
            shards.tokens(300_000 + 131_000, 1000)
    (folder / "train-00000.bin").unlink()
    assert all(len(shards.tokens(0, 300_000)) == 300_000 for shards in readers)
    with pytest.raises(ShardError, match=r"train-00000\.bin is missing\. Copy it again"):
        TokenShards(folder)


def test_what_a_disk_cannot_read_is_named(blocks, monkeypatch):
    shards = TokenShards(blocks)
    monkeypatch.setattr(os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(ShardError, match=r"train-00000\.bin cannot be read \(Input/output error\)\. Copy it again"):
        shards.tokens(0, 9)


def flip(path, byte):
    with path.open("r+b") as file:
        file.seek(byte)
        (old,) = file.read(1)
        file.seek(byte)
        file.write(bytes([old ^ 1]))


def test_altered_or_missing_sums_are_named(blocks, tmp_path):
    folder = shutil.copytree(blocks, tmp_path / "data")
    assert (folder / "train.sums").stat().st_size == 8 * sum(
        -(-s.bytes // 131_072) for s in Index.load(folder).splits["train"].shards
    )
    flip(folder / "train.sums", 9)
    with pytest.raises(ShardError, match=r"train\.sums is altered"):
        TokenShards(folder, verify="read")
    (folder / "train.sums").unlink()
    with pytest.raises(ShardError, match=r"train\.sums is missing"):
        TokenShards(folder, verify="read")
    TokenShards(folder)


def test_a_folder_of_an_earlier_version_gets_sums(blocks, tmp_path, capsys):
    """Then it is one of this version, but for the checksum of its index; nothing is written for one that is altered."""
    folder, content = shutil.copytree(blocks, tmp_path / "data"), json.loads((blocks / "index.json").read_bytes())
    del content["checksum"]
    for split in content["splits"].values():
        del split["sums"]
    (folder / "index.json").write_text(json.dumps(content))
    for split in ("train", "val"):
        (folder / f"{split}.sums").unlink()
    flip(folder / "train-00001.bin", 4)
    assert len(TokenShards(folder, verify="read").tokens(300_000, 9)) == 9  # not compared
    with pytest.raises(SystemExit, match=r"train-00001\.bin is altered"):
        main(["data", "verify", str(folder)])
    flip(folder / "train-00001.bin", 4)
    assert not list(folder.glob("*.sums"))
    for said in (
        "; checksums of blocks were added. index.json is of",
        "written. index.json is of an earlier version: no",
    ):
        main(["data", "verify", str(folder), "--workers", "2"])
        assert said in capsys.readouterr().out
        found = {p.name: p.read_bytes() for p in folder.glob("*.*")}
        wanted = {p.name: p.read_bytes() for p in blocks.glob("*.*")}
        assert json.loads(found.pop("index.json")).items() < json.loads(wanted.pop("index.json")).items()
        assert found == wanted


def test_the_tokenizer_is_compared_too(folder):
    first = next(p for p in sorted((folder / "tokenizer").iterdir()) if p.is_file())
    first.write_bytes(first.read_bytes() + b" ")
    with pytest.raises(TokenizerError, match="the data's tokenizer, is altered"):
        verify(folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(TokenizerError, match="the data's tokenizer, is missing"):
        verify(folder)


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
        (lambda c: c.pop("splits"), "index.json: splits is missing; the file was edited. Prepare again"),
        (lambda c: c.update(splits="x"), "index.json: splits must be an object; the file"),
        (
            lambda c: c["splits"]["val"]["shards"][0].update(tokens="x"),
            "splits.val.shards.0.tokens must be a valid integer",
        ),
        (lambda c: c["splits"]["val"]["shards"][0].update(file=3), "splits.val.shards.0.file must be a valid string"),
        (lambda c: c.update(source="texts"), r"index.json: source must be [^;]+; the file was edited. Prepare again"),
        (lambda c: c["source"].update(files="80"), "source.files must be a valid integer"),
        (lambda c: c["source"].update(skipped_examples=["x"]), "source.skipped_examples must be"),
        (lambda c: c.update(settings="x"), "settings must be"),
        (lambda c: c["tokenizer_behaviour"]["special_tokens"].update(eos_token=3), "special_tokens.eos_token must be"),
        (lambda c: c["statistics"].update(unigram_entropy="x"), "statistics.unigram_entropy must be a valid number"),
        (lambda c: c["splits"]["train"]["shards"].pop(), "its shards [0-9]+ tokens; the file was edited"),
        (lambda c: c["splits"]["train"].update(tokens=9), "its shards [0-9]+ tokens; the file was edited"),
        (lambda c: c["splits"]["val"].update(text_bytes=-1), "the file was edited"),
        (lambda c: c["splits"]["val"]["shards"][0].update(xxh3_64="0" * 16), "fingerprint does not belong"),
        (
            lambda c: c["splits"]["val"].update(text_bytes=9),
            "its checksum does not belong to its content; the file was edited",
        ),
        (lambda c: c["splits"]["val"].update(documents=9), "its checksum does not belong to its content"),
        (lambda c: c.update(documents_end=False), "its checksum does not belong to its content"),
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
