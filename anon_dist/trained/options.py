"""The options of the commands that work on what a training left behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

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
