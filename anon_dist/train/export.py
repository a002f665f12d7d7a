"""The trained model as a Hugging Face folder: safetensors, config, tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from anon_dist.files import publish


def export_model(folder: Path, model: nn.Module, config: PretrainedConfig, tokenizer: Path, main: bool) -> None:
    """Gather the weights on the first rank, which writes the folder; complete or absent, replacing an older one. Every rank must call it.

    The folder loads with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    Args:
        tokenizer: folder of the tokenizer the data was prepared with.
        main: whether this is the first rank.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not main:
        return
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.config.use_cache = True
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    plain.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(temporary)
    publish(temporary, folder)


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
