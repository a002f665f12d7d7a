"""`anon-dist init`: what it writes is taken by `anon-dist train`, has the size that was asked for, and fits as the plan says."""

import json
import re
from types import SimpleNamespace

import pytest
from helpers import forget_accelerate
from transformers import AutoModelForCausalLM

from anon_dist.bench.init import duration, often
from anon_dist.cli import main
from anon_dist.train.config.families import model_config
from anon_dist.train.config.parsing import accumulation, parse_args


def written(tmp_path, data, model, *words):
    out = tmp_path / "my.yaml"
    out.unlink(missing_ok=True)
    main(["init", model, "--data", str(data), "--out", str(out), *map(str, words)])
    return parse_args(["--config", str(out)]), out.read_text()


def built(config):
    """Parameters of the model that the configuration builds."""
    import torch

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(config.model, 257, 256))
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "wanted"), [("200k", 2e5), ("1M", 1e6), ("124m", 1.24e8), ("1.3B", 1.3e9), ("13B", 1.3e10)]
)
def test_a_number_of_parameters_becomes_a_shape_of_about_as_many(model, wanted, tmp_path, prepared):
    config, _ = written(tmp_path, prepared, model, "--ranks", 64, "--memory", 80)
    assert built(config) == pytest.approx(wanted, rel=0.1)
    assert 16 < config.model.width / config.model.layers < 260


def test_memory_decides_how_it_is_sharded_and_recomputed(tmp_path, prepared, capsys):
    """Held against the plan's own command: what is chosen fits there, and what is simpler does not."""

    def fits(memory, **job):
        out = tmp_path / "plan.json"
        words = ["--checkpointing", job.pop("checkpointing")]
        words += [w for k, v in job.items() for w in (f"--{k.replace('_', '-')}", str(v))]
        reserve = ("--hardware.reserve", str(1e8 * memory), "--hardware.memory", str(1e9 * memory))
        config = ("--model", str(tmp_path / "my.yaml"), "--vocab", "257", "--engines", "ddp", "fsdp2")
        main(["bench", "plan", *config, "--optimizers", "anon-columns", *words, *reserve, "--json", str(out)])
        return {row["engine"]: row["fits"] for row in json.loads(out.read_text())["rows"]}

    batch = ("--batch-tokens", "64k", "--tokens", "10M", "--ranks", 4, "--seq-len", "2048")
    roomy, text = written(tmp_path, prepared, "1B", *batch, "--memory", 45)
    assert roomy.train.activation_checkpointing == "none"
    assert (roomy.data.seq_len, roomy.train.global_batch, accumulation(roomy, 4) >= 1) == (2048, 32, True)
    assert f"--num_processes 4 launch/pretrain.py --config {tmp_path / 'my.yaml'}" in text
    job = {"ranks": 4, "seq_len": 2048}
    assert fits(45, **job, micro_batch=roomy.train.micro_batch, checkpointing="none")[roomy.train.engine]

    tight, _ = written(tmp_path, prepared, "1B", *batch, "--memory", 7.4)
    assert (tight.train.engine, tight.train.activation_checkpointing) == ("fsdp2", "selective")
    assert fits(7.4, **job, micro_batch=tight.train.micro_batch, checkpointing="selective") == {
        "ddp": False,
        "fsdp2": True,
    }
    assert not any(fits(7.4, **job, micro_batch=1, checkpointing="none").values())
    with pytest.raises(SystemExit, match=r"error: 1\S*B parameters do not fit on 4 x 2 GB: .*take more ranks"):
        main(
            [
                "init",
                "1B",
                "--data",
                str(prepared),
                "--out",
                str(tmp_path / "no.yaml"),
                *map(str, batch),
                "--memory",
                "2",
            ]
        )
    assert not (tmp_path / "no.yaml").exists()


