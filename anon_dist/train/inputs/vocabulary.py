"""Whether the data's tokenizer is the one that the run will need, asked before the first step: it is exported with the model."""

from __future__ import annotations

import logging
from typing import Any

from anon_dist.data import DataError, Tokenizer
from anon_dist.data.preparation.tokenizer import PROBE
from anon_dist.train.config.parsing import Config
from anon_dist.train.inputs.corpora import first_folder

log = logging.getLogger(__name__)


def tokenizer_problem(config: Config, context: int) -> str | None:
    """What is wrong with the tokenizer beside the data, in a line; None: nothing.

    It must be there, load, be the one that made the data, number its tokens as the model of `model.from_pretrained` does, and leave room
    behind `log.sample_prompt`.

    Args:
        context: positions of the model.
    """
    try:
        tokenizer = Tokenizer.of(first_folder(config))
    except (DataError, OSError) as error:
        return str(error)
    name, prompt = config.model.from_pretrained, config.log.sample_prompt
    if name is not None and (other := _other_tokens(name, tokenizer)):
        folder = first_folder(config)
        return (
            f"model.from_pretrained = {name} has other tokens than data.path = {folder} ({other}); prepare the data with "
            f"that model's own tokenizer: --tokenizer hf:{name}"
        )
    if prompt is not None and not 1 <= len(tokenizer.hf(prompt)["input_ids"]) < context:
        return f"log.sample_prompt must have from 1 to {context - 1} tokens, for the model's context of {context}, not {prompt[:60]!r}"
    return None


def _other_tokens(name: str, tokenizer: Tokenizer) -> str | None:
    """How the pretrained model's tokenizer differs; None: not at all, or it has none to compare with."""
    from transformers import AutoTokenizer

    try:
        own: Any = AutoTokenizer.from_pretrained(name)
        if len(own.get_vocab()) <= len(own.all_special_tokens):  # what transformers makes of a folder without one
            raise FileNotFoundError
    except Exception as error:  # what transformers' parsers raise
        log.warning(
            "model.from_pretrained = %s has no tokenizer that loads (%s): whether its tokens are the data's is not checked",
            name,
            type(error).__name__,
        )
        return None
    ours, theirs = tokenizer.hf.get_vocab(), own.get_vocab()
    differing = [(token, i) for token, i in ours.items() if theirs.get(token) != i]
    if differing:
        token, i = min(differing, key=lambda pair: pair[1])
        there = next((t for t, k in theirs.items() if k == i), None)
        return f"{len(differing):,} of {len(ours):,}; {i} is {token!r} in the data and {there!r} there"
    if own(PROBE, add_special_tokens=False)["input_ids"] != tokenizer.encode(PROBE).tolist():
        return f"the same ones, but text is cut differently: {PROBE!r}"
    return None
