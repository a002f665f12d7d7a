"""What a resumed run does differently from the one that wrote its checkpoint, said at its start."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from anon_dist.train.config.fields import BY_NAME
from anon_dist.train.config.parsing import Config, ConfigError, flat

PLACES = ("run_dir", "resume", "data.cache_dir", "data.cache_bytes")
"""Fields that say where something lies, not what a run does."""


def versions() -> dict[str, str]:
    """Of what computes."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def recorded(config: Config) -> dict[str, Any]:
    """The configuration as plain JSON values, for a checkpoint to keep."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return content


def changes(config: Config, engine: str, source: Path, progress: Mapping[str, Any]) -> list[str]:
    """A line for each field of the configuration, and each circumstance, that is not as it was when the checkpoint was written.

    Args:
        engine: the present one's name.
        source: the checkpoint's folder.
        progress: what the checkpoint says of its run. An older one does not say its configuration: then its run's folder does.
    """
    before = progress.get("config") or _beside(source)
    now: dict[str, Any] = {"engine": engine, "threads": torch.get_num_threads(), **flat({"versions": versions()})}
    then = {**now, **{k: v for k, v in flat(progress).items() if k in now}}
    lines = []
    if before is None:
        lines.append(
            f"{source} does not say with which configuration it was written, so what this run changes is not known"
        )
    else:
        now |= flat(recorded(config))
        then |= {**flat(recorded(Config())), **flat(before)}
    once = {"train.engine"} if then["engine"] != engine else set()  # what was asked for is told by what came of it
    for name, value in now.items():
        if then[name] != value and name not in PLACES and name not in once:
            lines.append(f"resuming with {name} = {value!r}; {source.name} had {then[name]!r}")
    return lines


MADE_IT = (
    "model.",
    "optim.",
    "schedule.",
    "data.seed",
    "data.seq_len",
    "data.packing",
    "data.mask_documents",
    "train.seed",
    "train.global_batch",
)
"""Fields that say what a model comes out; of those that a prepared folder's contents do not tell."""


def other_than_made(config: Config, made: Mapping[str, Any]) -> str | None:
    """What a configuration asks for that a finished run was not made with, in words.

    Args:
        made: the finished run's configuration, as its results have it.
    """
    then = {**flat(recorded(Config())), **flat(made)}
    now = flat(recorded(config))
    found = [
        f"{k} = {v!r} (here {then.get(k)!r})" for k, v in now.items() if k.startswith(MADE_IT) and then.get(k) != v
    ]
    return ", ".join(found) or None


