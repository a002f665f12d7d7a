"""A preparation gives the same bytes however it is run, interrupted or not, and refuses what it cannot do well."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from anon_dist.data import (
    Index,
    PreparationError,
    PrepareConfig,
    SourceError,
    Tokenizer,
    TokenizerError,
    TokenShards,
    prepare,
)
from anon_dist.data.preparation import encode, finish
from anon_dist.data.preparation.encode import is_validation
from anon_dist.data.preparation.writer import SplitWriter
from anon_dist.files import exclusive

SPM = "spm-bpe:600"
# The package has a function of that name.
prepare_module = importlib.import_module("anon_dist.data.preparation.prepare")
STEPS = {"compute_statistics": finish, "write_json": prepare_module, "build_tokenizer": prepare_module}


def config(corpus, out, **options):
    defaults = {"tokenizer": SPM, "val_fraction": 0.1, "shard_tokens": 1000, "workers": 1}
    return PrepareConfig(source=str(corpus), out=Path(out), **{**defaults, **options})


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("reference") / "data"
    prepare(config(corpus, out))
    return out


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(encode, "CHUNK_CHARS", 500)
    monkeypatch.setattr(prepare_module, "COMMIT_BYTES", 1500)


def texts_of(folder, split):
    shards, tokenizer = TokenShards(folder, split), Tokenizer.of(folder)
    tokens = shards.tokens(0, len(shards))
    ends = np.flatnonzero(tokens == tokenizer.eod_id)
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.decode(document[:-1]) for document in np.split(tokens, ends[:-1] + 1)]


def segments_of(corpus):
    """Counted here: files fill up 16 bytes for each of a shard's 1,000 tokens, and then a segment ends."""
    count, size = 1, 0
    for path in sorted(corpus.iterdir()):
        count, size = (count + 1, 0) if size >= 16_000 else (count, size)
        size += path.stat().st_size
    return count


def test_every_document_once_with_its_end(corpus, reference):
    expected = {"train": [], "val": []}
    for path in sorted(corpus.iterdir()):
        data = path.read_bytes()
        expected["val" if is_validation(data, 0.1) else "train"].append(data.decode())
    index = Index.load(reference)
    for split, texts in expected.items():
        assert texts_of(reference, split) == texts
        assert index.splits[split].documents == len(texts)
        assert index.splits[split].text_bytes == sum(len(t.encode()) for t in texts)
    sizes = [s.tokens for s in index.splits["train"].shards]
    assert max(sizes) == 1000
    assert len([size for size in sizes if size < 1000]) == segments_of(corpus)  # where a segment of the source ends
    assert index.dtype == "uint16"
    assert index.tokenizer == SPM
    assert sorted(p.name for p in reference.iterdir() if p.suffix != ".bin") == [
        "index.json",
        "tokenizer",
        "train.sums",
        "val.sums",
    ]


def test_the_result_does_not_depend_on_the_workers(corpus, reference, tmp_path, small_steps):
    prepare(config(corpus, tmp_path / "two", workers=2))
    assert contents(tmp_path / "two") == contents(reference)


def test_large_vocabularies_are_uint32(corpus, tmp_path, monkeypatch):
    def with_a_large_id(*arguments):
        Tokenizer.__init__(*arguments)
        arguments[0].vocab_size = 65_537

    monkeypatch.setattr(prepare_module, "Tokenizer", type("Large", (Tokenizer,), {"__init__": with_a_large_id}))
    index = prepare(config(corpus, tmp_path, tokenizer="bytes"))
    assert index.dtype == "uint32"
    shards = TokenShards(tmp_path, "val")
    tokens = shards.tokens(0, len(shards))
    assert (tokens == index.eod_id).sum() == index.splits["val"].documents


def test_complete_is_left_alone(corpus, tmp_path, reference, capsys, monkeypatch):
    out = shutil.copytree(reference, tmp_path / "data")
    monkeypatch.setattr(prepare_module, "_Preparation", None)
    index = prepare(config(corpus, out))
    assert "is complete" in capsys.readouterr().out
    assert index == Index.load(reference)
    assert contents(out) == contents(reference)
    (out / "train-00001.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train-00001\.bin is torn"):
        prepare(config(corpus, out))


