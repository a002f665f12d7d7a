"""DeepSpeed on two ranks, launched once; each case of `deepspeed_cases.py` is a test."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import assert_passed, forget_accelerate, launch_ranks

from anon_dist.train import config as c
from anon_dist.train import loop

pytest.importorskip("deepspeed")
SCRIPT = Path(__file__).with_name("deepspeed_cases.py")
CASES = re.findall(r"^def (case_\w+)", SCRIPT.read_text(), re.MULTILINE)
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
            eval=c.EvalConfig(every=5, sequences=16, final_sequences=32),
            checkpoint=c.CheckpointConfig(every=4),
            log=c.LogConfig(every=1, trackers=()),
            run_dir=str(out / "reference"),
        )
    )
    return launch_ranks(SCRIPT, RANKS, out, str(prepared), str(reference))


@pytest.mark.parametrize("case", CASES)
def test_case(case, launched):
    assert_passed(case, launched, RANKS)


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
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=os.environ)
