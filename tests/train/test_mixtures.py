"""Runs on several sources: what they read, what they are validated on, and what they say of both."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from anon_dist.data import PrepareConfig, TokenShards, prepare
from anon_dist.train.config.parsing import ConfigError, PhaseConfig, SourceConfig
from anon_dist.train.inputs.corpora import open_corpora, remarks
from anon_dist.train.reports import plot, report
from anon_dist.train.reports.metrics import read_metrics
from anon_dist.trained.options import Runs
from anon_dist.trained.runs import runs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name → prepared folder: letters, digits, and a third that has no validation split."""
    found = {}
    for name, alphabet, documents, share in (
        ("web", "abcdef", 90, 0.3),
        ("code", "0123", 60, 0.3),
        ("more", "xyz", 20, 0.0),
    ):
        source, out = tmp_path_factory.mktemp("source") / "a.jsonl", tmp_path_factory.mktemp("out")
        draw = np.random.default_rng(len(alphabet))
        texts = ["".join(draw.choice(list(alphabet), 90)) for _ in range(documents)]
        source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        prepare(PrepareConfig(source=str(source), out=out, tokenizer="bytes", val_fraction=share, workers=1))
        found[name] = out
    return found


def loss_by_hand(folder, split, model):
    """Plain code: the mean over all sequences of 32 tokens."""
    shards = TokenShards(folder, split)
    samples = torch.from_numpy(shards.samples(np.arange(shards.num_samples(32)), 32))
    with torch.no_grad():
        logits = model(input_ids=samples[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()).item()


def test_a_run_on_two_sources_is_validated_on_each(run_config, train, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "plot_loss", plot.plot_loss)
    sources = {"web": SourceConfig(str(folders["web"]), 0.75, 5.0), "code": SourceConfig(str(folders["code"]), 0.25)}
    options = {"data__sources": sources, "eval__sets": {"held": str(folders["more"])}, "eval__final_sequences": 0}
    folder = train(run_config(run_dir=str(tmp_path / "runs" / "both"), **options))
    said = capsys.readouterr().out
    assert "data.sources.web: 75.0% of the samples, " in said
    records = read_metrics(folder / "metrics.jsonl")
    last = [r for r in records if "loss" in r][-1]
    samples = {name: TokenShards(folders[name]).num_samples(32) for name in sources}
    assert last["epoch/web"] == pytest.approx(84 / samples["web"])  # 14 steps of 8 samples
    assert last["epoch/code"] == pytest.approx(28 / samples["code"])

    result = json.loads((folder / "result.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    by_hand = {
        name: loss_by_hand(folders[name], split, model)
        for name, split in (("web", "val"), ("code", "val"), ("more", "train"))
    }
    for name, key in (("web", "web"), ("code", "code"), ("more", "held")):
        assert result[f"final_loss/{key}"] == pytest.approx(by_hand[name], rel=1e-4)
    assert result["final_loss"] == pytest.approx(0.75 * by_hand["web"] + 0.25 * by_hand["code"], rel=1e-4)
    size = sum(w * TokenShards(folders[n], "val").info.bytes_per_token for n, w in (("web", 0.75), ("code", 0.25)))
    assert result["final_bits_per_byte"] == pytest.approx(result["final_loss"] / math.log(2) / size)
    assert result["final_perplexity"] == pytest.approx(math.exp(result["final_loss"]))
    assert {"val_loss", "val_loss/web", "val_loss/code", "val_loss/held"} <= set().union(*records)
    for name in ("web", "code", "held", "mean by weight"):
        assert name in said
    card = (folder / "model" / "README.md").read_text()
    assert "web: training split" in card
    assert "| code: weight | 0.25 |" in card
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    runs(Runs(tmp_path / "runs"))
    page = (tmp_path / "runs" / "runs.html").read_text()
    for name in ("web", "code", "held"):
        assert f"<th>val loss, {name}</th>" in page
        assert f"{result[f'final_loss/{name}']:.4f}" in page


def test_sources_that_are_not_validated_are_said(run_config, train, folders, tmp_path, capsys):
    def warnings(**changes):
        config = run_config(**changes)
        corpora, sets = open_corpora(config, Accelerator())
        return [line for line in remarks(config, corpora, sets) if "says little" not in line]

    paths = {name: SourceConfig(str(folder), 1.0) for name, folder in folders.items()}
    length = TokenShards(folders["code"], "val").info.tokens
    assert TokenShards(folders["web"], "val").info.tokens > length
    long = {"data__seq_len": length, "model__context": length}
    (short,) = warnings(data__sources={name: paths[name] for name in ("web", "code")}, **long)
    assert short.startswith(
        f"WARNING: data.sources.code = {folders['code']}, 50.0% of what is trained on, has {length:,} tokens to validate"
    )
    assert (
        f"too few for data.seq_len = {length}: val_loss is the mean of the other sources. Make it again with" in short
    )
    (alone,) = warnings(data__path=str(folders["more"]))
    assert alone.startswith(f"WARNING: data.path = {folders['more']} has no validation split: there is no val_loss.")
    assert warnings(data__path=str(folders["web"])) == []

    sources = {"web": SourceConfig(str(folders["web"]), 0.1), "more": SourceConfig(str(folders["more"]), 0.9)}
    train(run_config(run_dir=str(tmp_path / "run"), data__sources=sources, train__steps=1, schedule__warmup_steps=0))
    said = capsys.readouterr().out
    assert ", 90.0% of what is trained on, has no validation split: val_loss is the mean of the other sources." in said
    assert "mean by weight, without more" in said
    losses = {f"{key}{name}": 1.0 for key in ("final_loss", "final_bits_per_byte") for name in ("", "/held")}
    _, table = report._losses(run_config(eval__sets={"held": str(folders["more"])}), losses)
    assert list(table.columns[0].cells) == ["held", "data.path"]


def test_a_source_that_comes_in_at_a_resume(run_config, train, folders, tmp_path, capsys):
    """The samples before are those of the run that had it not; those after are told."""
    alone = {"data__path": str(folders["web"]), "eval__every": 0, "schedule__decay": "constant"}
    before = train(run_config(run_dir=str(tmp_path / "a"), train__steps=8, **alone))
    first = [r["loss"] for r in read_metrics(before / "metrics.jsonl") if "loss" in r]
    sources = {"web": SourceConfig(str(folders["web"]), 0.5), "code": SourceConfig(str(folders["code"]), 0.5)}
    train(run_config(run_dir=str(tmp_path / "a"), data__sources=sources, **alone))
    said = capsys.readouterr().out
    assert "From sample 64 on, shares of the samples: " in said
    assert "data.sources.code 0.5 (after 0.00 epochs)" in said
    records = [r for r in read_metrics(before / "metrics.jsonl") if "loss" in r]
    assert [r["loss"] for r in records[:8]] == first
    samples = {name: TokenShards(folders[name]).num_samples(32) for name in sources}
    assert records[-1]["epoch/web"] == pytest.approx((64 + 24) / samples["web"])
    assert records[-1]["epoch/code"] == pytest.approx(24 / samples["code"])


def test_what_no_mixture_can_be_made_of_is_refused(run_config, train, folders, tmp_path):
    def refused(message, sources, **more):
        with pytest.raises(ConfigError, match=message):
            train(run_config(data__sources={n: SourceConfig(**s) for n, s in sources.items()}, **more))

    web, code = {"path": str(folders["web"])}, {"path": str(folders["code"])}
    refused(r"data\.sources\.gone = \S+ is not there", {"web": web, "gone": {"path": str(tmp_path / "x")}})
    refused(r"data\.sources\.b = \S+ is the same data as data\.sources\.a; leave one out", {"a": web, "b": web})
    refused(r"data\.sources\.b\.weight = 1e-09 is too small beside", {"a": web, "b": {**code, "weight": 1e-9}})
    refused(r"eval\.sets\.a = \S+ has the name of a source", {"a": web}, eval__sets={"a": code["path"]})
    refused(
        r"eval\.sets\.s = \S+ is trained on",
        {"a": {"path": str(folders["more"])}},
        eval__sets={"s": str(folders["more"])},
    )
    source = tmp_path / "other.jsonl"
    source.write_text("\n".join(json.dumps({"text": f"the {i} quick brown foxes {i}" * 5}) for i in range(80)))
    prepare(PrepareConfig(source=str(source), out=tmp_path / "other", tokenizer="spm-bpe:380", workers=1))
    refused(
        r"data\.sources\.b = \S+ has another tokenizer \(spm-bpe:380, 380 tokens\) than \S+ \(bytes, 257 tokens\); prepare it with that "
        r"one: --tokenizer hf:\S+/tokenizer",
        {"a": web, "b": {"path": str(tmp_path / "other")}},
    )


def test_a_limit_on_repetition_and_its_remedies(run_config, train, folders, tmp_path):
    """What the refusal says keeps within the limit does so, and little more does not."""

    def config(weight=0.5, steps=100, most=1.5):
        code = SourceConfig(str(folders["code"]), weight, most)
        sources = {"web": SourceConfig(str(folders["web"]), 0.5), "code": code}
        return run_config(data__sources=sources, train__steps=steps, run_dir=str(tmp_path / f"{weight}-{steps}"))

    with pytest.raises(ConfigError) as error:
        train(config())
    text = str(error.value)
    samples = TokenShards(folders["code"]).num_samples(32)
    assert (
        f"data.sources.code: train.steps = 100 would read it {400 / samples:.2f} times, more than max_epochs = 1.5;"
        in text
    )
    weight, steps = (float(text.split(f"{what} to ")[1].split(",")[0]) for what in ("its weight", "train.steps"))
    for wrong in (config(weight * 1.05), config(steps=int(steps) + 1)):
        with pytest.raises(ConfigError, match="more than max_epochs"):
            train(wrong)
    assert steps == int(1.5 * samples / 4)
    phases = (PhaseConfig(until=99), PhaseConfig())
    for until, what in ((0, "train.steps"), (1, "the phase's until")):
        given = config(steps=100 + until)
        given.data.phases = phases if until else (PhaseConfig(until=1), PhaseConfig())
        with pytest.raises(ConfigError, match=rf"{what} = {99 if until else 100} would read .* {what} to \d+,"):
            train(given)
    train(config(steps=int(steps)))


def test_phases_are_the_run_that_was_resumed_with_other_sources(run_config, train, folders, tmp_path):
    """And one that is stopped in the middle of a phase goes on in it."""
    web, both = (
        {"web": SourceConfig(str(folders["web"]))},
        {"web": SourceConfig(str(folders["web"]), 0.25), "code": SourceConfig(str(folders["code"]), 0.75, 2.0)},
    )
    phases = (PhaseConfig(6, web), PhaseConfig(10, both), PhaseConfig(sources=web, global_batch=4))
    constant = {"eval__every": 0, "schedule__decay": "constant", "checkpoint__every": 3}

    def losses(folder):
        return [(r["step"], r["samples"], r["loss"]) for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]

    whole = losses(train(run_config(run_dir=str(tmp_path / "whole"), data__phases=phases, **constant)))
    assert [samples for _, samples, _ in whole] == [*range(8, 88, 8), 84, 88, 92, 96]
    for steps, sources, batch in ((6, web, 8), (10, both, 8), (14, web, 4)):
        options = {"train__steps": steps, "data__sources": sources, "train__global_batch": batch}
        by_hand = train(run_config(run_dir=str(tmp_path / "by-hand"), **options, **constant))
    assert losses(by_hand) == whole
    for steps in (8, 12, 14):
        stopped = train(
            run_config(run_dir=str(tmp_path / "stopped"), data__phases=phases, train__steps=steps, **constant)
        )
    assert losses(stopped) == whole
    result = json.loads((stopped / "result.json").read_text())
    read = {"web": 48 + 8 + 16, "code": 24}
    mean = sum(result[f"final_loss/{name}"] * n for name, n in read.items()) / 96
    assert result["final_loss"] == pytest.approx(mean)


def test_a_phase_of_longer_samples_keeps_the_tokens_of_a_step(run_config, train, folders, tmp_path, capsys):
    phases = (PhaseConfig(8, seq_len=16), PhaseConfig())
    folder = train(run_config(data__phases=phases, data__path=str(folders["web"]), train__steps=12, eval__every=0))
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    assert [r["samples"] for r in records] == [*range(16, 144, 16), 136, 144, 152, 160]
    said = capsys.readouterr().out
    assert "Steps 1 to 8: 16 samples of 16 tokens a step" in said
    assert "Steps 9 to 12: 8 samples of 32 tokens a step" in said
    assert "data: data.seq_len is 32 now: the run goes on after 2,048 tokens, at sample 64 of" in said
    samples = TokenShards(folders["web"]).num_samples(32)
    assert records[-1]["epoch"] == pytest.approx((64 + 4 * 8) / samples)
