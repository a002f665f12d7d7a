"""How good a model is: lm-eval's tasks in a training and by `anon-dist eval`, and bits per byte, each against sums of its own."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import forget_accelerate, metrics, write_tasks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from anon_dist.cli import main
from anon_dist.train import loop
from anon_dist.train.config import parsing as c
from anon_dist.train.config.errors import RunError
from anon_dist.train.reports import report
from anon_dist.train.saves.lock import _BYTE, LOCK
from anon_dist.train.tasks import during as tasks
from anon_dist.train.tasks import harness, known
from anon_dist.train.tasks.known import tasks_problem
from anon_dist.trained.text import windows

CONTEXT = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("evaluation") / "tasks")


def trained(prepared, out, **evaluation):
    config = c.Config(
        model=c.ModelConfig(layers=2, width=32, heads=2, context=CONTEXT, dropout=0.1),
        data=c.DataConfig(path=str(prepared), seq_len=32),
        optim=c.OptimConfig(lr=3e-3),
        schedule=c.ScheduleConfig(warmup_steps=2),
        train=c.TrainConfig(steps=6, global_batch=8, micro_batch=4),
        eval=c.EvalConfig(every=3, sequences=4, final_sequences=8, **evaluation),
        checkpoint=c.CheckpointConfig(every=3),
        log=c.LogConfig(every=1, trackers=()),
        run_dir=str(out),
    )
    forget_accelerate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot_loss", lambda *_: None)
        loop.train(config)
    forget_accelerate()
    return config, out


@pytest.fixture(scope="module")
def run(prepared, folder, tmp_path_factory):
    """A finished run with two tasks, evaluated after steps 2, 4 and 6."""
    evaluation = {"tasks": ("local_mc", "local_text"), "tasks_path": str(folder), "tasks_every": 2}
    return trained(prepared, tmp_path_factory.mktemp("tasks") / "run", **evaluation)[1]


def of_tasks(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if any(key.startswith("task/") for key in r)]


@torch.no_grad()
def nats(model, context, text):
    """−log p of each token of a text, one forward pass for each: (context's tokens, the text's) → list."""
    tokens, found = list(context), []
    for token in text:
        logits = model(input_ids=torch.tensor([tokens[-CONTEXT:]])).logits[0, -1]
        found.append(-float(logits.log_softmax(0)[token]))
        tokens.append(token)
    return found


@pytest.fixture(scope="module")
def model(run):
    return AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float64).eval()


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_a_training_is_the_same_with_tasks_as_without(prepared, run, tmp_path):
    """With dropout, so that a single number drawn by lm-eval would show."""
    _, plain = trained(prepared, tmp_path / "plain")
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (plain, run)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    with_tasks = [record for record in metrics(run) if len(record) > 1]
    assert with_tasks == metrics(plain)
    for step in (3, 6):
        states = [f / "checkpoints" / f"step-{step:08d}" / "random-00000.pt" for f in (plain, run)]
        assert states[0].read_bytes() == states[1].read_bytes()


def test_scores_are_those_of_plain_sums(run, folder, model):
    assert [record["step"] for record in of_tasks(run)] == [2, 4, 6]
    documents = [json.loads(line) for line in (folder / "mc.jsonl").read_text().splitlines()]
    right = 0
    for d in documents:
        sums = [sum(nats(model, d["q"].encode(), choice.encode())) for choice in d["c"]]
        right += sums.index(min(sums)) == d["a"]
    last = of_tasks(run)[-1]
    assert last["task/local_mc/acc"] == right / len(documents)
    assert 0 < right < len(documents)
    texts = [json.loads(line)["t"].encode() for line in (folder / "text.jsonl").read_text().splitlines()]
    # lm-eval's windows do not overlap; the last of a text reaches back to be full.
    total = 0.0
    for text in texts:
        tokens = [256, *text]
        for start in range(0, len(text), CONTEXT):
            end = min(start + CONTEXT, len(text))
            first = max(0, end - CONTEXT) if start else 0
            total += sum(nats(model, tokens[first : start + 1], tokens[start + 1 : end + 1]))
    assert last["task/local_text/bits_per_byte"] == pytest.approx(total / math.log(2) / sum(map(len, texts)), rel=1e-5)


def test_the_command_says_the_same_and_puts_it_where_the_run_is(prepared, run, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # no repository of git, to which lm-eval turns
    copy = shutil.copytree(run, tmp_path / "run")
    words = ["eval", str(copy), "--tasks", "local_mc", "local_text", "--include-path", str(folder)]
    main(words)
    said, complained = capfd.readouterr()
    assert "git" not in complained
    record, trainings = of_tasks(copy)[-1], of_tasks(copy)[-2]
    assert record == {**record, **trainings}
    assert f"{record['task/local_mc/acc']:.4g}" in said
    assert f"{record['task/local_text/bits_per_byte']:.4g}" in said
    (file,) = (copy / "evaluations").iterdir()
    written = json.loads(file.read_text())
    assert written["step"] == 6
    assert written["tasks"]["results"]["local_mc"]["acc,none"] == record["task/local_mc/acc"]
    assert written["tasks"]["n-samples"]["local_mc"]["effective"] == 11
    # Of an earlier checkpoint: behind later records, and there still when the run has gone on.
    main(
        [
            "eval",
            str(copy / "checkpoints" / "step-00000003"),
            *words[2:],
            "--limit",
            "4",
            "--out",
            str(tmp_path / "x.json"),
        ]
    )
    assert of_tasks(copy)[-1]["step"] == 3
    assert json.loads((tmp_path / "x.json").read_text())["tasks"]["n-samples"]["local_mc"]["effective"] == 4
    before = of_tasks(copy)
    trained_on = c.load_config(copy / "config.yaml")
    trained_on.run_dir, trained_on.train.steps, trained_on.eval.tasks = str(copy), 7, ()
    trained_on.log.trackers = ()
    forget_accelerate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot_loss", lambda *_: None)
        loop.train(trained_on)
    assert of_tasks(copy) == before
    assert [r["step"] for r in metrics(copy) if "final_loss" in r] == [7]


def test_a_run_at_work_keeps_its_metrics_for_itself(run, folder, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    before = (copy / "metrics.jsonl").read_bytes()
    (tmp_path / "a.txt").write_text("import os")
    lock = f"f = open({str(copy / LOCK)!r}, 'r+'); fcntl.lockf(f, fcntl.LOCK_EX, 1, {_BYTE})"
    hold = f"import fcntl; {lock}; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        main(["eval", str(copy), "--text", str(tmp_path / "a.txt")])
        other.communicate(b"\n")
    assert "note: not in the run's metrics: run_dir = " in capsys.readouterr().out
    assert (copy / "metrics.jsonl").read_bytes() == before
    assert len(list((copy / "evaluations").iterdir())) == 1


def test_worked_examples_and_limits_are_taken_in_a_training(run, folder, prepared, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(tasks, "run_tasks", lambda found, scorer, **options: seen.append(options) or {})
    trained(prepared, tmp_path / "run", tasks=("local_mc",), tasks_path=str(folder), tasks_limit=5, tasks_fewshot=2)
    assert seen == [{"limit": 5, "fewshot": 2, "errors": False}]
    model = SimpleNamespace(batch_size=1)
    with pytest.raises(harness.HarnessError, match="tasks local_mc: TypeError"):
        harness.run_tasks(harness.find_tasks(["local_mc"], str(folder)), model)


GENERATING = "output_type: generate_until\ngeneration_kwargs: {until: ['x'], max_gen_toks: 4}\n"


def test_what_cannot_be_evaluated_is_said_before_the_first_step(folder, prepared, tmp_path, monkeypatch):
    mine = shutil.copytree(folder, tmp_path / "tasks")
    text = (mine / "mc.yaml").read_text()
    writing = text.replace("output_type: multiple_choice\n", GENERATING).replace("local_mc", "local_writing")
    (mine / "writing.yaml").write_text(writing.replace("metric: acc", "metric: exact_match"))
    (mine / "lost.yaml").write_text(text.replace("local_mc", "local_lost").replace("/mc.jsonl", "/gone.jsonl"))
    cases = {
        ("local_writing", str(mine)): "eval.tasks: in local_writing the model writes text, which is not done while",
        ("local_lost", str(mine)): r"eval.tasks: task local_lost cannot be loaded: FileNotFoundError: .*gone\.jsonl",
        (str(mine / "no.yaml"), None): r"eval.tasks: there is no task .*no\.yaml",
        ("local_mc", "/nowhere"): "eval.tasks: the folder of task files /nowhere does not exist",
    }
    from lm_eval.tasks import TaskManager

    plain = TaskManager.__init__
    # Without lm-eval's own 14,000 files.
    monkeypatch.setattr(TaskManager, "__init__", lambda self, **o: plain(self, **{**o, "include_defaults": False}))
    for (name, path), message in cases.items():
        with pytest.raises(c.ConfigError, match=message):
            trained(prepared, tmp_path / "run", tasks=(name,), tasks_path=path)
    (mine / "broken.yaml").write_text("task: [")
    with pytest.raises(harness.HarnessError, match=r"no task local_m, and .*broken\.yaml cannot be read: "):
        harness.find_tasks(["local_m"], str(mine))
    with pytest.raises(harness.HarnessError, match=r"there is no task local_m; did you mean local_mc\?"):
        harness.find_tasks(["local_m"], str(folder))
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(c.ConfigError, match=r"lm_eval is not installed: pip install 'lm-eval>=0\.4\.13'$"):
        trained(prepared, tmp_path / "run", tasks=("local_mc",), tasks_path=str(folder))


def test_a_name_that_is_none_of_a_task_is_told_by_the_text_of_the_files(folder, run, monkeypatch):
    """Of lm-eval's 14,000 too, without its index of them. What is a file, or in a folder of one's own, is a task."""
    names = ("hellaswag", "arc_easy", "mmlu", "local_mc", str(folder / "text.yaml"))
    assert tasks_problem(names, str(folder)) is None
    wanted = "there is no task helaswag; did you mean hellaswag? (a YAML file can be named too)"
    assert tasks_problem(["arc_easy", "helaswag"], None) == wanted
    assert tasks_problem(["local_mc"], None).startswith("there is no task local_mc")
    for words in (["train", "--config", "quickstart", "--eval.tasks"], ["eval", str(run), "--tasks"]):
        with pytest.raises(SystemExit) as ended:
            main([*words, "helaswag"])
        assert ended.value.code == 2
    monkeypatch.setattr(known, "find_spec", lambda name: None)
    assert tasks_problem(names, str(folder)).endswith("lm_eval is not installed: pip install 'lm-eval>=0.4.13'")


def test_a_data_set_on_a_hub_that_is_not_reached_is_named(folder, monkeypatch, capfd):
    """By the error that `datasets` raises for one of lm-eval's own tasks where it is told to stay offline."""
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).parent / "hellaswag"
    for setting in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(setting, True)
    with pytest.raises(harness.HarnessError) as refused:
        harness.find_tasks(["hellaswag"], str(own))
    said = str(refused.value)
    assert said.startswith(
        "task hellaswag: its data set Rowan/hellaswag is on the Hugging Face hub, which cannot be reached"
    )
    assert said.endswith("copy that here, or name task files of your own")
    assert capfd.readouterr() == ("", "")


