"""The losses of a run's model on its validation sets."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from anon_dist.train.inputs.corpora import ValidationSet
from anon_dist.train.loss.evaluate import Evaluation, evaluate, mean
from anon_dist.train.reports.metrics import Record
from anon_dist.train.running import Run


def validate(run: Run, sequences: int, prefix: str, look: Callable[[], None] = lambda: None) -> Record:
    """The mean over the sources by their weights; and where there are several sets, each. Every rank must call it.

    Args:
        sequences: of each set, at most; 0: all.
        prefix: of the record's names.
        look: called before each batch, as often on every rank.
    """
    with run.pulse.phase("validation", run.step):
        found = {each: _evaluate(run, each, sequences, look) for each in run.sets}
    record = {k: v for each, result in found.items() if each.name for k, v in result.record(prefix, each.name).items()}
    weighted = [(result, each.weight) for each, result in found.items() if each.weight]
    return (mean(weighted).record(prefix) if weighted else {}) | record


def _evaluate(run: Run, each: ValidationSet, sequences: int, look: Callable[[], None]) -> Evaluation:
    def own(tokens: Tensor) -> Tensor:
        look()
        return run.own(tokens)

    return evaluate(
        run.engine.model,
        each.shards,
        run.phase.data.seq_len,
        run.phase.train.micro_batch,
        run.accelerator.device,
        sequences,
        run.mask_eod,
        run.reader,
        run.readers,
        run.pulse.through(own, "validation"),
    )
