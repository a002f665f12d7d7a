"""`eval.tasks`: lm-eval's tasks during a training, on all ranks, which touches nothing of it."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from anon_dist.agreement import together
from anon_dist.engines.base import Engine
from anon_dist.train.config.errors import HarnessError
from anon_dist.train.config.parsing import Config, ConfigError
from anon_dist.train.inputs import randomness
from anon_dist.train.inputs.corpora import first_folder
from anon_dist.train.reports.metrics import Record
from anon_dist.train.tasks.harness import Tasks, find_tasks, quiet, run_tasks, scores


def wanted_tasks(config: Config) -> Tasks | None:
    """What `eval.tasks` names, with its data, of which `datasets` keeps one copy for all ranks of a machine. Every rank must call it.

    Raises:
        ConfigError: lm-eval, a task or its data is missing, or the model would write text in one; on every rank.
    """
    if not config.eval.tasks:
        return None
    with randomness.kept(), together(ConfigError, ConfigError):
        try:
            found = find_tasks(config.eval.tasks, config.eval.tasks_path)
        except HarnessError as error:
            raise ConfigError(f"eval.tasks: {error}") from error
        if found.generating:
            raise ConfigError(
                f"eval.tasks: in {', '.join(found.generating)} the model writes text, which is not done while it trains; evaluate "
                "its checkpoints with anon-dist eval"
            )
    return found


def score_tasks(
    tasks: Tasks,
    engine: Engine,
    shape: PretrainedConfig,
    device: torch.device,
    config: Config,
    reader: int,
    readers: int,
) -> Record:
    """The scores of the engine's model as it is, the same on every rank. Every rank must call it.

    Args:
        shape: of the model.
        reader: which of the `readers` shares of the requests this rank scores.

    Raises:
        HarnessError: a task does not go with the model; on every rank.
    """
    from transformers import AutoTokenizer

    from anon_dist.train.tasks.scorer import Scorer

    model = engine.model
    training = model.training
    model.eval()
    try:
        with randomness.kept(), quiet(bars=False):
            tokenizer = AutoTokenizer.from_pretrained(first_folder(config) / "tokenizer")
            scorer = Scorer(
                lambda ids: model(input_ids=ids, use_cache=False).logits,
                shape,
                device,
                tokenizer,
                config.train.micro_batch,
                reader,
                readers,
            )
            limit, fewshot = config.eval.tasks_limit, config.eval.tasks_fewshot
            return scores(run_tasks(tasks, scorer, limit=limit, fewshot=fewshot, errors=False))
    finally:
        model.train(training)
