"""Which settings of a run must be the same on every rank; `engines.comparison` compares them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from anon_dist.data import DataError, Index
from anon_dist.train.config.families import read_config
from anon_dist.train.config.parsing import Config, ConfigError, SourceConfig
from anon_dist.train.config.sources import all_sources

BY_CONTENT = ("data.path", "train.deepspeed_config", "model.config", "model.from_pretrained", "optim.match")
"""Paths that may differ from node to node. Of the data the fingerprint is compared, of DeepSpeed's configuration what is in it (by
`start`), of `model.config` too, of a pretrained model its configuration and weights; what `optim.match` names is read by rank 0 alone."""


def shared_settings(config: Config) -> dict[str, Any]:
    """Every field of the configuration but those paths, and the fingerprint of the data. A fault of the data is said later."""
    found = dict(_fields(asdict(config), ""))
    for name in BY_CONTENT:
        path = found.pop(name)
        if name in ("model.from_pretrained", "optim.match"):
            found[name] = None if path is None else "a path"
        if name == "model.config" and path is not None:
            found["what model.config says"] = _content(path)
    for key, sources in _mixtures(config):
        found[key] = {name: {**vars(source), "path": ""} for name, source in sources.items()}
    found["data.phases"] = [{**vars(phase), "sources": ""} for phase in config.data.phases]
    found["eval.sets"] = sorted(config.eval.sets)
    paths = {name: source.path for name, source in all_sources(config).items()} | config.eval.sets
    return found | {
        f"the fingerprint of the data{name and f' of {name}'}": _fingerprint(p) for name, p in paths.items()
    }


def _mixtures(config: Config) -> Iterator[tuple[str, Mapping[str, SourceConfig]]]:
    yield "data.sources", config.data.sources
    yield from ((f"data.phases.{i}.sources", phase.sources) for i, phase in enumerate(config.data.phases))


def _fingerprint(path: str) -> str:
    """Of the data in a folder."""
    try:
        return Index.load(path).fingerprint
    except DataError:
        return "none, as there is no data that can be read"


def _content(path: str) -> Any:
    """Of a config.json; a fault of it is said later."""
    try:
        return read_config(Path(path))
    except ConfigError:
        return "none that can be read"


def pretrained_settings(built: PretrainedConfig) -> dict[str, Any]:
    """A pretrained model's configuration, but for where it came from."""
    found = {k: v for k, v in built.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return {f"the pretrained model's {name}": value for name, value in found.items()}


def _fields(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    sections = ("model", "data", "optim", "schedule", "train", "eval", "checkpoint", "log")
    for name, value in values.items():
        if not prefix and name in sections:
            yield from _fields(value, f"{name}.")
        else:
            yield f"{prefix}{name}", value
