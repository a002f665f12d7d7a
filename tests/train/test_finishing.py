"""Signals after the last step: the run ends as between steps, and the same command does the rest."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from helpers import metrics, send
from ranks import run_ranks

from anon_dist.checkpoint.checksums import checksums
from anon_dist.train import finishing
from anon_dist.train.config.errors import Interrupted, RunError
from anon_dist.train.health import signals
from anon_dist.train.reports.metrics import MetricsFile
from anon_dist.train.reports.report import RESULT
from anon_dist.train.saving import Saver

ROOT = Path(__file__).parents[2]
SLOW = Path(__file__).with_name("slow_ends.py")
SMALL = """
model: {layers: 2, width: 32, heads: 2, context: 32}
data: {path: PATH, seq_len: 32}
optim: {lr: 3.0e-3}
schedule: {warmup_steps: 3}
train: {steps: 8, global_batch: 8, micro_batch: 4, engine: ddp}
eval: {final_sequences: 32}
checkpoint: {every: 5}
log: {every: 1, trackers: []}
"""
RESULTS = "The same command makes the results."


@pytest.fixture
def options(prepared, tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL.replace("PATH", str(prepared)))
    return ["--config", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / "run")]


def in_batch(monkeypatch, number, action):
    """Have `action()` called before a batch of the final validation; the number of batches that were begun goes to the list."""
    original, begun = finishing.validate, []

    def validate(run, sequences, prefix, look):
        def looked():
            begun.append(1)
            if len(begun) == number:
                action()
            look()

        return original(run, sequences, prefix, looked)

    monkeypatch.setattr(finishing, "validate", validate)
    return begun


def assert_whole(folder):
    """The last checkpoint is as it was written, and nothing of the results is there, not half of them either."""
    assert not checksums(folder / "checkpoints" / "step-00000014").verify()
    assert not [p.name for p in folder.iterdir() if p.name.startswith(("model", "result", "loss"))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_validation_is_left_between_batches(number, run_config, train, tmp_path, monkeypatch, capsys):
    whole, config = train(run_config(run_dir=str(tmp_path / "whole"))), run_config()
    with monkeypatch.context() as patch:
        begun = in_batch(patch, 3, send(number))
        with pytest.raises(Interrupted) if number == signal.SIGINT else contextlib.nullcontext():
            train(config)
    assert len(begun) == 3  # of 8
    said = f"Stopped by {number.name} after the last step; its checkpoint is written. {RESULTS}"
    assert said in capsys.readouterr().out
    assert_whole(tmp_path / "run")
    train(config)
    assert metrics(tmp_path / "run") == metrics(whole)
    assert "final_loss" in metrics(whole)[-1]


def test_a_signal_in_the_last_step_or_its_save_is_heard(run_config, train, tmp_path, monkeypatch, capsys):
    save, config = Saver.save, run_config(checkpoint__every=0)
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save", lambda saver: (save(saver), send(signal.SIGTERM)()))
        train(config)
    assert RESULTS in capsys.readouterr().out
    assert_whole(tmp_path / "run")


def test_the_end_of_a_launcher_is_a_signal(run_config, train, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        launcher = SimpleNamespace(gone=False, name="torchrun", pid=77)
        patch.setattr(signals, "LAUNCHER", launcher)
        in_batch(patch, 2, lambda: setattr(launcher, "gone", True))
        train(run_config())
    assert "Stopped by the end of its launcher (torchrun, process 77) after the last step;" in capsys.readouterr().out
    assert_whole(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_being_exported_is_finished(number, run_config, train, tmp_path, monkeypatch, capsys):
    export = finishing.export_model
    monkeypatch.setattr(finishing, "export_model", lambda *args: (send(number)(), export(*args)))
    with pytest.raises(Interrupted) if number == signal.SIGINT else contextlib.nullcontext():
        train(run_config())
    assert f"The run is finished; {number.name} came while its results were written." in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / RESULT).read_text())["step"] == 14
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_metrics_that_cannot_be_written_after_the_last_step_end_the_run(run_config, train, tmp_path, monkeypatch):
    """Of the last saves: what is not recorded is not to be taken for finished."""
    write = MetricsFile.write

    def full(file, record):
        if set(record) > {"saves"} and "loss" not in record and "val_loss" not in record:
            raise OSError("No space left on device")
        write(file, record)

    with monkeypatch.context() as patch, pytest.raises(RunError, match="No space left on device"):
        patch.setattr(MetricsFile, "write", full)
        train(run_config())
    assert_whole(tmp_path / "run")


@pytest.mark.parametrize("finished", [False, True])
def test_copies_are_left_to_the_same_command(finished, run_config, train, tmp_path, monkeypatch, capsys):
    """By a run at its end, and by one that has nothing else to do. The store is never done with the last checkpoint's files."""
    address, store = f"memory://{tmp_path}/there", fsspec.filesystem("memory")
    config = run_config(checkpoint__remote=address)
    if finished:
        train(run_config())
    put_file = type(store).put_file

    def endless(self, source, target, callback, **options):
        if "step-00000014" not in target:
            return put_file(self, source, target, callback=callback, **options)
        while not (tmp_path / "run" / RESULT).exists():
            time.sleep(0.01)
        send(signal.SIGTERM)()
        while True:
            callback.relative_update(1)

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "put_file", endless)
        train(config)
    said = f"Stopped by SIGTERM after its results were written. The same command copies to {address} what is not there yet."
    assert said in capsys.readouterr().out
    assert not store.exists(f"{tmp_path}/there/step-00000014/trainer.json")
    train(config)
    assert "Nothing to do" in capsys.readouterr().out
    assert store.exists(f"{tmp_path}/there/step-00000014/trainer.json")
    store.store.clear()