SHAPE = {
    "family": ("model_type",),
    "layers": ("n_layer", "num_hidden_layers"),
    "width": ("n_embd", "hidden_size"),
    "heads": ("n_head", "num_attention_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "hidden": ("n_inner", "intermediate_size"),
    "experts": ("num_local_experts",),
    "tie_embeddings": ("tie_word_embeddings",),
    "pad_vocab_to": ("vocab_size",),
}
"""Fields of `model` without which weights mean nothing, or something else, and their keys in transformers' configurations."""


def check_shape(config: Config, shape: Mapping[str, Any], source: Path, progress: Mapping[str, Any]) -> None:
    """That a checkpoint is of this model: the engine would take tensors of other sizes for damage, and other heads for the same.

    Args:
        shape: the model's configuration, as transformers writes it; a checkpoint's progress has one too.

    Raises:
        ConfigError: it is of another; with each field, both values and the remedy.
    """
    then = progress.get("model")
    if not isinstance(then, Mapping):
        return
    keys = ((field, key) for field, names in SHAPE.items() for key in names if key in shape and key in then)
    found = {field: (key, shape[key], then[key]) for field, key in keys if shape[key] != then[key]}
    sizes = [field for field in found if getattr(config.model, field) is not None]  # others come of these
    given = next((name for name in ("from_pretrained", "config") if getattr(config.model, name) is not None), None)
    told, kept = [], []
    for field, (key, now, before) in found.items():
        if given is not None:
            told.append(f"{key} = {now!r} by model.{given} = {getattr(config.model, given)}, not {before!r}")
            kept.append(f"what has {key} = {before!r}")
        elif field == "pad_vocab_to":
            told.append(
                f"a vocabulary of {now} by model.pad_vocab_to = {config.model.pad_vocab_to} and the data's tokenizer, not {before}"
            )
            kept.append("model.pad_vocab_to and the tokenizer")
        elif field in sizes or not sizes:
            told.append(f"model.{field} = {now!r}, not {before!r}")
            kept.append(f"model.{field} = {before!r}")
    if told:
        other = "run_dir and checkpoint.remote" if config.checkpoint.remote else "run_dir"
        raise ConfigError(
            f"{source} is of another model: this one has {'; '.join(told)}. Keep {' and '.join(kept)}, or choose another {other} to begin "
            "anew"
        )


def check_positions(config: Config, source: Path, progress: Mapping[str, Any]) -> None:
    """That GPT-2's positions, which are learned, are as many as in a checkpoint; other families' are computed.

    Raises:
        ConfigError: they are not.
    """
    now, then = config.model, ((progress.get("config") or _beside(source) or {}).get("model") or {})
    given = (now.config, now.from_pretrained, then.get("config"), then.get("from_pretrained"))
    old = then.get("context", now.context)
    if any(given) or {now.family, then.get("family")} != {"gpt2"} or old == now.context:
        return
    raise ConfigError(
        f"model.context = {now.context}, and {source} was trained with {old}: gpt2 learns a vector for each position, so it has none for "
        f"others. Keep model.context = {old}, and data.seq_len no longer than that; a longer context wants a new run, of a family whose "
        "positions are computed (llama, say)"
    )


def why_refused(config: Config, source: Path, progress: Mapping[str, Any]) -> str | None:
    """What may have an engine refuse a checkpoint's param groups, in the configuration's words, with the remedy: patterns of names,
    `optim.basis`, `embedding_beta1` and `embedding_beta3` part groups, which cannot be joined again. The latter two part them as far as any
    basis does."""
    before = (progress.get("config") or _beside(source) or {}).get("optim") or {}
    if gone := {f: left for f in BY_NAME if (left := _left_out(before, vars(config.optim), f))}:
        said = "; ".join(f"optim.{field} of {', '.join(map(repr, patterns))}" for field, patterns in gone.items())
        return (
            f"{source} was trained with {said}: that parts the param groups, which cannot be joined again. Keep these patterns, with the "
            f"values that the other parameters have: 1 in lr_by_name, {config.optim.weight_decay:g} (vectors: 0) in weight_decay_by_name, "
            f"{config.optim.gamma:g} in gamma_by_name"
        )
    then, now = _parting(before), _parting(vars(config.optim))
    if not then or then == now or any(key != "basis" for key in now):
        return None
    said = ", ".join(f"optim.{key} = {value}" for key, value in then.items())
    return (
        f"{source} was trained with {said}: that parts the param groups. "
        f"Set optim.embedding_beta1 = {config.optim.betas[0]}, the β1 of all others: it keeps them apart"
    )


def _left_out(before: Mapping[str, Any], now: Mapping[str, Any], field: str) -> list[str]:
    """Patterns of a field that part the param groups of a checkpoint, and stand in the configuration no more."""
    then = before.get(field) if field != "gamma_by_name" or before.get("name") == "anon" else None
    return [pattern for pattern in then or {} if pattern not in now[field]]


def _parting(optim: Mapping[str, Any]) -> dict[str, Any]:
    """What of an optimizer's configuration parts param groups. AdamW has no basis and no β3, whatever stands there."""
    keys = ("basis", "embedding_beta1", "embedding_beta3") if optim.get("name") == "anon" else ("embedding_beta1",)
    return {key: optim[key] for key in keys if optim.get(key) is not None}


def _beside(source: Path) -> Mapping[str, Any] | None:
    """The configuration in the folder of the checkpoint's run."""
    try:
        found = yaml.safe_load((source.parent.parent / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, Mapping) else None
