"""DeepSpeed on two ranks, launched once; each case of `deepspeed_cases.py` is a test."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import assert_passed, forget_accelerate, launch_ranks, metrics

from anon_dist.train import loop
from anon_dist.train.config import parsing as c
from anon_dist.train.config.parsing import load_config

pytest.importorskip("deepspeed")
SCRIPT = Path(__file__).with_name("deepspeed_cases.py")
CASES = re.findall(r"^def (case_\w+)", SCRIPT.read_text(), re.MULTILINE)
ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "deepspeed"
RANKS = 2


@pytest.fixture(scope="module")
def launched(tmp_path_factory, prepared):
    """The folder of the results, by rank."""
    out = tmp_path_factory.mktemp("deepspeed")
    forget_accelerate()
    reference = loop.train(
        c.Config(
            model=c.ModelConfig(layers=2, width=32, heads=2, context=32),
            data=c.DataConfig(path=str(prepared), seq_len=32),
            optim=c.OptimConfig(lr=3e-3, eps=1e-8),
            schedule=c.ScheduleConfig(warmup_steps=3),
            train=c.TrainConfig(steps=12, global_batch=8, micro_batch=4),
            eval=c.EvalConfig(every=5, sequences=8, final_sequences=8),
            checkpoint=c.CheckpointConfig(every=4),
            log=c.LogConfig(every=1, trackers=()),
            run_dir=str(out / "reference"),
        )
    )
    return launch_ranks(SCRIPT, RANKS, out, str(prepared), str(reference))


@pytest.mark.parametrize("case", CASES)
def test_case(case, launched):
    assert_passed(case, launched, RANKS)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_another_world_size(name, launched):
    """A run of two DeepSpeed ranks, interrupted, goes on in one process without DeepSpeed."""
    folder = launched / f"two-ranks-{name}"
    forget_accelerate()
    config = load_config(launched / "reference" / "config.yaml")
    config.run_dir = str(folder)
    loop.train(config)
    check_goes_on(folder, launched)


def test_another_world_size_and_stage(launched):
    """The same with DeepSpeed, as a user starts it, and in another stage."""
    folder = launched / "two-ranks-zero3-copy"
    options = [
        "--train.engine",
        "deepspeed",
        "--train.deepspeed-config",
        str(CONFIGS / "zero2.json"),
        "--run-dir",
        str(folder),
    ]
    command = [
        sys.executable,
        str(ROOT / "launch" / "pretrain.py"),
        "--config",
        str(launched / "reference" / "config.yaml"),
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    check_goes_on(folder, launched)


def check_goes_on(folder, launched):
    ours, theirs = metrics(folder), metrics(launched / "reference")
    for key in ("loss", "final_loss", "grad_norm", "refreshes", "samples"):
        assert [r[key] for r in ours if key in r] == pytest.approx([r[key] for r in theirs if key in r], rel=1e-4), key


@pytest.mark.parametrize("first", ["anon_dist", "deepspeed"])
def test_anon_is_known_whichever_is_imported_first(first):
    second = {"anon_dist": "deepspeed", "deepspeed": "anon_dist"}[first]
    code = f"""
import {first}, {second}
import torch
from anon_dist import Anon
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
assert torch.optim.Anon is Anon
assert Anon in ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.runtime.engine import DeepSpeedEngine
assert DeepSpeedEngine._configure_optimizer.__module__ == "anon_dist.engines.register"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=os.environ)