@pytest.mark.parametrize(("moment", "sender"), [("validation", "1"), ("copying", "0")])
def test_a_signal_to_one_of_two_ranks_ends_both(moment, sender, options, tmp_path):
    options = [*options, "--checkpoint.remote", f"file://{tmp_path / 'there'}"]
    environments = [{**os.environ, "MOMENT": moment, "SENDER": sender}] * 2
    assert run_ranks(SLOW, environments, options, tmp_path / "log", 120), (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert said.count("Stopped by ") == 1
    assert ("after the last step;" if moment == "validation" else "after its results were written.") in said
    assert (tmp_path / "run" / RESULT).exists() == (moment == "copying")
    assert not checksums(tmp_path / "run" / "checkpoints" / "step-00000008").verify()
    assert run_ranks(SLOW, [os.environ] * 2, options, tmp_path / "log", 120), (tmp_path / "log").read_text()
    assert (tmp_path / "run" / RESULT).exists()
    assert (tmp_path / "there" / "step-00000008" / "trainer.json").exists()


@pytest.mark.parametrize("moment", ["validation", "copying"])
def test_a_run_that_is_preempted_at_its_end_has_that_exit_code(moment, options, tmp_path):
    """launch/multinode/torchrun.sh on one node of two ranks, whose launcher starts them with a long end."""
    (tmp_path / "bin").mkdir()
    torchrun = tmp_path / "bin" / "torchrun"
    torchrun.write_text(f'#!/bin/bash\nexec {shutil.which("torchrun")} "${{@/#launch\\/pretrain.py/{SLOW}}}"\n')
    torchrun.chmod(0o755)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "NODES": "1", "RANKS_PER_NODE": "2"}
    environment |= {"NODE_RANK": "0", "STOPPED_CODE": "75", "OMP_NUM_THREADS": "1", "VENV": str(tmp_path)}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    command = ["bash", str(ROOT / "launch" / "multinode" / "torchrun.sh"), *options]
    command += ["--checkpoint.remote", f"file://{tmp_path / 'there'}"]

    def start(**more):
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment, **more},
            start_new_session=True,
        )

    process = start(MOMENT=moment)
    for line in process.stdout:
        if line == "HERE\n":
            process.send_signal(signal.SIGTERM)
            break
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    assert output.count("Stopped by SIGTERM after ") == 1
    process = start()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert (tmp_path / "run" / RESULT).exists()


@pytest.fixture
def torchrun_sh(options, tmp_path):
    """Starts launch/multinode/torchrun.sh on one node, with a launcher of the test's."""

    def start(launcher, **more):
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "torchrun").write_text(f"#!/bin/bash\n{launcher}\n")
        (tmp_path / "bin" / "torchrun").chmod(0o755)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29534", "NODES": "1", "NODE_RANK": "0"}
        place |= {"VENV": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        return subprocess.Popen(
            ["bash", str(ROOT / "launch" / "multinode" / "torchrun.sh"), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **place, **more},
        )

    return start


def test_a_signal_that_comes_while_ranks_are_starting_is_not_lost(torchrun_sh, tmp_path):
    """They ignore it until they can answer: it would have been the only one that Slurm sends."""
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import signal, sys, time\nprint('STARTING', flush=True)\ntime.sleep(2)\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(print('STOPPED', flush=True)))\nsignal.pause()\n"
    )
    process = torchrun_sh(f"{sys.executable} {rank} & wait $!")
    for line in process.stdout:
        if line == "STARTING\n":
            process.send_signal(signal.SIGUSR1)
            break
    output, _ = process.communicate(timeout=60)
    assert (output, process.returncode) == ("STOPPED\n", 0)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_before_there_are_ranks_starts_none(name, torchrun_sh, tmp_path):
    checks = tmp_path / "sitecustomize.py"
    checks.write_text("import time\nprint('CHECKING', flush=True)\ntime.sleep(2)\n")
    process = torchrun_sh("echo STARTED", STOPPED_CODE="75", PYTHONPATH=f"{tmp_path}:{ROOT}")
    for line in process.stdout:
        if line == "CHECKING\n":
            process.send_signal(signal.Signals[name])
            break
    output, _ = process.communicate(timeout=60)
    assert f"stopped by {name} before its ranks were started" in output
    assert "STARTED" not in output
    assert process.returncode == 75
