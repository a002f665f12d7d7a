"""The model card of an exported model: the data it saw, how it was trained, what came out. A README.md as the hub reads it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from anon_dist import __version__
from anon_dist.data import DataError, Index
from anon_dist.train.config.fields import OptimConfig

Rows = list[tuple[str, Any]]

HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- anon-dist
- {family}
---

# {name}

A {family} language model, pretrained from {start} with [anon_dist]({home}) {version}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)
print(tokenizer.decode(ids[0]))
```

It continues text; it follows no instructions, and what it says is not checked.
"""
HOME = "https://arxiv.org/abs/2605.02317"
_NOT_SAID = "This is not recorded in the checkpoint."


def model_card(name: str, model: Mapping[str, Any], progress: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Markdown with the hub's header.

    Args:
        name: of the model, as it is loaded.
        model: its configuration, as JSON values.
        progress: what the training loop writes into a checkpoint (step, config, versions, …); empty for other trainings.
        results: a record of the last validation: keys such as final_loss and val_loss.
    """
    config: Mapping[str, Any] = progress.get("config") or {}
    pretrained = (config.get("model") or {}).get("from_pretrained")
    head = HEAD.format(
        family=model.get("model_type", "causal"),
        name=name,
        start=f"the weights of {without_folders(pretrained)}"
        if pretrained
        else "scratch"
        if config
        else "a checkpoint",
        home=HOME,
        version=__version__,
    )
    sections = {
        "Model": _model(model),
        "Data": _data(config),
        "Training": _training(config, progress),
        "Results": _results(results),
    }
    return head + "".join(f"\n## {title}\n\n{_table(rows)}\n" for title, rows in sections.items())


def without_folders(place: str) -> str:
    """What a path on this machine is called, which is nobody else's matter: its last part. Addresses and names of the hub stay.

    Args:
        place: a path or a name, perhaps behind its kind: `hf:gpt2`, `spm:/home/me/my.model`.
    """
    kind, path = re.fullmatch(r"([\w-]+:(?!//))?(.*)", place, re.DOTALL).groups("")  # type: ignore[union-attr]
    if (
        "://" in path
        or (kind and not path.startswith(("/", ".", "~")))
        or not (kind or os.path.exists(path) or path[:1] in "/.~")
    ):
        return place
    return kind + (os.path.basename(os.path.abspath(path)) or path)


def _table(rows: Rows) -> str:
    shown = [(what, value) for what, value in rows if value is not None]
    if not shown:
        return _NOT_SAID
    cells = (f"| {what} | {str(value).replace('|', chr(92) + '|')} |" for what, value in shown)
    return "\n".join(["| | |", "|---|---|", *cells])


def _model(model: Mapping[str, Any]) -> Rows:
    def first(*names: str) -> Any:
        return next((model[n] for n in names if model.get(n) is not None), None)

    return [
        ("architecture", first("model_type")),
        ("layers", first("num_hidden_layers", "n_layer")),
        ("width", first("hidden_size", "n_embd")),
        ("heads", first("num_attention_heads", "n_head")),
        ("vocabulary, padded", first("vocab_size")),
        ("context, tokens", first("max_position_embeddings", "n_positions")),
    ]


def _data(config: Mapping[str, Any]) -> Rows:
    """Of the prepared folders, as far as they are still there."""
    data = config.get("data") or {}
    in_phases = {name: source for phase in data.get("phases") or () for name, source in phase["sources"].items()}
    sources: Mapping[str, Any] = {**(data.get("sources") or {}), **in_phases}
    sources = sources or ({"": {"path": data["path"]}} if "path" in data else {})
    rows: Rows = []
    for name, source in sources.items():
        rows += [(f"{name}: {what}" if name else what, value) for what, value in _source(source, data)]
    return rows


def _source(source: Mapping[str, Any], data: Mapping[str, Any]) -> Rows:
    weight = ("weight", source.get("weight"))
    try:
        index = Index.load(source["path"])
    except DataError:
        words = " ".join(map(without_folders, (data.get("prepare") or "").split()))
        prepared = f"anon-dist data prepare {words}" if words and not weight[1] else None
        return [weight, ("prepared by", prepared)]
    train = index.splits["train"]
    return [
        weight,
        ("source", without_folders(index.settings.get("source") or "") or None),
        ("tokenizer", without_folders(index.tokenizer)),
        ("training split", f"{train.tokens:,} tokens of {train.text_bytes:,} bytes, {train.documents:,} documents"),
        ("fingerprint", index.fingerprint),
    ]


def _training(config: Mapping[str, Any], progress: Mapping[str, Any]) -> Rows:
    if not config:
        return [("steps", progress.get("step"))]
    o, s, t = config["optim"], config["schedule"], config["train"]
    per_step, steps = t["global_batch"] * config["data"]["seq_len"], progress.get("step")
    chosen = [f"{name} {o[name]}" for name in _settings(o)]
    versions, phases = progress.get("versions") or {}, config["data"].get("phases")
    return [
        ("optimizer", f"{o['name']}: {', '.join(chosen)}"),
        (
            "schedule",
            f"{s['decay']} to {s['min_ratio']:g} of the peak after {s['warmup_steps']} steps of warm-up, {t['steps']} steps planned",
        ),
        ("steps", steps),
        ("tokens", None if steps is None or phases else f"{steps * per_step:,} ({per_step:,} a step)"),
        ("batch", f"{t['global_batch']} sequences of {config['data']['seq_len']} tokens"),
        ("phases", "; ".join(map(_phase, phases or ())) or None),
        ("gradient clipping", t.get("grad_clip")),
        ("precision", t.get("precision")),
        ("ranks", f"{progress.get('world_size')}, {progress.get('engine')}" if progress.get("world_size") else None),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items()) or None),
    ]


def _phase(phase: Mapping[str, Any]) -> str:
    sources = [f"{name} {source['weight']:g}" for name, source in (phase.get("sources") or {}).items()]
    said = [f"{key} {value}" for key, value in phase.items() if value and key != "sources"]
    return ", ".join([*said, *([f"sources {', '.join(sources)}"] if sources else [])])


def _settings(optim: Mapping[str, Any]) -> list[str]:
    """Names of what is to be said of an optimizer: what every one has, and of Anon's what says its steps or was chosen."""
    common, anon = ("lr", "betas", "eps", "weight_decay"), ("gamma", "refresh_ratio", "beta3", "update_clip", "window")
    defaults = asdict(OptimConfig())
    other = [name for name in defaults if optim.get(name) != defaults[name] and name not in ("name", "match", *common)]
    shared = ("lr_by_name", "weight_decay_by_name", "embedding_beta1")  # the others are Anon's alone
    names = (*common, *(anon if optim["name"] == "anon" else ()))
    names += tuple(n for n in other if n not in names and (optim["name"] == "anon" or n in shared))
    return [n for n in names if optim.get(n) not in (None, {}, [])]


def _results(results: Mapping[str, Any]) -> Rows:
    prefix = "final" if "final_loss" in results else "val"
    whole = "the whole validation split" if prefix == "final" else "a part of the validation split"
    rows: Rows = [
        (f"{what}, on {whole}", f"{results[f'{prefix}_{key}']:.4f}")
        for what, key in (
            ("loss, nats per token", "loss"),
            ("perplexity", "perplexity"),
            ("bits per byte", "bits_per_byte"),
        )
        if f"{prefix}_{key}" in results
    ]
    return [("after step", results["step"]), *rows] if rows else []
