"""Conversions are complete or absent: killed, out of room, in each other's way; and what is wrong with a source is said."""

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import trained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anon_dist.checkpoint import CheckpointError, copy
from anon_dist.checkpoint.convert import convert
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.options import WriteOptions
from anon_dist.checkpoint.verify import verify
from anon_dist.cli import main

COMMAND = [sys.executable, "-m", "anon_dist.cli", "ckpt"]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    model, optimizer = trained("anon")
    path = tmp_path_factory.mktemp("script") / "a.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """About 100 MB."""
    path = tmp_path_factory.mktemp("large") / "a.pt"
    model = {f"w{i}": torch.randn(1 << 20) for i in range(8)}
    state = {
        i: {"exp_avg": torch.randn(1 << 20), "exp_avg_sq": torch.randn(1 << 20), "step": torch.tensor(1.0)}
        for i in range(8)
    }
    torch.save(
        {
            "model": model,
            "optimizer": {
                "state": state,
                "param_groups": [{"lr": 0.1, "params": list(range(8)), "param_names": list(model)}],
            },
        },
        path,
    )
    return path


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(copy, "SEGMENT", 1 << 20)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("to", ["consolidated", "dcp", "canonical"])
def test_a_stopped_conversion_goes_on(large, tmp_path, monkeypatch, small_steps, to):
    """After an error half way the target is absent; the next call writes only what is missing."""
    target, written = tmp_path / "out", []
    original = copy._write_region

    def failing(descriptor, source, region, observe):
        written.append(region)
        if len(written) == 15:
            raise KeyboardInterrupt
        original(descriptor, source, region, observe)

    monkeypatch.setattr(copy, "_write_region", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(large, target, to, WriteOptions(world_size=3))
    assert names(tmp_path) == ["out.partial"]
    again = []
    monkeypatch.setattr(copy, "_write_region", lambda *a: (again.append(a), original(*a)))
    convert(large, target, to, WriteOptions(world_size=3))
    assert names(tmp_path) == ["out"]
    assert len(again) <= (24 if to != "dcp" else 72) - 12
    assert verify(large, target) == []
    if to == "canonical":
        assert verify(target) == []
    else:
        with pytest.raises(CheckpointError, match="has no checksums"):
            verify(target)


def test_a_changed_source_begins_anew(large, script, tmp_path, monkeypatch, small_steps):
    target, source, count = tmp_path / "out", tmp_path / "in.pt", [0]
    shutil.copy(large, source)
    original = copy._write_region

    def failing(*args):
        count[0] += 1
        if count[0] == 15:
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr(copy, "_write_region", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, "canonical")
    other = torch.load(source)
    other["model"]["w0"] += 1
    torch.save(other, source)
    convert(source, target, "canonical")
    assert verify(source, target) == []


def test_a_killed_process_goes_on(large, tmp_path):
    target = tmp_path / "out"
    command = [*COMMAND, "convert", str(large), str(target), "--to", "dcp", "--world-size", "4"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("out.partial/data/*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists() or process.returncode == 0
    convert(large, tmp_path / "again", "dcp", WriteOptions(world_size=4))
    if not target.exists():
        subprocess.run(command, check=True, timeout=300, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert names(tmp_path) == ["again", "out"]
    assert verify(target, tmp_path / "again") == []


def test_no_room(large, tmp_path):
    """A file size limit stands for a full disk: one line, exit code 1, no target; with room, the same command goes on."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30 << 20, 30 << 20))

    command = [*COMMAND, "convert", str(large), str(tmp_path / "out.pt"), "--to", "consolidated"]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "error: no room for" in done.stderr
    assert "run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.pt").exists()
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    assert verify(large, tmp_path / "out.pt") == []


def test_a_disk_that_is_too_small_is_noticed_before_writing(large, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"no room for .*out .*it needs 0.10 GB"):
        convert(large, tmp_path / "out", "dcp")
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays(script, tmp_path):
    target = tmp_path / "out"
    convert(script, target, "canonical")
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    with pytest.raises(CheckpointError, match=r"out exists; .*--overwrite"):
        convert(script, target, "dcp")
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    convert(script, target, "dcp", overwrite=True)
    assert (target / ".metadata").exists()
    assert not (target / "manifest.json").exists()
    assert names(tmp_path) == ["out"]
    convert(script, target, "consolidated", overwrite=True)
    assert target.is_file()
    assert verify(script, target) == []


def test_places_that_cannot_be_targets(script, tmp_path):
    with pytest.raises(CheckpointError, match="lie in each other"):
        convert(script, script, "canonical", overwrite=True)
    convert(script, tmp_path / "c", "canonical")
    with pytest.raises(CheckpointError, match="lie in each other"):
        convert(tmp_path / "c", tmp_path / "c" / "inside", "dcp")
    with pytest.raises(CheckpointError, match="lie in each other"):
        convert(tmp_path / "c", tmp_path, "dcp", overwrite=True)
    with pytest.raises(CheckpointError, match="--to fsdp3 is no format; there are canonical"):
        convert(script, tmp_path / "x", "fsdp3")
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "mine").write_text("")
    with pytest.raises(CheckpointError, match="was not written by a conversion"):
        convert(script, tmp_path / "x", "dcp")
    assert (tmp_path / "x.partial" / "mine").exists()


def test_the_source_is_not_touched(script, tmp_path):
    before = script.read_bytes(), script.stat().st_mtime_ns
    convert(script, tmp_path / "a", "canonical")
    assert (script.read_bytes(), script.stat().st_mtime_ns) == before


