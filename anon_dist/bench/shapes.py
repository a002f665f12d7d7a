"""The parameters of each family's shapes, without building them, and what their arithmetic costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from anon_dist.train.config.families import GLOBAL_EVERY, default_hidden
from anon_dist.train.config.parsing import ConfigError, ModelConfig, find_config, load_config

Family = Literal["gpt2", "llama", "qwen3", "gemma3", "olmo2", "mixtral"]
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

    family: Family
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocab: int
    context: int
    tied: bool
    head_dim: int | None = None
    """None: width / heads."""
    experts: int = 0
    """mixtral: of a layer."""
    experts_per_token: int = 0
    window: int | None = None
    """gemma3: tokens that most layers attend to."""

    @property
    def head_size(self) -> int:
        """Of a head."""
        return self.head_dim or self.width // self.heads

    @property
    def query_width(self) -> int:
        """Width of the queries."""
        return self.head_size * self.heads

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values."""
        return self.head_size * self.kv_heads

    def parameters(self) -> list[Parameter]:
        """All, in the model's order."""
        h, f = self.width, self.hidden
        block: list[tuple[tuple[int, ...], int | None]]
        if self.family != "gpt2":
            block, first, last = self._rotary_block(), [], [Parameter((h,), "tail")]
        else:  # norm; q, k, v in one; projection; norm; MLP (transformers' GPT2Block)
            block = [((h,), None), ((h,), None), ((h, 3 * h), None), ((3 * h,), None), ((h, h), None), ((h,), None)]
            block += [((h,), None), ((h,), None), ((h, f), None), ((f,), None), ((f, h), None), ((h,), None)]
            first, last = [Parameter((self.context, h), "root")], [Parameter((h,), "tail"), Parameter((h,), "tail")]
        embedding = Parameter((self.vocab, h), "tail" if self.tied else "embedding", split=None if self.tied else 0)
        output = [] if self.tied else [Parameter((self.vocab, h), "tail", split=0)]
        blocks = [Parameter(shape, "block", i, split) for i in range(self.layers) for shape, split in block]
        return [embedding, *first, *blocks, *last, *output]

    def _rotary_block(self) -> list[tuple[tuple[int, ...], int | None]]:
        """Of Llama and what came of it: attention's matrices and norms, the MLP's matrices, or the experts', the block's norms."""
        h, f, q, kv = self.width, self.hidden, self.query_width, self.kv_width
        block: list[tuple[tuple[int, ...], int | None]] = [((q, h), 0), ((kv, h), 0), ((kv, h), 0), ((h, q), 1)]
        if self.family in ("qwen3", "gemma3"):
            block += [((self.head_size,), None)] * 2
        elif self.family == "olmo2":
            block += [((q,), None), ((kv,), None)]
        if self.family == "mixtral":
            block += [((self.experts, h), None), ((self.experts, 2 * f, h), None), ((self.experts, h, f), None)]
        else:
            block += [((f, h), 0), ((f, h), 0), ((h, f), 1)]
        return block + [((h,), None)] * (4 if self.family == "gemma3" else 2)

    def flops_per_token(self, seq_len: int) -> float:
        """As `anon_dist.train.model.build.flops_per_token`."""
        return 6.0 * (self._multiplied("block") + self._multiplied("tail")) + 12.0 * self.query_width * self._seen(
            seq_len
        )

    def recomputed_per_token(self, seq_len: int, how: str) -> float:
        """What is computed once more in the backward pass, besides: the blocks' forward pass, or every second product of theirs."""
        if how == "full":
            return 2.0 * self._multiplied("block") + 4.0 * self.query_width * self._seen(seq_len)
        return self._multiplied("block") if how == "selective" else 0.0

    def _multiplied(self, where: Where) -> float:
        """Parameters there that a token is multiplied by."""
        share = self.experts_per_token / self.experts if self.experts else 1.0
        return sum(p.numel * (share if len(p.shape) == 3 else 1.0) for p in self.parameters() if p.where == where)

    def _seen(self, seq_len: int) -> float:
        """Tokens that attention looks at, over all layers."""
        near = self.layers - self.layers // GLOBAL_EVERY if self.window else 0
        return near * min(seq_len, self.window or seq_len) + (self.layers - near) * seq_len

    def saved_per_token(self) -> tuple[float, float]:
        """Numbers that a compiled block saves for its backward pass, for each token, with attention that keeps no scores (FlashAttention).

        Returns:
            Those that are whole on every rank of a tensor-parallel group (inputs of norms and of the matrices after them), and those
            that are split (queries, keys, values, attention's output, what is normed of them; the MLP's hidden numbers). After
            Korthikanti et al., arXiv 2205.05198, section 4.1.
        """
        hidden = (2 if self.family == "gpt2" else 3) * self.hidden * max(1, self.experts_per_token)
        normed = self.query_width + self.kv_width if self.family in ("qwen3", "gemma3", "olmo2") else 0
        gathered = 2 * self.width * self.experts_per_token  # each expert's input and output
        return 4.0 * self.width + gathered, 2.0 * self.query_width + 2.0 * self.kv_width + hidden + normed

    def eager_per_token(self, half: bool, pure: bool = False) -> tuple[float, float]:
        """What it saves besides where nothing is compiled, whole and split: counted in transformers' code, op by op.

        Args:
            half: under autocast, whose casts are saved for each matrix beside norms' float32 numbers; counted in numbers of 2 bytes.
            pure: of bfloat16 parameters without autocast, where norms compute in float32 all the same.
        """
        h, q, kv, experts = self.width, self.query_width, self.kv_width, self.experts_per_token
        if self.family == "gpt2":  # its GELU is six operations
            return (2.0 if half else 0.0) * h, 3.0 * self.hidden
        norms = {"gemma3": (6, 17), "mixtral": (2, 8)}.get(self.family, (2, 9))[half] * h
        heads = {"qwen3": (1, 2), "gemma3": (1, 3), "olmo2": (1, 3)}.get(self.family, (0, 0))[half] * (q + kv)
        repeated = 2.0 * (q - kv) if self.family == "gemma3" else 0.0  # keys and values, where there is a mask
        wide = experts if half and not pure else 0  # experts' grouped products are in float32 there
        gate = self.hidden * max(1, experts)  # after its SiLU or GELU
        return norms + 2.0 * h * wide, heads + repeated + gate + 4.0 * self.hidden * wide

    def selected_per_token(self) -> tuple[float, float]:
        """Of these, whole and split, what `train.recompute` keeps of a block beside its input under selective: attention's output, and the
        results of every second matrix product (in Llama's order the first is q, the last the MLP's)."""
        if self.family == "gpt2":
            return 0.0, 4.0 * self.width + self.hidden
        attention = 2.0 * self.query_width + self.kv_width
        if self.family == "mixtral":  # whose experts' products are grouped, and repeated
            return 0.0, attention
        return 1.0 * self.width, attention + self.hidden


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
    for source in (config.from_pretrained, config.config):
        if source is not None:
            raise ConfigError(f"--model {name} starts from {source}; give the sizes in a configuration instead")
    return shape_of(config, vocab)


