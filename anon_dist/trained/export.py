"""A Hugging Face folder of any training checkpoint: its weights converted, and what transformers and a reader need beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

from anon_dist.checkpoint import CheckpointError
from anon_dist.checkpoint.convert import convert
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.options import ReadOptions
from anon_dist.files import publish
from anon_dist.train.model.card import model_card
from anon_dist.train.model.export import complete
from anon_dist.trained.find import find, tokenizer_of
from anon_dist.trained.model import check_tokens, model_config
from anon_dist.trained.options import Export


def export(options: Export) -> list[str]:
    """Write the folder; complete or absent. Memory stays at a few blocks for each worker.

    Returns:
        What had to be assumed.

    Raises:
        CheckpointError: the source cannot be read, something is missing that must be named, or the target exists.
    """
    target, read = options.target, ReadOptions(unsafe=options.unsafe)
    trained = find(options.source, read)
    _check_target(trained.path, target, options.overwrite)
    tokenizer = tokenizer_of(trained, options.tokenizer)
    checkpoint = open_checkpoint(trained.path, read)
    try:
        config = model_config(trained.path, checkpoint, options.model_config)
    finally:
        checkpoint.close()
    check_tokens(trained.path, config, tokenizer)
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        notes = convert(trained.path, temporary, "hf", None, read, options.workers, quiet=False)
        card = model_card(options.push or target.name, config.to_dict(), trained.progress, trained.results())
        complete(temporary, config, tokenizer, card)
        publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return notes


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    """As `convert` does, before any work."""
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists; choose another target, or replace it with --overwrite")
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise CheckpointError(f"{target} and the source {source} lie in each other; choose another target")
