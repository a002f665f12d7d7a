"""The presets' shapes, built without memory for their weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from anon_dist.train.config.families import model_config
from anon_dist.train.config.parsing import parse_args


@pytest.mark.parametrize(
    ("preset", "vocabulary", "millions"),
    [("gpt2-small", 50257, 124), ("gpt2-medium", 50257, 355), ("llama-1b", 32000, 1039), ("qwen3-1b", 32000, 1032)],
)
def test_presets_have_the_size_they_name(preset, vocabulary, millions):
    config = parse_args(["--config", preset])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(config.model, vocabulary, 0))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
