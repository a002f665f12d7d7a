"""Every kind of source, from any place in it, and what is wrong with bad ones."""

import gzip
import json
import sysconfig

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from anon_dist.data import SourceError
from anon_dist.data.preparation.sources import Cursor, LimitedSource, open_source

TEXTS = ["first\n", "second: naïve 漢字\r\n\ttabs", "", "third  "]


def source_of(spec, **options):
    return open_source(
        str(spec), **{"text_field": "text", "split": "train", "streaming": False, "text_unit": "file", **options}
    )


def read(spec, **options):
    return [item.text for item in source_of(spec, **options).read() if item.skipped is None]


def skipped(spec, **options):
    return [item.skipped for item in source_of(spec, **options).read() if item.skipped is not None]


def json_lines(texts=TEXTS, field="text"):
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()


def assert_resumes_anywhere(source):
    items = list(source.read())
    for i, item in enumerate(items):
        assert list(source.read(item.after)) == items[i + 1 :]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.jsonl", bytes), ("a.json", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)],
)
def test_json_lines(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(json_lines() + b"\n"))
    assert read(path) == [t for t in TEXTS if t]
    assert skipped(path) == ["empty"]
    assert_resumes_anywhere(source_of(path))


@pytest.mark.parametrize(
    ("name", "pack"), [("a.md", bytes), ("a.txt.gz", gzip.compress), ("a.txt.zst", zstandard.compress)]
)
def test_text(tmp_path, name, pack):
    path = tmp_path / name
    text = "line\r\n\n \ufeff x\ty" + "z" * 20_000
    path.write_bytes(pack(b"\xef\xbb\xbf" + text.encode()))  # a byte order mark is none of the text
    assert read(path) == [text]


@pytest.mark.parametrize("size", [1, 8190, 8191, 8192, 8193, 20_000])
def test_text_units(tmp_path, size):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n" + b"a" * size + b"\nb  \n \n\n" + b"c\nd" + "é".encode())
    assert read(path, text_unit="line") == ["a" * size, "b  ", "c", "dé"]
    assert read(path, text_unit="paragraph") == ["a" * size + "\nb  ", "c\ndé"]
    assert_resumes_anywhere(source_of(path, text_unit="line"))


