"""The parameters of GPT-2 and Llama shapes, without building them, and what their arithmetic costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from anon_dist.train.config import ConfigError, ModelConfig, find_config, load_config

Where = Literal["block", "embedding", "tail", "root"]
"""A transformer block; token embedding; final norm and output matrix; GPT-2's positions."""


@dataclass(frozen=True)
class Parameter:
    """A parameter, and how engines treat it."""

    shape: tuple[int, ...]
    where: Where
    block: int = 0
    split: int | None = None
    """The dimension that tensor parallelism splits."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def local(self, ranks: int, tensor: int = 1) -> int:
        """Elements on the rank that has most, split in `tensor` parts and then by rows among `ranks` (FSDP2)."""
        sizes = list(self.shape)
        if self.split is not None:
            sizes[self.split] = -(-sizes[self.split] // tensor)
        return -(-sizes[0] // ranks) * math.prod(sizes[1:])


@dataclass(frozen=True)
class Shape:
    """A model's dimensions."""

    family: Literal["gpt2", "llama"]
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocab: int
    context: int
    tied: bool

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values."""
        return self.width // self.heads * self.kv_heads

    def parameters(self) -> list[Parameter]:
        """All, in the model's order."""
        h, f, kv = self.width, self.hidden, self.kv_width
        block: list[tuple[tuple[int, ...], int | None]]
        if self.family == "llama":  # q, k, v, o; gate, up, down; norms (transformers' LlamaDecoderLayer)
            block = [((h, h), 0), ((kv, h), 0), ((kv, h), 0), ((h, h), 1), ((f, h), 0), ((f, h), 0), ((h, f), 1)]
            block += [((h,), None)] * 2
            first, last = [], [Parameter((h,), "tail")]
        else:  # norm; q, k, v in one; projection; norm; MLP (transformers' GPT2Block)
            block = [((h,), None), ((h,), None), ((h, 3 * h), None), ((3 * h,), None), ((h, h), None), ((h,), None)]
            block += [((h,), None), ((h,), None), ((h, f), None), ((f,), None), ((f, h), None), ((h,), None)]
            first, last = [Parameter((self.context, h), "root")], [Parameter((h,), "tail"), Parameter((h,), "tail")]
        embedding = Parameter((self.vocab, h), "tail" if self.tied else "embedding", split=None if self.tied else 0)
        output = [] if self.tied else [Parameter((self.vocab, h), "tail", split=0)]
        blocks = [Parameter(shape, "block", i, split) for i in range(self.layers) for shape, split in block]
        return [embedding, *first, *blocks, *last, *output]

    def flops_per_token(self, seq_len: int) -> float:
        """As `anon_dist.train.model.flops_per_token`: 6 for each parameter that multiplies, 12 · layers · width · seq_len for attention."""
        multiplied = sum(p.numel for p in self.parameters() if p.where not in ("embedding", "root"))
        return 6.0 * multiplied + 12.0 * self.layers * self.width * seq_len

    def saved_per_token(self) -> tuple[float, float]:
        """Numbers that a block saves for its backward pass, for each token, with attention that keeps no scores (FlashAttention).

        Returns:
            Those that are whole on every rank of a tensor-parallel group (inputs of norms and of the matrices after them), and those
            that are split (queries, keys, values, attention's output; the MLP's hidden numbers). After Korthikanti et al., arXiv
            2205.05198, section 4.1.
        """
        hidden = (4 if self.family == "llama" else 2) * self.hidden
        return 4.0 * self.width, 2.0 * self.width + 2.0 * self.kv_width + hidden


MODELS = {
    "7b": Shape("llama", 32, 4096, 32, 32, 11008, 32000, 4096, tied=False),
    "70b": Shape("llama", 80, 8192, 64, 8, 28672, 32000, 4096, tied=False),
    "405b": Shape("llama", 126, 16384, 128, 8, 53248, 128256, 8192, tied=False),
    "small": Shape("llama", 4, 256, 4, 4, 768, 4096, 128, tied=False),
}
"""Llama 2 7B and 70B (arXiv 2307.09288 and its config.json), Llama 3.1 405B (arXiv 2407.21783, table 3); small is for measurements."""


def find_shape(name: str, vocab: int) -> Shape:
    """A model of `MODELS`, or the model of a training configuration.

    Args:
        name: a key of `MODELS`, a shipped configuration, or a YAML file.
        vocab: tokens, for a configuration: it leaves them to the data.

    Raises:
        ConfigError: there is none of that name, or it is a pretrained one.
    """
    if name in MODELS:
        return MODELS[name]
    try:
        config = load_config(find_config(name)).model
    except ConfigError as error:
        raise ConfigError(
            f"--model {name} is none of {', '.join(MODELS)}, and no configuration either: {error}"
        ) from None
    if config.from_pretrained is not None:
        raise ConfigError(
            f"--model {name} starts from {config.from_pretrained}; give the sizes in a configuration instead"
        )
    return shape_of(config, vocab)


def shape_of(config: ModelConfig, vocab: int) -> Shape:
    """What `anon_dist.train.model.model_config` makes of a configuration."""
    llama = config.family == "llama"
    hidden = config.hidden or (-(-8 * config.width // 3 // 256) * 256 if llama else 4 * config.width)
    padded = -(-vocab // config.pad_vocab_to) * config.pad_vocab_to
    kv_heads = (config.kv_heads or config.heads) if llama else config.heads
    sizes = (config.layers, config.width, config.heads, kv_heads, hidden, padded, config.context)
    return Shape(config.family, *sizes, tied=config.tie_embeddings)


def config_of(shape: Shape) -> ModelConfig:
    """The configuration that builds the shape."""
    return ModelConfig(
        family=shape.family,
        layers=shape.layers,
        width=shape.width,
        heads=shape.heads,
        kv_heads=shape.kv_heads if shape.family == "llama" else None,
        hidden=shape.hidden,
        context=shape.context,
        tie_embeddings=shape.tied,
        pad_vocab_to=1,
    )
