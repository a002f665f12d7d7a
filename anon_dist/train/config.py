"""The training configuration: every field with what it means, read from YAML and overridden on the command line.

launch/pretrain.py --config configs/train/quickstart.yaml --optim.gamma 0.5 --train.steps 1000
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml


class ConfigError(ValueError):
    """The configuration is wrong; the message says which file or flag, which key, and the remedy."""


@dataclass
class ModelConfig:
    family: Literal["gpt2", "llama"] = "gpt2"
    """Architecture, built with transformers: GPT2LMHeadModel or LlamaForCausalLM."""
    layers: int = 12
    """Transformer blocks."""
    width: int = 768
    """Size of the residual stream."""
    heads: int = 12
    """Attention heads; they divide the width."""
    kv_heads: int | None = None
    """Key and value heads of Llama's grouped-query attention. None: as many as heads."""
    hidden: int | None = None
    """Size inside the feed-forward block. None: 4 · width (GPT-2), or 8/3 · width rounded up to 256 (Llama)."""
    context: int = 1024
    """Longest sequence the model takes; data.seq_len must not exceed it."""
    tie_embeddings: bool = True
    """Whether the output matrix is the token embedding."""
    dropout: float = 0.0
    """Dropout rate of GPT-2's embeddings, attention and residuals; pretraining over less than an epoch wants none."""
    rope_theta: float = 10000.0
    """Base of Llama's rotary position embedding."""
    pad_vocab_to: int = 64
    """The vocabulary is padded to a multiple of this, for the matrix units."""
    from_pretrained: str | None = None
    """Folder or hub name of a Hugging Face causal LM whose weights and shape to start from, instead of all the above."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""


@dataclass
class DataConfig:
    path: str = "data/stdlib"
    """Folder made by `anon-dist data prepare`."""
    seq_len: int = 1024
    """Tokens that a sample predicts."""
    seed: int = 0
    """Order of the samples; a function of this and the sample's position alone."""
    mask_documents: bool = False
    """Whether attention stops at document borders (and positions count from them). Off: documents follow each other in one stream."""
    verify: Literal["size", "checksum"] = "checksum"
    """What of the shards is checked at start: their sizes, or their contents too (about 1 GB/s, by one process per node)."""


@dataclass
class OptimConfig:
    name: Literal["anon", "adamw"] = "anon"
    """Anon, or torch's AdamW as a baseline. The fields marked (Anon) do nothing to AdamW."""
    lr: float = 6e-4
    """Peak learning rate. Its unit depends on γ: rescale it with gamma, or set match."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the gradient's mean and of the squared gradient's."""
    eps: float | None = None
    """Added to the second moment. None: 1e-16 for Anon, 1e-8 for AdamW (where it stands outside the square root)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings; vectors are not decayed."""
    gamma: float = 1.0
    """(Anon) Adaptivity γ: 0 is momentum SGD, 1 adapts like Adam."""
    gamma_by_name: dict[str, float] = field(default_factory=dict)
    """(Anon) Parameter name pattern (shell-style) → its own γ. lr, weight_decay and update_clip are those of all: see match."""
    gamma_schedule: dict[int, float] = field(default_factory=dict)
    """(Anon) Step → γ, linear in between, in place of gamma; parameters that gamma_by_name names keep their own. It takes effect at
    refreshes. {0: 0.5, 2000: 1.0} rises over the first 2000 steps. Needs match."""
    match: str | None = None
    """(Anon) lr, weight_decay and update_clip are meant for γ = 1, and multiplied in each param group for the γ in force there, so that its
    steps keep their root mean square (see anon_dist.optim.matching). A file of spectra, such as a sweep's calibration/spectrum.json, or
    the folder of a checkpoint of this model, of Anon or AdamW, to measure it on."""
    refresh_ratio: float = 1.03
    """(Anon) ρ: the preconditioner is refreshed at steps 1, …, a, ⌈ρ a⌉, … The paper's is 2."""
    beta3: float = 0.93
    """(Anon) Weight of the old preconditioner at a refresh. The paper's is 0.5."""
    update_clip: float | None = 1.0
    """(Anon) Largest magnitude of an element of v · m̂. Its unit depends on γ. None: unlimited, as in the paper."""
    window: int | Literal["auto"] | None = 64
    """(Anon) Steps before a refresh in which the second moment is accumulated; the others are faster. auto: so many that
    what is left out weighs at most 2^-24. None: all of them, as in the paper."""
    hold_silent: bool = False
    """(Anon) Elements without gradient since the last refresh keep their preconditioner; meant for γ < 0."""
    state_dtype: str = "float32"
    """(Anon) dtype of exp_avg, exp_avg_sq and precond: float32, float64 or bfloat16, or by state, float32 where nothing is said:
    "exp_avg=int8, exp_avg_sq=bfloat16, precond=bfloat16" (5 bytes per parameter)."""


