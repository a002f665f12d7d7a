"""Runs as a user starts them: through the launchers, and killed like a machine that loses power."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import metrics
from ranks import run_ranks

from anon_dist.exits import IN_USE

ROOT = Path(__file__).parents[2]
SMALL = """
model: {layers: 2, width: 32, heads: 2, context: 32}
data: {path: PATH, seq_len: 32}
optim: {lr: 3.0e-3}
schedule: {warmup_steps: 3}
train: {steps: 60, global_batch: 8, micro_batch: 4}
eval: {every: 25, sequences: 16, final_sequences: 32}
checkpoint: {every: 5}
log: {every: 1}
"""


@pytest.fixture(scope="module")
def config(prepared, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("launch") / "small.yaml"
    path.write_text(SMALL.replace("PATH", str(prepared)))
    return path


def launch(config: Path, run_dir: Path, launcher: list[str], *options: str) -> subprocess.Popen[str]:
    command = [
        *launcher,
        str(ROOT / "launch" / "pretrain.py"),
        "--config",
        str(config),
        "--run-dir",
        str(run_dir),
        *options,
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )


def accelerate(config_file: str, ranks: int = 2) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "configs" / "accelerate" / config_file),
    ]
    return [*command, "--num_processes", str(ranks)]


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the end of a run that should succeed; its output."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def test_what_one_rank_finds_altered_ends_all(config, prepared, tmp_path):
    """After the start, at the first touch, which one of two ranks has in a given step."""
    shutil.copytree(prepared, tmp_path / "altered")
    shard = tmp_path / "altered" / "train-00000.bin"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    process = launch(
        config,
        tmp_path / "run",
        accelerate("fsdp2.yaml"),
        "--data.path",
        str(tmp_path / "altered"),
        "--data.seq-len",
        "8",
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "train-00000.bin is altered: bytes 0 to " in output
    assert "anon_dist/data/" not in output  # a line, not where in the code


def test_killed_at_random_times_it_ends_like_one_that_was_not(config, tmp_path):
    """SIGKILL to every process of the run, launcher included, at any moment: in a step, in a checkpoint."""

    def without_launcher(name):
        """What the run prints if two ranks go on with it to its end."""
        log, options = tmp_path / "log", ["--config", str(config), "--run-dir", str(tmp_path / name)]
        options += ["--train.engine", "fsdp2"]
        log.unlink(missing_ok=True)
        well = run_ranks(ROOT / "launch" / "pretrain.py", [os.environ] * 2, options, log, seconds=300)
        assert well, log.read_text()
        return log.read_text()

    without_launcher("whole")
    moment = random.Random(0)
    for _ in range(2):
        process = launch(config, tmp_path / "killed", accelerate("fsdp2-cpu.yaml"))
        steps = (line for line in process.stdout if line.startswith("step="))
        for _ in range(moment.randint(1, 20)):
            next(steps)
        time.sleep(moment.uniform(0.0, 0.1))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    output = finish(launch(config, tmp_path / "killed", accelerate("fsdp2-cpu.yaml")))
    assert "Resuming" in output
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert "Nothing to do" in without_launcher("killed")


def test_sigterm_to_the_launcher_saves(config, tmp_path):
    process = launch(
        config, tmp_path / "run", accelerate("ddp-cpu.yaml"), "--checkpoint.every", "0", "--train.steps", "100000"
    )
    for line in process.stdout:
        if line.startswith("step=3 "):
            break
    process.terminate()
    output, _ = process.communicate(timeout=300)
    assert "Stopped by SIGTERM after step" in output
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_one_run_in_a_folder_and_none_without_its_launcher(config, tmp_path):
    """A second start is refused. The launcher alone is killed: its ranks save, and end."""
    options = ("--checkpoint.every", "0", "--train.steps", "100000")
    process = launch(config, tmp_path / "run", accelerate("ddp-cpu.yaml"), *options)
    for line in process.stdout:
        if line.startswith("step=3 "):
            break
    second = launch(config, tmp_path / "run", [sys.executable], *options)
    output, _ = second.communicate(timeout=200)
    assert second.returncode == IN_USE
    assert output.count("\n") == 1
    assert output.startswith(f"error: run_dir = {tmp_path / 'run'} is in use by process ")
    process.kill()
    output = process.stdout.read()  # the ranks have the pipe, until they end
    process.wait()
    process.stdout.close()
    name = f"accelerate.commands.launch, process {process.pid}"
    assert f"Stopped by the end of its launcher ({name}) after step" in output
    # How soon is the machine's load to say; but long before the end, and with the checkpoint of the very step that was the last.
    last = metrics(tmp_path / "run")[-1]["step"]
    assert last < 10_000
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{last:08d}"]


def test_one_process_instead_of_several_is_noticed(config, tmp_path):
    """accelerate's MULTI_CPU launcher starts a single process, whatever num_processes says, without a word."""
    text = (ROOT / "configs" / "accelerate" / "ddp-cpu.yaml").read_text()
    (tmp_path / "multi-cpu.yaml").write_text(
        text.replace("MULTI_GPU\n", "MULTI_CPU\n").replace("port: 0", "port: 29400")
    )
    process = launch(config, tmp_path / "run", accelerate(str(tmp_path / "multi-cpu.yaml")))
    output, _ = process.communicate(timeout=300)
    assert "accelerate was to start several processes and started one" in output
    assert process.returncode == 1