def test_what_a_model_writes_in_a_task_is_its_greedy_continuation(run, folder, tmp_path):
    mine = shutil.copytree(folder, tmp_path / "tasks")
    model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    documents = []
    for i in range(6):
        tokens = list(f"def f{i}(x)".encode())
        for _ in range(4):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        written = bytes(t for t in tokens[-4:] if t < 128).decode()
        documents.append({"q": f"def f{i}(x)", "t": written if i % 3 else f"{written}no"})
    (mine / "write.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    text = (mine / "mc.yaml").read_text().replace(str(folder), str(mine)).replace("mc.jsonl", "write.jsonl")
    text = text.replace("output_type: multiple_choice\n", GENERATING.replace("'x'", "'never'")).replace(
        "local_mc", "local_writing"
    )
    text = (
        text.replace('doc_to_choice: "{{c}}"\n', "")
        .replace("{{a}}", "{{t}}")
        .replace("metric: acc", "metric: exact_match")
    )
    (mine / "writing.yaml").write_text(text)
    out = tmp_path / "out.json"
    main(["eval", str(run / "model"), "--tasks", str(mine / "writing.yaml"), "--out", str(out)])
    assert json.loads(out.read_text())["tasks"]["results"]["local_writing"]["exact_match,none"] == pytest.approx(4 / 6)


def test_a_task_that_does_not_go_with_the_model_ends_the_run_with_a_checkpoint(folder, prepared, tmp_path):
    mine = shutil.copytree(folder, tmp_path / "tasks")
    (mine / "mc.jsonl").write_text(json.dumps({"q": "a", "c": [" b" * 20, " c"], "a": 0}) + "\n")
    yaml = (mine / "mc.yaml").read_text().replace(str(folder), str(mine))
    (mine / "mc.yaml").write_text(yaml)
    with pytest.raises(RunError, match=r"eval.tasks: tasks local_mc: .*checkpoint of step 2 is written"):
        trained(prepared, tmp_path / "run", tasks=("local_mc",), tasks_path=str(mine), tasks_every=2)
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "trainer.json").is_file()
    assert trained(prepared, tmp_path / "run")[1] / "model"