@dataclass
class ScheduleConfig:
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly to its peak."""
    decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after the warm-up; wsd stays at the peak and falls linearly at the end."""
    decay_fraction: float = 0.2
    """Share of all steps in which wsd falls."""
    min_ratio: float = 0.1
    """Last learning rate, as a share of the peak."""


@dataclass
class TrainConfig:
    steps: int = 1000
    """Optimizer steps."""
    global_batch: int = 64
    """Sequences per step, over all ranks: micro_batch · ranks · accumulation, the last of which follows."""
    micro_batch: int = 8
    """Sequences that a rank takes at once."""
    engine: Literal["auto", "single", "ddp", "zero1", "fsdp2", "hsdp", "fsdp1", "deepspeed"] = "auto"
    """How ranks share the work. auto: what accelerate's configuration asks for; under torchrun, which asks for nothing, fsdp2."""
    shard_ranks: int | None = None
    """hsdp: ranks among which one copy of parameters and state is sharded, a node's, say; the copies are replicas. None: as accelerate's
    parallelism_config says, else all."""
    tensor_parallel: int | None = None
    """fsdp2 and Llama shapes: neighbouring ranks that split the matrices of each block between them, and read the same samples. None: as
    accelerate's parallelism_config says, else 1."""
    offload: Literal["off", "serial", "overlap"] | None = None
    """fsdp2 and hsdp: parameters, gradients and optimizer state in host memory, where the CPU steps them; serial: the device waits for the
    step; overlap: it goes on with the next forward, whose modules wait for their own parameters (Anon only; the same bits, so this is what
    None comes to). None: offloaded if accelerate's configuration says so."""
    accumulate: Literal["sharded", "whole"] | None = None
    """fsdp2, hsdp, fsdp1: how gradients of several micro-batches are summed. sharded: reduced after each micro-batch, so that a rank keeps
    its share only; whole: on every rank in full, 4 bytes a parameter more, and reduced once a step. None: sharded, but whole for bf16-true,
    which would sum shares in bfloat16."""
    deepspeed_config: str | None = None
    """deepspeed: JSON file, such as those in configs/deepspeed. None: the one in accelerate's configuration, else ZeRO stage 2."""
    precision: Literal["fp32", "bf16", "fp16", "bf16-true"] = "fp32"
    """Dtype of the computation; parameters are float32 all the same, but for bf16-true: there parameters and gradients are bfloat16 without
    a float32 copy, and Anon rounds them stochastically (engines single, ddp, fsdp2, hsdp). fp16: engine deepspeed on GPUs only."""
    grad_clip: float | None = 1.0
    """Largest global gradient norm. None: not clipped."""
    max_skipped: int = 10
    """A step with a non-finite gradient is skipped on every rank; more than so many in a row end the run."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    compile: bool = False
    """torch.compile each transformer block."""
    deterministic: bool = False
    """Deterministic algorithms on CUDA, for bit-identical resumes; slower. (CPU runs are deterministic without.)"""
    seed: int = 0
    """Initial weights and dropout."""
    timeout_minutes: float = 10.0
    """A rank that waits longer than this for its peers ends with an error."""


@dataclass
class EvalConfig:
    every: int = 200
    """Steps between validations; 0: only after the last step."""
    sequences: int = 256
    """Validation sequences, always the same ones; 0: the whole split."""
    final_sequences: int = 0
    """The same for the last validation, whose result is the run's."""


@dataclass
class CheckpointConfig:
    every: int = 500
    """Steps between checkpoints; 0: only at the end, or when the run is stopped."""
    keep: int = 2
    """How many of the latest checkpoints stay."""


