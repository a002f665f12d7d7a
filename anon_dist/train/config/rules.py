"""Relations between the fields of a configuration that no single type can say. Each function raises `ConfigError`."""

from __future__ import annotations

from anon_dist.train.config.errors import ConfigError
from anon_dist.train.config.fields import Config, ModelConfig, TrainConfig

OF_FAMILIES: dict[str, tuple[str, ...]] = {
    "dropout": ("gpt2",),
    "kv_heads": ("llama", "qwen3", "gemma3", "olmo2", "mixtral"),
    "rope_theta": ("llama", "qwen3", "gemma3", "olmo2", "mixtral"),
    "head_dim": ("llama", "qwen3", "gemma3", "mixtral"),
    "experts": ("mixtral",),
    "experts_per_token": ("mixtral",),
    "window": ("gemma3",),
}
"""Fields of a model that only some families have."""


def model_rules(config: Config) -> None:
    """Of the model with itself and with the data."""
    m, d = config.model, config.data
    if m.attention == "flash_attention_2" and config.train.precision == "fp32":
        raise ConfigError(
            "model.attention = flash_attention_2 computes in half precision only; set train.precision to bf16, or attention to sdpa"
        )
    if m.config is not None and m.from_pretrained is not None:
        raise ConfigError("model.config and model.from_pretrained both say what the model is; leave one out")
    if m.from_pretrained is not None or m.config is not None:
        return
    if m.width % m.heads and m.head_dim is None:
        raise ConfigError(f"model.width = {m.width} is not a multiple of model.heads = {m.heads}")
    _family_rules(m)
    if d.seq_len > m.context:
        raise ConfigError(
            f"data.seq_len = {d.seq_len} is longer than model.context = {m.context}; raise the context or shorten the samples"
        )


