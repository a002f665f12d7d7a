"""Texts at addresses: the documents of a folder here, from stores that fail."""

import gzip
import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from anon_dist.data import PrepareConfig, SourceError, prepare
from anon_dist.data.preparation.sources import open_source
from anon_dist.data.stored import remote, remote_files
from anon_dist.data.stored.index import Index

LINES = "".join(json.dumps({"text": f"line {i} " + "naïve 漢字 " * (i % 7)}) + "\n" for i in range(300)).encode()


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    for module, name in ((remote, "AT_START"), (remote, "MEANWHILE"), (remote_files, "AT_START")):
        monkeypatch.setattr(module, name, (0.0, 0.0))
    monkeypatch.setattr(remote_files, "BLOCK", 1000)
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def texts(tmp_path):
    """A folder with every kind of file."""
    folder = tmp_path / "texts"
    (folder / "sub" / ".hidden").mkdir(parents=True)
    (folder / "a.txt").write_text("plain\n" * 900)
    (folder / "sub" / "b.jsonl").write_bytes(LINES)
    (folder / "sub" / "c.jsonl.gz").write_bytes(gzip.compress(LINES[: len(LINES) // 3].rpartition(b"\n")[0]))
    (folder / "sub" / "d.jsonl.zst").write_bytes(zstandard.compress(LINES))
    (folder / "sub" / ".hidden" / "e.txt").write_text("no")
    pq.write_table(pa.table({"text": [f"row {i}" * 30 for i in range(600)]}), folder / "f.parquet")
    return folder


def upload(folder, address):
    fs, root = fsspec.core.url_to_fs(address)
    for path in (p for p in folder.rglob("*") if p.is_file()):
        name = f"{root}/{path.relative_to(folder)}"
        fs.makedirs(name.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(name, path.read_bytes())
    return address


def source_of(spec, **options):
    return open_source(
        str(spec), **{"text_field": "text", "split": "train", "streaming": False, "text_unit": "file", **options}
    )


def documents(spec, **options):
    return [item.text for item in source_of(spec, **options).read() if item.skipped is None]


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_the_documents_are_those_of_the_folder(kind, texts, tmp_path):
    address = upload(texts, f"{kind}://{tmp_path}/there/texts")
    assert documents(address) == documents(texts)
    assert documents(f"{address}/") == documents(texts)
    assert source_of(address).describe()["hidden_files"] == 1
    assert source_of(address).describe()["bytes"] == source_of(texts).describe()["bytes"]
    assert documents(f"{address}/sub/b.jsonl") == documents(texts / "sub" / "b.jsonl")
    assert documents(f"{address}/**/*.jsonl*") == documents(f"{texts}/**/*.jsonl*")
    items = list(source_of(address).read())
    for i in range(0, len(items), 97):
        assert list(source_of(address).read(items[i].after)) == items[i + 1 :]


def test_a_preparation_from_a_store_that_fails_makes_the_same_tokens(s3, texts, tmp_path):
    address = upload(texts, f"s3://bucket{tmp_path}/texts")
    options = {"tokenizer": "bytes", "val_fraction": 0.1, "workers": 1}
    prepare(PrepareConfig(source=str(texts), out=tmp_path / "a", **options))
    count = iter(range(10**6))
    s3.fault = lambda method, path, _: ("503", "cut")[next(count) % 2] if next(count) % 7 == 2 else None
    try:
        prepare(PrepareConfig(source=address, out=tmp_path / "b", **options))
    finally:
        s3.fault = lambda *_: None
    assert Index.load(tmp_path / "a").fingerprint == Index.load(tmp_path / "b").fingerprint
    assert Index.load(tmp_path / "b").source["origin"] == address


def test_what_cannot_be_read_is_named(texts, tmp_path, monkeypatch):
    address = upload(texts, f"memory://{tmp_path}/texts")
    with pytest.raises(SourceError, match=rf"--source {address}/none: no files there"):
        source_of(f"{address}/none")
    with pytest.raises(SourceError, match="no address that fsspec takes"):
        source_of("nowhere://x")
    source, store = source_of(address), fsspec.filesystem("memory")
    store.pipe_file(f"{tmp_path}/texts/a.txt", b"short")
    with pytest.raises(SourceError, match=rf"{address}/a.txt was changed meanwhile: 5 bytes, and 5,400 before"):
        list(source.read())
    (texts / "sub" / "b.jsonl").write_text('{"txt": 1}\n')
    upload(texts, address)
    with pytest.raises(SourceError, match=rf"{address}/sub/b.jsonl, line 1: no field 'text'"):
        documents(address, on_bad_text="fail")
    upload(texts, address)
    source = source_of(address)
    monkeypatch.setattr(type(store), "cat_file", lambda *a, **k: (_ for _ in ()).throw(TimeoutError("no answer")))
    words = r"a.txt cannot be read: TimeoutError: no answer \(attempt 3, .*The same command goes on when the store answers again"
    with pytest.raises(SourceError, match=words):
        list(source.read())
