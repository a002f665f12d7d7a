"""Checksums of training checkpoints, and files that would run code or lead elsewhere; on several ranks: the distributed cases."""

import contextlib
import json
import os
import pickle
import random
import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import xxhash
from damage import EVIL, PAYLOADS, altered, flip, poison, poison_entry, refused, unsealed
from torch import nn

from anon_dist import Anon
from anon_dist.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint, load_sharded, save_sharded
from anon_dist.checkpoint import checksums as sums
from anon_dist.checkpoint.convert import convert
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.keeping.folder import read_progress
from anon_dist.checkpoint.options import WriteOptions
from anon_dist.checkpoint.schema import Key
from anon_dist.checkpoint.torchfiles.mapped import verified
from anon_dist.checkpoint.torchfiles.torchfile import LEGACY, open_torch
from anon_dist.checkpoint.verify import differences, verify
from anon_dist.cli import main
from anon_dist.engines.restore import check_present
from anon_dist.train.inputs import randomness


def make(width=700):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 3))
    optimizer = Anon(model.parameters(), lr=0.1)
    model(torch.ones(2, width)).square().mean().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint whose one tensor file has several blocks; never changed."""
    model, optimizer = make()
    checkpoints = Checkpoints(tmp_path_factory.mktemp("run") / "checkpoints", 1)
    with checkpoints.writing(7, {"step": 7, "world_size": 1}) as folder:
        save_sharded(folder, model, optimizer)
        (folder / "deepspeed").mkdir()
        torch.save({"a": torch.arange(100_000.0)}, folder / "deepspeed" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        (folder / "deepspeed" / "empty").touch()
        randomness.save(folder, 0)
    return checkpoints.latest()


@pytest.fixture
def checkpoint(written, tmp_path):
    return shutil.copytree(written, tmp_path / written.name)


def load_all(checkpoint):
    """Everything that a resume reads, of several engines."""
    read_progress(checkpoint)
    load_sharded(checkpoint, *make())
    randomness.load(checkpoint, 0)
    found = open_torch(checkpoint / "deepspeed" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return verified(found["a"])


def test_every_file_is_listed_with_size_and_checksum(written):
    listed = json.loads((written / "checksums.json").read_text())["files"]
    there = {p.relative_to(written).as_posix(): p for p in written.rglob("*") if p.is_file()}
    assert set(listed) == set(there) - {"checksums.json", "trainer.json"}
    assert all(listed[name]["size"] == there[name].stat().st_size for name in listed)
    assert there["__0_0.distcp"].stat().st_size > 3 * sums.BLOCK
    assert verify(written) == []
    load_all(written)


def test_any_flipped_bit_is_noticed_by_verify_and_by_whoever_reads_it(checkpoint):
    """At several places of every file."""
    place = random.Random(0)
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size)
    assert len(files) == 8
    for path in files:
        name = path.relative_to(checkpoint).as_posix()
        listing = name in ("trainer.json", "checksums.json")
        for at in [0.0, 0.999999] + [place.random() for _ in range(4)]:
            with altered(path, flip, at):
                refused(
                    DamagedCheckpoint, f"{checkpoint.name}/{name} is damaged.*earlier checkpoint", load_all, checkpoint
                )
                if listing:
                    refused(DamagedCheckpoint, f"{name} is damaged", verify, checkpoint)
                else:
                    assert [line.what for line in verify(checkpoint)] == [name]
    load_all(checkpoint)


def test_missing_truncated_and_foreign_files(checkpoint):
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != "trainer.json"):
        for how in (
            Path.unlink,
            lambda p: os.truncate(p, p.stat().st_size // 2 or 3),
            lambda p: p.write_bytes(b"x" * 9),
        ):
            with altered(path, how):
                refused(
                    DamagedCheckpoint, f"{path.name} (is missing|is damaged|does not)", present_and_loaded, checkpoint
                )
    present_and_loaded(checkpoint)
    (checkpoint / "notes.txt").write_text("mine")
    assert verify(checkpoint) == []
    shutil.copy(checkpoint / "random-00000.pt", checkpoint / "random-00001.pt")
    present_and_loaded(checkpoint)
    refused(
        DamagedCheckpoint,
        "random-00001.pt is none of the files that .*checksums.json lists",
        randomness.load,
        checkpoint,
        1,
    )


def present_and_loaded(checkpoint):
    check_present(checkpoint)
    load_all(checkpoint)


def test_a_single_process_is_not_warned_that_it_is_one(tmp_path):
    """Nor the second time, after a block whose filters of warnings ended with it."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            save_sharded(tmp_path / name, *make(4))
            load_sharded(tmp_path / name, *make(4))
        assert not [str(w.message) for w in said if "torch.distributed is disabled" in str(w.message)]