def _family_rules(m: ModelConfig) -> None:
    for name, families in OF_FAMILIES.items():
        if getattr(m, name) != getattr(ModelConfig, name) and m.family not in families:
            raise ConfigError(
                f"model.{name} = {getattr(m, name)} is for {', '.join(families)}, and model.family is {m.family}; leave it out, or change "
                "the family"
            )
    if m.family == "gpt2":
        return
    if m.heads % (m.kv_heads or 1):
        raise ConfigError(f"model.heads = {m.heads} is not a multiple of model.kv_heads = {m.kv_heads}")
    if (m.head_dim or m.width // m.heads) % 2:
        size = f"model.head_dim = {m.head_dim}" if m.head_dim else f"model.width / model.heads = {m.width} / {m.heads}"
        raise ConfigError(f"{size} is odd, and rotary position embeddings turn pairs; change it")
    if m.family == "gemma3" and m.width % m.heads:
        raise ConfigError(
            f"model.width = {m.width} is not a multiple of model.heads = {m.heads}, as transformers wants it of gemma3"
        )
    for key, number in (("width", m.width), ("hidden", m.hidden or 8)) if m.family == "mixtral" else ():
        if number % 8:
            raise ConfigError(f"model.{key} = {number} is not a multiple of 8, as products grouped by experts want")
    if (m.experts_per_token or 2) > (m.experts or 8):
        raise ConfigError(
            f"model.experts_per_token = {m.experts_per_token or 2} is more than model.experts = {m.experts or 8}"
        )


def optim_rules(config: Config) -> None:
    """Of the optimizer with itself and with the training."""
    o, anon = config.optim, config.optim.name == "anon"
    if config.train.precision == "bf16-true" and not anon:
        raise ConfigError(
            f"train.precision bf16-true needs optim.name anon: {o.name} rounds parameters to nearest, which loses small updates"
        )
    if config.train.offload == "overlap" and not anon:
        raise ConfigError(f"train.offload is overlap, which {o.name} has not; set it to serial")
    if len(set(o.gamma_schedule.values())) > 1 and o.match is None and anon:
        raise ConfigError(
            "optim.gamma_schedule changes γ, and with it the unit of the learning rate: set optim.match to a checkpoint of Anon or AdamW "
            "on this model, or to a sweep's calibration/spectrum.json (anon-dist sweep: --match-rms), so that it follows"
        )
    if o.lr * o.weight_decay >= 1.0:
        raise ConfigError(
            f"optim.lr · optim.weight_decay = {o.lr:g} · {o.weight_decay:g} ≥ 1 would decay the weights past 0 in a step; lower one of them"
        )


def train_rules(config: Config) -> None:
    """Of the training with itself, the schedule and the log."""
    t, s, trackers = config.train, config.schedule, config.log.trackers
    if s.warmup_steps >= t.steps:
        raise ConfigError(
            f"schedule.warmup_steps = {s.warmup_steps} leaves nothing of train.steps = {t.steps}; set it to "
            f"{t.steps // 10}, say"
        )
    if t.activation_checkpointing == "budget" and t.compile == "none":
        raise ConfigError(
            "train.activation_checkpointing is budget, which torch.compile keeps; set train.compile to blocks or whole, or take "
            "selective"
        )
    if t.activation_budget != TrainConfig.activation_budget and t.activation_checkpointing != "budget":
        raise ConfigError(
            f"train.activation_budget = {t.activation_budget} does nothing where train.activation_checkpointing is "
            f"{t.activation_checkpointing}; set that to budget, or leave it out"
        )
    if (
        t.precision == "fp8"
        and config.model.family == "gpt2"
        and config.model.config is None
        and config.model.from_pretrained is None
    ):
        raise ConfigError(
            "train.precision fp8 has no effect on gpt2, whose matrices are of another class than torchao turns; use bf16"
        )
    if t.on_spike == "rewind" and config.checkpoint.every == 0:
        raise ConfigError(
            "train.on_spike is rewind, and with checkpoint.every = 0 there is nothing to go back to; set that, or take skip"
        )
    if t.first_timeout_minutes is not None and t.first_timeout_minutes < t.timeout_minutes:
        raise ConfigError(
            f"train.first_timeout_minutes = {t.first_timeout_minutes:g} is for what takes longer than a step, and train.timeout_minutes is "
            f"{t.timeout_minutes:g}; make it no less, or leave it out"
        )
    profiled = config.log.profile_steps
    if profiled is not None and not profiled[0] <= profiled[1] <= t.steps:
        raise ConfigError(
            f"log.profile_steps = {profiled[0]} {profiled[1]} must be a first and a last step, up to train.steps = {t.steps}"
        )
    if "://" in config.resume:
        raise ConfigError(
            f"resume = {config.resume} is an address: set checkpoint.remote to its folder, and resume to auto, which takes the newest; or "
            "copy it here"
        )
    if config.checkpoint.remote is not None and "://" not in config.checkpoint.remote:
        raise ConfigError(
            f"checkpoint.remote = {config.checkpoint.remote} is no address such as s3://bucket/run, gs://bucket/run or file:///folder"
        )
    if len(set(trackers)) < len(trackers):
        raise ConfigError(f"log.trackers names one twice: {', '.join(trackers)}")


def phase_rules(config: Config) -> None:
    """Of the phases of the data with each other and with the rest."""
    d, t, phases = config.data, config.train, config.data.phases
    before = 0
    for i, phase in enumerate(phases):
        last = i + 1 == len(phases)
        place = f"data.phases.{i}"
        if phase.until is None and not last:
            raise ConfigError(f"{place}.until is missing: only the last phase may leave it out")
        if phase.until is not None and phase.until <= before:
            raise ConfigError(f"{place}.until = {phase.until} must be more than that of the phase before, {before}")
        if last and phase.until is not None and phase.until < t.steps:
            raise ConfigError(
                f"{place}.until = {phase.until}, of the last phase, is before train.steps = {t.steps}; leave it out, or add a phase"
            )
        before = phase.until or before
        if not (phase.sources or d.sources) and any(p.sources for p in phases):
            raise ConfigError(
                f"{place}.sources is missing: other phases have them; name them in each, or in data.sources"
            )
        length = phase.seq_len or d.seq_len
        if config.model.config is None and config.model.from_pretrained is None and length > config.model.context:
            raise ConfigError(
                f"{place}.seq_len = {length} is longer than model.context = {config.model.context}; raise the context"
            )
        if phase.global_batch is None and t.global_batch * d.seq_len % length:
            raise ConfigError(
                f"{place}.seq_len = {length} does not divide the {t.global_batch * d.seq_len:,} tokens of a step; give it a global_batch"
            )
    folders: dict[str, str] = {}
    for sources in (d.sources, *(phase.sources for phase in phases)):
        for name, source in sources.items():
            if folders.setdefault(name, source.path) != source.path:
                raise ConfigError(
                    f"data.phases: the source {name} is {folders[name]} in one and {source.path} in another; give one of them another name"
                )
