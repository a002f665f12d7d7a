"""A model continues a text, token by token, as transformers' `generate` does it with its cache of keys and values."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer, TextStreamer

from anon_dist.checkpoint import CheckpointError
from anon_dist.checkpoint.options import ReadOptions
from anon_dist.train.model.export import context_of, generation_config
from anon_dist.trained.device import device_of
from anon_dist.trained.find import find, tokenizer_of
from anon_dist.trained.model import check_tokens, load_model
from anon_dist.trained.options import Generate

Say = Callable[[str], object]


def generate(options: Generate) -> None:
    """Print the text and what the model writes after it, as it is written.

    Raises:
        CheckpointError: an option is out of its range, or there is no such model.
    """
    device = device_of(options.device)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise CheckpointError("the text is not UTF-8") from None
    trained = find(options.source, ReadOptions(unsafe=options.unsafe))
    tokenizer = tokenizer_of(trained, options.tokenizer)
    model = load_model(trained, options.model_config, options.unsafe)
    check_tokens(trained.path, model.config, tokenizer)
    print(f"{trained.path}{_step(trained.progress)}", file=sys.stderr)
    shown = TextStreamer(tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    continued(model.to(device), tokenizer, prompt, options, shown, lambda text: print(text, file=sys.stderr))


@torch.no_grad()
def continued(
    model: PreTrainedModel, tokenizer: Any, prompt: str, options: Generate, shown: BaseStreamer | None, say: Say
) -> list[int]:
    """The ids of the prompt and of what the model writes after it.

    Args:
        shown: given each token as it comes.
        say: told what the user should know.

    Raises:
        CheckpointError: the prompt leaves no room in the model's context, or is empty and no token begins a text.
    """
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)["input_ids"]
    config = generation_config(model.config, tokenizer)
    if ids.shape[1] == 0:
        if config.bos_token_id is None:
            raise CheckpointError("an empty text: this model has no token that begins one; give it some words")
        ids = torch.tensor([[config.bos_token_id]])
    context, new = context_of(model.config), options.max_new_tokens
    if context is not None:
        if ids.shape[1] >= context:
            raise CheckpointError(f"the text has {ids.shape[1]} tokens, and the model's context {context}; shorten it")
        if ids.shape[1] + new > context:
            new = context - ids.shape[1]
            say(f"note: {new} tokens at most, to the end of the model's context of {context}")
    config.update(max_new_tokens=new, use_cache=True, do_sample=options.temperature > 0)
    if options.temperature > 0:
        config.update(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
        torch.manual_seed(options.seed) if options.seed is not None else torch.seed()
    ids = ids.to(model.device)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=shown)
    return [int(i) for i in made[0]]


def _step(progress: Any) -> str:
    return f", step {progress['step']:,}" if "step" in progress else ""
