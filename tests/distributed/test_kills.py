"""A run is killed in the middle of a save, of a copy to elsewhere, of going back; the same command goes on, to the same weights."""

import json
import os
import re
import socket
from pathlib import Path

import pytest
from ranks import run_ranks

from anon_dist.checkpoint.checksums import checksums
from anon_dist.train.config import parsing as c
from anon_dist.train.reports.metrics import read_metrics

SCRIPT = Path(__file__).with_name("kills.py")
ZERO3 = Path(__file__).parents[2] / "configs" / "deepspeed" / "zero3.json"
RANKS = 2


@pytest.fixture
def command(prepared, tmp_path):
    """A function that starts a run, to be killed at a point, if one is named; what it says. Keywords are `section__field`."""

    def start(name, point="", ranks=RANKS, **changes):
        config = c.Config(
            model=c.ModelConfig(layers=2, width=32, heads=2, context=32),
            data=c.DataConfig(path=str(prepared), seq_len=32),
            optim=c.OptimConfig(lr=3e-3, eps=1e-8),
            schedule=c.ScheduleConfig(warmup_steps=3),
            train=c.TrainConfig(steps=12, global_batch=8, micro_batch=4),
            eval=c.EvalConfig(every=0, final_sequences=8),
            checkpoint=c.CheckpointConfig(every=4),
            log=c.LogConfig(every=1, trackers=()),
            run_dir=str(tmp_path / name),
        )
        for key, value in changes.items():
            section, _, field = key.partition("__")
            setattr(getattr(config, section), field, value)
        described, log = tmp_path / "config.yaml", tmp_path / "log"
        described.write_text(c.to_yaml(config))
        log.write_text("")
        ended = run_ranks(SCRIPT, [os.environ] * ranks, [str(tmp_path), str(described), point], log, 300)
        said = log.read_text()
        assert (ended, "KILLED" in said) == (not point, bool(point)), said[-4000:]
        return said

    return start


def weights(run):
    return (run / "model" / "model.safetensors").read_bytes()


def complete(folder):
    """Steps of the checkpoints that lie in a folder, all as they were written."""
    found = sorted(path.parent for path in folder.glob("step-????????/trainer.json"))
    assert [checksums(checkpoint).verify() for checkpoint in found] == [[]] * len(found)
    return [int(path.name.removeprefix("step-")) for path in found]


def newest(here):
    """The step of the last checkpoint that needs nothing more than its name."""
    return max(int(path.parent.name.removeprefix("step-")) for path in here.rglob("step-????????/trainer.json"))


SAVES = {
    "a part is half written": -1,
    "all parts are there": -1,
    "without a marker": -1,
    "without a name": 0,
    "with a name": 0,
}
"""Points in a save; whether the next start goes on from it or from the one before."""
LATER = ("copied in part", "the marker copied in part", "copied, and not removed", "removed in part")
"""Points in what follows, while the next save may be under way."""


def test_in_a_save(command, tmp_path):
    """Under ZeRO-3, each start in its second save, or what follows. The next one goes on from the last checkpoint that is complete; in the
    end those are here that are to stay, and all are at the address."""
    pytest.importorskip("deepspeed")
    zero3 = {"train__engine": "deepspeed", "train__deepspeed_config": str(ZERO3), "train__steps": 24}
    command("calm", **zero3)
    kept = {"checkpoint__keep": 2, "checkpoint__keep_every": 5, "checkpoint__keep_steps": (7,)}
    options = {**zero3, **kept, "checkpoint__every": 1, "checkpoint__remote": f"file://{tmp_path}/there"}
    here, last = tmp_path / "run" / "checkpoints", 0
    for point in (*SAVES, *LATER, ""):
        said = command("run", point, **options)
        resumed = re.search(r"Resuming \S+ after step (\d+)", said)
        assert last == (0 if resumed is None else int(resumed[1])), said
        if point:
            complete(here)
            killed, last = int(re.search(r"KILLED, save \[(\d+)\]", said)[1]), newest(here)
            assert last - killed in ((SAVES[point],) if point in SAVES else (-1, 0))
    assert weights(tmp_path / "run") == weights(tmp_path / "calm")
    assert complete(here) == [5, 7, 10, 15, 20, 23, 24]
    assert complete(tmp_path / "there") == list(range(1, 25))
    assert not (here / ".unfinished").exists()


