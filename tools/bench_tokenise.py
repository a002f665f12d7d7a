#!/usr/bin/env python
"""Tokens per second and core of `anon-dist data prepare`, of Hugging Face's `datasets.map` with the fast tokenizer's batch call, and of
datatrove's tokenizer where it is installed: the same texts and tokenizer, in turns, each in a process of its own, imports not counted.

    python tools/bench_tokenise.py [--texts FOLDER] [--tokenizer FOLDER] [--workers 1 2] [--repeats 3] [--out DIR]

By default the texts are the standard library's sources, and the tokenizer is a byte-level BPE of 32,000 tokens trained on them. All write
what they make to the disk: shards with the end of each document, an Arrow table, and datatrove's token files. Each has one process for each
worker, and the tokenizer's own threads are off. Seconds of processors, over all processes, do not grow with other work on the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anon_dist.machine import processor

FILES = 4
"""Of JSON Lines that the texts are written to, so that all can read in parallel."""
VOCABULARY = 32_000
Count = tuple[int, int]
"""Tokens, ends of documents not counted, and documents."""


def prepare(texts: Path, tokenizer: Path, workers: int, out: Path) -> Count:
    """Ours. All documents go to one split, and statistics are counted, as always."""
    from anon_dist.data import PrepareConfig
    from anon_dist.data import prepare as run

    index = run(
        PrepareConfig(source=(str(texts),), tokenizer=f"hf:{tokenizer}", out=out, workers=workers, val_fraction=0.0)
    )
    assert index is not None
    split = index.splits["train"]
    return split.tokens - split.documents, split.documents


def datasets_map(texts: Path, tokenizer: Path, workers: int, out: Path) -> Count:
    """Hugging Face's own way; its cache is what is written."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    files = [str(path) for path in sorted(texts.iterdir())]
    data = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(out))
    fast = AutoTokenizer.from_pretrained(tokenizer)

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        found = fast(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        return {"input_ids": found["input_ids"]}

    found = data.map(encode, batched=True, num_proc=workers if workers > 1 else None, remove_columns=["text"])
    lengths = [len(column) for batch in found.with_format("arrow").iter(1000) for column in batch["input_ids"]]
    return sum(lengths), len(lengths)


def datatrove(texts: Path, tokenizer: Path, workers: int, out: Path) -> Count:
    """With as many tasks as workers."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from transformers import AutoTokenizer

    eos = AutoTokenizer.from_pretrained(tokenizer).eos_token
    steps = [
        JsonlReader(str(texts)),
        DocumentTokenizer(
            str(out / "tokens"),
            tokenizer_name_or_path=str(tokenizer / "tokenizer.json"),
            eos_token=eos,
            shuffle_documents=False,
            local_working_dir=str(out / "work"),
        ),
    ]
    LocalPipelineExecutor(steps, tasks=workers, workers=workers, logging_dir=str(out / "logs")).run()
    size = max(2, 2 if len(AutoTokenizer.from_pretrained(tokenizer)) <= 1 << 16 else 4)
    tokens = sum(path.stat().st_size for path in (out / "tokens").glob("*.ds")) // size
    documents = sum(path.stat().st_size for path in (out / "tokens").glob("*.ds.index")) // 8
    return tokens - documents, documents


CONTENDERS: dict[str, Callable[[Path, Path, int, Path], Count]] = {
    "anon-dist data prepare": prepare,
    "datasets.map": datasets_map,
    "datatrove": datatrove,
}


def one(name: str, texts: Path, tokenizer: Path, workers: int) -> None:
    """A measurement, printed as JSON."""
    for module in ("torch", "transformers", "datasets", "anon_dist.data.preparation.prepare"):
        importlib.import_module(module)
    if name == "datatrove":
        importlib.import_module("datatrove.pipeline.tokens")
    with tempfile.TemporaryDirectory(dir=texts.parent) as folder:
        started, before = time.perf_counter(), processor_seconds()
        tokens, documents = CONTENDERS[name](texts, tokenizer, workers, Path(folder) / "out")
        seconds = time.perf_counter() - started
        for servers in ("multiprocessing.forkserver", "multiprocess.forkserver"):
            if servers in sys.modules:
                sys.modules[servers]._forkserver._stop()  # whose workers' time is known when it has ended
        print(json.dumps([tokens, documents, seconds, processor_seconds() - before]))


def processor_seconds() -> float:
    """Of this process and those of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def measure(name: str, texts: Path, tokenizer: Path, workers: int) -> tuple[Count, float, float]:
    """What one process says of itself: what it counted, its seconds, and those of processors."""
    command = [sys.executable, __file__, "--one", name, "--texts", str(texts), "--tokenizer", str(tokenizer)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, "--workers", str(workers)], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}, {workers} workers:\n{done.stderr[-2000:]}")
    tokens, documents, seconds, busy = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{name}, {workers} workers: {seconds:.1f} s, {busy:.1f} s of processors", file=sys.stderr, flush=True)
    return (tokens, documents), seconds, busy


