"""What tests of whole runs share."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from ranks import run_ranks

from anon_dist.train import loop


def forget_accelerate():
    """accelerate keeps its state in singletons and in the environment; a run in the same process starts with none."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    for key in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_OFFLOAD_PARAMS", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(key, None)


def launch_ranks(script: Path, ranks: int, out: Path, *args: str, seconds: float = 2000) -> Path:
    """Run a script on several ranks of this machine, with `out` and `args` as arguments; its output goes to `out/log`."""
    if not run_ranks(script, [os.environ] * ranks, [str(out), *args], out / "log", seconds):
        with (out / "log").open("a") as log:
            log.write(f"\nA rank failed, or {seconds} s did not do.\n")
    return out


def assert_passed(case: str, out: Path, ranks: int) -> None:
    """That every rank wrote of this case that it passed (`launch_cases.run_cases`). What each of the others wrote is shown: the first to
    fail is seldom rank 0."""
    failed = []
    for rank in range(ranks):
        path = out / f"results-{rank}.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        result = results.get(case, "was not reached")
        if result != "passed":
            failed.append(f"rank {rank}: {result}")
    if any("was not reached" in text for text in failed):
        failed.append((out / "log").read_text()[-4000:])
    assert not failed, "\n".join(failed)


MEASURE = """<script>addEventListener('load', () => {
  const pictures = [...document.images].map(i => i.complete ? i.naturalWidth : 0);
  const asked = performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith('data:'));
  const tables = [...document.querySelectorAll('table')].map(t => t.rows.length);
  const found = {pictures, asked, tables, wide: document.documentElement.scrollWidth, window: innerWidth};
  document.title = JSON.stringify(found);
});</script></body>"""


def browse(page: Path, work: Path) -> dict:
    """What a browser makes of a page: widths of its pictures, what it asked for besides, rows of its tables, its width and the window's.

    The test is skipped where there is no browser.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if browser is None:
        pytest.skip("no chromium here")
    measured = work / "measured.html"
    measured.write_text(page.read_text().replace("</body>", MEASURE))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={work / 'browser'}"]
    options += ["--window-size=1000,1200", "--virtual-time-budget=5000", "--dump-dom"]
    command = [browser, *options, measured.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", shown)[1]))


MC = """task: local_mc
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/mc.jsonl}, cache_dir: FOLDER/cache}
output_type: multiple_choice
test_split: test
doc_to_text: "{{q}}"
doc_to_choice: "{{c}}"
doc_to_target: "{{a}}"
metric_list: [{metric: acc}]
"""
TEXT = """task: local_text
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/text.jsonl}, cache_dir: FOLDER/cache}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{t}}"
metric_list: [{metric: bits_per_byte}]
"""


def write_tasks(folder: Path) -> Path:
    """A folder of lm-eval's task files: questions with choices of several lengths, and texts shorter and longer than a context of 32."""
    folder.mkdir(parents=True)
    questions = [{"q": f"def f{i}(x): return", "c": [" x", " yes", " None + 1"], "a": i % 3} for i in range(11)]
    texts = [{"t": f"import os{i}\n" * (3 * i + 1)} for i in range(5)]
    for name, documents, task in (("mc", questions, MC), ("text", texts, TEXT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
        (folder / f"{name}.yaml").write_text(task.replace("FOLDER", str(folder)))
    return folder


def assert_scored_as_by_one_process(run: Path, tasks: Path) -> None:
    """The last scores of a run on `write_tasks`' tasks are those of lm-eval's own model class, loaded from what the run exported."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from anon_dist.train.tasks.harness import find_tasks, run_tasks, scores

    model, tokenizer = (kind.from_pretrained(run / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    alone = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=3)
    wanted = scores(run_tasks(find_tasks(["local_mc", "local_text"], str(tasks)), alone, errors=False))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "task/local_mc/acc" in record][-1]
    assert set(wanted) == set(last) - {"step"} == {"task/local_mc/acc", "task/local_text/bits_per_byte"}
    assert last["task/local_mc/acc"] == wanted["task/local_mc/acc"]
    assert abs(last["task/local_text/bits_per_byte"] / wanted["task/local_text/bits_per_byte"] - 1) < 1e-5


def assert_exported_as_by_the_run(run: Path, out: Path) -> None:
    """`anon-dist export` makes of a run's last checkpoint what the run itself exported, from its engine's own weights."""
    from safetensors.torch import load_file

    from anon_dist.cli import main

    (*_, last) = sorted((run / "checkpoints").glob("step-*"))
    main(["export", str(last), str(out)])
    ours, wanted = (load_file(folder / "model.safetensors") for folder in (out, run / "model"))
    assert set(ours) == set(wanted)
    assert all(value.equal(wanted[name].to(value.dtype)) for name, value in ours.items())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, run / "model")]
    assert configs[0]["vocab_size"] == configs[1]["vocab_size"]
    assert (out / "README.md").is_file()
    assert (out / "tokenizer.json").read_bytes() == (run / "model" / "tokenizer.json").read_bytes()


def at_step(monkeypatch, step, action):
    """Have `action()` called when the given step is about to be made."""
    original = loop.lr_factor

    def factor(current, *rest):
        if current == step:
            action()
        return original(current, *rest)

    monkeypatch.setattr(loop, "lr_factor", factor)


def metrics(folder: Path):
    """The records that do not depend on the clock."""
    keep = (
        "step",
        "samples",
        "loss",
        "val_loss",
        "final_loss",
        "grad_norm",
        "update_rms",
        "refreshes",
        "lr",
        "skipped",
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [{k: v for k, v in json.loads(line).items() if k in keep} for line in lines]
    return [record for record in found if set(record) != {"step"}]  # of the last saves


class Crash(Exception):  # noqa: N818 - it stands for a machine, not an error
    """The process ends here."""


def crash():
    raise Crash


def send(signal):
    """A function that sends this process a signal."""
    return lambda: os.kill(os.getpid(), signal)
