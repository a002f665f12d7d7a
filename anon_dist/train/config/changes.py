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


def _beside(source: Path) -> Mapping[str, Any] | None:
    """The configuration in the folder of the checkpoint's run."""
    try:
        found = yaml.safe_load((source.parent.parent / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, Mapping) else None