# -- damaged and foreign sources ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    convert(script, folder / "dcp", "dcp", WriteOptions(world_size=3))
    convert(script, folder / "canonical", "canonical")
    convert(script, folder / "hf", "hf")
    return folder


@pytest.mark.parametrize(
    ("kind", "file", "said"),
    [
        ("dcp", "__1_0.distcp", "__1_0.distcp cannot be opened"),
        ("dcp", ".metadata", ".metadata is missing"),
        ("canonical", "index.json", "index.json cannot be read"),
        ("canonical", "tensors-00001-of-00001.safetensors", "safetensors cannot be opened"),
    ],
)
def test_a_missing_file(whole, tmp_path, kind, file, said):
    source = shutil.copytree(whole / kind, tmp_path / "source")
    (source / file).unlink()
    with pytest.raises(CheckpointError, match=said):
        convert(source, tmp_path / "out", "consolidated")
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("dcp", "__1_0.distcp"),
        ("dcp", ".metadata"),
        ("canonical", "index.json"),
        ("canonical", "manifest.json"),
        ("canonical", "tensors-00001-of-00001.safetensors"),
        ("hf", "model.safetensors"),
    ],
)
@pytest.mark.parametrize("part", [0.0, 0.4, 0.99])
def test_a_truncated_file(whole, tmp_path, kind, file, part):
    source = shutil.copytree(whole / kind, tmp_path / "source")
    os.truncate(source / file, int((source / file).stat().st_size * part))
    with pytest.raises(CheckpointError, match=file.split("-")[0]):
        convert(source, tmp_path / "out", "consolidated")
    assert names(tmp_path) == ["source"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["script", "dcp", "canonical"]), data=st.data())
def test_any_byte_may_be_wrong(whole, script, tmp_path_factory, kind, data):
    """Whatever is damaged: an error of ours, or a checkpoint that is read; never another exception, never a half target."""
    folder = tmp_path_factory.mktemp("fuzz")
    source = folder / "source"
    shutil.copy(script, source) if kind == "script" else shutil.copytree(whole / kind, source)
    paths = [source] if source.is_file() else sorted(source.iterdir())
    path = data.draw(st.sampled_from(paths))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        convert(source, folder / "out", "consolidated")
    except CheckpointError:
        assert names(folder) in (["source"], ["out.partial", "source"])
    shutil.rmtree(folder)


def test_damage_shows_in_the_checksums(whole, tmp_path):
    source = shutil.copytree(whole / "canonical", tmp_path / "source")
    assert verify(source) == []
    file = source / "tensors-00001-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    found = verify(source)
    assert len(found) == 1
    assert "is damaged" in found[0].how
    assert str(file) in found[0].how
    with pytest.raises(CheckpointError, match=r"safetensors is damaged: the checksum of bytes \d+ to \d+ differs"):
        convert(source, tmp_path / "out", "consolidated")
    assert not (tmp_path / "out").exists()


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_code_of_a_dcp_folder_is_run(whole, tmp_path):
    source = shutil.copytree(whole / "dcp", tmp_path / "source")
    meta = pickle.loads((source / ".metadata").read_bytes())
    meta.planner_data["evil"] = Evil(tmp_path / "ran")
    (source / ".metadata").write_bytes(pickle.dumps(meta))
    with pytest.raises(CheckpointError, match=r".metadata holds an object of posix.mkdir"):
        open_checkpoint(source)
    assert not (tmp_path / "ran").exists()


def test_foreign_places_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "text.txt").write_text("hello")
    for path in (tmp_path / "text.txt", tmp_path):
        with pytest.raises(
            CheckpointError, match=r"no checkpoint of a known format. Looked for canonical: manifest.json"
        ):
            open_checkpoint(path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list.pt holds a list"):
        open_checkpoint(tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "dict.pt")
    with pytest.raises(CheckpointError, match=r"dict.pt holds neither a model's nor an optimizer's .* its keys: a"):
        open_checkpoint(tmp_path / "dict.pt")


# -- the command ---------------------------------------------------------------------------------------------------------


def run(*args):
    """The command, in this process: the tests above start it as users do."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(["ckpt", *map(str, args)])
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
            if isinstance(exit_.code, str):
                print(exit_.code, file=sys.stderr)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def test_the_command(script, tmp_path):
    done = run("convert", script, tmp_path / "dcp", "--to", "dcp", "--world-size", "2")
    assert done.returncode == 0, done.stderr
    assert "is complete" in done.stdout
    shown = json.loads(run("inspect", tmp_path / "dcp", "--json").stdout)
    assert (shown["format"], shown["optimizer"], shown["world_size"]) == ("dcp", "Anon", 2)
    assert "exp_avg_sq" in run("inspect", script).stdout
    assert run("verify", script, tmp_path / "dcp").returncode == 0
    other = torch.load(script)
    other["optimizer"]["state"][0]["exp_avg"][0, 0] += 1
    other["optimizer"]["param_groups"][1]["lr"] = 0.5
    torch.save(other, tmp_path / "other.pt")
    done = run("verify", script, tmp_path / "other.pt")
    assert done.returncode == 1
    assert "1 of 66 elements, the first at 0" in " ".join(done.stdout.split())
    assert "hyperparameter lr" in " ".join(done.stdout.split())
    done = run("inspect", Path(tmp_path / "nothing"))
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        == f"error: {tmp_path / 'nothing'} does not exist; name a run, or a checkpoint's file or folder"
    )
