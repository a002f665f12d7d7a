"""Runs on data at addresses: what they compute, what they leave behind, and what they say while a store does not answer."""

import json
import shutil

import fsspec
import pytest

from anon_dist.cli import main
from anon_dist.data import ShardError
from anon_dist.data.stored import cache, remote
from anon_dist.train.config.parsing import ConfigError, SourceConfig
from anon_dist.train.health.pulse import Pulse
from anon_dist.train.health.waiting import Waiting
from anon_dist.train.reports.metrics import read_metrics


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "AT_START", (0.0,))
    monkeypatch.setattr(remote, "MEANWHILE", (0.0,))
    monkeypatch.setenv("ANON_DIST_CACHE", str(tmp_path / "default"))
    remote.forget_copies()
    yield
    cache.use(None, None)
    remote.forget_copies()
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def address(prepared, tmp_path):
    store, place = fsspec.filesystem("memory"), f"{tmp_path}/corpus"
    for path in (p for p in prepared.rglob("*") if p.is_file()):
        store.pipe_file(f"{place}/{path.relative_to(prepared)}", path.read_bytes())
    return f"memory://{place}"


def losses(folder):
    """Of training and validation, by step."""
    return [
        {k: v for k, v in record.items() if k in ("step", "loss", "val_loss", "samples")}
        for record in read_metrics(folder / "metrics.jsonl")
        if "final_loss" not in record
    ]


def test_runs_there_and_here_are_the_same(run_config, train, prepared, address, tmp_path, capsys):
    here = train(run_config())
    capsys.readouterr()
    copied = train(
        run_config(run_dir=str(tmp_path / "copied"), data__path=address, data__cache_dir=str(tmp_path / "c"))
    )
    assert f"data.path = {address}: " in (said := capsys.readouterr().out)
    assert f"bytes are copied into {tmp_path}/c" in said
    ranges = {"data__path": address, "data__cache_bytes": 0, "run_dir": str(tmp_path / "ranges")}
    train(run_config(**ranges))
    said = capsys.readouterr().out
    assert "each sample is a request of 131,072 bytes or a block more, which are compared" in said
    assert losses(copied) == losses(here) == losses(tmp_path / "ranges")
    progress = json.loads((copied / "checkpoints" / "step-00000014" / "trainer.json").read_text())
    assert progress["tokenizer"] == f"{address}/tokenizer"

    # It goes on here from what was read there, and there again; which is the same data.
    for steps, path in ((18, str(prepared)), (22, address)):
        train(run_config(run_dir=str(copied), train__steps=steps, data__path=path, schedule__decay="constant"))
    assert "samples" not in capsys.readouterr().err
    assert [r["step"] for r in losses(copied)][-1] == 22

    shutil.rmtree(copied / "model")
    remote.forget_copies()
    main(["generate", str(copied), "def", "--max-new-tokens", "3"])
    assert capsys.readouterr().out.startswith("def")
    main(["export", str(copied), str(tmp_path / "exported")])
    assert (tmp_path / "exported" / "tokenizer.json").read_bytes() == (
        prepared / "tokenizer/tokenizer.json"
    ).read_bytes()
    assert "| tokenizer | bytes |" in (tmp_path / "exported" / "README.md").read_text()


def test_sources_here_and_there(run_config, train, prepared, address, tmp_path):
    from anon_dist.data import PrepareConfig, prepare

    text = tmp_path / "digits.txt"
    text.write_text("\n".join(f"{i * 7919}" for i in range(4000)))
    other = tmp_path / "digits"
    prepare(PrepareConfig(source=str(text), out=other, tokenizer="bytes", text_unit="line", workers=1))

    def run(name, path):
        sources = {"code": SourceConfig(path, 0.5), "digits": SourceConfig(str(other), 0.5)}
        return train(run_config(run_dir=str(tmp_path / name), data__sources=sources, data__packing="best_fit"))

    assert losses(run("a", address)) == losses(run("b", str(prepared)))


