"""The options of the commands that work on what a training left behind."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from anon_dist.checkpoint.keeping.names import newest_of, run_problem
from anon_dist.data.config import TextUnit
from anon_dist.named import need, need_checkpoint, need_file, need_folder, need_no, need_room
from anon_dist.train.tasks.known import tasks_problem
from anon_dist.usage import UsageError

_WHOSE = "a run, a checkpoint or an exported model"
_DEVICE = re.compile(r"(cpu|cuda|xpu|mps|hpu|npu|mtia|xla)(:\d+)?")
_Source = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]


@dataclass
class Generate:
    """Have a model continue a text, and print it as it is written.

    RUN_OR_CHECKPOINT is the folder of a run (its newest checkpoint, or the model that it exported at its end), a training checkpoint of any
    format that `anon-dist ckpt inspect` knows, or a Hugging Face folder.
    """

    source: _Source
    """Whose model."""
    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")]
    """The text to continue; "" begins a new one, - reads it from the standard input."""
    max_new_tokens: int = 200
    """Most tokens to write; it ends before at the model's end of text, and at the end of its context."""
    temperature: float = 0.8
    """Below 1: likelier tokens. 0: always the likeliest."""
    top_k: int = 40
    """Choose among so many likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    seed: int | None = None
    """For the same text again. None: another each time."""
    device: str | None = None
    """cpu, cuda, cuda:1, … None: CUDA if there is one."""
    tokenizer: str | None = None
    """Folder (or hub name) of the tokenizer, where neither the model nor its run has it."""
    model_config: Path | None = None
    """Hugging Face's config.json of the model, where the checkpoint does not have it."""
    unsafe: bool = False
    """Build whatever classes the checkpoint's pickles ask for. This may run any code that the file's author wants."""

    def check(self) -> None:
        """Raises `UsageError`: an option is out of its range, or what is named is not there."""
        rules = (
            ("max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "a number ≥ 0"),
            ("top-k", self.top_k, self.top_k >= 0, "at least 0"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "a number > 0 and ≤ 1"),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < 1 << 63, "a whole number from 0 to 2^63 - 1"),
        )
        for name, value, right, allowed in rules:
            if not right:
                raise UsageError(f"--{name} must be {allowed}, not {value}")
        _check_device(self.device)
        need_file(self.model_config, "a config.json", "--model-config")
        _need_trained(self.source)


@dataclass
class Eval:
    """Say how good a model is: on lm-eval's tasks, and in bits per byte of any text.

    RUN_OR_CHECKPOINT is as for `anon-dist generate`. The results are printed; of a run they also go into its metrics.jsonl and, with all
    that lm-eval says, into a file in its folder `evaluations`.
    """

    source: _Source
    """Whose model."""
    tasks: tuple[str, ...] = ()
    """Tasks, groups or tags of lm-eval by name, or YAML files of your own (pip install lm-eval)."""
    include_path: str | None = None
    """Folder of task files of your own, whose names --tasks may then name."""
    num_fewshot: int | None = None
    """Worked examples before each question. None: as the task says."""
    limit: int | None = None
    """Documents of each task. None: all."""
    text: tuple[str, ...] = ()
    """Files or folders of text, JSON Lines or parquet, as for `anon-dist data prepare`: bits per byte of each."""
    text_unit: TextUnit = "file"
    """What of a plain-text file is one document."""
    text_field: str = "text"
    """Field of JSON Lines and parquet that holds the text."""
    window: int | None = None
    """Tokens that the model reads at once of a text. None: its context."""
    stride: int | None = None
    """Tokens from the beginning of a window of a text to that of the next. Less than the window: they overlap, and each token is predicted
    from more. None: the window, so that each begins anew."""
    batch_size: int = 8
    """Sequences at once."""
    out: Path | None = None
    """File for the results, as JSON. None: one in the run's folder, if it is a run's model."""
    device: str | None = None
    """cpu, cuda, cuda:1, … None: CUDA if there is one."""
    tokenizer: str | None = None
    """Folder (or hub name) of the tokenizer, where neither the model nor its run has it."""
    model_config: Path | None = None
    """Hugging Face's config.json of the model, where the checkpoint does not have it."""
    unsafe: bool = False
    """Build whatever classes the checkpoint's pickles ask for. This may run any code that the file's author wants."""

    def check(self) -> None:
        """Raises `UsageError`: an option is out of its range, or what is named is not there."""
        if not self.tasks and not self.text:
            raise UsageError("nothing to evaluate on: name --tasks of lm-eval, or a --text")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                "anon-dist eval is one process; under a launcher, eval.tasks evaluates during the training"
            )
        for name in ("limit", "num_fewshot", "batch_size", "window", "stride"):
            value, least = getattr(self, name), 0 if name == "num_fewshot" else 1
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        for text in self.text:
            need(Path(text), "a file or folder of text", "--text")
        if self.include_path is not None:
            need(Path(self.include_path), "a folder of task files", "--include-path")
        _check_device(self.device)
        need_file(self.model_config, "a config.json", "--model-config")
        _need_trained(self.source)
        if self.tasks and (problem := tasks_problem(self.tasks, self.include_path)):
            raise UsageError(f"--tasks: {problem}")


