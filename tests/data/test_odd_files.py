"""Files as they are found: marks before the text, NULs, wide encodings, rubbish and damage behind what is packed, names with anything."""

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard
from test_prepare import config, texts_of

from anon_dist.data import Index, SourceError, prepare
from anon_dist.data.preparation.tally import Tally

MARK = b"\xef\xbb\xbf"
PACKED = {"gz": gzip.compress, "zst": zstandard.compress}


def prepared(folder, out, **options):
    """Texts, and reason → places."""
    index = prepare(config(folder, out, **{"tokenizer": "bytes", "val_fraction": 0.0, **options}))
    assert index == Index.load(out)
    return texts_of(out, "train"), index.source["skipped_examples"]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "t"
    path.mkdir()
    (path / "0.txt").write_text("good")
    return path


def test_blank_documents_and_marks(folder, tmp_path):
    (folder / "1.txt").write_text(" \n\t \u3000\r\n")
    (folder / "2.txt").write_bytes(MARK)
    (folder / "3.txt").write_bytes(MARK + b"marked\r\n")
    (folder / "4.jsonl").write_bytes(MARK + b'{"text": "first"}\r\n\r\n{"text": "  "}\r\n{"text": "\\ufeffkept"}')
    (folder / "5.txt.gz").write_bytes(gzip.compress(MARK + b"in gzip"))
    texts, left = prepared(folder, tmp_path / "out")
    assert texts == ["good", "marked\r\n", "first", "\ufeffkept", "in gzip"]
    assert left == {"empty": ["t/1.txt", "t/2.txt", "t/4.jsonl, line 3"]}


@pytest.mark.parametrize("mode", ["skip", "replace", "fail"])
def test_a_nul_far_into_a_file(mode, folder, tmp_path):
    late = b"a" * 10_000 + b"\0b"
    (folder / "1.txt").write_bytes(late)
    (folder / "2.bin").write_bytes(b"MZ\0\1" + late)
    if mode == "fail":
        with pytest.raises(SourceError, match=r"1\.txt: NUL characters \(byte 10,000 is 0\)\. Remove them \(tr"):
            prepared(folder, tmp_path / "out", on_bad_text=mode)
        return
    texts, left = prepared(folder, tmp_path / "out", on_bad_text=mode)
    if mode == "skip":
        assert texts == ["good"]
        assert left == {"binary": ["t/2.bin"], "NUL characters": ["t/1.txt: byte 10,000 is 0"]}
    else:
        assert texts == ["good", "a" * 10_000 + "\ufffdb"]
        assert left == {"binary": ["t/2.bin"], "NUL characters, replaced": ["t/1.txt"]}
    texts, left = prepared(folder, tmp_path / "lines", text_unit="line", on_bad_text="skip")
    assert left["NUL characters"] == ["t/1.txt, line 1: byte 10,000 is 0"]


@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        *(("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE")),
        *(("utf-32", "UTF-32"), ("utf-32-le", "UTF-32LE"), ("utf-32-be", "UTF-32BE")),
    ],
)
def test_wide_encodings_are_named(encoding, named, folder, tmp_path):
    for name, text in (("1.txt", "Brücke 漢字 — naïve 😀\n" * 999), ("2.jsonl", '{"text": "x 漢"}\n' * 9)):
        (folder / name).write_bytes(text.encode(encoding))
    texts, left = prepared(folder, tmp_path / "out", on_bad_text="replace")
    assert texts == ["good"]
    assert left == {named[:6]: ["t/1.txt", "t/2.jsonl"]}
    with pytest.raises(SourceError, match=rf"1\.txt: is {named}\. Convert it \(iconv -f {named} -t UTF-8\)"):
        prepared(folder, tmp_path / "fail", on_bad_text="fail")


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("end", ["\n", ""])
def test_rubbish_behind_what_is_packed(kind, end, folder, tmp_path):
    text = "".join(f"line {i} {'z' * (i % 97)}\n" for i in range(5000)) + f"last{end}"
    rows = "".join(json.dumps({"text": line}) + "\n" for line in text.splitlines())
    for name, content in (("1.txt", text), ("2.jsonl", rows.removesuffix("\n") + end)):
        (folder / f"{name}.{kind}").write_bytes(PACKED[kind](content.encode()) + b"rubbish, not packed")
    texts, left = prepared(folder, tmp_path / "out")
    assert texts == ["good", text, *text.splitlines()]
    lines = Tally({"rubbish behind packed text": 2}).lines(2)
    assert lines == ["taken: 2 rubbish behind packed text"]
    places = left.pop("rubbish behind packed text")
    assert not left
    assert [place.partition(":")[0] for place in places] == [f"t/1.txt.{kind}", f"t/2.jsonl.{kind}"]
    with pytest.raises(SourceError, match=r"something that is not packed follows [\d,]+ bytes of text\. Cut it off"):
        prepared(folder, tmp_path / "fail", on_bad_text="fail")


