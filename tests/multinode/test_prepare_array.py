"""The batch script that prepares a corpus on many nodes, with a stand-in for sbatch that runs each job at once, in its order."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from anon_dist.data import Index, PrepareConfig, prepare

ROOT = Path(__file__).parents[2]
SBATCH = """#!/usr/bin/env python
import os, subprocess, sys
options = [word for word in sys.argv[1:] if word.startswith("--")][: sys.argv[1:].index("launch/prepare.sbatch")]
script = sys.argv[sys.argv.index("launch/prepare.sbatch") :]
given = dict(option.lstrip("-").split("=", 1) for option in options if "=" in option)
stage = given["export"].removeprefix("ALL,STAGE=")
first, last = map(int, given.get("array", "1-1").split("-"))
for task in range(first, last + 1):
    job = {"STAGE": stage, "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_SUBMIT_DIR": os.getcwd()}
    for attempt in range(3):
        done = subprocess.run(["bash", *script], env={**os.environ, **job}, stdout=sys.stderr)
        if not os.path.exists("requeued") or os.remove("requeued"):
            break
    with open("jobs", "a") as file:
        print(stage, task, done.returncode, attempt, given.get("dependency", ""), file=file)
ids = {"tokenizer": 11, "part": 12, "merge": 13}
print(f"{ids[stage]};cluster")
"""
ANON_DIST = f"""#!{sys.executable}
import os, signal, sys
if "2/2" in sys.argv and not os.path.exists("stopped"):  # before the time limit, Slurm signals the batch script
    open("stopped", "w").close()
    os.kill(os.getppid(), signal.SIGUSR1)
    signal.pause()
from anon_dist.cli import main
main()
"""
SCONTROL = """#!/bin/bash
[ "$*" = "requeue 7" ] && touch requeued
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A function that gives the script's command; what the jobs came to."""
    (tmp_path / "bin").mkdir()
    for name, text in {"sbatch": SBATCH, "scontrol": SCONTROL, "anon-dist": ANON_DIST}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "VENV": "none"}
    environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def run(*options):
        command = ["bash", "launch/prepare.sbatch", *options]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
        jobs = (tmp_path / "jobs").read_text().splitlines() if (tmp_path / "jobs").exists() else []
        return done, [line.rstrip() for line in jobs]

    return run


@pytest.mark.slow
def test_an_array_prepares_what_one_machine_does(slurm, tmp_path):
    """The tokenizer first; one part stopped before its time limit, and queued again."""
    (tmp_path / "texts").mkdir()
    rng = random.Random(0)
    for i in range(12):
        text = "".join(rng.choices("etaoin shrdlu\n", k=3000))
        (tmp_path / "texts" / f"{i:02d}.txt").write_text(text)
    options = ["--source", str(tmp_path / "texts"), "--val-fraction", "0.3", "--shard-tokens", "500", "--workers", "1"]
    done, jobs = slurm("2", *options, "--tokenizer=spm-bpe:420", "--out", str(tmp_path / "data"))
    assert done.returncode == 0, done.stderr
    assert jobs == [
        "tokenizer 1 0 0",
        "part 1 0 0 afterok:11",
        "part 2 0 1 afterok:11",
        "merge 1 0 0 afterok:12",
    ]
    assert done.stdout == f"2 parts: job 12; then job 13 makes {tmp_path}/data of them\n"
    settings = {"val_fraction": 0.3, "shard_tokens": 500, "workers": 1, "tokenizer": "spm-bpe:420"}
    index = prepare(PrepareConfig(source=str(tmp_path / "texts"), out=tmp_path / "one", **settings))
    assert Index.load(tmp_path / "data").fingerprint == index.fingerprint


def test_without_a_folder_or_a_count(slurm):
    for options, said in ((("3", "--source", "x"), "--out is missing"), (("3",), "usage: bash launch/prepare.sbatch")):
        done, jobs = slurm(*options)
        assert done.returncode != 0
        assert said in done.stderr
        assert not jobs