INTERRUPTED = """
import importlib, os, signal, sys
from pathlib import Path
from anon_dist.data.preparation import encode
from anon_dist.data.preparation.writer import SplitWriter

prepare_module = importlib.import_module("anon_dist.data.preparation.prepare")
corpus, out, workers, tokenizer, appends = sys.argv[1:]
encode.CHUNK_CHARS, prepare_module.COMMIT_BYTES = 500, 1500
append, count = SplitWriter.append, 0

def counted(self, documents):
    global count
    count += 1
    if count == int(appends):
        self._file and self._file.flush()
        if int(workers) > 1:
            print("waiting", flush=True)
            signal.pause()
        os.kill(os.getpid(), signal.SIGKILL)
    return append(self, documents)

SplitWriter.append = counted
if __name__ == "__main__":
    prepare_module.prepare(prepare_module.PrepareConfig(
        source=corpus, out=Path(out), tokenizer=tokenizer, val_fraction=0.1, shard_tokens=1000, workers=int(workers)))
"""


def start_interrupted(corpus, out, tmp_path, workers, appends):
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    root = Path(prepare_module.__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, str(script), str(corpus), str(out), str(workers), SPM, str(appends)],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_killed_twice_and_run_again(corpus, reference, tmp_path, small_steps, capsys):
    out = tmp_path / "data"
    tokens = [0]
    for appends in (12, 17):
        process = start_interrupted(corpus, out, tmp_path, 1, appends)
        process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL
        assert not (out / "index.json").exists()
        with pytest.raises(ValueError, match="preparation unfinished"):
            Index.load(out)
        progress = json.loads((out / "progress.json").read_text())
        train = progress["splits"]["train"]
        tokens.append(sum(s["tokens"] for s in train["shards"]) + (train["open"] or {"tokens": 0})["tokens"])
    assert 0 < tokens[1] < tokens[2]
    prepare(config(corpus, out))
    assert "going on after" in capsys.readouterr().out
    assert contents(out) == contents(reference)


def test_workers_end_with_a_killed_parent(corpus, reference, tmp_path, small_steps):
    out = tmp_path / "data"
    process = start_interrupted(corpus, out, tmp_path, 2, 9)
    assert any("waiting" in line for line in process.stdout)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.communicate(timeout=300)
    deadline = time.monotonic() + 60
    while any(_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(child) for child in children)
    prepare(config(corpus, out))
    assert contents(out) == contents(reference)


def _alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class CrashError(Exception):
    pass


@pytest.mark.parametrize("appends", [1, 2, 5, 8, 30, 41])
def test_an_error_anywhere_can_be_gone_on_from(corpus, reference, tmp_path, small_steps, monkeypatch, appends):
    count, append = 0, SplitWriter.append

    def crash(self, documents):
        nonlocal count
        count += 1
        if count == appends:
            raise CrashError
        return append(self, documents)

    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "append", crash)
        with pytest.raises(CrashError):
            prepare(config(corpus, tmp_path / "data"))
    prepare(config(corpus, tmp_path / "data"))
    assert contents(tmp_path / "data") == contents(reference)


@pytest.mark.parametrize("step", STEPS)
def test_the_index_is_whole_or_absent(corpus, reference, tmp_path, monkeypatch, step):
    """A crash in training, before the index, or between its temporary file and its name."""

    def crash(*arguments, **options):
        if step == "write_json":
            (tmp_path / "data" / "index.json.tmp").write_text('{"format_ver')
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(STEPS[step], step, crash)
        with pytest.raises(CrashError):
            prepare(config(corpus, tmp_path / "data"))
    assert not (tmp_path / "data" / "index.json").exists()
    prepare(config(corpus, tmp_path / "data"))
    assert contents(tmp_path / "data") == contents(reference)