@pytest.mark.parametrize("kind", PACKED)
def test_what_lies_before_damage_is_taken(kind, folder, tmp_path):
    """Whole lines and paragraphs; a document that the damage cuts off is left out."""
    text = "".join(f"line {i} {os.urandom(20).hex()}\n" for i in range(5000))
    packed = PACKED[kind](text.encode())
    (folder / f"1.txt.{kind}").write_bytes(packed[: len(packed) * 2 // 3])
    texts, left = prepared(folder, tmp_path / "whole")
    assert texts == ["good"]
    assert left["damaged"][0].startswith(f"t/1.txt.{kind}: ")
    texts, left = prepared(folder, tmp_path / "lines", text_unit="line")
    assert 2500 < len(texts) - 1 < 4000
    assert texts[1:] == text.splitlines()[: len(texts) - 1]
    assert left["damaged"][0].startswith(f"t/1.txt.{kind}: ")
    (folder / f"1.txt.{kind}").write_bytes(b"never packed")
    texts, left = prepared(folder, tmp_path / "never")
    assert list(left) == ["damaged"]


def test_json_that_nests_too_deep_is_a_bad_line(folder, tmp_path):
    (folder / "1.jsonl").write_text('{"text": "a"}\n{"text": ' + "[" * 100_000 + '\n{"text": "b"}\n')
    texts, left = prepared(folder, tmp_path / "out")
    assert texts == ["good", "a", "b"]
    assert left["not JSON"][0].startswith("t/1.jsonl, line 2: not JSON (maximum recursion depth")


def test_names_with_anything(folder, tmp_path, capsys):
    for name in (b"with space.txt", b"with\nline end.txt", b"latin-\xe9.txt", b"UPPER.TXT.GZ"):
        content = name.replace(b"\xe9", b"")
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(gzip.compress(content) if name.endswith(b"GZ") else content)
    with open(os.fsencode(folder) + b"/bad-\xff\n.txt", "wb") as file:
        file.write(b"\xff")
    texts, left = prepared(folder, tmp_path / "out")
    assert sorted(texts) == ["UPPER.TXT.GZ", "good", "latin-.txt", "with\nline end.txt", "with space.txt"]
    assert left == {"not UTF-8": [r"t/bad-\udcff\n.txt: byte 0 is 0xff"]}
    assert r"bad-\udcff\n.txt" in capsys.readouterr().out
    prepare(config(folder, tmp_path / "out", tokenizer="bytes", val_fraction=0.0))
    assert "Nothing to do" in capsys.readouterr().out
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/od\xe9"))
    folder.rename(odd)
    texts, _ = prepared(odd, tmp_path / "odd")
    assert len(texts) == 5


def test_what_a_preparation_without_a_result_left_is_in_nobodys_way(folder, tmp_path):
    """A wrong source or tokenizer; or a kill before the tokenizer was noted."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").write_text(" ")
    out = tmp_path / "out"
    with pytest.raises(SourceError, match="no documents"):
        prepare(config(tmp_path / "empty", out, tokenizer="bytes"))
    (out / "tokenizer").mkdir()
    assert prepared(folder, out)[0] == ["good"]
