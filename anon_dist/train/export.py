"""The trained model as a Hugging Face folder: safetensors, config, tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from anon_dist.files import publish


def export_model(folder: Path, weights: dict[str, Tensor], config: PretrainedConfig, tokenizer: Path) -> None:
    """Write the folder; complete or absent, replacing an older one.

    The folder loads with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    Args:
        weights: of the whole model, by parameter name; tied ones may be missing.
        tokenizer: folder of the tokenizer the data was prepared with.

    Raises:
        RuntimeError: weights are missing that are not tied to others.
    """
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(weights, assign=True, strict=False)
    plain.tie_weights()
    if missing := [name for name, p in plain.named_parameters() if p.is_meta]:
        raise RuntimeError(f"the engine gave no weights for {', '.join(missing)}")
    plain.config.use_cache = True
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        plain.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(temporary)
        publish(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # half a model on a full disk keeps it full
        raise


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
