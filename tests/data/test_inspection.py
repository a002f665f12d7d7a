"""`anon-dist data inspect` says what lies in a folder; lengths are counted here from the texts."""

import json
import math
from collections import Counter

import pytest

from anon_dist.cli import main
from anon_dist.data import Index, PrepareConfig, inspection, prepare
from anon_dist.data.preparation.encode import is_validation


def inspected(capsys, *args):
    main(["data", "inspect", *map(str, args)])
    return capsys.readouterr().out


def lengths_of(corpus, split):
    """Bytes and an end, of each text of the split."""
    texts = [path.read_bytes() for path in sorted(corpus.iterdir())]
    return [len(text) + 1 for text in texts if is_validation(text, 0.1) == (split == "val")]


@pytest.mark.parametrize("block", [64, inspection.BLOCK_BYTES])
def test_as_json(corpus, prepared, capsys, monkeypatch, block):
    monkeypatch.setattr(inspection, "BLOCK_BYTES", block)
    found, index = json.loads(inspected(capsys, prepared, "--json", "--samples", "3")), Index.load(prepared)
    assert found["fingerprint"] == index.fingerprint
    assert found["source"]["files"] == 80
    for split in ("train", "val"):
        lengths, shown = lengths_of(corpus, split), found["splits"][split]
        assert (shown["tokens"], shown["documents"]) == (sum(lengths), len(lengths))
        assert shown["shards"] == len(index.splits[split].shards)
        bins = {int(low): count for low, count in shown["lengths"]["bins"].items() if count}
        assert bins == Counter(1 << int(math.log2(length)) for length in lengths)
        assert (shown["lengths"]["least"], shown["lengths"]["most"]) == (min(lengths), max(lengths))
        middle = sorted(lengths)[(len(lengths) - 1) // 2]
        assert middle <= shown["lengths"]["median_at_most"] < 2 * middle
        texts = {path.read_bytes().decode() for path in corpus.iterdir()}
        samples = found["samples"][split]
        assert len({sample["token"] for sample in samples}) == 3
        assert all(sample["whole"] and sample["text"] in texts for sample in samples)


def test_as_text_and_as_a_picture(prepared, tmp_path, capsys):
    said = inspected(capsys, prepared, "--samples", "1", "--plot", tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    for words in (
        "bytes: 257 tokens, end of document 256",
        "(80 files, ",
        "--- train, document at token 0",
        "█",
        "WARNING",
    ):
        assert words in said
    train = Index.load(prepared).splits["train"]
    assert f"train       {train.tokens:,} tokens in {train.documents:,} documents" in said


def test_a_part_and_what_was_left_out(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for i in range(9):
        (tmp_path / "texts" / f"{i}.txt").write_bytes(b"\xe9" if i == 8 else b"text " * 800)
    options = {"tokenizer": "bytes", "shard_tokens": 500, "val_fraction": 0.0, "workers": 1}
    prepare(PrepareConfig(source=str(tmp_path / "texts"), out=tmp_path / "part", part="2/2", **options))
    said = inspected(capsys, tmp_path / "part")
    assert f"{tmp_path}/part: part 2 of 2\n" in said
    assert "left out: 1 not UTF-8 (texts/8.txt: byte 0 is 0xe9)" in said
    found = json.loads(inspected(capsys, tmp_path / "part", "--json"))
    assert found["kind"] == "part 2 of 2"
    assert found["skipped"] == {"not UTF-8": 1}
    assert found["splits"]["train"]["documents"] < 8


def test_what_is_none(tmp_path):
    with pytest.raises(SystemExit, match="error: preparation unfinished or not a data folder"):
        main(["data", "inspect", str(tmp_path)])
