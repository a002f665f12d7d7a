"""Runs on packed documents, and what runs say of their steps."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from anon_dist.data import Packing, PrepareConfig, SampleOrder, TokenShards, prepare
from anon_dist.train import loop
from anon_dist.train.config.parsing import ConfigError
from anon_dist.train.model.build import build_model
from anon_dist.train.reports.metrics import read_metrics


def steps_of(folder):
    """The records of a run's steps."""
    return [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


@pytest.fixture
def short_documents(tmp_path):
    """A prepared folder of documents that are shorter than a sample, but for some."""
    source, out = tmp_path / "short.jsonl", tmp_path / "short"
    lines = ["tick " * (i % 5 + 1) + f"of {i}" for i in range(300)]
    lines[::40] = [f"a long one, number {i}, that one sample does not hold" for i in range(8)]
    source.write_text("\n".join(json.dumps({"text": text}) for text in lines))
    prepare(PrepareConfig(source=str(source), tokenizer="bytes", out=out, val_fraction=0.3, workers=1))
    return out


def test_packed_documents_train_as_if_each_were_alone(run_config, train, tmp_path, short_documents, capsys):
    """The first step's loss and gradient are those of plain code on each piece by itself; a resumed run is the one that was not stopped."""
    packed = {"data__packing": "best_fit", "data__mask_documents": True, "train__z_loss": 1e-3}
    options = {"data__path": str(short_documents), "eval__every": 0, "train__grad_clip": None, **packed}
    whole = train(run_config(run_dir=str(tmp_path / "whole"), **options))
    (said,) = re.findall(
        r"([\d,]+) samples of whole documents; ([\d.]+)% of their places are left free", capsys.readouterr().out
    )
    records = steps_of(whole)
    assert float(said[1]) / 100 == pytest.approx(sum(r["padding_share"] for r in records) / len(records), abs=0.05)

    shards = TokenShards(short_documents)
    packing = Packing(whole / "packing-32", shards, 32)
    samples = packing.samples(SampleOrder(packing.num_samples, 0)(np.arange(8)))
    model = build_model(run_config().model, shards.index.vocab_size, shards.index.eod_id, 32, seed=0)
    losses, squares = [], []
    for inputs, targets, numbers in samples:
        for number in set(numbers) - {-1}:
            tokens, wanted = (torch.from_numpy(t[numbers == number]) for t in (inputs, targets))
            logits = model(input_ids=tokens[None]).logits[0]
            losses.append(F.cross_entropy(logits, wanted, reduction="none"))
            squares.append(logits.logsumexp(1).square())
    loss, z = torch.cat(losses).mean(), 1e-3 * torch.cat(squares).mean()
    (loss + z).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert records[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert records[0]["z_loss"] == pytest.approx(z.item(), rel=1e-5)
    assert records[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)

    train(run_config(run_dir=str(tmp_path / "stopped"), train__steps=6, schedule__decay="constant", **options))
    constant = train(run_config(run_dir=str(tmp_path / "constant"), schedule__decay="constant", **options))
    resumed = train(run_config(run_dir=str(tmp_path / "stopped"), schedule__decay="constant", **options))
    assert [r["loss"] for r in steps_of(resumed)] == [r["loss"] for r in steps_of(constant)]


def test_records_say_where_the_time_went_and_steps_are_traced(run_config, train, tmp_path, capsys):
    folder = train(run_config(log__profile_steps=(3, 5)))
    for record in steps_of(folder):
        parts = [record[f"{part}_share"] for part in ("data", "forward", "backward", "optimizer", "logging")]
        assert all(0.0 <= share < 1.0 for share in parts), record
        assert 0.5 < sum(parts) <= 1.0
        assert 0.0 <= record["waiting_share"] < 1.0
        assert record["tokens_per_s_per_device"] == record["tokens_per_s"]
    said = capsys.readouterr().out
    (file,) = (folder / "profile").iterdir()
    assert f"Trace of steps 3 to 5: {file}; open it in https://ui.perfetto.dev" in said
    assert re.search(r"Time: data [\d.]+%, forward [\d.]+%, backward [\d.]+%, optimizer [\d.]+%", said)
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    backward = [e for e in events if e.get("name") == "autograd::engine::evaluate_function: _SummedLossBackward"]
    assert len(backward) == 3 * 2  # micro-batches of three steps
    plain = train(run_config(run_dir=str(tmp_path / "plain")))
    assert not (plain / "profile").exists()


def test_running_out_of_gpu_memory_leaves_a_snapshot(run_config, train, monkeypatch, capsys):
    def exhausted(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "take_step", exhausted)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda name: Path(name).write_text("a snapshot"))
    with pytest.raises(torch.OutOfMemoryError):
        train(config := run_config())
    file = Path(config.run_dir) / "profile" / "out-of-memory-rank-0.pickle"
    assert file.read_text() == "a snapshot"
    assert (
        f"Snapshot of rank 0's GPU memory: {file}; open it in https://docs.pytorch.org/memory_viz"
        in capsys.readouterr().out
    )


def test_flex_attention_is_refused_on_cpus(run_config, train):
    with pytest.raises(
        ConfigError, match=r"model.attention = flex_attention has no backward pass on CPUs; set it to sdpa"
    ):
        train(run_config(model__attention="flex_attention"))