@dataclass
class Export:
    """Make a Hugging Face folder of a checkpoint: weights, configuration, tokenizer, how to generate, and a model card.

    RUN_OR_CHECKPOINT is the folder of a run (of which the newest checkpoint is taken), a training checkpoint of any format that
    `anon-dist ckpt inspect` knows, or a Hugging Face folder that lacks some of that. DST loads with AutoModelForCausalLM and AutoTokenizer.
    """

    source: _Source
    """What to export; only read."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Folder to write; complete or absent."""
    push: str | None = None
    """Upload it to this repository of the Hugging Face hub (USER/NAME), with the token of `hf auth login` or HF_TOKEN."""
    private: bool = False
    """Make that repository a private one, if it is new."""
    overwrite: bool = False
    """Replace DST if it exists, once the new one is complete."""
    tokenizer: str | None = None
    """Folder (or hub name) of the tokenizer, where neither the model nor its run has it."""
    model_config: Path | None = None
    """Hugging Face's config.json of the model, where the checkpoint does not have it."""
    workers: int = 2
    """Threads that copy weights."""
    unsafe: bool = False
    """Build whatever classes the checkpoint's pickles ask for. This may run any code that the file's author wants."""

    def check(self) -> None:
        """Raises `UsageError`: what is named is not there, or is there already."""
        need_file(self.model_config, "a config.json", "--model-config")
        _need_trained(self.source)
        need_no(self.target, self.overwrite)


@dataclass
class Runs:
    """List the runs below a folder and compare them: a table, the loss curves as one PNG, and a page that holds all in one file."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder below which runs lie."""
    sort: Literal["loss", "time", "name"] = "time"
    """Order of the table: by the last validation loss, by when they were last written to, or by name."""
    out: Path | None = None
    """Where runs.png and runs.html go. None: into DIR."""
    pictures: bool = True
    """Write them; else the table only."""

    def check(self) -> None:
        """Raises `UsageError`: there is no such folder, or no run in it."""
        need_folder(self.folder, "one with runs in it, or below it")
        if self.out is not None and self.pictures:
            need_room(self.out, "--out")
        if not any({"config.yaml", "metrics.jsonl"} <= set(files) for _, _, files in os.walk(self.folder)):
            raise UsageError(f"there is no run in or below {self.folder}: no folder with config.yaml and metrics.jsonl")


def _need_trained(source: Path) -> None:
    """Raises `UsageError` if it cannot be a run with a model to it, a checkpoint or a model."""
    need_checkpoint(source, _WHOSE)
    has_model = any((folder / "config.json").is_file() for folder in (source, source / "model"))
    if not has_model and newest_of(source) is None and (problem := run_problem(source)):
        raise UsageError(problem)


def _check_device(name: str | None) -> None:
    if name is not None and _DEVICE.fullmatch(name) is None:
        raise UsageError(f"--device {name}: it must be cpu, cuda, or one of several as in cuda:1")