def test_whole_documents_need_the_whole_corpus(run_config, train, address):
    with pytest.raises(
        ConfigError, match=r"data.packing best_fit reads all of it at first, [\d,]+ bytes, and data.cache_bytes"
    ):
        train(run_config(data__path=address, data__packing="best_fit", data__cache_bytes=0))


def test_a_store_that_goes_away_in_a_run(run_config, train, address, monkeypatch):
    """The run ends with what was asked for and what to do; when it is there again, the same command goes on."""
    store = type(fsspec.filesystem("memory"))
    read, asked = store.cat_file, []
    config = run_config(data__path=address, data__cache_bytes=0, checkpoint__every=1, eval__every=0)
    monkeypatch.setattr("anon_dist.data.samples.loader.ORDER_BLOCK", 4)

    def away(self, path, **options):
        asked.append(path)
        if len(asked) > 60:
            raise TimeoutError("no answer")
        return read(self, path, **options)

    words = rf"{address}/train-0+\.bin cannot be read: TimeoutError: no answer \(attempt 2, .*the same command goes on"
    with monkeypatch.context() as patch, pytest.raises(ShardError, match=words):
        patch.setattr(store, "cat_file", away)
        train(config)
    begun = [r["step"] for r in losses(train(config)) if "loss" in r]
    assert begun == list(range(1, 15))


def test_waiting_for_data_is_told_from_a_hang(monkeypatch):
    monkeypatch.setattr(remote.TRAFFIC, "last", "train-00007.bin (TimeoutError) of s3://bucket/corpus")
    pulse = Pulse()
    wait = Waiting(lambda: pulse)
    pulse.at -= 100.0
    wait()
    assert pulse.age > 99.0  # the wait alone is no progress
    assert pulse.doing == "waiting for train-00007.bin (TimeoutError) of s3://bucket/corpus"
    remote.TRAFFIC.received += 1
    wait()
    assert pulse.age < 50.0
    pulse.at -= 100.0
    wait()
    assert pulse.age > 99.0


def test_a_run_on_datatroves_files(run_config, train, prepared, tmp_path):
    """The tokens are those of the prepared folder, in files of datatrove: so is what a run on all of them reads."""
    import numpy as np

    from anon_dist.data import Index, TokenShards
    from anon_dist.data.config import IndexConfig
    from anon_dist.data.preparation.indexing import index_tokens

    shards = TokenShards(prepared)
    tokens = shards.tokens(0, len(shards))
    tokens.astype("<u2").tofile(tmp_path / "a.ds")
    (np.flatnonzero(tokens == 256) + 1).astype("<u8").tofile(tmp_path / "a.ds.index")
    options = {"source": f"{tmp_path}/a.ds", "tokenizer": f"hf:{prepared}/tokenizer", "workers": 1}
    index_tokens(IndexConfig(out=tmp_path / "indexed", val_fraction=0.0, **options))
    assert Index.load(tmp_path / "indexed").tokenizer_hash == Index.load(prepared).tokenizer_hash

    def run(name, path):
        sets = {"held": str(prepared)}
        quiet = {"eval__sets": sets, "eval__every": 0, "data__mask_documents": True, "data__packing": "best_fit"}
        return train(run_config(run_dir=str(tmp_path / name), data__path=path, train__steps=4, **quiet))

    assert losses(run("a", str(tmp_path / "indexed")))[:4] == losses(run("b", str(prepared)))[:4]
    (np.flatnonzero(tokens == 10) + 1).astype("<u8").tofile(tmp_path / "a.ds.index")
    with (tmp_path / "a.ds.index").open("ab") as file:
        file.write(np.array([len(tokens)], "<u8").tobytes())
    index_tokens(IndexConfig(out=tmp_path / "lines", **options))
    with pytest.raises(ConfigError, match=r"lines: its documents do not end with an end-of-document token"):
        train(run_config(run_dir=str(tmp_path / "c"), data__path=str(tmp_path / "lines"), data__mask_documents=True))