# -- texts ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def independent(model, documents, length, stride):
    """Bits per byte, token by token: the context of each by the definition."""
    total = 0.0
    for text in documents:
        tokens = [256, *text.encode()]
        for place in range(1, len(tokens)):
            # Of all windows that reach the token, the first one.
            start = next(s for s in range(0, len(tokens), stride) if place <= s + length)
            context = torch.tensor([tokens[start:place]])
            total -= float(model(input_ids=context).logits[0, -1].log_softmax(0)[tokens[place]])
    return total / math.log(2) / sum(len(text.encode()) for text in documents)


@pytest.mark.parametrize("options", [(), ("--stride", "5"), ("--window", "9"), ("--window", "9", "--stride", "1")])
def test_bits_per_byte_are_those_of_one_token_after_the_other(run, model, tmp_path, capsys, options):
    documents = ["x" * 33 + "\n", "naïve <|endoftext|> <eod> ×", "a", "b" * 32, "def f(x):\n    return x + 1\n" * 3]
    (tmp_path / "a").mkdir()
    for i, text in enumerate(documents):
        (tmp_path / "a" / f"{i}.txt").write_text(text)
    (tmp_path / "a" / "5.txt").write_text("")
    (tmp_path / "a" / "6.bin").write_bytes(b"\0\1")
    words = ["eval", str(run / "model"), "--text", str(tmp_path / "a"), "--out", str(tmp_path / "out.json")]
    main([*words, *options, "--batch-size", "3"])
    assert "left out: " in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "out.json").read_text())["texts"].values()
    given = dict(zip(options[::2], map(int, options[1::2]), strict=True))
    length = given.get("--window", CONTEXT)
    wanted = independent(model, documents, length, given.get("--stride", length))
    assert found["bits_per_byte"] == pytest.approx(wanted, rel=1e-6)
    assert (found["documents"], found["text_bytes"]) == (5, sum(len(t.encode()) for t in documents))
    assert found["tokens"] == found["text_bytes"]  # of bytes


