"""Lists of tensors to step: a few large ones, or a model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from anon_dist.train.config.families import model_config
from anon_dist.train.config.parsing import find_config, load_config

Shapes = Sequence[Sequence[int]]

VOCABULARY = {"gpt2": 50257, "llama": 32000, "qwen3": 151936, "gemma3": 262144, "olmo2": 100352, "mixtral": 32000}
TENSORS = 4
BLOCKS = 2048
"""A multiple of the blocks that share a scale: torchao's and bitsandbytes' 128 to 256 elements."""
LADDER = {"cpu": (1e6, 10e6, 60e6), "cuda": (10e6, 100e6, 1e9)}
BYTES_NEEDED = 64
"""For each element, with some to spare: parameters, gradients, the base's state, another's and its temporaries, and a second process's."""


def few_large(elements: int) -> list[list[int]]:
    """`TENSORS` equal ones; whole blocks, if large enough, since low-bit optimizers keep float32 states of a tensor with a torn one."""
    length = max(1, elements // TENSORS)
    return [[length // BLOCKS * BLOCKS or length]] * TENSORS


def model_shapes(preset: str) -> list[list[int]]:
    """Of the parameters of a shipped training configuration's model, with its family's vocabulary, as published (of Llama, 2's).

    Raises:
        ConfigError: there is no such configuration.
    """
    from transformers import AutoModelForCausalLM

    config = replace(load_config(find_config(preset)).model, pad_vocab_to=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(config, VOCABULARY[config.family], 0))
    return [list(p.shape) for p in model.parameters()]


def default_sizes(device: torch.device) -> list[int]:
    """Of the ladder, what memory holds."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    return [int(n) for n in LADDER[device.type] if n * BYTES_NEEDED <= free]


def parameters(shapes: Shapes, device: torch.device) -> list[nn.Parameter]:
    """Random ones in float32, with gradients."""
    made = [nn.Parameter(torch.randn(list(shape), device=device)) for shape in shapes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made
