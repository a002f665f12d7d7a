"""What a finished run shows: losses beside simple models' of the same corpus, a picture, a sample, and where everything lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anon_dist.checkpoint import Checkpoints
from anon_dist.data import Index
from anon_dist.train.config.changes import other_than_made
from anon_dist.train.config.parsing import Config
from anon_dist.train.config.sources import all_sources
from anon_dist.train.inputs.corpora import first_folder
from anon_dist.train.reports.metrics import PARTS, Record, from_json, read_metrics
from anon_dist.train.reports.plot import plot_loss

RESULT = "result.json"


def finished(folder: Path, config: Config) -> bool:
    """Whether the run in this folder has come to its end, with as many steps as are now asked for."""
    try:
        result = json.loads((folder / RESULT).read_text())
    except (OSError, ValueError):
        return False
    return bool(result["step"] >= config.train.steps)


def refuse_other(folder: Path, config: Config) -> str | None:
    """Why the finished run in this folder is not the one that is asked for; None: it is."""
    other = other_than_made(config, json.loads((folder / RESULT).read_text()).get("config") or {})
    return other and f"run_dir = {folder} is a finished run, made without {other}; choose another run_dir"


def taken(folder: Path, config: Config) -> str:
    """How many steps a finished run has taken, in words."""
    step, asked = int(json.loads((folder / RESULT).read_text())["step"]), config.train.steps
    if step > asked:
        return f"this run has taken {step} steps, more than train.steps = {asked}"
    return f"this run has taken all its {asked} steps"


def spent_on(records: list[Record]) -> str:
    """Where the time of steps went, in words: the mean of what records say; "" if they say nothing."""
    told = [r for r in records if "forward_share" in r]
    mean = {part: sum(r.get(f"{part}_share", 0.0) for r in told) / max(1, len(told)) for part in (*PARTS, "waiting")}
    words = [f"{part} {share:.1%}" for part, share in mean.items() if part != "waiting"]
    return f"{', '.join(words)}; the host waited for device and ranks {mean['waiting']:.1%}" if told else ""


def _losses(config: Config, result: dict[str, Any]) -> tuple[dict[str, float], Table]:
    """Losses of simple models to compare with; and the table: of one source beside those, of several each by itself."""
    table = Table(title="Loss on the validation split, nats per token", title_justify="left")
    sets = {key.partition("/")[2]: loss for key, loss in result.items() if key.startswith("final_loss/")}
    if sets:
        for column in ("set", "loss", "bits per byte", "unigram entropy"):
            table.add_column(column, justify="left" if column == "set" else "right")
        paths = {name: source.path for name, source in all_sources(config).items()} | config.eval.sets
        for name, loss in sets.items():
            unigram = Index.load(paths[name]).statistics.unigram_entropy
            table.add_row(name, f"{loss:.3f}", f"{result[f'final_bits_per_byte/{name}']:.3f}", f"{unigram:.3f}")
        if "final_loss" in result:
            sources = [name for name in all_sources(config) if name]
            missing = ", ".join(name for name in sources if name not in sets)
            mean = "mean by weight" + f", without {missing}" * bool(missing) if sources else "data.path"
            table.add_row(mean, f"{result['final_loss']:.3f}", f"{result['final_bits_per_byte']:.3f}", "")
        return {}, table
    statistics = Index.load(first_folder(config)).statistics
    levels = {"unigram entropy of the corpus": statistics.unigram_entropy}
    if statistics.bigram_val_loss is not None:
        levels["bigram, add-one smoothed"] = statistics.bigram_val_loss
    for column in ("model", "loss", "share of unigram entropy"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, loss in (levels | ({"this run": result["final_loss"]} if "final_loss" in result else {})).items():
        table.add_row(name, f"{loss:.3f}", f"{loss / statistics.unigram_entropy:.3f}")
    return levels, table


def report(folder: Path, config: Config) -> None:
    """Print the result of a finished run, draw `loss.png`, and write a sample of the exported model's text."""
    result: dict[str, Any] = from_json(json.loads((folder / RESULT).read_text()))
    levels, table = _losses(config, result)
    console = Console()
    console.print(table)
    if "final_loss" in result:
        console.print(f"perplexity {result['final_perplexity']:.2f}, {result['final_bits_per_byte']:.3f} bits per byte")
    if spent := spent_on(read_metrics(folder / "metrics.jsonl")):
        console.print(f"Time: {spent}", soft_wrap=True)
    plot_loss(
        folder / "loss.png", read_metrics(folder / "metrics.jsonl"), levels, f"{folder.name}: {config.optim.name}"
    )
    if config.log.sample_prompt is not None:
        import transformers

        from anon_dist.train.model.export import sample

        transformers.logging.disable_progress_bar()

        console.print("\nA sample, from the exported model:", style="bold")
        console.print(
            sample(folder / "model", config.log.sample_prompt),
            markup=False,
            highlight=False,
            style="dim",
            soft_wrap=True,
        )
    places = {
        "Hugging Face model": folder / "model",
        "sharded checkpoint": Checkpoints(folder / "checkpoints", 1).latest(),
        "loss curve": folder / "loss.png",
        "metrics": folder / "metrics.jsonl",
        "configuration": folder / "config.yaml",
    }
    console.print("\nWhere everything lies:", style="bold")
    for what, where in places.items():
        console.print(f"  {what:<20} {where}", highlight=False, soft_wrap=True)