def test_parquet(tmp_path):
    texts = [f"row {i}" for i in range(600)]
    pq.write_table(pa.table({"body": [*texts, None], "n": range(601)}), tmp_path / "a.parquet")
    assert read(tmp_path, text_field="body") == texts
    assert skipped(tmp_path, text_field="body") == ["null"]
    source = source_of(tmp_path, text_field="body")
    assert [i.text for i in source.read(Cursor(0, 598))][:2] == texts[598:]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_hugging_face(tmp_path, hub, streaming, kind):
    folder = tmp_path / "set"
    folder.mkdir()
    if kind == "jsonl":
        (folder / "train.jsonl").write_bytes(json_lines(field="body"))
    else:
        pq.write_table(pa.table({"body": TEXTS}), folder / "train.parquet")
    source = source_of(f"hf:{folder}", text_field="body", streaming=streaming)
    assert [i.text for i in source.read() if not i.skipped] == [t for t in TEXTS if t]
    assert_resumes_anywhere(source)
    with pytest.raises(SourceError, match=r"no (column|field) 'text'; there are .*body.*--text-field"):
        read(f"hf:{folder}", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_datasets_has_saved(tmp_path, streaming):
    """One split or several, and single Arrow files."""
    import datasets

    every = datasets.Dataset.from_dict({"text": [*TEXTS * 3, None]})
    every.save_to_disk(tmp_path / "one", num_shards=2)
    several = {"train": every, "test": datasets.Dataset.from_dict({"text": ["of a test"]})}
    datasets.DatasetDict(several).save_to_disk(tmp_path / "several")
    texts = [t for t in TEXTS * 3 if t]
    for name in ("one", "several"):
        source = source_of(f"hf:{tmp_path / name}", streaming=streaming)
        assert [item.text for item in source.read() if item.skipped is None] == texts
        assert_resumes_anywhere(source)
        with pytest.raises(SourceError, match=r"saved by datasets .* Give it as --source hf:\S+/(one|several)\.$"):
            source_of(tmp_path / name)
        with pytest.raises(SourceError, match=r"no split 'dev'. Set --split train"):
            read(f"hf:{tmp_path / name}", split="dev", streaming=streaming)
    assert read(f"hf:{tmp_path / 'several'}", split="test", streaming=streaming) == ["of a test"]
    assert read(tmp_path / "one" / "*.arrow") == texts
    assert_resumes_anywhere(source_of(tmp_path / "one" / "*.arrow"))


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow(tmp_path, new):
    table = pa.table({"text": [*TEXTS, None], "n": range(5)})
    with new(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=2)
    assert read(tmp_path) == [t for t in TEXTS if t]
    assert skipped(tmp_path) == ["empty", "null"]
    assert_resumes_anywhere(source_of(tmp_path))
    with pytest.raises(SourceError, match=r"a\.arrow: no column 'body'; there are text, n\. Set --text-field"):
        read(tmp_path, text_field="body")
    whole = (tmp_path / "a.arrow").read_bytes()
    for kept in range(0, len(whole), 8):  # batches begin at multiples of it
        (tmp_path / "a.arrow").write_bytes(whole[:kept])
        assert skipped(tmp_path)[-1] == "damaged"
    with pytest.raises(SourceError, match=r"a\.arrow: not a readable Arrow file .* Repair or remove the file"):
        read(tmp_path, on_bad_text="fail")


ROWS = [
    {"meta": {"text": {"en": "one"}, "n": 1}},
    {"meta": {"text": {"en": "two"}, "n": 2}},
    {"meta": {"text": None, "n": 3}},
    {"meta": None},
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "hf", "streamed"])
def test_a_field_of_a_record_in_the_record(tmp_path, hub, kind):
    path, streaming = tmp_path / "set" / f"train.{kind}", kind == "streamed"
    path.parent.mkdir()
    if kind in ("parquet", "arrow"):
        table = pa.Table.from_pylist(ROWS)
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_stream(path, table.schema) as file:
                file.write_table(table)
    else:
        path = path.with_suffix(".jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    spec = path if kind in ("jsonl", "parquet", "arrow") else f"hf:{path.parent}"
    options = {"text_field": "meta.text.en", "streaming": streaming}
    assert read(spec, **options) == ["one", "two"]
    assert skipped(spec, **options) == ["null", "null"]
    for field in ("meta.body", "meta.text.de", "body.text"):
        with pytest.raises(SourceError, match=rf"no (column|field) '{field}'; there are meta.*Set --text-field"):
            read(spec, text_field=field, streaming=streaming)
    with pytest.raises(SourceError, match=r"field 'meta.text' is dict, not text|no column 'meta.text'"):
        read(spec, text_field="meta.text", streaming=streaming)


def test_a_name_with_a_dot_is_the_fields_own_first(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a.b": "own", "a": {"b": "inner"}}\n{"a": {"b": "inner"}}\n')
    assert read(tmp_path, text_field="a.b") == ["own", "inner"]
    pq.write_table(pa.table({"a.b": ["own"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_field="a.b") == ["own"]


def test_hugging_face_without_data(tmp_path, hub):
    with pytest.raises(SourceError, match=r"--source hf:.*Check the name"):
        read(f"hf:{tmp_path}")


def test_folder_in_order_without_hidden_and_binary_files(tmp_path):
    for name, data in {
        "b/2.txt": b"two",
        "a.jsonl": json_lines(["one"]),
        "b/image.png": b"\x89PNG\0\0",
        "b/latin.txt": b"\xe9t\xe9",
        "c.txt.gz": gzip.compress(b"three"),
        ".hidden.txt": b"no",
        ".git/config": b"no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    source = source_of(tmp_path)
    assert read(tmp_path) == ["one", "two", "three"]
    assert sorted(skipped(tmp_path)) == ["binary", "not UTF-8"]
    assert source.describe()["hidden_files"] == 2
    assert_resumes_anywhere(source)
    assert read(tmp_path / "**" / "*.txt") == ["two"]
    assert read(tmp_path / "*") == ["one", "three"]


def test_description_changes_with_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = source_of(tmp_path).describe()
    assert source_of(tmp_path).describe() == before
    (tmp_path / "a.txt").write_text("three")
    assert source_of(tmp_path).describe()["listing"] != before["listing"]


def test_standard_library(tmp_path, monkeypatch):
    for name in ("os.py", "json/tool.py", "site-packages/x.py", "json/__pycache__/y.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert read("stdlib") == ["json/tool.py", "os.py"]
    (tmp_path / "os.py").unlink()
    (tmp_path / "json/tool.py").unlink()
    with pytest.raises(SourceError, match=r"no \.py files"):
        source_of("stdlib")


@pytest.mark.parametrize(
    ("documents", "size", "expected"),
    [(2, None, ["a", "bb"]), (None, 3, ["a", "bb"]), (None, 4, ["a", "bb", "ccc"]), (9, 99, ["a", "bb", "ccc"])],
)
def test_limits(tmp_path, documents, size, expected):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a", "", "bb", "ccc"]))
    source = LimitedSource(source_of(tmp_path), documents, size)
    assert [i.text for i in source.read() if not i.skipped] == expected
    assert_resumes_anywhere(source)


def test_lone_surrogates(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "whole \\ud83d\\ude00"}\n{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    assert read(tmp_path) == ["whole 😀"]
    assert skipped(tmp_path) == ["lone surrogates"]
    assert read(tmp_path, on_bad_text="replace") == ["whole 😀", "a\ufffdb 😀"]
    with pytest.raises(
        SourceError, match=r"a\.jsonl, line 2: character 1 is half of a surrogate pair.*--on-bad-text skip"
    ):
        read(tmp_path, on_bad_text="fail")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y"}\n',
            r"a\.jsonl, line 2: no field 'text'; there are body\. Set --text-field",
        ),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3: not JSON"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl, line 1: a JSON list, not an object"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl, line 1: field 'text' is int, not text"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: cannot be read .* Repair or remove"),
        ("a.jsonl.gz", gzip.compress(json_lines())[:-9], r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.zst", b"not zstandard", r"a\.jsonl\.zst: cannot be read"),
        ("a.txt.zst", zstandard.compress(b"text" * 999)[:-5], r"a\.txt\.zst: cannot be read"),
        ("a.parquet", b"not parquet", r"a\.parquet: not a readable parquet file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read(tmp_path, on_bad_text="fail")


def test_parquet_without_the_column(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet: no column 'text'; there are body"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"), [("nowhere", "no such file or folder"), ("nowhere/*.txt", "no files there")]
)
def test_nothing_there(tmp_path, spec, message):
    with pytest.raises(SourceError, match=message):
        source_of(tmp_path / spec)