@dataclass
class LogConfig:
    every: int = 10
    """Steps between records of the metrics."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where the metrics go besides metrics.jsonl."""
    project: str = "anon_dist"
    """Project name for the trackers."""
    sample_prompt: str | None = None
    """Text that the exported model continues at the end of the run, as a sample."""


@dataclass
class Config:
    """Pretraining of a GPT-style model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run_dir: str = "runs/default"
    """Folder of the run: checkpoints, metrics, the exported model."""
    resume: str = "auto"
    """auto: go on from the latest checkpoint in run_dir that is not damaged, if there is one. never: start afresh. Or a checkpoint's
    folder; if it is an older one of this run, the later ones are renamed."""


def check(config: Config) -> None:
    """Relations between fields that no single type can say.

    Raises:
        ConfigError: naming the field and the remedy.
    """
    m, d, t, s = config.model, config.data, config.train, config.schedule
    for name, value, least in (
        ("model.layers", m.layers, 1),
        ("model.heads", m.heads, 1),
        ("data.seq_len", d.seq_len, 1),
        ("train.steps", t.steps, 1),
        ("train.micro_batch", t.micro_batch, 1),
        ("train.global_batch", t.global_batch, 1),
        ("checkpoint.keep", config.checkpoint.keep, 1),
        ("log.every", config.log.every, 1),
        ("schedule.warmup_steps", s.warmup_steps, 0),
        ("eval.every", config.eval.every, 0),
        ("checkpoint.every", config.checkpoint.every, 0),
    ):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, not {value}")
    if m.width % m.heads:
        raise ConfigError(f"model.width = {m.width} is not a multiple of model.heads = {m.heads}")
    if m.from_pretrained is None and d.seq_len > m.context:
        raise ConfigError(
            f"data.seq_len = {d.seq_len} is longer than model.context = {m.context}; raise the context or shorten the samples"
        )
    if t.precision == "bf16-true" and config.optim.name != "anon":
        raise ConfigError(
            f"train.precision bf16-true needs optim.name anon: {config.optim.name} rounds parameters to nearest, which loses small updates"
        )
    if s.warmup_steps >= t.steps:
        raise ConfigError(
            f"schedule.warmup_steps = {s.warmup_steps} leaves nothing of train.steps = {t.steps}; shorten the warm-up"
        )
    schedule = config.optim.gamma_schedule
    if any(step < 0 for step in schedule):
        raise ConfigError(f"optim.gamma_schedule has γ at steps, counted from 1, not at {min(schedule)}")
    if len(set(schedule.values())) > 1 and config.optim.match is None and config.optim.name == "anon":
        raise ConfigError(
            "optim.gamma_schedule changes γ, and with it the unit of the learning rate: set optim.match to a checkpoint of Anon or AdamW "
            "on this model, or to a sweep's calibration/spectrum.json (anon-dist sweep: --match-rms), so that it follows"
        )
    if t.offload == "overlap" and config.optim.name != "anon":
        raise ConfigError(f"train.offload is overlap, which {config.optim.name} has not; set it to serial")
    if not 0.0 <= s.min_ratio <= 1.0 or not 0.0 < s.decay_fraction <= 1.0:
        raise ConfigError("schedule.min_ratio must be in [0, 1] and schedule.decay_fraction in (0, 1]")


def accumulation(config: Config, world_size: int) -> int:
    """Micro-batches per step and rank.

    Raises:
        ConfigError: the global batch does not divide evenly.
    """
    per_round = config.train.micro_batch * world_size
    if config.train.global_batch % per_round:
        raise ConfigError(
            f"train.global_batch = {config.train.global_batch} is not a multiple of train.micro_batch · ranks = "
            f"{config.train.micro_batch} · {world_size}; change one of them"
        )
    return config.train.global_batch // per_round


# -- reading ----------------------------------------------------------------------------------------------------------


def find_config(name: str) -> Path:
    """The file of that path, or else the shipped training configuration of that name (`quickstart`).

    Raises:
        ConfigError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = shipped_configs() / "train"
    shipped = folder / f"{name.removesuffix('.yaml')}.yaml"
    if shipped.is_file() and shipped.parent == folder:
        return shipped
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    raise ConfigError(f"--config {name}: no such file, and no shipped configuration of that name ({', '.join(names)})")


