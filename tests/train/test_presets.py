"""The presets' shapes, built without memory for their weights; where they start."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from anon_dist.train.config.at_once import check_at_once
from anon_dist.train.config.errors import ConfigError
from anon_dist.train.config.families import model_config
from anon_dist.train.config.parsing import parse_args

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("preset", "vocabulary", "millions"),
    [("gpt2-small", 50257, 124), ("gpt2-medium", 50257, 355), ("llama-1b", 32000, 1039), ("qwen3-1b", 32000, 1032)],
)
def test_presets_have_the_size_they_name(preset, vocabulary, millions):
    config = parse_args(["--config", preset])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(config.model, vocabulary, 0))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(
    ("environment", "options", "said"),
    [
        ({}, ["--train.engine", "deepspeed"], "DeepSpeed's stage 2"),
        ({}, ["--train.engine", "deepspeed", "--train.deepspeed-config", "configs/deepspeed/zero3.json"], None),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "configs/deepspeed/zero1.json"},
            [],
            "DeepSpeed's stage 1",
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, [], "FSDP1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, ["--optim.basis", "None"], None),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, [], None),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, ["--optim.name", "adamw"], None),
    ],
)
def test_where_their_basis_cannot_be_the_start_says_so(environment, options, said, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    config = parse_args(["--config", "gpt2-small", *options])
    if said is None:
        check_at_once(config, data=False)
        return
    with pytest.raises(ConfigError, match=rf"{said} cuts them anywhere: add --optim\.basis None, or"):
        check_at_once(config, data=False)
