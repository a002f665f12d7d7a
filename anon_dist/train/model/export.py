"""The trained model as a Hugging Face folder: safetensors, configurations, tokenizer, model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig

from anon_dist.files import publish


def export_model(
    folder: Path, weights: dict[str, Tensor], config: PretrainedConfig, tokenizer: Path, card: str = ""
) -> None:
    """Write the folder; complete or absent, replacing an older one.

    The folder loads with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    Args:
        weights: of the whole model, by parameter name; tied ones may be missing.
        tokenizer: folder of the tokenizer the data was prepared with.
        card: the model card.

    Raises:
        RuntimeError: weights are missing that are not tied to others.
    """
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(weights, assign=True, strict=False)
    plain.tie_weights()
    if missing := [name for name, p in plain.named_parameters() if p.is_meta]:
        raise RuntimeError(f"the engine gave no weights for {', '.join(missing)}")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        plain.save_pretrained(temporary)
        complete(temporary, plain.config, AutoTokenizer.from_pretrained(tokenizer), card)
        publish(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # half a model on a full disk keeps it full
        raise


def complete(folder: Path, config: PretrainedConfig, tokenizer: Any, card: str) -> None:
    """What a folder of weights needs besides, so that it is used as it was trained: the model's configuration, how to generate, the
    tokenizer, the model card.

    Training switches the model's cache off, and a configuration for generating that is made from the model's would keep it off.
    """
    config.use_cache = True
    config.save_pretrained(folder)
    generation_config(config, tokenizer).save_pretrained(folder)
    tokenizer.model_max_length = context_of(config) or tokenizer.model_max_length
    tokenizer.save_pretrained(folder)
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")


def generation_config(config: PretrainedConfig, tokenizer: Any) -> GenerationConfig:
    """The tokens that begin, end and pad a text. A pretrained model's own ends (a chat model has several) stay if the tokenizer's is one
    of them."""
    eos, own = tokenizer.eos_token_id, getattr(config, "eos_token_id", None)
    ends = own if isinstance(own, list) and eos in own else eos
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else getattr(config, "bos_token_id", None)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    return GenerationConfig(bos_token_id=bos, eos_token_id=ends, pad_token_id=pad)


def context_of(config: PretrainedConfig) -> int | None:
    """Positions that the model has."""
    found = getattr(config, "max_position_embeddings", None)
    return None if found is None else int(found)


@torch.no_grad()
def sample(folder: Path, prompt: str, tokens: int = 120, seed: int = 0) -> str:
    """Text that the exported model writes after `prompt`, loaded with nothing but transformers.

    Sampled at temperature 0.8 among the 40 likeliest tokens.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    room = int(getattr(model.config, "max_position_embeddings", 1024)) - inputs["input_ids"].shape[1]
    torch.manual_seed(seed)
    ids = model.generate(
        **inputs,
        max_new_tokens=max(1, min(tokens, room)),
        do_sample=True,
        temperature=0.8,
        top_k=40,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))