def shipped_configs() -> Path:
    """The folder `configs`: of the clone, or inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def load_config(path: Path) -> Config:
    """The configuration in a YAML file; what it does not say is the default.

    Raises:
        ConfigError: the file is no YAML mapping, a key is unknown (the nearest is suggested), or a value has the wrong type.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(values).__name__}")
    return typing.cast(Config, _build(Config, values or {}, str(path), ""))


def parse_args(args: Sequence[str] | None = None) -> Config:
    """The configuration of a command line: `--config FILE` first, then `--section.field value` over it.

    Raises:
        ConfigError: as `load_config` and `check` do.
        SystemExit: for `--help` and for flags that are unknown or of the wrong type, after a message.
    """
    args = list(sys.argv[1:] if args is None else args)
    default, rest, i = Config(), [], 0
    while i < len(args):
        if args[i] == "--config" and i + 1 < len(args):
            default = load_config(find_config(args[i + 1]))
            i += 2
        elif args[i].startswith("--config="):
            default = load_config(find_config(args[i].split("=", 1)[1]))
            i += 1
        else:
            rest.append({"true": "True", "false": "False"}.get(args[i], args[i]))  # as YAML spells them
            i += 1
    config = tyro.cli(
        Config,
        default=default,
        args=rest,
        prog="pretrain.py",
        config=(tyro.conf.FlagConversionOff,),  # every flag takes a value, as in the file
        description="Pretrain a GPT-style model. --config FILE (or the name of a shipped configuration) sets the defaults of all below.",
    )
    check(config)
    return config


@cache
def field_types(section: type = Config, prefix: str = "") -> Mapping[str, Any]:
    """Dotted name → annotated type, of every field."""
    found: dict[str, Any] = {}
    for key, hint in typing.get_type_hints(section).items():
        name = f"{prefix}{key}"
        found.update(
            field_types(typing.cast(type, hint), f"{name}.") if dataclasses.is_dataclass(hint) else {name: hint}
        )
    return found


def with_fields(config: Config, values: Mapping[str, Any], where: str) -> Config:
    """A copy in which the fields of these dotted names have these values, converted as in a file.

    Args:
        where: what the values come from, for the message.

    Raises:
        ConfigError: a name is unknown (the nearest is suggested), or a value has the wrong type.
    """
    changed, hints = copy.deepcopy(config), field_types()
    for name, value in values.items():
        if name not in hints:
            by_end = [n for n in hints if n.rpartition(".")[2] == name.rpartition(".")[2]]
            near = (by_end or difflib.get_close_matches(name, hints, n=1, cutoff=0.0))[0]
            raise ConfigError(f"{where}: unknown field '{name}'; did you mean '{near}'?")
        *sections, key = name.split(".")
        owner: Any = changed
        for section in sections:
            owner = getattr(owner, section)
        setattr(owner, key, _convert(hints[name], value, f"{where}: '{name}'"))
    return changed


def to_yaml(config: Config) -> str:
    """The configuration as `load_config` reads it."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _build(cls: type, values: dict[str, Any], file: str, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{file}: unknown key '{prefix}{key}'; did you mean '{prefix}{near}'?")
    built = {}
    for key, value in values.items():
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise ConfigError(f"{file}: '{prefix}{key}' is a section, not {value!r}")
            built[key] = _build(typing.cast(type, hint), value, file, f"{prefix}{key}.")
        else:
            built[key] = _convert(hint, value, f"{file}: '{prefix}{key}'")
    return cls(**built)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type; YAML gives lists for tuples, and reads 6e-4 as a string."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in inner:
            try:
                return _convert(option, value, where)
            except ConfigError:
                continue
    elif origin is Literal:
        if any(value == option and type(value) is type(option) for option in inner):
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        items = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        if len(items) == len(value):
            return tuple(_convert(item, v, where) for item, v in zip(items, value, strict=True))
    elif origin is dict and isinstance(value, dict):
        keys = [
            int(k) if inner[0] is int and isinstance(k, str) and k.isdecimal() else k for k in value
        ]  # JSON has no others
        pairs = zip(keys, value.values(), strict=True)
        return {_convert(inner[0], k, where): _convert(inner[1], v, where) for k, v in pairs}
    elif hint is type(None):
        if value is None:
            return None
    elif hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise ConfigError(f"{where} must be {_spell(hint)}, not {value!r}")


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return getattr(hint, "__name__", None) if isinstance(hint, type) and not typing.get_args(hint) else str(hint)  # type: ignore[return-value]
