"""What needs a GPU: the loop on it under every engine (one rank each, NCCL), compiled, in bfloat16, crashed and resumed.

The kernel's own tests on a GPU are `optim/gpu_cases.py`.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import metrics
from torch import nn

from anon_dist import Anon
from anon_dist.optim import STATE_KEYS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SMALL = """
model: {layers: 2, width: 64, heads: 2, context: 64}
data: {path: PATH, seq_len: 64}
optim: {lr: 3.0e-3}
schedule: {warmup_steps: 3}
train: {steps: 20, global_batch: 8, micro_batch: 4, engine: auto}
eval: {every: 10, sequences: 16, final_sequences: 32}
checkpoint: {every: 8}
log: {every: 1}
"""
LAUNCHES = {
    "ddp": ("ddp.yaml",),
    "fsdp1": ("fsdp1.yaml",),
    "fsdp2": ("fsdp2.yaml",),
    **{f"zero{stage}": ("deepspeed.yaml", f"configs/deepspeed/zero{stage}.json") for stage in range(4)},
    "zero2-offload": ("deepspeed.yaml", "configs/deepspeed/zero2-offload.json"),
}
LAUNCHER_OF = {**LAUNCHES, "zero2-fp16": ("deepspeed.yaml", "configs/deepspeed/zero2-fp16.json")}


@pytest.fixture(scope="module")
def config(prepared, tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "small.yaml"
    path.write_text(SMALL.replace("PATH", str(prepared)))
    return path


def train(config, run_dir, launcher, *options):
    """Run the training script to its end; what it printed."""
    command = [*launcher, "launch/pretrain.py", "--config", str(config), "--run-dir", str(run_dir), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env=os.environ)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    assert "fused kernel is not available" not in output
    return output


def launcher(engine, tmp_path):
    """accelerate, on one GPU; the shipped configuration, with the stage written into it."""
    name, *stage = LAUNCHER_OF[engine]
    text = (ROOT / "configs" / "accelerate" / name).read_text()
    for path in stage:
        text = text.replace("configs/deepspeed/zero2.json", path)
    (tmp_path / name).write_text(text)
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / name)]
    return [*accelerate, "--num_processes", "1"]


@pytest.fixture(scope="module")
def single(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    train(config, folder, [sys.executable])
    return metrics(folder)


@pytest.mark.parametrize("engine", LAUNCHES)
def test_an_engine_trains_as_one_process_without_it(engine, config, single, tmp_path):
    train(config, tmp_path / "run", launcher(engine, tmp_path))
    found = metrics(tmp_path / "run")
    assert [r["step"] for r in found] == [r["step"] for r in single]
    for record, expected in zip(found, single, strict=True):
        for key in {"loss", "val_loss", "final_loss"} & expected.keys():
            assert abs(record[key] - expected[key]) < 2e-4, (record, expected)


@pytest.mark.parametrize(
    ("engine", "precision", "tolerance"),
    [("zero2-fp16", "fp16", 0.15), ("zero2", "bf16", 0.05), ("fsdp2", "bf16", 0.05)],
)
def test_lower_precision_follows_float32(engine, precision, tolerance, config, single, tmp_path):
    train(config, tmp_path / "run", launcher(engine, tmp_path), "--train.precision", precision)
    found = metrics(tmp_path / "run")
    pairs = [(r["val_loss"], s["val_loss"]) for r, s in zip(found, single, strict=True) if "val_loss" in s]
    assert len(pairs) == 2
    assert all(abs(loss - expected) < tolerance for loss, expected in pairs), pairs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(precision, config, tmp_path):
    """In bfloat16 compiled too; there the kernels of backward passes may add up in any order."""
    options = [
        "--train.steps",
        "300",
        "--train.precision",
        precision,
        "--train.compile",
        "blocks" if precision == "bf16" else "none",
    ]
    train(config, tmp_path / "whole", [sys.executable], *options)
    command = [sys.executable, "launch/pretrain.py", "--config", str(config), "--run-dir", str(tmp_path / "resumed")]
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([*command, *options], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=unbuffered)
    limit = threading.Timer(400, process.kill)
    limit.start()
    for line in process.stdout:
        if line.startswith("step=20 "):
            process.terminate()
    limit.cancel()
    assert process.wait(timeout=100) == 0
    assert "Resuming" in train(config, tmp_path / "resumed", [sys.executable], *options)
    resumed, whole = metrics(tmp_path / "resumed"), metrics(tmp_path / "whole")
    if precision == "fp32":
        assert resumed == whole
    assert len(resumed) == len(whole)
    assert all(abs(r["loss"] - w["loss"]) < 0.03 for r, w in zip(resumed, whole, strict=True) if "loss" in w)


def test_a_step_does_not_wait_for_the_gpu():
    """Neither for the scale that clips, nor for the flag that skips, nor for the counts: torch says so of every wait."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(300, 70, device="cuda")) for _ in range(3)]
    optimizer = Anon(params, lr=1e-2, betas=(0.9, 0.95), refresh_ratio=1.1, window=4, update_clip=1.0, fused=True)
    for t in range(40):
        for p in params:
            p.grad = torch.randn_like(p)
        if t % 5 == 2:
            params[1].grad[0, 0] = torch.nan
        norm = torch.stack(torch._foreach_norm([p.grad for p in params])).norm()
        optimizer.grad_scale, optimizer.found_inf = norm.clamp(min=1.0), (~norm.isfinite()).float()
        torch.cuda.set_sync_debug_mode("error" if t > 2 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    optimizer.settle()
    assert {float(optimizer.state[p]["step"]) for p in params} == {32.0}
    assert all(p.isfinite().all() for p in params)


def test_the_steps_are_those_of_the_cpu():
    """The same gradients on both: the same bits, in every dtype of the state."""
    for states in ("float32", {"precond": "bfloat16", "exp_avg_sq": "bfloat16"}, {"exp_avg": "int8"}):
        results = []
        for device in ("cpu", "cuda"):
            generator = torch.Generator().manual_seed(0)
            params = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in ((300, 70), (129,))]
            options = {"betas": (0.9, 0.95), "refresh_ratio": 1.1, "window": "auto", "update_clip": 1.0}
            optimizer = Anon(params, lr=1e-2, weight_decay=0.1, state_dtype=states, fused=True, **options)
            for _ in range(150):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator).to(device)
                optimizer.step()
            results.append((params, [optimizer.state[p] for p in params]))
        (on_cpu, cpu_states), (on_gpu, gpu_states) = results
        for p, q, s, u in zip(on_cpu, on_gpu, cpu_states, gpu_states, strict=True):
            assert torch.equal(p, q.cpu()), (p - q.cpu()).abs().max()
            assert all(torch.equal(s[k], u[k].cpu()) for k in STATE_KEYS), states
            assert u["step"].device.type == "cpu"
