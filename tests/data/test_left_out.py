"""What is wrong with texts is left out, mended or refused, as one wishes, and said with its place."""

import gzip
import importlib
import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_prepare import config, texts_of

from anon_dist.data import DataError, Index, PreparationError, SourceError, prepare
from anon_dist.data.config import PrepareConfig
from anon_dist.data.preparation.encode import is_validation
from anon_dist.data.preparation.meter import Meter
from anon_dist.data.preparation.tally import Tally
from anon_dist.data.verify import verify

GOOD = [f"document {i} " * 40 for i in range(40)]


@pytest.fixture
def bad(tmp_path):
    """A folder with all that can be wrong; good documents before, between and behind."""
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in GOOD))
    lines = ['{"text": "kept"}', '{"body": "x"}', '{"text": ', '{"text": 7}', '{"text": null}', '{"text": ""}', "[1]"]
    (folder / "b.jsonl").write_text("\n".join([*lines, '{"text": "half \\ud800 pair"}']))
    (folder / "c.txt").write_bytes("vor der Brücke".encode("latin-1"))
    (folder / "d.txt").write_bytes("Brücke".encode("utf-16"))
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "before the damage"}\n' * 9, mtime=0)[:-9])
    (folder / "f.parquet").write_bytes(b"PAR1 not really PAR1")
    pq.write_table(pa.table({"body": ["x"]}), folder / "g.parquet")
    (folder / "h.png").write_bytes(b"\0\1")
    (folder / "i.pdf").write_bytes(b"%PDF-1.4 text")
    (folder / "j.warc.wet.gz").write_bytes(gzip.compress(b"WARC/1.0\r\n"))
    (folder / ".hidden").write_text("no")
    return folder


SKIPPED = {
    "UTF-16": (["bad/d.txt"], 1),
    "binary": (["bad/h.png"], 1),
    "damaged": (["bad/e.jsonl.gz: Compressed file ended", "bad/f.parquet: "], 2),
    "empty": (["bad/b.jsonl, line 6"], 1),
    "lone surrogates": (["bad/b.jsonl, line 8: character 5 is half"], 1),
    "no field 'text'": (["bad/b.jsonl, line 2", "bad/g.parquet"], 2),
    "no text format": (["bad/i.pdf", "bad/j.warc.wet.gz"], 2),
    "not JSON": (["bad/b.jsonl, line 3: not JSON", "bad/b.jsonl, line 7: a JSON list"], 2),
    "not UTF-8": (["bad/c.txt: byte 10 is 0xfc"], 1),
    "not text": (["bad/b.jsonl, line 4: int"], 1),
    "null": (["bad/b.jsonl, line 5"], 1),
}


def said_of(out):
    return Tally.from_json(Index.load(out).source)


def test_skipped_with_its_places(bad, tmp_path, capsys):
    prepare(config(bad, tmp_path / "out", tokenizer="bytes"))
    tally, printed = said_of(tmp_path / "out"), capsys.readouterr().out
    assert tally.counts == {reason: count for reason, (_, count) in SKIPPED.items()}
    for reason, (places, _) in SKIPPED.items():
        assert len(tally.examples[reason]) == len(places)
        for place, wanted in zip(tally.examples[reason], places, strict=True):
            assert place.startswith(wanted)
            assert place in printed
    assert "left out: 1 not UTF-8 (bad/c.txt: byte 10 is 0xfc): convert them (iconv" in printed
    assert "left out: 1 hidden files" in printed
    taken = sum(split.documents for split in Index.load(tmp_path / "out").splits.values())
    assert taken > len(GOOD) + 1
    assert f"WARNING: {12 / (taken + 12):.1%} of the source's documents were left out" in printed
    assert {*texts_of(tmp_path / "out", "train"), *texts_of(tmp_path / "out", "val")} == {
        *GOOD,
        "kept",
        "before the damage",
    }


def test_replaced(bad, tmp_path, capsys):
    prepare(config(bad, tmp_path / "out", tokenizer="bytes", on_bad_text="replace"))
    texts = {*texts_of(tmp_path / "out", "train"), *texts_of(tmp_path / "out", "val")}
    assert texts == {*GOOD, "kept", "before the damage", "half \ufffd pair", "vor der Br\ufffdcke"}
    counts = said_of(tmp_path / "out").counts
    assert counts["not UTF-8, replaced"] == counts["lone surrogates, replaced"] == 1
    assert not {"not UTF-8", "lone surrogates"} & set(counts)
    assert "taken: 1 not UTF-8, replaced (bad/c.txt)" in capsys.readouterr().out


def test_fail_stops_at_the_first_and_goes_on_with_another_choice(bad, tmp_path):
    """With the bytes of a preparation that had left such out from the beginning."""
    with pytest.raises(SourceError, match=r"b\.jsonl, line 2: no field 'text'; .*--on-bad-text skip: the same command"):
        prepare(config(bad, tmp_path / "out", tokenizer="bytes", on_bad_text="fail", val_fraction=0.0))
    assert (tmp_path / "out" / "progress.json").exists()
    for name in ("out", "fresh"):
        prepare(config(bad, tmp_path / name, tokenizer="bytes", val_fraction=0.0))
    assert (tmp_path / "out" / "index.json").read_bytes() == (tmp_path / "fresh" / "index.json").read_bytes()
    with pytest.raises(PreparationError, match="--on-bad-text was 'skip', now 'replace'"):
        prepare(config(bad, tmp_path / "out", tokenizer="bytes", val_fraction=0.0, on_bad_text="replace"))