def test_only_the_blocks_of_a_part_are_read(tmp_path, monkeypatch):
    """Another world size reads parts: the blocks that a part touches, each once, and no others."""
    checkpoints = Checkpoints(tmp_path, 1)
    with checkpoints.writing(1, {}) as folder:
        save_sharded(folder, *make(1500))
    file = open_checkpoint(checkpoints.latest())
    seen, original = [], sums.FileSums.check
    monkeypatch.setattr(sums.FileSums, "check", lambda self, i, data: (seen.append(i), original(self, i, data)))
    key, mib = Key("0.weight", "exp_avg"), (1 << 20) // 4
    file.read(key, 4 * mib, 4 * mib + 10)
    del seen[:-1]  # before it, the tensor's record is looked up
    file.read(key, 4 * mib, 7 * mib)
    assert sorted(seen) == list(range(seen[0], seen[0] + 4))
    file.read(key, 5 * mib, 6 * mib)
    assert len(seen) == 4


def test_checkpoints_without_checksums_are_read(checkpoint):
    """Those of earlier versions; and verify says that it cannot tell."""
    with unsealed(checkpoint):
        present_and_loaded(checkpoint)
        refused(CheckpointError, "has no checksums", verify, checkpoint)
    with altered(checkpoint / "checksums.json", Path.unlink):  # but it cannot be made to be one
        refused(DamagedCheckpoint, "checksums.json is missing", load_all, checkpoint)


def test_what_is_converted_is_checked(checkpoint, tmp_path):
    shutil.rmtree(checkpoint / "deepspeed")
    content = json.loads((checkpoint / "checksums.json").read_text())
    with altered(checkpoint / "__0_0.distcp", flip, 0.5):
        refused(DamagedCheckpoint, "__0_0.distcp is damaged", convert, checkpoint, tmp_path / "a", "canonical")
    assert not (tmp_path / "a").exists()
    convert(checkpoint, tmp_path / "b", "dcp")
    assert content["files"]["__0_0.distcp"]["size"] == (checkpoint / "__0_0.distcp").stat().st_size
    assert read_progress(tmp_path / "b") == {"step": 7, "world_size": 1}
    assert verify(tmp_path / "b") == []
    with altered(tmp_path / "b" / "__0_0.distcp", flip, 0.5):
        refused(DamagedCheckpoint, "b/__0_0.distcp is damaged", load_sharded, tmp_path / "b", *make())
    assert differences(open_checkpoint(checkpoint), open_checkpoint(tmp_path / "b")) == []