def json_lines(folder: Path, given: Path | None) -> int:
    """Write the texts as JSON Lines; their bytes."""
    from anon_dist.data.preparation.sources import open_source

    source = open_source(str(given or "stdlib"), text_field="text", split="", streaming=False, text_unit="file")
    texts = [item.text for item in source.read() if item.skipped is None]
    folder.mkdir()
    for i in range(FILES):
        rows = (json.dumps({"text": text}) for text in texts[i::FILES])
        (folder / f"{i}.jsonl").write_text("\n".join(rows) + "\n")
    return sum(len(text.encode()) for text in texts)


def train_tokenizer(texts: Path, folder: Path) -> None:
    """A byte-level BPE, as GPT-2's is."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    lines = (json.loads(line)["text"] for path in sorted(texts.iterdir()) for line in path.open())
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(lines, VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    end = {f"{role}_token": "<|endoftext|>" for role in ("bos", "eos", "pad")}
    PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, split_special_tokens=True, **end).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="folder of texts (default: the standard library)")
    parser.add_argument("--tokenizer", type=Path, help="folder of a fast tokenizer (default: one trained on the texts)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for all that is written (default: a temporary one)")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return one(args.one, args.texts, args.tokenizer, args.workers[0])
    out = args.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "texts", ignore_errors=True)
    size = json_lines(out / "texts", args.texts)
    if args.tokenizer is None:
        train_tokenizer(out / "texts", out / "tokenizer")
    tokenizer = args.tokenizer or out / "tokenizer"
    names = [n for n in CONTENDERS if n != "datatrove" or importlib.util.find_spec("datatrove")]
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {}
    counts = set()
    for _ in range(args.repeats):
        for workers in args.workers:
            for name in names:
                count, *took = measure(name, out / "texts", tokenizer, workers)
                counts.add(count)
                seconds.setdefault((name, workers), []).append((took[0], took[1]))
    if len(counts) > 1:
        sys.exit(f"they do not give the same number of tokens and documents: {sorted(counts)}")
    ((tokens, documents),) = counts
    print(
        f"{size / 1e6:.1f} MB of text, {documents:,} documents, {tokens:,} tokens; {processor()}; median of {args.repeats}"
    )
    print(
        "| what | workers | tokens/s | tokens/s and core | tokens per second of a processor | seconds |\n|---|---|---|---|---|---|"
    )
    for (name, workers), found in seconds.items():
        middle, busy = (statistics.median(each) for each in zip(*found, strict=True))
        each = ", ".join(f"{s:.1f}" for s, _ in found)
        rates = f"{tokens / middle:,.0f} | {tokens / middle / workers:,.0f} | {tokens / busy:,.0f}"
        print(f"| {name} | {workers} | {rates} | {each} |")
    if "datatrove" not in names:
        print("datatrove is not installed: pip install datatrove")


if __name__ == "__main__":
    main()