def test_the_first_places_are_kept_over_chunks_and_interruptions(tmp_path, monkeypatch):
    encode, preparation = (
        importlib.import_module(f"anon_dist.data.{name}") for name in ("preparation.encode", "preparation.prepare")
    )
    monkeypatch.setattr(encode, "CHUNK_CHARS", 10)
    monkeypatch.setattr(preparation, "COMMIT_BYTES", 10)
    rows = [f'{{"text": "good {i}"}}\n{{"body": "{i}"}}\n' for i in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    options = {"tokenizer": "bytes", "val_fraction": 0.0}

    def interrupted(self, chunk):
        if "good 5" in bytes(chunk.splits["train"].tokens.astype("u1")).decode(errors="replace"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Meter, "count", interrupted)
        prepare(config(tmp_path / "a.jsonl", tmp_path / "out", **options))
    prepare(config(tmp_path / "a.jsonl", tmp_path / "out", **options))
    tally = said_of(tmp_path / "out")
    assert tally.counts == {"no field 'text'": 9}
    root = tmp_path.name
    assert tally.examples == {"no field 'text'": [f"{root}/a.jsonl, line {n}" for n in (2, 4, 6)]}


def test_what_nobody_may_read(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text " * 9)
    if os.getuid() == 0:  # whom nothing is denied

        def denied(self, *args, **kwargs):
            if self.name == "b.txt":
                raise PermissionError(13, "Permission denied")
            return opened(self, *args, **kwargs)

        opened = type(tmp_path).open
        monkeypatch.setattr(type(tmp_path), "open", denied)
    else:
        (tmp_path / "b.txt").chmod(0)
    prepare(config(tmp_path / "?.txt", tmp_path / "out", tokenizer="bytes", val_fraction=0.0))
    assert said_of(tmp_path / "out").counts == {"unreadable": 1}
    with pytest.raises(SourceError, match="Give yourself the right to read it"):
        prepare(config(tmp_path / "?.txt", tmp_path / "o", tokenizer="bytes", val_fraction=0.0, on_bad_text="fail"))


def test_an_error_of_the_disk_is_no_bad_text(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")

    def broken(self, *args, **kwargs):
        if self.name == "a.txt":
            raise OSError(5, "Input/output error")
        return opened(self, *args, **kwargs)

    opened = type(tmp_path).open
    monkeypatch.setattr(type(tmp_path), "open", broken)
    with pytest.raises(SourceError, match=r"a\.txt: cannot be read .*The same command goes on"):
        prepare(config(tmp_path / "a.txt", tmp_path / "out", tokenizer="bytes", val_fraction=0.0))


@pytest.mark.parametrize(
    ("source", "out", "refused"),
    [
        ("texts", "texts", "holds texts of the source"),
        ("texts", "texts/out", "lies in the source's folder"),
        ("texts/*.txt", "texts", "holds texts of the source"),
        ("texts/a.txt", "texts", "holds texts of the source"),
        ("**/*.txt", "out", "lies in the source's folder"),
        ("hf:texts", "texts/out", "lies in the source's folder"),
        ("texts/*.txt", "texts/out", None),
        ("texts", ".", None),
    ],
)
def test_no_preparation_reads_what_it_writes(source, out, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for i in range(9):
        (tmp_path / "texts" / f"{'abcdefghi'[i]}.txt").write_text(f"text {i} " * 99)
    (tmp_path / "b.txt").write_text("more")
    options = {"tokenizer": "bytes", "val_fraction": 0.0}
    if refused is None:
        for _ in range(2):
            prepare(config(source, out, **options))
        return
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PreparationError, match=rf"--out {out} {refused}: .*Name a folder of its own"):
        prepare(config(source, out, **options))
    assert sorted(tmp_path.rglob("*")) == before


def test_several_sources_are_one_corpus_in_the_order_given(tmp_path, capsys):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_text("one")
    (tmp_path / "b" / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "b" / "2.txt").write_text("two")
    (tmp_path / "a.jsonl").write_text('{"text": "three"}\n{"text": "four"}\n')
    options = {"tokenizer": "bytes", "val_fraction": 0.0, "workers": 1}
    sources = (str(tmp_path / "b"), str(tmp_path / "a.jsonl"))
    index = prepare(PrepareConfig(source=sources, out=tmp_path / "out", **options))
    assert texts_of(tmp_path / "out", "train") == ["one", "two", "three", "four"]
    assert index.settings["source"] == list(sources)
    assert [each["origin"] for each in index.source["sources"]] == list(sources)
    assert index.source["skipped_examples"] == {"not UTF-8": ["b/bad.txt: byte 0 is 0xff"]}
    prepare(PrepareConfig(source=sources, out=tmp_path / "out", **options))
    assert "Nothing to do" in capsys.readouterr().out
    with pytest.raises(PreparationError, match="--source was"):
        prepare(PrepareConfig(source=sources[::-1], out=tmp_path / "out", **options))
    prepare(PrepareConfig(source=sources[::-1], out=tmp_path / "other", **options))
    assert texts_of(tmp_path / "other", "train") == ["three", "four", "one", "two"]
    with pytest.raises(PreparationError, match="comes twice"):
        prepare(PrepareConfig(source=(sources[0], sources[0]), out=tmp_path / "o", **options))
    for nothing in ("", " ", (sources[0], "")):
        with pytest.raises(PreparationError, match="--source '' names nothing"):
            prepare(PrepareConfig(source=nothing, out=tmp_path / "o", **options))
    for other in (f"{tmp_path}/./b", f"{tmp_path}/b/*"):
        with pytest.raises(PreparationError, match=r"both have .*; it would be read twice"):
            prepare(PrepareConfig(source=(sources[0], other), out=tmp_path / "o", **options))
    (tmp_path / "c.jsonl").write_text('{"body": "x"}\n')  # the first of its source: a wrong setting
    with pytest.raises(SourceError, match="Set --text-field"):
        prepare(PrepareConfig(source=(*sources, str(tmp_path / "c.jsonl")), out=tmp_path / "o", **options))


def test_progress_says_documents_speed_and_what_is_left(tmp_path, capsys, monkeypatch):
    meter, encode = (
        importlib.import_module(f"anon_dist.data.{name}") for name in ("preparation.meter", "preparation.encode")
    )
    monkeypatch.setattr(meter, "LOG_SECONDS", -1.0)
    monkeypatch.setattr(encode, "CHUNK_CHARS", 1000)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in GOOD)
    (tmp_path / "a.jsonl").write_text(rows * 50)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode() * 10))
    prepare(config(tmp_path / "?.*", tmp_path / "out", tokenizer="bytes", shard_tokens=1 << 22))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("file ")]
    shares = [float(line.split("%")[0].rpartition(" ")[2]) for line in lines if "%" in line]
    assert lines[0].startswith("file 1 of 2: ")
    assert re.search(r"[\d,]+ documents, [\d.]+ MB to .* MB/s, .* left$", lines[0])
    assert shares == sorted(shares)
    assert shares[0] < 50 < shares[-1] <= 100