def test_a_whole_files_bits_are_those_of_its_lines_apart(run, model, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo three\n")
    words = ["eval", str(run / "model"), "--text", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out.json")]
    for unit, documents in (("file", ["one\n\ntwo three\n"]), ("line", ["one", "two three"])):
        main([*words, "--text-unit", unit])
        (found,) = json.loads((tmp_path / "out.json").read_text())["texts"].values()
        assert found["bits_per_byte"] == pytest.approx(independent(model, documents, CONTEXT, CONTEXT), rel=1e-6)


def test_each_token_is_counted_once():
    for tokens in range(1, 40):
        for length in range(1, 12):
            for stride in range(1, length + 1):
                found = list(windows(list(range(tokens)), length, stride))
                assert [t for w, n in found for t in w[len(w) - n :]] == list(range(1, tokens))
                assert all(1 <= n < len(w) <= length + 1 for w, n in found)
                assert all(len(w) - n >= length - stride + 1 for w, n in found[1:])


def test_a_window_longer_than_the_context_is_refused(run):
    with pytest.raises(SystemExit, match=r"--window 33 is longer than the model's context, 32"):
        main(["eval", str(run / "model"), "--text", __file__, "--window", "33"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "nothing to evaluate on: name --tasks of lm-eval, or a --text"),
        ("--text x --stride 0", "--stride must be at least 1, not 0"),
        ("--text x --window 0", "--window must be at least 1, not 0"),
        ("--tasks x --limit 0", "--limit must be at least 1, not 0"),
        ("--tasks x --num-fewshot -1", "--num-fewshot must be at least 0, not -1"),
        ("--text x --batch-size 0", "--batch-size must be at least 1, not 0"),
        ("--text /nowhere/x.txt", "--text /nowhere/x.txt does not exist"),
        (f"--text {__file__} --stride 40", "--stride 40 is longer than the window of 32, and would leave tokens out"),
        (
            "--tasks local_mc --include-path /nowhere",
            "--include-path /nowhere does not exist; name a folder of task files",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(run, words, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        main(["eval", str(run / "model"), *words.split()])
