"""What several machines prepare and merge is what one prepares, byte for byte, and what plain AutoTokenizer makes of the texts."""

import errno
import importlib
import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash
from test_prepare import contents
from transformers import AutoTokenizer

from anon_dist.cli import main
from anon_dist.data import Index, PreparationError, PrepareConfig, ShardError, TokenShards, prepare, verify_checksums
from anon_dist.data.preparation import encode
from anon_dist.data.preparation.division import segments
from anon_dist.data.preparation.merge import merge
from anon_dist.data.preparation.prepare import _source as source_of

merge_module = importlib.import_module("anon_dist.data.preparation.merge")
preparation = importlib.import_module("anon_dist.data.preparation.prepare")
LETTERS = "etaoin shrdlu\n"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two sources: 30 files of lines, of very different sizes, some with bad text; and JSON Lines in two files."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    for i in range(30):
        text = "".join(rng.choices(LETTERS, k=rng.choice([40, 900, 5000])))
        (folder / "a" / f"{i:02d}.txt").write_bytes(b"\xff" * (i % 5 == 4) + f"{i} {text}".encode())
    for name in "xy":
        rows = [{"text": "".join(rng.choices(LETTERS, k=300))} if i % 7 else {"body": "x"} for i in range(50)]
        rows[0] = {"text": "first"}
        (folder / "b" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    """Trained by a preparation that stops there."""
    out = tmp_path_factory.mktemp("tokenizer")
    assert prepare(config(texts, out, tokenizer="spm-bpe:420", only_tokenizer=True)) is None
    assert not list(out.glob("*.bin"))
    return out


def config(texts, out, **options):
    defaults = {"val_fraction": 0.2, "shard_tokens": 500, "workers": 1}
    return PrepareConfig(source=(f"{texts}/a", f"{texts}/b"), out=Path(out), **{**defaults, **options})


@pytest.fixture(scope="module")
def one(texts, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "data"
    prepare(config(texts, out, tokenizer=f"hf:{tokenizer}/tokenizer"))
    return out


@pytest.fixture(scope="module")
def parts(texts, tokenizer, tmp_path_factory):
    """A function: the finished parts of N, prepared once."""
    made = {}

    def of(count):
        if count not in made:
            made[count] = [tmp_path_factory.mktemp(f"{i}-of-{count}-") for i in range(1, count + 1)]
            for i, out in enumerate(made[count], 1):
                assert prepare(config(texts, out, tokenizer=f"hf:{tokenizer}/tokenizer", part=f"{i}/{count}")) is None
        return made[count]

    return of


@pytest.fixture
def copied(parts, tmp_path):
    """Parts of 3, for a test that changes them."""
    return [shutil.copytree(folder, tmp_path / f"part{i}") for i, folder in enumerate(parts(3))]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_merged_parts_are_what_one_machine_makes(count, parts, one, tmp_path):
    folders = parts(count)
    random.Random(1).shuffle(folders := list(folders))
    index = merge(folders, tmp_path / "data")
    assert contents(tmp_path / "data") == contents(one)
    assert index == Index.load(one) == verify_checksums(tmp_path / "data", quiet=True)
    shard = index.splits["train"].shards[0].file
    assert (tmp_path / "data" / shard).stat().st_nlink > 1  # not copied


def test_tokens_are_those_of_the_texts(texts, tokenizer, one):
    """Read here, encoded by AutoTokenizer, divided by the rule that is documented."""
    hf = AutoTokenizer.from_pretrained(tokenizer / "tokenizer")
    documents = [p.read_bytes() for p in sorted((texts / "a").iterdir())]
    rows = [json.loads(line) for p in sorted((texts / "b").iterdir()) for line in p.read_text().splitlines()]
    documents += [row["text"].encode() for row in rows if "text" in row]
    expected = {"train": [], "val": []}
    for data in documents:
        if not data.startswith(b"\xff"):
            ids = hf(data.decode(), add_special_tokens=False)["input_ids"]
            expected["val" if xxhash.xxh3_64_intdigest(data) < int(0.2 * 2**64) else "train"] += [*ids, hf.eos_token_id]
    for split, ids in expected.items():
        shards = TokenShards(one, split, "read")
        assert np.array_equal(shards.tokens(0, len(shards)), ids)
    skipped = Index.load(one).source["skipped"]
    assert skipped == {"no field 'text'": sum("body" in row for row in rows), "not UTF-8": 6}


def test_a_tokenizer_made_beforehand_gives_the_tokens_of_one_made_on_the_way(texts, one, tmp_path):
    index = prepare(config(texts, tmp_path / "data", tokenizer="spm-bpe:420"))
    assert index.fingerprint == Index.load(one).fingerprint


def test_only_tokenizer_is_gone_on_with(texts, tmp_path):
    for only in (True, False):
        prepare(config(texts, tmp_path / "data", tokenizer="spm-bpe:420", only_tokenizer=only))
    prepare(config(texts, tmp_path / "fresh", tokenizer="spm-bpe:420"))
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def test_an_interrupted_part_is_gone_on_with(texts, tokenizer, parts, tmp_path, monkeypatch):
    """Wherever it stopped, its files are those of one that was not, and its number cannot be changed."""
    monkeypatch.setattr(encode, "CHUNK_CHARS", 500)
    monkeypatch.setattr(preparation, "COMMIT_BYTES", 1500)
    options = {"tokenizer": f"hf:{tokenizer}/tokenizer", "part": "2/3"}
    append, count = preparation.SplitWriter.append, 0

    def crash(self, documents):
        nonlocal count
        count += 1
        if count % 9 == 0:
            raise KeyboardInterrupt
        return append(self, documents)

    monkeypatch.setattr(preparation.SplitWriter, "append", crash)
    crashes = 0
    while not (tmp_path / "part" / "part.json").exists():
        try:
            prepare(config(texts, tmp_path / "part", **options))
        except KeyboardInterrupt:
            crashes += 1
            with pytest.raises(PreparationError, match="--part was '2/3', now '1/3'"):
                prepare(config(texts, tmp_path / "part", **{**options, "part": "1/3"}))
    assert crashes > 1
    assert contents(tmp_path / "part") == contents(parts(3)[1])
    prepare(config(texts, tmp_path / "part", **options))
    with pytest.raises(ShardError, match=r"is a part of a corpus\. Merge all its parts"):
        Index.load(tmp_path / "part")


class CrashError(Exception):
    pass


@pytest.mark.parametrize("links", [True, False])
def test_an_interrupted_merge_is_gone_on_with(links, copied, one, tmp_path, monkeypatch):
    """At any of its file operations; also where shards have to be moved."""

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    operations = {"n": 0, "stop": 1}

    def counted(function):
        def call(*args, **options):
            operations["n"] += 1
            if operations["n"] == operations["stop"]:
                raise CrashError
            return function(*args, **options)

        return call

    for target, name in ((merge_module, "sync"), (merge_module, "write_json"), (shutil, "copytree")):
        monkeypatch.setattr(target, name, counted(getattr(target, name)))
    monkeypatch.setattr(merge_module, "_take", counted(merge_module._take))
    finished = False
    while not finished:
        operations["n"] = 0
        try:
            merge(copied, tmp_path / "data")
            finished = True
        except CrashError:
            assert not (tmp_path / "data" / "index.json").exists()
            operations["stop"] += 7
    assert operations["stop"] > 30
    assert contents(tmp_path / "data") == contents(one)
    assert bool(list(copied[0].glob("*.bin"))) == links
    merge(copied, tmp_path / "data")  # nothing to do
    with pytest.raises(ShardError, match="data is a whole corpus, and no part of one"):
        merge([tmp_path / "data"], tmp_path / "again")
    assert contents(tmp_path / "data") == contents(one)


def edited(folder, edit):
    """The part then is as of a version that had no checksum of part.json."""
    content = json.loads((folder / "part.json").read_text())
    content.pop("checksum")
    edit(content)
    (folder / "part.json").write_text(json.dumps(content))


def test_parts_that_do_not_belong_together(copied, tmp_path, capsys):
    out = tmp_path / "data"

    def refused(error, words, folders=copied):
        with pytest.raises(error, match=words):
            merge(folders, out)
        assert not out.exists()

    refused(PreparationError, "of 3 parts, 2 are not given: 1, 3. Name them too; --part 1/3", copied[1:2])
    again = shutil.copytree(copied[0], tmp_path / "again")
    refused(PreparationError, "again is part 1 of 3, as .*part0 is. Leave one out", [*copied, again])
    refused(PreparationError, "no parts are given", [])
    (tmp_path / "none").mkdir()
    refused(ShardError, "none is no finished part.*it goes on where it was", [*copied[:2], tmp_path / "none"])
    original = (copied[2] / "part.json").read_text()
    for edit, words in (
        (lambda c: c["settings"].update(shard_tokens=501), "--shard-tokens is 501 and 500"),
        (lambda c: c["source"].update(bytes=1), "the source's bytes is 1 and"),
        (lambda c: c.update(tokenizer_hash="x"), "the tokenizer is 'x'"),
        (lambda c: c.update(of=4), "the number of parts is 4 and 3"),
        (lambda c: c.update(val_fraction=0.3), "the settled share of validation is 0.3"),
        (lambda c: c.update(part_version=9), "of another version of anon_dist"),
        (lambda c: c.pop("splits"), "is damaged"),
    ):
        edited(copied[2], edit)
        refused((PreparationError, ShardError), words)
        (copied[2] / "part.json").write_text(original)
    (copied[2] / "part.json").write_text(re.sub(r'"text_bytes": (\d+)', r'"text_bytes": 9\1', original))
    refused(ShardError, r"part2/part\.json: its checksum does not belong to its content; the file was edited")
    edited(copied[2], lambda c: None)
    merge(copied, out)
    assert (
        f"no checksum covers their counts of documents and of bytes of text: {copied[2]}\n" in capsys.readouterr().out
    )


def test_torn_files_and_what_is_in_the_way(copied, tmp_path, monkeypatch):
    shard = copied[1] / "train-00000.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[:-2])
    with pytest.raises(PreparationError, match=r"train-00000\.bin has 998 bytes, part\.json says 1,000"):
        merge(copied, tmp_path / "data")
    shard.write_bytes(data)
    before = contents(copied[0])
    with pytest.raises(
        PreparationError, match=r"--out \S+part0 is itself a part of a corpus\. Name a new folder, beside"
    ):
        merge(copied, copied[0])
    assert contents(copied[0]) == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "train-00003.bin").write_bytes(b"precious")
    with pytest.raises(PreparationError, match=r"train-00003\.bin is in the way"):
        merge(copied, tmp_path / "foreign")
    assert (tmp_path / "foreign" / "train-00003.bin").read_bytes() == b"precious"
    (tmp_path / "text.txt").write_text("another text")
    prepare(
        PrepareConfig(source=str(tmp_path / "text.txt"), out=tmp_path / "other", tokenizer="bytes", val_fraction=0.0)
    )
    with pytest.raises(PreparationError, match="of another corpus"):
        merge(copied, tmp_path / "other")

    def elsewhere(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", elsewhere)
    with pytest.raises(PreparationError, match="on another file system"):
        merge(copied, tmp_path / "far")


def test_what_does_not_divide(texts, tokenizer, tmp_path):
    given = {"tokenizer": f"hf:{tokenizer}/tokenizer"}
    count = segments(source_of(config(texts, tmp_path)), 500)[-1] + 1
    for options, words in (
        ({"part": "1/99", **given}, f"divides into {count} at most. Shares are whole files"),
        ({"part": "1/2", "max_documents": 50, **given}, "divides into 1 at most. An hf: data set and --max-documents"),
        ({"part": "3/2", **given}, "must be I/N"),
        ({"part": "0/2", **given}, "must be I/N"),
        ({"part": "2", **given}, "must be I/N"),
        (
            {"part": "1/2", "tokenizer": "spm-bpe:420"},
            "--only-tokenizer in place of --part.*--tokenizer hf:TOK/tokenizer",
        ),
    ):
        with pytest.raises(PreparationError, match=words):
            prepare(config(texts, tmp_path / "out", **options))
        assert not (tmp_path / "out").exists()


def test_from_the_command_line(texts, tokenizer, one, tmp_path, capsys):
    command = ["data", "prepare", "--source", f"{texts}/a", "--source", f"{texts}/b", "--val-fraction", "0.2"]
    command += ["--tokenizer", f"hf:{tokenizer}/tokenizer", "--shard-tokens", "500", "--workers", "1"]
    for i in (1, 2):
        main([*command, "--part", f"{i}/2", "--out", str(tmp_path / str(i))])
        assert f"is part {i} of 2: train " in capsys.readouterr().out
    main(["data", "merge", str(tmp_path / "1"), str(tmp_path / "2"), "--out", str(tmp_path / "data")])
    assert contents(tmp_path / "data") == contents(one)
    said = capsys.readouterr().out
    assert (
        "left out: 6 not UTF-8 (a/04.txt: byte 0 is 0xff; a/09.txt: byte 0 is 0xff; a/14.txt: byte 0 is 0xff; and 3 more)"
        in said
    )
    with pytest.raises(SystemExit, match="error: of 2 parts, 1 are not given: 2"):
        main(["data", "merge", str(tmp_path / "1"), "--out", str(tmp_path / "data")])
