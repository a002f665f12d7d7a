"""Models, planned and built with transformers, and what their arithmetic costs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from anon_dist.checkpoint.schema import Checkpoint
from anon_dist.engines.materialize import materialize
from anon_dist.train.config.families import check_length, expert_share, has_windows, model_config
from anon_dist.train.config.parsing import ConfigError, ModelConfig
from anon_dist.train.loss.documents import register_causal
from anon_dist.train.model.initial import initial_weights, make_buffers
from anon_dist.train.model.pretrained import HeldWeights, saved_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Planned:
    """A model before any rank has memory for it."""

    model: PreTrainedModel
    """In training mode; its parameters, float32, are on the meta device."""
    weights: Checkpoint
    """What they will be, range by range."""


def plan_model(
    config: ModelConfig, vocab_size: int, eod_id: int, seq_len: int, *, seed: int, share: float = 1.0
) -> Planned:
    """The configured model: freshly initialised as its own code does, with the same bits for every number of ranks, or a pretrained one.

    Args:
        share: of the model that this machine's ranks will hold together, in copies.

    Raises:
        ConfigError: the pretrained model cannot be loaded, its vocabulary or context is too small for the data, or memory is too small.
    """
    if config.from_pretrained is not None:
        return _pretrained(config, vocab_size, seq_len)
    shape = model_config(config, vocab_size, eod_id)
    check_length(config, shape.to_dict(), seq_len)
    _check_memory(shape, share)
    model = _on_meta(config, shape)
    return Planned(model, initial_weights(model, seed))


def build_model(
    config: ModelConfig, vocab_size: int, eod_id: int, seq_len: int, seed: int | None = None
) -> PreTrainedModel:
    """The whole model on the CPU.

    Args:
        seed: of fresh weights; None: from torch's random state.

    Raises:
        ConfigError: see `plan_model`.
    """
    seed = int(torch.randint(1 << 62, ())) if seed is None else seed
    planned = plan_model(config, vocab_size, eod_id, seq_len, seed=seed)
    materialize(planned.model, planned.weights, torch.device("cpu"))
    return planned.model


MARKS = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}
"""By which a model of transformers says that it has an implementation of attention; eager is what each has."""
MASKLESS = ("gpt2", "llama", "qwen3", "olmo2", "mixtral")
"""Model types that attend causally to everything where no mask is made for them."""


def _on_meta(config: ModelConfig, shape: PretrainedConfig) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    _check_attention(config.attention, shape)
    unmasked = config.attention == "sdpa" and shape.model_type in MASKLESS and not has_windows(shape)
    attention = register_causal() if unmasked else config.attention
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, attn_implementation=attention, dtype=torch.float32)
    except (ImportError, ValueError) as error:
        remedy = "" if config.attention == "eager" else "; set it to eager, which every model has"
        raise ConfigError(f"model.attention = {config.attention}: {' '.join(str(error).split())}{remedy}") from error
    except Exception as error:  # of a model's own code, for sizes that it did not expect
        if config.config is None:
            raise
        raise ConfigError(
            f"model.config = {config.config}: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    model.config.use_cache = False
    _name_blocks(model)
    trained: PreTrainedModel = model.train()
    return trained


def _check_attention(attention: str, shape: PretrainedConfig) -> None:
    """Refuse an implementation that transformers does not have of the model.

    Raises:
        ConfigError: it does not.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(shape)]
    if attention in MARKS and not getattr(kind, MARKS[attention], False):
        raise ConfigError(
            f"model.attention = {attention}: transformers does not have it for {shape.model_type}; set it to eager, which every model has"
        )


def _name_blocks(model: PreTrainedModel) -> None:
    """Have the model name the class of its blocks, by which FSDP, recomputation and compilation go: of those that it names, which it shares
    with other models, the ones that it has; else that of its longest list of one kind.

    Raises:
        ConfigError: it has none.
    """
    present = {type(module).__name__ for module in model.modules()}
    named = [name for name in getattr(model, "_no_split_modules", None) or () if name in present]
    if not named:
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
        if not lists:
            raise ConfigError(f"model: {type(model).__name__} has no list of blocks, by which it could be sharded")
        named = [type(max(lists, key=len)[0]).__name__]
    model._no_split_modules = named


def _pretrained(config: ModelConfig, vocab_size: int, seq_len: int) -> Planned:
    """A Hugging Face model: its files are read where they hold the model's parameters by their names, else transformers loads it whole."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = config.from_pretrained
    assert source is not None
    try:
        shape = AutoConfig.from_pretrained(source).get_text_config()
        _check_pretrained(config, shape, vocab_size, seq_len)
        model = _on_meta(config, shape)
        weights: Checkpoint | None = saved_weights(source, model)
        if weights is None:
            whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            weights = HeldWeights({name: p.detach() for name, p in whole.named_parameters()})
    except (ImportError, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"model.from_pretrained = {source}: {' '.join(str(error).split())}") from error
    make_buffers(model)
    return Planned(model, weights)


def _check_pretrained(config: ModelConfig, shape: Any, vocab_size: int, seq_len: int) -> None:
    """That the model is large enough for the data."""
    if shape.vocab_size < vocab_size:
        raise ConfigError(
            f"model.from_pretrained = {config.from_pretrained} has {shape.vocab_size} embeddings and the data {vocab_size} tokens; prepare "
            f"the data with that model's own tokenizer (--tokenizer hf:{config.from_pretrained})"
        )
    check_length(config, shape.to_dict(), seq_len)


def _check_memory(shape: PretrainedConfig, share: float) -> None:
    """Refuse what cannot fit in host memory, before pages are touched."""
    width = shape.hidden_size
    hidden = getattr(shape, "intermediate_size", None) or getattr(shape, "n_inner", None) or 4 * width
    experts, _ = expert_share(shape)
    least = shape.vocab_size * width + shape.num_hidden_layers * 2 * width * (width + hidden * max(1, experts))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * least * share > memory:
        raise ConfigError(
            f"model: more than {least:.3g} parameters, {4e-9 * least * share:,.0f} GB on this machine, do not fit into its "
            f"{1e-9 * memory:,.0f} GB; lower model.width, model.layers or model.hidden, or take more machines under engine fsdp2"
        )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: what is checkpointed, compiled and sharded as a unit."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [m for m in model.modules() if type(m).__name__ in names]
