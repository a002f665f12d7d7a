"""GPT-2 and Llama shapes, built with transformers, and what their arithmetic costs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from anon_dist.train.config import ConfigError, ModelConfig
from anon_dist.train.documents import register_causal

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def model_config(config: ModelConfig, vocab_size: int, eod_id: int) -> PretrainedConfig:
    """The transformers configuration of the shape, its vocabulary padded to a multiple of `pad_vocab_to`."""
    from transformers import GPT2Config, LlamaConfig

    vocab = -(-vocab_size // config.pad_vocab_to) * config.pad_vocab_to
    special = {"bos_token_id": eod_id, "eos_token_id": eod_id}
    if config.family == "gpt2":
        return GPT2Config(
            vocab_size=vocab,
            n_positions=config.context,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            n_inner=config.hidden,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            tie_word_embeddings=config.tie_embeddings,
            **special,
        )
    return LlamaConfig(
        vocab_size=vocab,
        max_position_embeddings=config.context,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads or config.heads,
        intermediate_size=config.hidden or -(-8 * config.width // 3 // 256) * 256,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
        **special,
    )


def build_model(config: ModelConfig, vocab_size: int, eod_id: int, seq_len: int) -> PreTrainedModel:
    """A float32 model on the CPU, in training mode: freshly initialised from torch's random state, or with a pretrained one's weights.

    Raises:
        ConfigError: the pretrained model cannot be loaded, or its vocabulary or context is too small for the data.
    """
    from transformers import AutoModelForCausalLM

    if config.from_pretrained is None:
        shape = model_config(config, vocab_size, eod_id)
        _check_memory(shape)
        try:
            attention = register_causal() if config.attention == "sdpa" else config.attention
            model = AutoModelForCausalLM.from_config(shape, attn_implementation=attention, dtype=torch.float32)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"model.attention = {config.attention}: {' '.join(str(error).split())}") from error
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                config.from_pretrained, attn_implementation=config.attention, dtype=torch.float32
            )
        except (ImportError, OSError, ValueError) as error:
            raise ConfigError(
                f"model.from_pretrained = {config.from_pretrained}: {' '.join(str(error).split())}"
            ) from error
        rows, context = (
            model.get_input_embeddings().num_embeddings,
            getattr(model.config, "max_position_embeddings", seq_len),
        )
        if rows < vocab_size:
            raise ConfigError(
                f"model.from_pretrained = {config.from_pretrained} has {rows} embeddings and the data {vocab_size} tokens; prepare the "
                f"data with that model's own tokenizer (--tokenizer hf:{config.from_pretrained})"
            )
        if context < seq_len:
            raise ConfigError(f"data.seq_len = {seq_len} is longer than the pretrained model's context, {context}")
    model.config.use_cache = False
    trained: PreTrainedModel = model.train()
    return trained


def _check_memory(shape: PretrainedConfig) -> None:
    """Each rank first builds the whole model in host memory: refuse what cannot fit, before pages are touched."""
    width = shape.hidden_size
    hidden = getattr(shape, "intermediate_size", None) or getattr(shape, "n_inner", None) or 4 * width
    least = shape.vocab_size * width + shape.num_hidden_layers * 2 * width * (width + hidden)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * least > memory:
        raise ConfigError(
            f"model: more than {least:.3g} parameters, {4e-9 * least:,.0f} GB, do not fit into this machine's {1e-9 * memory:,.0f} GB; "
            "lower model.width, model.layers or model.hidden"
        )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: what is checkpointed, compiled and sharded as a unit."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [m for m in model.modules() if type(m).__name__ in names]


def flops_per_token(model: PreTrainedModel, seq_len: int) -> float:
    """Floating-point operations that one token of a training step costs, forward and backward.

    6 for each parameter that multiplies (all but embedding look-ups), and 12 · layers · width · seq_len for attention, as in PaLM's
    appendix B (arXiv 2204.02311).
    """
    config: Any = model.config
    multiplied = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    if output is None or output.weight is not embedding:
        multiplied -= embedding.numel()
    if getattr(config, "model_type", "") == "gpt2":
        multiplied -= config.n_positions * config.n_embd
    attention = 12.0 * config.num_hidden_layers * config.hidden_size * seq_len
    return float(6.0 * multiplied + attention)


PEAK_BF16_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense half-precision peaks from the vendor's data sheets; the first name that the device's contains."""


def peak_flops(device: torch.device) -> float | None:
    """The device's peak, if it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in name), None)