def interrupt(corpus, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(finish, "compute_statistics", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(config(corpus, out))


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("tokenizer", "bytes", "--tokenizer was 'spm-bpe:600', now 'bytes'"),
        ("shard_tokens", 999, "--shard-tokens was 1000, now 999"),
        ("val_fraction", 0.2, "--val-fraction was 0.1, now 0.2"),
        ("max_documents", 5, "--max-documents was None, now 5"),
    ],
)
def test_other_settings_are_refused(corpus, reference, tmp_path, monkeypatch, option, value, message, finished):
    out = shutil.copytree(reference, tmp_path / "data") if finished else tmp_path / "data"
    if not finished:
        interrupt(corpus, out, monkeypatch)
    before = contents(out)
    with pytest.raises(PreparationError, match=f"{message}.*--overwrite.*or another --out"):
        prepare(config(corpus, out, **{option: value}))
    assert contents(out) == before


def test_another_source_is_refused(corpus, reference, tmp_path):
    shutil.copytree(corpus, tmp_path / "corpus")
    prepare(config(tmp_path / "corpus", tmp_path / "data", tokenizer="bytes"))
    (tmp_path / "corpus" / "extra.txt").write_text("more")
    with pytest.raises(PreparationError, match="the source's files was 80, now 81"):
        prepare(config(tmp_path / "corpus", tmp_path / "data", tokenizer="bytes"))


def test_overwrite_removes_only_what_is_ours(corpus, reference, tmp_path):
    out = shutil.copytree(reference, tmp_path / "data")
    (out / "notes.txt").write_text("mine")
    prepare(config(corpus, out, tokenizer="bytes", shard_tokens=100_000, overwrite=True))
    names = {p.name for p in out.iterdir()}
    assert names == {
        "index.json",
        "notes.txt",
        "tokenizer",
        "train-00000.bin",
        "val-00000.bin",
        "train.sums",
        "val.sums",
    }
    assert not (out / "tokenizer" / "spm.model").exists()


def test_foreign_shards_are_not_overwritten(corpus, tmp_path):
    (tmp_path / "train-00000.bin").write_bytes(b"precious")
    with pytest.raises(PreparationError, match=r"train-00000\.bin is in the way"):
        prepare(config(corpus, tmp_path))
    assert (tmp_path / "train-00000.bin").read_bytes() == b"precious"


def test_files_changed_while_interrupted_are_named(corpus, tmp_path, monkeypatch):
    interrupt(corpus, tmp_path, monkeypatch)
    (tmp_path / "train-00001.bin").write_bytes(b"x")
    with pytest.raises(PreparationError, match=r"train-00001\.bin has 1 bytes, the progress file says 2,000"):
        prepare(config(corpus, tmp_path))
    (tmp_path / "progress.json").write_text("[]")
    with pytest.raises(PreparationError, match="not a progress file"):
        prepare(config(corpus, tmp_path))


def test_two_at_once(corpus, tmp_path):
    with exclusive(tmp_path), pytest.raises(PreparationError, match="another process is preparing it"):
        prepare(config(corpus, tmp_path))