def test_what_is_written_trains(tmp_path, prepared, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    forget_accelerate()
    words = ("--context", 64, "--precision", "fp32", "--memory", 2, "--tokens", 2048, "--batch-tokens", 512)
    config, text = written(tmp_path, prepared, "30k", *words)
    assert (config.train.steps, config.train.global_batch, config.train.engine) == (4, 8, "single")
    assert "anon-dist train --config" in text
    short = ("--eval.sequences", "4", "--eval.final-sequences", "4", "--log.trackers")
    main(["train", "--config", str(tmp_path / "my.yaml"), *short])
    forget_accelerate()
    assert (tmp_path / "runs" / "my" / "model" / "README.md").is_file()
    assert f"{built(config) / 1e6:.2f}M parameters" in capsys.readouterr().out


def test_presets_and_published_models_keep_their_shape(tmp_path, prepared):
    preset = parse_args(["--config", "gpt2-small"])
    assert written(tmp_path, prepared, "gpt2-small")[0].model == preset.model
    model = written(tmp_path, prepared, "7b", "--ranks", 8)[0].model
    assert (model.layers, model.width, model.hidden, model.tie_embeddings) == (32, 4096, 11008, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("giant", "MODEL giant is no number of parameters .*none of 7b, 70b, 405b, small, and no configuration"),
        ("20k", r"nearest has [\d,]+, the smallest there is: MODEL \d+k, or more"),
        ("12", "MODEL 12: from 10k to 1000B parameters"),
        ("1M --ranks 0", "--ranks must be at least 1, not 0"),
        ("1M --memory 0", "--memory is GB of one accelerator"),
        ("gpt2-small --seq-len 4k", "--seq-len 4000 is longer than the model's context, 1024"),
        ("1M --out there.yaml", "--out there.yaml exists; name another file, or remove it"),
        ("1M --out there.yaml/x", "--out there.yaml is a file; name a folder"),
        ("1M --data gone", "--data gone does not exist; name a folder that `anon-dist data prepare` made"),
    ],
)
def test_mistakes_are_named_in_a_line(words, message, tmp_path, prepared, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.yaml").write_text("mine")
    given = words.split()
    given += ["--out", "o.yaml"] if "--out" not in given else []
    given += ["--data", str(prepared)] if "--data" not in given else []
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as ended:
        main(["init", *given])
    assert "\n" not in str(ended.value)
    assert [p.name for p in tmp_path.iterdir()] == ["there.yaml"]
    assert (tmp_path / "there.yaml").read_text() == "mine"


def test_rounds_are_round_and_times_have_their_unit():
    assert [often(steps) for steps in (2, 70, 168, 1000, 3100, 19073)] == [2, 10, 10, 50, 200, 1000]
    assert [duration(s) for s in (0.17, 59, 121, 7300, 100_000, 9e6)] == [
        "0.2 seconds", "59 seconds", "2.0 minutes", "2.0 hours", "28 hours", "104 days"
    ]  # fmt: skip


@pytest.mark.parametrize("words", [("0.5M",), ("1M",), ("0.5M", "--seq-len", "512")])
def test_of_little_data_no_more_than_four_epochs_are_read(words, tmp_path, prepared):
    out = tmp_path / "little.yaml"
    main(["init", *words, "--data", str(prepared), "--out", str(out)])
    assert float(re.search(r", ([\d.]+) epochs", out.read_text()).group(1)) <= 4


@pytest.mark.parametrize(
    ("words", "gpu", "said", "precision"),
    [
        (
            "",
            None,
            "for 1 x 12 GB (what is free here, where no GPU is; for a GPU elsewhere give its --memory); start",
            "fp32",
        ),
        ("--ranks 4", None, "for 4 x 80 GB (assumed, as no GPU is here; --memory says otherwise); start", "bf16"),
        (
            "--precision bf16",
            None,
            "for 1 x 80 GB (assumed, as no GPU is here; --memory says otherwise); start",
            "bf16",
        ),
        ("--memory 24", None, "for 1 x 24 GB; start", "bf16"),
        ("", 25.3, "for 1 x 25.3 GB (Some GPU, which is here); start", "bf16"),
        ("--precision fp32", 25.3, "for 1 x 25.3 GB (Some GPU, which is here); start", "fp32"),
    ],
)
def test_it_says_for_what_machine_it_plans(words, gpu, said, precision, tmp_path, prepared, monkeypatch, capsys):
    """This one, if it has a GPU, or for one process on its CPU."""
    monkeypatch.setattr("anon_dist.bench.init.free_memory", lambda: 12e9)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu is not None)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda i: "Some GPU")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda i: SimpleNamespace(total_memory=(gpu or 0) * 1e9))
    config, text = written(tmp_path, prepared, "1M", *words.split())
    assert said in capsys.readouterr().out
    assert said in text
    assert config.train.precision == precision