def shape_of(config: ModelConfig, vocab: int) -> Shape:
    """What `anon_dist.train.config.families.model_config` makes of a configuration."""
    padded = -(-vocab // config.pad_vocab_to) * config.pad_vocab_to
    kv_heads = config.heads if config.family == "gpt2" else config.kv_heads or config.heads
    experts = (config.experts or 8, config.experts_per_token or 2) if config.family == "mixtral" else (0, 0)
    return Shape(
        config.family,
        config.layers,
        config.width,
        config.heads,
        kv_heads,
        config.hidden or default_hidden(config),
        padded,
        config.context,
        config.tie_embeddings,
        config.head_dim,
        *experts,
        window=(config.window or 512) if config.family == "gemma3" else None,
    )


def config_of(shape: Shape) -> ModelConfig:
    """The configuration that builds the shape."""
    return ModelConfig(
        family=shape.family,
        layers=shape.layers,
        width=shape.width,
        heads=shape.heads,
        kv_heads=None if shape.family == "gpt2" else shape.kv_heads,
        head_dim=shape.head_dim,
        hidden=shape.hidden,
        experts=shape.experts or None,
        experts_per_token=shape.experts_per_token or None,
        window=shape.window,
        context=shape.context,
        tie_embeddings=shape.tied,
        pad_vocab_to=1,
    )