def test_copies_of_a_document_stay_together(tmp_path):
    lines = [f"document {i % 50}" for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    prepare(config(tmp_path / "a.jsonl", tmp_path / "data", tokenizer="bytes", val_fraction=0.3))
    train, val = texts_of(tmp_path / "data", "train"), texts_of(tmp_path / "data", "val")
    assert len(train) + len(val) == 200
    assert not set(train) & set(val)
    assert len(val) == 4 * len(set(val))


def test_a_small_source_gives_more_to_validation_and_what_is_still_too_little_is_said(tmp_path, capsys):
    for documents, least in ((2500, 196_608), (300, 20_000)):
        lines = [json.dumps({"text": f"{i} " * 250}) for i in range(documents)]
        (tmp_path / f"{documents}.jsonl").write_text("\n".join(lines))
        out = tmp_path / str(documents)
        index = prepare(
            config(tmp_path / f"{documents}.jsonl", out, tokenizer="bytes", val_fraction=0.01, shard_tokens=1 << 22)
        )
        val, of_all = index.splits["val"], sum(split.documents for split in index.splits.values())
        assert least <= val.text_bytes < least + 25_000
        assert val.documents <= 0.15 * of_all
        warned = (
            f"WARNING: {out}: the validation split has {val.tokens:,} tokens in {val.documents} documents; below 65,536"
        )
        assert (warned in capsys.readouterr().out) == (documents == 300)


def test_no_validation_wanted(corpus, tmp_path):
    index = prepare(config(corpus, tmp_path, tokenizer="bytes", val_fraction=0.0))
    assert set(index.splits) == {"train"}
    assert index.statistics.bigram_val_loss is None
    with pytest.raises(ValueError, match=r"no split 'val'.*--val-fraction > 0"):
        TokenShards(tmp_path, "val")


def test_skipped_is_counted(corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    (folder / "image.png").write_bytes(b"\0\1")
    (folder / "empty.txt").write_bytes(b"")
    index = prepare(config(folder, tmp_path / "data", tokenizer="bytes"))
    assert index.source["skipped"] == {"binary": 1, "empty": 1}


def test_limits(corpus, tmp_path):
    index = prepare(config(corpus, tmp_path, tokenizer="bytes", max_documents=30, val_fraction=0.2))
    assert sum(split.documents for split in index.splits.values()) == 30


def test_hugging_face_source_streamed_or_not(corpus, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    rows = [json.dumps({"body": path.read_text("utf-8")}) for path in sorted(corpus.iterdir())]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(rows))
    indices = [
        prepare(config(f"hf:{tmp_path / 'set'}", tmp_path / f"out{s}", text_field="body", streaming=s))
        for s in (False, True)
    ]
    assert indices[0].fingerprint == indices[1].fingerprint
    assert contents(tmp_path / "outFalse") == contents(tmp_path / "outTrue")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"val_fraction": 1.0}, PreparationError, r"--val-fraction must be in \[0, 1\), not 1\.0"),
        ({"shard_tokens": 0}, PreparationError, "--shard-tokens must be at least 1, not 0"),
        ({"workers": 0}, PreparationError, "--workers must be at least 1, not 0"),
        ({"max_documents": 0}, PreparationError, "--max-documents must be at least 1, not 0"),
        ({"tokenizer_sample_mb": 0}, PreparationError, "--tokenizer-sample-mb must be more than 0"),
        ({"tokenizer": "gpt2"}, TokenizerError, "must be spm-bpe:SIZE"),
    ],
)
def test_settings_out_of_range(corpus, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        prepare(config(corpus, tmp_path / "data", **options))
    assert not (tmp_path / "data").exists()


def test_out_is_a_file(corpus, tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(PreparationError, match=r"is a file\. Name a folder"):
        prepare(config(corpus, tmp_path / "data"))


def test_a_source_without_documents(tmp_path):
    (tmp_path / "x.png").write_bytes(b"\0")
    with pytest.raises(SourceError, match=r"no documents \(left out: 1 binary\)"):
        prepare(config(tmp_path / "x.png", tmp_path / "data"))


def test_the_command_line_says_what_each_option_does(capsys):
    import tyro

    with pytest.raises(SystemExit):
        tyro.cli(PrepareConfig, args=["--help"])
    help_text = capsys.readouterr().out
    for option in ("--source", "--tokenizer", "--out", "--val-fraction", "--overwrite", "--text-unit"):
        assert option in help_text
    parsed = tyro.cli(PrepareConfig, args=["--out", "x", "--max-documents", "5", "--streaming"])
    assert (parsed.out, parsed.max_documents, parsed.streaming) == (Path("x"), 5, True)


def test_a_few_documents_are_enough_for_validation(tmp_path):
    """At 1% none of five documents would be chosen; the one with the least hash is."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.txt").write_text(f"document {i}\n" * 50)
    index = prepare(config(folder, tmp_path / "data", tokenizer="bytes", val_fraction=0.01))
    assert (index.splits["train"].documents, index.splits["val"].documents) == (4, 1)


def test_a_single_document_is_refused_before_any_work(tmp_path):
    (tmp_path / "all.txt").write_text("one\n\ntwo\n\nthree\n")
    with pytest.raises(PreparationError, match=r"single document.*--text-unit paragraph or line.*--val-fraction 0"):
        prepare(config(tmp_path / "all.txt", tmp_path / "data", tokenizer="bytes"))
    index = prepare(config(tmp_path / "all.txt", tmp_path / "data", tokenizer="bytes", text_unit="paragraph"))
    assert index.splits["val"].documents == 1
