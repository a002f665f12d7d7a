"""The prepared folders that a configuration names, and that they are there: known before torch is imported."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import replace

from anon_dist.data.stored.index import INDEX_FILE, Index
from anon_dist.named import named_instead
from anon_dist.stores import is_address, store_problem
from anon_dist.train.config.errors import ConfigError
from anon_dist.train.config.fields import Config, DataConfig, SourceConfig
from anon_dist.train.config.phases import phases_from


def sources_of(data: DataConfig) -> dict[str, SourceConfig]:
    """Name → folder and weight of each source; data.path is one, of the name ""."""
    return dict(data.sources) or {"": SourceConfig(data.path)}


def all_sources(config: Config) -> dict[str, SourceConfig]:
    """Name → folder of every source of every phase; its weight is its share of all tokens that the run plans to read."""
    found: dict[str, SourceConfig] = {}
    for steps, phase in phases_from(config, 0):
        sources = sources_of(phase.data)
        tokens = steps * phase.train.global_batch * phase.data.seq_len / sum(s.weight for s in sources.values())
        for name, source in sources.items():
            weight = source.weight * tokens + (found[name].weight if name in found else 0.0)
            found[name] = replace(source, weight=weight)
    total = sum(source.weight for source in found.values())
    return {name: replace(source, weight=source.weight / total) for name, source in found.items()}


def called(name: str) -> str:
    """A source's name in messages."""
    return f"data.sources.{name}" if name else "data.path"


def check_present(config: Config) -> None:
    """That each folder on this machine is prepared: its shards are looked at later. What lies at an address is not asked for.

    Raises:
        ConfigError: a source is not there, or not finished; with the command that makes it. Or fsspec cannot open an address here.
        ShardError: its index, or that of a set to validate on, is missing or malformed.
    """
    for name, source in all_sources(config).items():
        _check_begun(name, source, config.data.prepare)
        _check_index(called(name), source.path)
    for name, path in config.eval.sets.items():
        _check_index(f"eval.sets.{name}", path)


def _check_index(name: str, path: str) -> None:
    if not is_address(path):
        Index.load(path)
    elif problem := store_problem(path):
        raise ConfigError(f"{name}: {problem}")


def _check_begun(name: str, source: SourceConfig, prepare: str | None) -> None:
    if is_address(source.path) or os.path.isfile(os.path.join(source.path, INDEX_FILE)) or (name == "" and not prepare):
        return
    if os.path.isfile(source.path):
        raise ConfigError(f"{called(name)} = {source.path} is a file; {named_instead(source.path)}")
    options = prepare if name == "" and prepare else "--source … --tokenizer …"
    if os.path.isdir(source.path) and not _is_begun(source.path):
        text, out = (shlex.quote(str(path)) for path in (source.path, f"{os.path.normpath(source.path)}-prepared"))
        tokenizer = re.search(r"--tokenizer \S+", options)
        raise ConfigError(
            f"{called(name)} = {source.path} is a folder, and not one of prepared data. If it holds text: anon-dist data prepare --source "
            f"{text} {tokenizer.group() if tokenizer else '--tokenizer …'} --out {out}, and name {out} here"
        )
    raise ConfigError(
        f"{called(name)} = {source.path} is not there, or not finished. This makes it, or goes on with it (your own text: its folder as "
        f"--source): anon-dist data prepare {options} --out {shlex.quote(source.path)}"
    )


def _is_begun(folder: str) -> bool:
    """Whether a preparation has written there, a part of one too, or nobody has anything."""
    names = {name for name in os.listdir(folder) if not name.startswith(".")}
    return not names or bool(names & {"progress.json", "part.json", "tokenizer"})
