"""The canonical folder: nothing of it is taken unchecked, whoever reads it."""

import json
import shutil

import pytest
import torch
import xxhash
from checkpoints import trained
from safetensors import safe_open
from safetensors.torch import save_file

from anon_dist.checkpoint import CheckpointError, DamagedCheckpoint
from anon_dist.checkpoint.convert import convert
from anon_dist.checkpoint.copy import BLOCK
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.options import WriteOptions
from anon_dist.checkpoint.schema import Key
from anon_dist.checkpoint.torchfiles.mapped import MappedFile
from anon_dist.checkpoint.verify import verify

TENSORS = "tensors-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, optimizer = trained("anon")
    whole = tmp_path_factory.mktemp("canonical")
    extras = {"best": {1, 2}, "curve": torch.arange(9.0)}  # what JSON cannot say
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **extras}, whole / "a.pt")
    convert(whole / "a.pt", whole / "canonical", "canonical")
    return whole / "canonical"


def test_whatever_bit_is_wrong_a_conversion_refuses_it_or_gives_what_was_written(folder, tmp_path):
    """What may go unnoticed (a space in a header that became a tab) changes nothing."""
    convert(folder, tmp_path / "right.pt", "consolidated")
    right, refused = (tmp_path / "right.pt").read_bytes(), dict.fromkeys(["manifest", "index", "tensors", "extras"], 0)
    for path in sorted(folder.iterdir()):
        source = shutil.copytree(folder, tmp_path / "source")
        content = path.read_bytes()
        for at in range(3, len(content), max(1, len(content) // 40)):
            altered = bytearray(content)
            altered[at] ^= 1 << at % 8
            (source / path.name).write_bytes(altered)
            try:
                convert(source, tmp_path / "out.pt", "consolidated")
            except CheckpointError:
                refused[path.name.partition(".")[0].partition("-")[0]] += 1
            else:
                assert (tmp_path / "out.pt").read_bytes() == right, (path.name, at)
                (tmp_path / "out.pt").unlink()
            shutil.rmtree(tmp_path / "out.pt.partial", ignore_errors=True)
        shutil.rmtree(source)
    assert min(refused.values()) >= 35, refused


def test_each_byte_is_checked_once_and_only_where_it_is_read(tmp_path, monkeypatch):
    """By the block, so that a rank that wants a part of a large tensor hashes that part."""
    numel = 3 * BLOCK // 4 + 5
    torch.save({"model": {"w": torch.arange(float(numel))}}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "c", "canonical")
    checked = []
    plain = MappedFile.check

    def check(self, start, stop):
        before = sum(self._checked)
        plain(self, start, stop)
        checked.append(sum(self._checked) - before)

    monkeypatch.setattr(MappedFile, "check", check)
    opened = open_checkpoint(tmp_path / "c")
    assert sum(checked) == 0
    part = opened.read(Key("w", "weight"), BLOCK // 4 + 1, BLOCK // 4 + 3)
    assert part.tolist() == [BLOCK // 4 + 1, BLOCK // 4 + 2]
    assert sum(checked) == 1
    content = bytearray((tmp_path / "c" / TENSORS).read_bytes())
    content[-1] ^= 1
    (tmp_path / "c" / TENSORS).write_bytes(content)
    again = open_checkpoint(tmp_path / "c")
    assert torch.equal(again.read(Key("w", "weight"), 0, 2), torch.tensor([0.0, 1.0]))
    with pytest.raises(DamagedCheckpoint, match=rf"weight of w cannot be read: .*{TENSORS} is damaged"):
        again.read(Key("w", "weight"), numel - 1, numel)
    del checked[:]
    with pytest.raises(DamagedCheckpoint):
        convert(
            tmp_path / "c", tmp_path / "d", "dcp", WriteOptions(world_size=3), workers=1
        )  # two would count each other's
    assert sum(checked) <= 4


def test_what_an_interrupted_conversion_wrote_has_checksums_too(folder, tmp_path, monkeypatch):
    from anon_dist.checkpoint import copy

    plain, calls = copy._write_region, []

    def fails_once(*args):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(5, "Input/output error")
        plain(*args)

    monkeypatch.setattr(copy, "_write_region", fails_once)
    monkeypatch.setattr(copy, "SEGMENT", 1)
    with pytest.raises(CheckpointError, match="Input/output error"):
        convert(folder, tmp_path / "again", "canonical")
    convert(folder, tmp_path / "again", "canonical")
    assert verify(folder, tmp_path / "again") == []


def test_a_folder_of_version_1_is_read_and_checked(folder, tmp_path):
    """It had the xxh3 of the xxh3 of each block for a tensor, and no checksums of the small files."""
    old = shutil.copytree(folder, tmp_path / "old")
    with safe_open(old / TENSORS, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.offset_keys()}

    def digest(tensor):
        data = tensor.flatten().view(torch.uint8).numpy().tobytes()
        blocks = (data[i : i + BLOCK] for i in range(0, len(data), BLOCK))
        return xxhash.xxh3_64_hexdigest(b"".join(xxhash.xxh3_64_digest(b) for b in blocks))

    save_file(tensors, old / TENSORS)
    with safe_open(old / TENSORS, "pt") as file:
        order = list(file.offset_keys())
    save_file(tensors, old / TENSORS, {"xxh3": "".join(digest(tensors[name]) for name in order)})
    manifest, index = (json.loads((old / f"{n}.json").read_text()) for n in ("manifest", "index"))
    manifest["anon_dist_checkpoint"] = 1
    (old / "manifest.json").write_text(json.dumps(manifest))
    (old / "index.json").write_text(json.dumps({"tensors": index["tensors"]}))
    assert verify(old, folder) == []
    content = bytearray((old / TENSORS).read_bytes())
    content[-3] ^= 4
    (old / TENSORS).write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="its checksum differs"):
        convert(old, tmp_path / "out.pt", "consolidated")


def test_a_key_that_is_there_twice(folder, tmp_path):
    """Python takes the last."""
    source = shutil.copytree(folder, tmp_path / "source")
    index = json.loads((source / "index.json").read_text())
    old = {"tensors": index["tensors"]}
    text = json.dumps(old)
    (source / "index.json").write_text(text[:-1] + ', "tensors": []}')
    with pytest.raises(DamagedCheckpoint, match="it has 'tensors' twice"):
        open_checkpoint(source)
    (source / "index.json").write_text(text)  # of version 1, beside a manifest of version 2
    with pytest.raises(DamagedCheckpoint, match="is damaged: KeyError"):
        open_checkpoint(source)
    twice = {"tensors": [*index["tensors"], index["tensors"][0]], "xxh3": index["xxh3"]}
    twice["self"] = xxhash.xxh3_64_hexdigest(json.dumps(twice, sort_keys=True).encode())
    (source / "index.json").write_text(json.dumps(twice))
    with pytest.raises(DamagedCheckpoint, match="a tensor is in the index twice"):
        open_checkpoint(source)