def test_verify_on_the_command_line(checkpoint, capsys):
    main(["ckpt", "verify", str(checkpoint)])
    assert capsys.readouterr().out == "as written\n"
    for name in ("notes.txt", "deepspeed/__7_0.distcp"):
        (checkpoint / name).write_text("x")
    main(["ckpt", "verify", str(checkpoint)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "as written"
    assert [line.split()[1] for line in lines[1:]] == [
        f"{checkpoint}/deepspeed/__7_0.distcp",
        f"{checkpoint}/notes.txt",
    ]
    for name in ("notes.txt", "deepspeed/__7_0.distcp"):
        (checkpoint / name).unlink()
    with altered(checkpoint / "deepspeed" / "empty", Path.write_text, "x"), pytest.raises(SystemExit) as stopped:
        main(["ckpt", "verify", str(checkpoint)])
    assert stopped.value.code == 1
    assert "empty" in capsys.readouterr().out


# -- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAYLOADS)
def test_no_door_runs_code(kind, checkpoint, tmp_path, capfd):
    """And each payload does, with pickle."""
    mark = tmp_path / "ran"
    pickled = PAYLOADS[kind](mark)
    with unsealed(checkpoint):
        with altered(checkpoint / ".metadata", poison, pickled):
            refused(CheckpointError, r"\.metadata (holds an object|cannot be read)", load_sharded, checkpoint, *make(9))
            refused(CheckpointError, r"\.metadata (holds an object|cannot be read)", open_checkpoint, checkpoint)
        with altered(checkpoint / ".metadata", poison_entry, pickled):
            refused(CheckpointError, f"{EVIL} holds an object of .*code", load_sharded, checkpoint, *make())
            refused(CheckpointError, f"{EVIL} holds an object of .*code", open_checkpoint, checkpoint)
        with altered(checkpoint / "random-00000.pt", poison, pickled):
            refused(CheckpointError, "random-00000.pt holds an object of .*code", randomness.load, checkpoint, 0)
    old = tmp_path / "before-1.6.pt"
    old.write_bytes(LEGACY + b"." + pickled)
    refused(CheckpointError, "before-1.6.pt holds an object of .*code", open_torch, old)
    assert not mark.exists()
    with contextlib.suppress(Exception):
        pickle.loads(pickled)
    assert mark.exists()


def test_no_state_is_given_to_what_others_use(tmp_path):
    """BUILD sets attributes: of a class or function that is known, for everybody; a dtype's flags make bytes pointers."""
    for pickled in (
        b"\x80\x02ccollections\nCounter\nN}X\x04\x00\x00\x00evilK\x01s\x86b.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.",
        b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00O8K\x00K\x01\x87R(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.",
        b"\x80\x02cnumpy\nndarray\nK\x01\x85X\x01\x00\x00\x00OC\x08AAAAAAAA\x87R.",
    ):
        torch.save(1, tmp_path / "f.pt")
        poison(tmp_path / "f.pt", pickled)
        refused(CheckpointError, "f.pt (holds an object of|is damaged)", open_torch, tmp_path / "f.pt")
    assert not hasattr(Counter, "evil")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == (None,)


# -- paths ------------------------------------------------------------------------------------------------------------


def test_paths_stay_inside(checkpoint, tmp_path):
    """Of DCP's metadata, the canonical index and Hugging Face's, DeepSpeed's `latest` and what a conversion writes."""
    outside = tmp_path / "outside"
    shutil.copytree(checkpoint, outside)
    name = "__0_0.distcp"
    for path in (f"../outside/{name}", str(outside / name), f"x/../../outside/{name}"):
        with unsealed(checkpoint), altered(checkpoint / ".metadata", relative_paths, path):
            for reading in (open_checkpoint, lambda folder: load_sharded(folder, *make())):
                refused(CheckpointError, "which is not in its folder", reading, checkpoint)
    with unsealed(checkpoint):
        (checkpoint / name).unlink()
        (checkpoint / name).symlink_to(outside / name)
        for reading in (open_checkpoint, lambda folder: load_sharded(folder, *make())):
            refused(CheckpointError, "is a link that leads out of its folder", reading, checkpoint)

    canonical, weights = tmp_path / "canonical", tmp_path / "hf"
    shutil.rmtree(outside / "deepspeed")
    convert(outside, canonical, "canonical")
    convert(outside, weights, "hf")
    index = json.loads((canonical / "index.json").read_text())
    index["tensors"] = [{**t, "file": f"../canonical/{t['file']}"} for t in index["tensors"]]
    del index["self"]
    index["self"] = xxhash.xxh3_64_hexdigest(
        json.dumps(index, sort_keys=True).encode()
    )  # who means harm writes it anew
    (canonical / "index.json").write_text(json.dumps(index))
    refused(CheckpointError, "index.json names .* not in its folder", open_checkpoint, canonical)
    places = {"weight_map": {"a": "../hf/model.safetensors"}}
    (weights / "model.safetensors.index.json").write_text(json.dumps(places))
    refused(CheckpointError, "index.json names .* not in its folder", open_checkpoint, weights)

    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "latest").write_text("../outside")
    refused(CheckpointError, "latest names '../outside'", open_checkpoint, tmp_path / "zero")


def test_a_snapshot_of_the_hubs_cache_is_read(tmp_path, written):
    """Its files are links, to blobs that lie beside the snapshots."""
    plain = shutil.copytree(written, tmp_path / "plain", ignore=shutil.ignore_patterns("deepspeed"))
    convert(plain, tmp_path / "hf", "hf")
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "blobs").mkdir()
    shutil.copy(tmp_path / "hf" / "model.safetensors", tmp_path / "hub" / "blobs" / "1")
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/1")
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert Key("0.weight", "weight") in open_checkpoint(snapshot).tensors


def test_a_conversion_writes_inside_its_target(tmp_path, written):
    """A file of extras may name others."""
    source = shutil.copytree(written, tmp_path / "source", ignore=shutil.ignore_patterns("deepspeed", "checksums.json"))
    (source / "trainer.json").unlink()
    torch.save({"files": {"../../escaped": b"x"}}, source / "extras.pt")
    refused(
        CheckpointError,
        "escaped, which would lie outside",
        convert,
        source,
        tmp_path / "to",
        "dcp",
        WriteOptions(layout="accelerate"),
    )
    assert not list(tmp_path.rglob("escaped"))


def relative_paths(metadata, path):
    meta = pickle.loads(metadata.read_bytes())
    for info in meta.storage_data.values():
        info.relative_path = path
    metadata.write_bytes(pickle.dumps(meta))
