"""The model of a training checkpoint: which it is, whether the weights are its own, and loaded to be used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from anon_dist.checkpoint import CheckpointError
from anon_dist.checkpoint.assemble import model_names
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.options import ReadOptions
from anon_dist.checkpoint.schema import MASTER, WEIGHT, Checkpoint, Key, TensorInfo
from anon_dist.train.model.initial import make_buffers
from anon_dist.trained.find import Trained


def model_config(source: Path, checkpoint: Checkpoint, named: Path | None) -> PretrainedConfig:
    """The configuration that is named, else the one that the checkpoint knows; of a model whose weights these are.

    Raises:
        CheckpointError: there is none, or the weights are another model's.
    """
    known: Any = checkpoint.manifest.extras.get("model_config")
    remedy = "name its configuration with --model-config CONFIG.JSON"
    if named is None and not (isinstance(known, Mapping) and "model_type" in known):
        raise CheckpointError(f"{source} does not say which model its weights are of; {remedy}")
    try:
        config: PretrainedConfig
        config = AutoConfig.from_pretrained(named) if named is not None else AutoConfig.for_model(**known)
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{named or source}: no model configuration that transformers knows ({text}); {remedy}"
        ) from None
    tensors = {name: checkpoint.tensors[_weight(checkpoint, name)] for name in model_names(checkpoint)}
    _check(source, config, tensors)
    dtypes = {info.dtype for info in tensors.values() if info.dtype.is_floating_point}
    config.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    config.use_cache = True
    return config


def _weight(checkpoint: Checkpoint, name: str) -> Key:
    """As the format hf has it."""
    key = Key(name, WEIGHT)
    return key if key in checkpoint.tensors else Key(name, MASTER)


def _check(source: Path, config: PretrainedConfig, tensors: Mapping[str, TensorInfo]) -> None:
    """That all of the model's weights are there, with their shapes, and no others: transformers would make up what is missing at random."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    known = {*model.state_dict(), *(name for name, _ in model.named_buffers())}
    troubles = {
        "lacks": [name for name in wanted if name not in tensors],
        "has another shape of": [n for n, shape in wanted.items() if n in tensors and tensors[n].shape != shape],
        "has beside the model": [name for name in tensors if name not in known],
    }
    for what, names in troubles.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{source} {what} {names[0]}{more}: its weights are not those of the {type(model).__name__} that its configuration says; "
                "name another with --model-config CONFIG.JSON"
            )


def check_tokens(source: Path, config: PretrainedConfig, tokenizer: Any) -> None:
    """That the model has an embedding for each of the tokenizer's tokens.

    Raises:
        CheckpointError: it has not.
    """
    most = max(tokenizer.get_vocab().values(), default=-1)
    if most >= config.vocab_size:
        raise CheckpointError(
            f"{source} has {config.vocab_size} embeddings, and the tokenizer a token {most}: it is another model's; name the right one "
            "with --tokenizer FOLDER"
        )


def load_model(trained: Trained, named: Path | None = None, unsafe: bool = False) -> PreTrainedModel:
    """The model with its weights, in their dtype, on the CPU, to be used.

    Raises:
        CheckpointError: it cannot be read, or is incomplete.
    """
    if trained.is_model and named is None:
        try:
            loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(trained.path)
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise CheckpointError(
                f"{trained.path} does not load as a model: {' '.join(str(error).split())[:300]}"
            ) from None
        return loaded.eval()
    checkpoint = open_checkpoint(trained.path, ReadOptions(unsafe=unsafe))
    try:
        config = model_config(trained.path, checkpoint, named)
        weights = {}
        for name in model_names(checkpoint):
            key = _weight(checkpoint, name)
            info = checkpoint.tensors[key]
            weights[name] = checkpoint.read(key, 0, info.numel).clone().view(info.shape)
    finally:
        checkpoint.close()
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    make_buffers(model)  # those that no checkpoint has, such as rotary frequencies
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    return model.eval()
