"""What `anon-dist init` is asked for: looked at before torch is imported."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from anon_dist.arguments import whole_number
from anon_dist.bench.options import InitOptions
from anon_dist.bench.shapes import MODELS, config_of, shape_of
from anon_dist.data.errors import DataError
from anon_dist.data.stored.index import Index
from anon_dist.train.config.parsing import ConfigError, ModelConfig, find_config, load_config


@dataclass(frozen=True)
class Asked:
    """A model, and the data for it."""

    model: ModelConfig
    vocab: int
    seq_len: int
    train: int
    """Tokens of the training split."""


def ask(options: InitOptions) -> Asked:
    """What the options name.

    Raises:
        ConfigError: the model is unknown, or its context too short.
        DataError: the data folder is none, or too small.
    """
    index = Index.load(options.data)
    model = model_of(options.model, index.vocab_size, options.context)
    seq_len = options.seq_len or model.context
    if seq_len > model.context:
        raise ConfigError(f"--seq-len {seq_len} is longer than the model's context, {model.context}")
    train = index.splits["train"].tokens
    if train <= seq_len:
        raise DataError(f"--data {options.data} has {train:,} training tokens, too few for samples of {seq_len}")
    return Asked(model, index.vocab_size, seq_len, train)


def model_of(name: str, vocab: int, context: int) -> ModelConfig:
    """A shape by its number of parameters, or a known one.

    Raises:
        ConfigError: it is neither.
    """
    if name in MODELS:
        return dataclasses.replace(config_of(MODELS[name]), pad_vocab_to=64)
    try:
        wanted = whole_number(name[:-1] + name[-1:].upper() if name[-1:] in "mb" else name)
    except ValueError:
        return _known(name)
    if not 10_000 <= wanted <= 10**12:
        raise ConfigError(f"MODEL {name}: from 10k to 1000B parameters")
    return shaped(wanted, vocab, context)


def _known(name: str) -> ModelConfig:
    try:
        model = load_config(find_config(name)).model
    except ConfigError as error:
        raise ConfigError(
            f"MODEL {name} is no number of parameters (124M), none of {', '.join(MODELS)}, and no configuration either: {error}"
        ) from None
    if model.from_pretrained is not None:
        raise ConfigError(
            f"MODEL {name} starts from {model.from_pretrained}; give the sizes in a configuration instead"
        )
    return model


def shaped(wanted: int, vocab: int, context: int) -> ModelConfig:
    """The Llama shape that comes nearest to a number of parameters, about as wide for its depth as published ones: 64 times at 1B, where
    heads are 64 wide, to 128 times from 10B, where they are 128.

    Raises:
        ConfigError: the vocabulary alone has as many.
    """
    head = 128 if wanted >= 3e9 else 64 if wanted >= 2e7 else 32
    usual = 64 * min(max((wanted / 1e9) ** 0.3, 0.5), 2.0)
    best: tuple[float, ModelConfig] | None = None
    for heads in range(1, 257):
        width = head * heads
        tied = wanted < 3e9
        shape = ModelConfig("llama", 1, width, heads, context=context, tie_embeddings=tied)
        one, two = (count(dataclasses.replace(shape, layers=n), vocab) for n in (1, 2))
        layers = max(1, round((wanted - one) / (two - one)) + 1)
        off = abs(math.log((one + (layers - 1) * (two - one)) / wanted))
        score = 10 * off + abs(math.log(width / layers / usual))
        if best is None or score < best[0]:
            best = score, dataclasses.replace(shape, layers=layers)
    assert best is not None
    found = best[1]
    has = count(found, vocab)
    if not 0.7 < has / wanted < 1.4:
        least = f", the smallest there is: MODEL {-(-has // 1000)}k, or more" if has > wanted else ""
        raise ConfigError(
            f"MODEL: no shape of {wanted:,} parameters with the data's vocabulary of {vocab:,}; the nearest has {has:,}{least}"
        )
    return found


def count(model: ModelConfig, vocab: int) -> int:
    """Parameters of a shape."""
    return sum(p.numel for p in shape_of(model, vocab).parameters())
