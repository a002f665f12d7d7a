"""What RUN_OR_CHECKPOINT names: a model that transformers loads, or a training checkpoint, and what is known of its training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anon_dist.checkpoint import CheckpointError
from anon_dist.checkpoint.formats import detect
from anon_dist.checkpoint.keeping.folder import read_progress
from anon_dist.checkpoint.keeping.names import PROGRESS, newest_of, run_problem, step_of
from anon_dist.checkpoint.layouts.hf import weight_files
from anon_dist.checkpoint.options import ReadOptions
from anon_dist.checkpoint.torchfiles.torchfile import is_torch_file
from anon_dist.data import DataError, Index, Tokenizer
from anon_dist.data.samples.stream import fingerprints_of
from anon_dist.named import config_problem
from anon_dist.train.reports.metrics import read_metrics
from anon_dist.train.reports.report import RESULT


@dataclass(frozen=True)
class Trained:
    """What was found."""

    path: Path
    """A Hugging Face folder, or a checkpoint of any format."""
    is_model: bool
    """Whether it is a Hugging Face folder."""
    run: Path | None
    """The folder of the run that it is of, if it lies in one."""
    progress: Mapping[str, Any] = field(default_factory=dict)
    """What the training loop wrote into the checkpoint; of an exported model, into that of the run's last step."""

    @property
    def step(self) -> int | None:
        """After which step of its training it was; None if that is not known."""
        found = self.progress.get("step")
        if found is None and self.is_model and self.run is not None and self.path.resolve() == self.run / "model":
            found = _finished_at(self.run)
        return found if isinstance(found, int) and found >= 0 else None

    def results(self) -> dict[str, Any]:
        """The record of the validation after this step, or else of the last before it; {} if there is none."""
        if self.run is None or "step" not in self.progress:
            return {}
        records = [r for r in read_metrics(self.run / "metrics.jsonl") if r["step"] <= self.progress["step"]]
        validated = [r for r in records if "final_loss" in r or "val_loss" in r]
        return dict(validated[-1]) if validated else {}


def find(path: Path, options: ReadOptions | None = None) -> Trained:
    """What a path names; of a run, the newest.

    Raises:
        CheckpointError: nothing is there, or what is there is none of these, or the run has no checkpoint yet.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; name a run, a checkpoint or an exported model")
    if is_model(path):
        return _model(path)
    latest = newest_of(path)
    exported = path / "model"
    if is_model(exported) and (latest is None or step_of(latest) <= _finished_at(path)):
        return _model(exported)
    if latest is not None:
        return _checkpoint(latest)
    if problem := run_problem(path):
        raise CheckpointError(problem)
    try:
        found = detect(path, options)
    except CheckpointError as error:
        raise CheckpointError(_neither(path, error)) from None
    if found == "consolidated" and path.is_file() and not is_torch_file(path):
        raise CheckpointError(f"{path} is damaged, truncated, or no file of torch.save")
    return _checkpoint(path)


def _neither(path: Path, error: CheckpointError) -> str:
    """What a path is not."""
    if "no checkpoint of a known format" not in str(error):
        return str(error)
    return f"{path} is no run, no checkpoint of a known format (anon-dist ckpt inspect says what it looks for), and no model"


def is_model(path: Path) -> bool:
    """Whether transformers loads it: weights and a configuration, and no checkpoint of the training loop."""
    return (path / "config.json").is_file() and bool(weight_files(path)) and not (path / PROGRESS).exists()


def _model(path: Path) -> Trained:
    if problem := config_problem(path):
        raise CheckpointError(problem)
    run = _run_of(path.resolve().parent)
    latest = None if run is None else newest_of(run)
    known = latest is not None and run is not None and step_of(latest) == _finished_at(run)
    return Trained(path, True, run, read_progress(latest) if known and latest is not None else {})


def _checkpoint(path: Path) -> Trained:
    progress = read_progress(path) if path.is_dir() and (path / PROGRESS).is_file() else {}
    return Trained(path, False, _run_of(path.resolve().parent.parent), progress)


def _run_of(folder: Path) -> Path | None:
    return folder if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file() else None


def _finished_at(run: Path) -> int:
    """The step after which the run ended and exported its model; -1 if it did not."""
    try:
        return int(json.loads((run / RESULT).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def tokenizer_of(trained: Trained, named: str | None) -> Any:
    """The tokenizer: the one that is named; the model's own; that of the data, if it still is what the run read; the exported model's.

    Raises:
        CheckpointError: there is none, or none that loads; with what to do.
    """
    if named is not None:
        return _load(named, f"--tokenizer {named}")
    if trained.is_model:
        return _load(trained.path, str(trained.path))
    problem = "the checkpoint does not say which it was"
    if "tokenizer" in trained.progress:
        data = trained.progress["tokenizer"].removesuffix("/tokenizer")
        try:
            tokenizer, fingerprint = Tokenizer.of(data), Index.load(data).fingerprint
            if fingerprint in fingerprints_of(trained.progress.get("data") or {}):
                return tokenizer.hf
            problem = f"data.path = {data} is not the data that the run read any more"
        except (DataError, OSError) as error:
            problem = str(error)
    if trained.run is not None and is_model(trained.run / "model"):
        return _load(trained.run / "model", str(trained.run / "model"))
    raise CheckpointError(f"{trained.path}: no tokenizer ({problem}); name it with --tokenizer FOLDER")


def _load(name: str | Path, called: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # what transformers' parsers raise
        raise CheckpointError(
            f"{called}: no tokenizer that transformers loads ({type(error).__name__}: {' '.join(str(error).split())[:200]}); name one with "
            "--tokenizer FOLDER"
        ) from None
    if len(tokenizer.get_vocab()) <= len(
        tokenizer.all_special_tokens
    ):  # what transformers makes of a folder without one
        raise CheckpointError(f"{called} has no tokenizer; name one with --tokenizer FOLDER")
    return tokenizer
