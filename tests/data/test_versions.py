"""A corpus is of one version of its source, and of the shards that were written: an edit that keeps the size is found out."""

import importlib
import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest
from test_prepare import contents, texts_of

from anon_dist.cli import main
from anon_dist.data import PreparationError, PrepareConfig, SourceError, prepare
from anon_dist.data.preparation.merge import merge
from anon_dist.data.preparation.meter import Meter

encode, preparation = (
    importlib.import_module(f"anon_dist.data.{name}") for name in ("preparation.encode", "preparation.prepare")
)
SHARDS = {"shard_tokens": 100}
"""So that the texts divide into three shares."""
TIME = 1_700_000_000_000_000_000


@pytest.fixture
def texts(tmp_path):
    """Nine files of one size, all last changed at one time."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.txt").write_text(f"text {i} " * 100)
        os.utime(folder / f"{i}.txt", ns=(TIME, TIME))
    return folder


def config(source, out, **options):
    defaults = {"tokenizer": "bytes", "val_fraction": 0.0, "workers": 1}
    return PrepareConfig(source=str(source), out=Path(out), **{**defaults, **options})


def edit(path):
    """One letter; the size stays, the time does not."""
    path.write_text(path.read_text().replace("text", "next", 1))
    os.utime(path, ns=(TIME + 1, TIME + 1))


def interrupted(source, out, monkeypatch, after, **options):
    """A preparation that ends after so many files, as one that is killed."""
    done = 0

    def count(self, chunk):
        nonlocal done
        done += 1
        if done > after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encode, "CHUNK_CHARS", 10)
        patch.setattr(preparation, "COMMIT_BYTES", 10)
        patch.setattr(Meter, "count", count)
        prepare(config(source, out, **options))


@pytest.mark.parametrize(
    ("number", "options"),
    [(1, {}), (7, {}), (7, {"max_documents": 8})],
    ids=["read before", "not read yet", "of a limited source"],
)
def test_a_resume_refuses_a_file_that_was_edited(number, options, texts, tmp_path, monkeypatch):
    interrupted(texts, tmp_path / "out", monkeypatch, 4, **options)
    original = (texts / f"{number}.txt").read_text()
    edit(texts / f"{number}.txt")
    words = rf"texts/{number}\.txt of the source changed since .*--overwrite; or, if only the time is another, go on with --ignore-times"
    with pytest.raises(PreparationError, match=words):
        prepare(config(texts, tmp_path / "out", **options))
    (texts / f"{number}.txt").write_text(original)  # a copy that did not keep the time
    prepare(config(texts, tmp_path / "out", ignore_times=True, **options))
    prepare(config(texts, tmp_path / "fresh", **options))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert not (tmp_path / "out" / "versions.json").exists()


def test_a_file_that_changes_while_it_is_read(texts, tmp_path, monkeypatch):
    def count(self, chunk):
        edit(texts / "8.txt")

    monkeypatch.setattr(encode, "CHUNK_CHARS", 10)
    monkeypatch.setattr(Meter, "count", count)
    with pytest.raises(
        SourceError, match=r"8\.txt was changed while the source was read. Start again with --overwrite"
    ):
        prepare(config(texts, tmp_path / "out"))
    with pytest.raises(PreparationError, match=r"texts/8\.txt of the source changed since"):
        prepare(config(texts, tmp_path / "out"))


def test_files_that_come_and_go_between_an_interruption_and_its_resume_are_named(texts, tmp_path, monkeypatch):
    interrupted(texts, tmp_path / "out", monkeypatch, 4)
    (texts / "3.txt").rename(texts / "33.txt")
    (texts / "5.txt").write_text("longer " * 200)
    words = r"the source's bytes was 6300, now 7000; .*; texts/3\.txt gone; texts/33\.txt new; texts/5\.txt changed\. Use --overwrite"
    with pytest.raises(PreparationError, match=words):
        prepare(config(texts, tmp_path / "out"))


def test_a_complete_folder_says_what_changed_since(texts, tmp_path, capsys):
    prepare(config(texts, tmp_path / "out"))
    prepare(config(texts, tmp_path / "out"))
    assert "WARNING" not in capsys.readouterr().out
    edit(texts / "3.txt")
    os.utime(texts / "3.txt")
    prepare(config(texts, tmp_path / "out"))
    assert "WARNING: texts/3.txt of the source changed after" in capsys.readouterr().out


def test_a_store_says_which_version_a_file_is(texts, tmp_path, monkeypatch):
    store = fsspec.filesystem("memory")
    for path in texts.iterdir():
        store.pipe_file(f"{tmp_path}/there/{path.name}", path.read_bytes())
    address = f"memory://{tmp_path}/there"
    interrupted(address, tmp_path / "out", monkeypatch, 4)
    store.pipe_file(f"{tmp_path}/there/6.txt", b"x" * 700)
    with pytest.raises(PreparationError, match=r"there/6\.txt of the source changed since"):
        prepare(config(address, tmp_path / "out"))
    store.store.clear()


def test_merge_refuses_parts_that_read_different_versions(texts, tmp_path):
    """A file that changed before its own part read it is the same in all of the corpus."""
    for i in (1, 2, 3):
        prepare(config(texts, tmp_path / str(i), part=f"{i}/3", **SHARDS))
        edit(texts / "4.txt") if i == 1 else None  # the second part's
    parts = [tmp_path / str(i) for i in (1, 2, 3)]
    merge(parts, tmp_path / "data")
    prepare(config(texts, tmp_path / "one", **SHARDS))
    assert contents(tmp_path / "data") == contents(tmp_path / "one")

    edit(texts / "0.txt")
    prepare(config(texts, tmp_path / "3", part="3/3", **SHARDS, overwrite=True))
    words = r"/1 read texts/0\.txt of the source before a change that .*/3 saw .*Prepare .*/1 again .*merge with --ignore-times"
    with pytest.raises(PreparationError, match=words):
        merge(parts, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(PreparationError, match=r"texts/0\.txt of the source changed since"):
        prepare(config(texts, tmp_path / "1", part="1/3", **SHARDS))  # complete, of the version before
    prepare(config(texts, tmp_path / "1", part="1/3", **SHARDS, overwrite=True))
    merge(parts, tmp_path / "other")
    assert texts_of(tmp_path / "other", "train")[0].startswith("next 0 ")
    merge(parts[::-1], tmp_path / "third", ignore_times=True)


@pytest.fixture
def parts(texts, tmp_path):
    folders = [tmp_path / "p1", tmp_path / "p2"]
    for i, folder in enumerate(folders, 1):
        prepare(config(texts, folder, part=f"{i}/2", **SHARDS, val_fraction=0.3))
    return folders


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("train-00001.bin", r"p2/train-00001\.bin is altered: checksum [0-9a-f]{16}, part\.json says"),
        ("train.sums", r"p2/train\.sums is altered: it does not belong to the shards"),
    ],
)
def test_merge_finds_an_altered_file_before_it_writes(file, words, parts, tmp_path, capsys):
    good = (parts[1] / file).read_bytes()
    (parts[1] / file).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(PreparationError, match=rf"{words}.*Prepare the part again with --overwrite"):
        merge(parts, tmp_path / "data")
    assert not [path for path in (tmp_path / "data").iterdir() if path.suffix in (".bin", ".json", ".sums")]
    (parts[1] / file).write_bytes(good)
    merge(parts, tmp_path / "data")
    assert "all shards were compared with the parts' checksums" in capsys.readouterr().out
    main(["data", "verify", str(tmp_path / "data")])


def test_merge_without_reading_says_so(parts, tmp_path, capsys):
    folders = [str(shutil.copytree(folder, tmp_path / f"copy-{folder.name}")) for folder in parts]
    shard = Path(folders[1]) / "train-00001.bin"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    main(["data", "merge", *folders, "--no-verify", "--out", str(tmp_path / "data")])
    assert (
        "the shards' contents were not compared with their checksums; anon-dist data verify" in capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match="is altered"):
        main(["data", "verify", str(tmp_path / "data")])
    with pytest.raises(PreparationError, match="p1 is given twice"):
        merge([parts[0], parts[0]], tmp_path / "data")
    version = json.loads((parts[0] / "versions.json").read_text())
    assert [name for name, _ in version["files"]] == [f"texts/{i}.txt" for i in range(9)]