def test_links_to_folders_are_followed_and_what_is_no_file_is_said(tmp_path, capsys):
    folder, other = tmp_path / "texts", tmp_path / "other"
    for path in (folder / "sub", other):
        path.mkdir(parents=True)
    for i, path in enumerate((folder / "a.txt", folder / "sub" / "b.txt", other / "c.txt")):
        path.write_text(GOOD[i])
    (folder / "more").symlink_to(other)
    (folder / "sub" / "again").symlink_to(folder)  # a loop
    (folder / "twice").symlink_to(folder / "sub")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.txt")
    prepare(config(folder, tmp_path / "out", tokenizer="bytes", val_fraction=0.0))
    assert texts_of(tmp_path / "out", "train") == [GOOD[0], GOOD[2], GOOD[1]]  # in the order of the paths
    assert "left out: 2 that are no files (links to nothing, pipes, devices)" in capsys.readouterr().out
    assert Index.load(tmp_path / "out").source["special_files"] == 2


@pytest.mark.parametrize("mode", ["skip", "replace", "fail"])
def test_lines_of_json_that_are_not_utf8(mode, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    good = json.dumps({"text": GOOD[0]}).encode()
    (folder / "a.jsonl").write_bytes(b"\n".join([good, b'{"text": "caf\xe9"}', b'{"text": "kept", "by": "Ren\xe9"}']))
    settings = config(folder, tmp_path / "out", tokenizer="bytes", val_fraction=0.0, on_bad_text=mode)
    if mode == "fail":
        with pytest.raises(SourceError, match=r"a\.jsonl, line 2: not UTF-8 .*iconv"):
            prepare(settings)
        return
    prepare(settings)
    found, tally = texts_of(tmp_path / "out", "train"), said_of(tmp_path / "out")
    assert found == ([GOOD[0]] if mode == "skip" else [GOOD[0], "caf\ufffd", "kept"])
    assert tally.counts == ({"not UTF-8": 2} if mode == "skip" else {"not UTF-8, replaced": 1})


def test_a_validation_split_of_much_text_is_said(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    chosen = next(text for text in (f"{i} " * 9000 for i in range(999)) if is_validation(text.encode(), 0.05))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (*GOOD, chosen)))
    for fraction in (0.05, 0.6):
        prepare(config(folder, tmp_path / str(fraction), tokenizer="bytes", val_fraction=fraction))
        assert ("long ones fell to it" in capsys.readouterr().out) == (fraction < 0.6)


def test_an_address_is_no_unfinished_folder():
    with pytest.raises(DataError, match=r"s3:/bucket/data is no folder; an address has two slashes: s3://bucket/data"):
        verify(Path("s3://bucket/data"))
