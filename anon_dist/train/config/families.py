"""Architectures: the transformers configuration of each family for the sizes of a training configuration, or of a config.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anon_dist.train.config.parsing import ConfigError, ModelConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GLOBAL_EVERY = 6
"""Of Gemma 3's layers, every so many attends to everything, the others to a window."""

CONTEXT = ("n_positions", "max_position_embeddings", "max_seq_len", "max_target_positions")
"""What the longest sequence of tokens is called in a config.json."""


def model_config(config: ModelConfig, vocab_size: int, eod_id: int) -> PretrainedConfig:
    """The transformers configuration of the shape, its vocabulary padded to a multiple of `pad_vocab_to`.

    Raises:
        ConfigError: `config.config` cannot be read, or is of no causal language model that transformers has.
    """
    vocab = _padded(vocab_size, config)
    tokens = {"vocab_size": vocab, "bos_token_id": eod_id, "eos_token_id": eod_id, "pad_token_id": None}
    if config.config is not None:
        return _of_file(Path(config.config), tokens, _padded(vocab_size + 1, config) - 1)
    if config.family == "gpt2":
        from transformers import GPT2Config

        return GPT2Config(
            n_positions=config.context,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            n_inner=config.hidden,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            tie_word_embeddings=config.tie_embeddings,
            **tokens,
        )
    return _with_rotary_positions(config, tokens)


def _padded(tokens: int, config: ModelConfig) -> int:
    return -(-tokens // config.pad_vocab_to) * config.pad_vocab_to


def _with_rotary_positions(config: ModelConfig, tokens: dict[str, Any]) -> PretrainedConfig:
    """Llama and what came of it."""
    import transformers

    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    head_dim = config.head_dim or config.width // config.heads
    values: dict[str, Any] = {
        "max_position_embeddings": config.context,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "intermediate_size": config.hidden or default_hidden(config),
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        **tokens,
    }
    if config.family == "olmo2":
        return transformers.Olmo2Config(**values)
    values["head_dim"] = head_dim
    if config.family == "qwen3":
        return transformers.Qwen3Config(**values)
    if config.family == "mixtral":
        experts = {"num_local_experts": config.experts or 8, "num_experts_per_tok": config.experts_per_token or 2}
        return transformers.MixtralConfig(**values, **experts)
    if config.family == "gemma3":
        # Its layers with a window have a base of their own, and attention's scale is a number of its own: 1 / sqrt(head_dim).
        ropes = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
        window = {"sliding_window": config.window or 512, "sliding_window_pattern": GLOBAL_EVERY}
        return transformers.Gemma3TextConfig(
            **{**values, "rope_parameters": ropes}, **window, query_pre_attn_scalar=head_dim
        )
    return transformers.LlamaConfig(**values)


def default_hidden(config: ModelConfig) -> int:
    """Size inside the feed-forward block where the configuration says none."""
    return 4 * config.width if config.family == "gpt2" else -(-8 * config.width // 3 // 256) * 256


def _of_file(path: Path, tokens: dict[str, Any], padding: int) -> PretrainedConfig:
    """A config.json with the data's vocabulary; of a model that must have a token that pads, it is `padding`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    values = read_config(path)
    kind = values.pop("model_type", None)
    # An encoder has a causal class too, for use in a decoder, and sees what comes after.
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise ConfigError(
            f"model.config = {path}: model_type {kind!r} is no causal language model of this transformers; name one that is (qwen3, say)"
        )
    if "auto_map" in values:
        raise ConfigError(f"model.config = {path} brings code of its own (auto_map), which is not run; remove the key")
    types = {f.name: f.type for f in dataclasses.fields(CONFIG_MAPPING[kind])}
    if types.get("pad_token_id") in (int, "int"):  # such a model must have one: none of the data's
        tokens = {**tokens, "pad_token_id": padding, "vocab_size": max(tokens["vocab_size"], padding + 1)}
    try:
        found: PretrainedConfig = CONFIG_MAPPING[kind](**{**values, **tokens})
    except (TypeError, ValueError, AttributeError, KeyError, StrictDataclassError) as error:
        raise ConfigError(f"model.config = {path}: {' '.join(str(error).split())}") from error
    if found.get_text_config() is not found:
        raise ConfigError(f"model.config = {path} is of a model of more than text; give its text_config alone")
    return found


def read_config(path: Path, key: str = "model.config") -> dict[str, Any]:
    """What is in a config.json, which `key` names.

    Raises:
        ConfigError: it cannot be read, or is no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key} = {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{key} = {path}: expected a JSON object, found {type(values).__name__}")
    return values


def check_length(config: ModelConfig, says: Mapping[str, Any], seq_len: int) -> None:
    """Refuse samples that are longer than the model's context.

    Args:
        config: what names the model.
        says: its config.json, or as much of it as is known.

    Raises:
        ConfigError: they are; with the key that says how long it is.
    """
    key = next((key for key in CONTEXT if isinstance(says.get(key), int)), None)
    if key is None or says[key] >= seq_len:
        return
    if config.from_pretrained is None:
        source, other = f"model.config = {config.config}", f"raise {key}"
    else:
        source, other = f"model.from_pretrained = {config.from_pretrained}", "take a model with a longer context"
    raise ConfigError(
        f"data.seq_len = {seq_len} is longer than the context of {source}, {key} = {says[key]}; lower it, or {other}"
    )


def has_windows(shape: PretrainedConfig) -> bool:
    """Whether some layers attend to a window only, for which a mask must be made."""
    kinds = set(getattr(shape, "layer_types", None) or ())
    windowed = getattr(shape, "sliding_window", None) is not None and not kinds
    return windowed or bool(kinds - {"full_attention"})


def window_of(shape: PretrainedConfig, layer: int) -> int | None:
    """Tokens that a layer attends to; None: all before."""
    kinds = getattr(shape, "layer_types", None)
    window = getattr(shape, "sliding_window", None)
    return window if window is not None and (kinds is None or kinds[layer] == "sliding_attention") else None


def expert_share(shape: PretrainedConfig) -> tuple[int, float]:
    """(experts of a layer, the share of them that a token passes); (0, 1) where there are none."""
    counts = (getattr(shape, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    experts = next((count for count in counts if count), 0)
    taken = getattr(shape, "num_experts_per_tok", None) or getattr(shape, "moe_top_k", None)
    return (experts, taken / experts) if experts and taken else (0, 1.0)