def test_in_a_save_of_torchs_zero1(command, tmp_path):
    """Between the writing of all parts and the name, in the background. Of three ranks: where a gradient lies among those that DDP sends
    together decides how their sum is rounded."""
    options = {"ranks": 3, "train__engine": "zero1", "train__global_batch": 12}
    command("calm", **options)
    for point, resumed in (("all parts are there", None), ("without a name", 4), ("", 12)):
        said = command("run", point, **options)
        found = re.search(r"Resuming \S+ after step (\d+)", said)
        assert resumed == (found and int(found[1])), said
    assert weights(tmp_path / "run") == weights(tmp_path / "calm")


@pytest.mark.parametrize("engine", ["zero1", "zero1.json", "zero2.json"])
def test_a_rank_that_is_stopped_is_named(engine, command, tmp_path):
    """Under torch's ZeRO-1, and under DeepSpeed's stages 1 and 2, whose gradients are reduced while the backward pass goes on."""
    options = {"train__engine": engine, "checkpoint__every": 0}
    if engine.endswith(".json"):
        pytest.importorskip("deepspeed")
        options |= {"train__engine": "deepspeed", "train__deepspeed_config": str(ZERO3.with_name(engine))}
    command("run", "stopped", **options)
    (summary,) = (tmp_path / "run").glob("hangs/*/summary.txt")
    first, second, *_ = summary.read_text().splitlines()
    assert first.startswith(f"This run waits for rank 1 on {socket.gethostname()}. ")
    assert re.match(
        r"  rank 1 on \S+, pid \d+: stopped \(by SIGSTOP, a terminal or a job scheduler\); after step 4, ", second
    )


GOING_BACK = ("a spike is known", "back to a checkpoint", "loaded in part", "loaded", "written down", "passed over")


def test_in_going_back(command, tmp_path):
    """From one of two spikes, by any of the ranks: in the end there were two rewinds, each with its record, no sample came twice, and the
    weights are those of a run that nobody killed."""
    options = {
        "train__engine": "fsdp2",
        "train__on_spike": "rewind",
        "train__spike_sigma": 40.0,
        "train__max_rewinds": 2,
    }
    command("calm", **options)
    for point in (*GOING_BACK, "gone back", ""):
        command("run", point, **options)
    calm, run = tmp_path / "calm", tmp_path / "run"
    assert weights(run) == weights(calm)
    rewinds = [json.loads((folder / "rewinds.json").read_text()) for folder in (run, calm)]
    of = [[entry.pop("checkpoint") for entry in entries] for entries in rewinds]  # ids, of other checkpoints
    assert rewinds[0] == rewinds[1]
    assert len(of[0]) == len(of[1]) == 2
    found = [
        {r["step"]: r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "lr" in r}
        for folder in (calm, run)
    ]
    told = [[r for r in read_metrics(f / "metrics.jsonl") if "rewound_from" in r] for f in (calm, run)]
    assert told[0] == told[1]
    assert [(r["rewinds"], r["samples_passed_over"]) for r in told[0]] == [(1, 16), (2, 16 + 24)]
    for key in ("loss", "samples", "rewinds", "spikes", "update_rms"):
        ours, theirs = ([r.get(key) for r in records.values()] for records in found)
        assert ours == theirs, key
    assert [found[0][step]["samples"] for step in (8, 9, 12)] == [64, 64 + 16 + 24 + 8, 12 * 8 + 16 + 24]
    assert (found[0][12]["rewinds"], found[0][12]["spikes"]) == (2, 2)
