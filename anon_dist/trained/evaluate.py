"""`anon-dist eval`: how good a checkpoint is, on lm-eval's tasks and on texts, into a table, a file, and its run's metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from anon_dist.checkpoint import CheckpointError
from anon_dist.checkpoint.options import ReadOptions
from anon_dist.data import DataError
from anon_dist.data.errors import SourceError
from anon_dist.data.preparation.sources import FileSource, open_source
from anon_dist.files import unused, write_text
from anon_dist.train.config.errors import HarnessError, RunError
from anon_dist.train.model.export import context_of, generation_config
from anon_dist.train.reports.metrics import Record, add_metrics
from anon_dist.train.saves.lock import held
from anon_dist.train.tasks.harness import Tasks, find_tasks, quiet, run_tasks, scores
from anon_dist.trained.device import device_of
from anon_dist.trained.find import Trained, find, tokenizer_of
from anon_dist.trained.model import check_tokens, load_model
from anon_dist.trained.options import Eval
from anon_dist.trained.text import TextScore, score_text


def evaluate(options: Eval) -> None:
    """Print the tables; write the file and the metrics.

    Raises:
        CheckpointError: an option is out of its range, there is no such model, or a text or a task cannot be read.
    """
    device = device_of(options.device)
    trained = find(options.source, ReadOptions(unsafe=options.unsafe))
    try:
        tasks = find_tasks(options.tasks, options.include_path) if options.tasks else None
        sources = {spec: _source(spec, options) for spec in options.text}
        tokenizer = tokenizer_of(trained, options.tokenizer)
        model: Any = load_model(trained, options.model_config, options.unsafe)
        check_tokens(trained.path, model.config, tokenizer)
        model = model.to(device)
        found = _on_tasks(tasks, model, tokenizer, options) if tasks else {}
        texts = {spec: _on_text(source, model, tokenizer, options) for spec, source in sources.items()}
    except (HarnessError, DataError) as error:
        raise CheckpointError(str(error)) from error
    console = Console(highlight=False)
    console.print(f"{trained.path}{_step(trained)}", markup=False, soft_wrap=True)
    for table in _tables(found, texts):
        console.print(table)
    _write(trained, options, found, texts)


def _step(trained: Trained) -> str:
    return "" if trained.step is None else f", step {trained.step:,}"


# -- tasks ------------------------------------------------------------------------------------------------------------


def _on_tasks(tasks: Tasks, model: PreTrainedModel, tokenizer: Any, options: Eval) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM

    with quiet():
        scored = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=options.batch_size)
    return run_tasks(tasks, scored, limit=options.limit, fewshot=options.num_fewshot)


# -- texts ------------------------------------------------------------------------------------------------------------


def _source(spec: str, options: Eval) -> FileSource:
    try:
        source = open_source(
            spec, text_field=options.text_field, split="", streaming=False, text_unit=options.text_unit
        )
    except SourceError as error:
        raise SourceError(str(error).replace("--source", "--text")) from None
    assert isinstance(source, FileSource)
    return source


def _on_text(source: FileSource, model: PreTrainedModel, tokenizer: Any, options: Eval) -> TextScore:
    begin = generation_config(model.config, tokenizer).bos_token_id
    if begin is None:
        raise CheckpointError("--text: this model has no token that begins a text, from which its first is predicted")
    context = context_of(model.config)
    length = options.window or context
    if length is None:
        raise CheckpointError("--text: this model does not say how long its context is; name --window TOKENS")
    if context is not None and length > context:
        raise CheckpointError(f"--window {length} is longer than the model's context, {context}")
    stride = options.stride or length
    if stride > length:
        raise CheckpointError(f"--stride {stride} is longer than the window of {length}, and would leave tokens out")
    skipped: dict[str, int] = {}

    def documents() -> Iterator[str]:
        """Texts; what the source leaves out is counted."""
        for item in source.read():
            if item.skipped is None:
                yield item.text
            else:
                skipped[item.skipped] = skipped.get(item.skipped, 0) + 1

    found = score_text(model, tokenizer, documents(), begin, length, stride, options.batch_size)
    name = source.describe()["origin"]
    if skipped:
        print(f"note: {name}: left out: " + ", ".join(f"{n} {why}" for why, n in skipped.items()))
    if found.unknown:
        print(f"note: {name}: {found.unknown} tokens stand for text that the tokenizer does not know; other models may")
    if not found.tokens:
        raise CheckpointError(f"--text {name} has no text")
    return found


# -- results ----------------------------------------------------------------------------------------------------------


def _tables(found: dict[str, Any], texts: dict[str, TextScore]) -> Iterator[Table]:
    if found:
        table = _table("task", "n-shot", "documents", "metric", "value", "stderr")
        for name, values in found["results"].items():
            for row in _rows(found, name, values):
                table.add_row(*row)
        yield table
    if texts:
        table = _table("text", "documents", "tokens", "bytes", "nats/token", "bits/byte")
        for name, s in texts.items():
            counts = (f"{s.documents:,}", f"{s.tokens:,}", f"{s.text_bytes:,}")
            table.add_row(name, *counts, f"{s.loss:.4f}", f"{s.bits_per_byte:.4f}")
        yield table


def _table(*columns: str) -> Table:
    table = Table()
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="left" if column == "metric" else "right", overflow="fold")
    return table


def _rows(found: dict[str, Any], name: str, values: dict[str, Any]) -> Iterator[list[str]]:
    shots, documents = found["n-shot"].get(name, ""), found["n-samples"].get(name, {}).get("effective", "")
    first = [str(values.get("alias", name)), str(shots), str(documents)]
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{chosen}")
            shown = [f"{v:.4g}" if isinstance(v, int | float) else "" for v in (value, error)]
            yield [*first, metric if chosen == "none" else f"{metric}, {chosen}", *shown]
            first = ["", "", ""]


def _write(trained: Trained, options: Eval, found: dict[str, Any], texts: dict[str, TextScore]) -> None:
    """All of it as JSON; the scores into the metrics of the run, if it is one's."""
    folder = None if trained.run is None else trained.run / "evaluations"
    name = f"{'model' if trained.step is None else f'step-{trained.step:08d}'}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = options.out or (None if folder is None else unused(folder / f"{name}.json"))
    texts_found = {
        spec: {**asdict(s), "loss": s.loss, "perplexity": s.perplexity, "bits_per_byte": s.bits_per_byte}
        for spec, s in texts.items()
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        windows = {"window": options.window, "stride": options.stride, "text_unit": options.text_unit}
        whole = {"model": str(trained.path), "step": trained.step, "tasks": found, "texts": texts_found, **windows}
        write_text(out, json.dumps(whole, indent=1, ensure_ascii=False, default=str) + "\n")
        print(f"results: {out}")
    if trained.run is None:
        return
    if trained.step is None:
        print(f"note: not in {trained.run / 'metrics.jsonl'}: it is not known after which step this model was exported")
        return
    record: Record = {"step": trained.step, **scores(found)}
    record |= {f"text/{spec}/{key}": texts_found[spec][key] for spec in texts for key in ("loss", "bits_per_byte")}
    try:
        with held(trained.run):
            add_metrics(trained.run / "metrics.jsonl", record)
    except RunError as error:
        print(f"note: not in the run's metrics: {error}")
