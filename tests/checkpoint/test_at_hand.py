"""Checkpoints at addresses, as the commands read them: in memory, in a folder, and on an S3 server of this machine."""

import json
import shutil

import fsspec
import pytest
import torch

from anon_dist import Anon
from anon_dist.checkpoint import Checkpoints, save_sharded
from anon_dist.checkpoint.checksums import checksums
from anon_dist.checkpoint.keeping.remote import Remote
from anon_dist.cli import main

pytestmark = pytest.mark.usefixtures("at_once")


def trained(folder, steps):
    """Checkpoints of a model."""
    here = Checkpoints(folder, keep=9)
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    for step in steps:
        with here.writing(step, {"step": step}) as path:
            save_sharded(path, model, Anon(model.named_parameters()))
    return here


def uploaded(address, here):
    for checkpoint in here.complete():
        Remote(address).upload(checkpoint)
    Remote(address).own({"id": "this run's"})


def at(address):
    """The store, and the path in it."""
    return fsspec.core.url_to_fs(address)


def put(address, folder):
    """Copy a folder there, file by file."""
    fs, root = at(address)
    for path in (p for p in folder.rglob("*") if p.is_file()):
        name = f"{root}/{path.relative_to(folder).as_posix()}"
        fs.makedirs(name.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(name, path.read_bytes())


def inspected(capsys, source):
    """What `ckpt inspect` says of it; and its notes."""
    capsys.readouterr()
    main(["ckpt", "inspect", source, "--json"])
    said = capsys.readouterr()
    return json.loads(said.out), said.err


def refused(*args):
    """The one line with which `ckpt` ends, and its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(["ckpt", *args])
    (line,) = str(ended.value).splitlines()
    return line.removeprefix("error: "), ended.value.code


@pytest.fixture
def copied(address, monkeypatch):
    """The files that are copied here from the address."""
    fs, names = Remote(address)._store.fs, []
    get = fs.get_file
    monkeypatch.setattr(fs, "get_file", lambda path, *a, **k: (names.append(path), get(path, *a, **k))[1])
    return names


def test_of_a_folder_of_checkpoints_the_newest_complete_one_is_taken(address, copied, tmp_path, capsys):
    """As of one that lies here; nothing else is copied."""
    uploaded(address, trained(tmp_path / "here", (3, 12, 40)))
    fs, root = at(address)
    fs.rm_file(f"{root}/step-00000040/trainer.json")
    found, said = inspected(capsys, f"{address}/")
    assert found["step"] == 12
    assert said == f"note: of {address} the newest complete checkpoint is taken: {address}/step-00000012\n"
    assert copied
    assert all("/step-00000012/" in path for path in copied)
    main(["ckpt", "verify", address, str(tmp_path / "here" / "step-00000012")])
    main(["ckpt", "convert", address, str(tmp_path / "out"), "--to", "canonical"])
    assert inspected(capsys, str(tmp_path / "out"))[0]["step"] == 12


def test_of_a_run_that_was_copied_there_the_newest_is_taken_and_of_several_one_is_to_be_named(
    address, copied, tmp_path, capsys
):
    uploaded(f"{address}/runs/b/checkpoints", trained(tmp_path / "here", (3, 12)))
    fs, root = at(address)
    fs.pipe_file(f"{root}/runs/b/config.yaml", b"x")
    found, said = inspected(capsys, f"{address}/runs/b")
    assert (found["step"], f"is taken: {address}/runs/b/checkpoints/step-00000012" in said) == (12, True)
    copied.clear()
    uploaded(f"{address}/runs/a", trained(tmp_path / "there", (5,)))
    words = f"{address}/runs is a folder of runs; name one of them, such as {address}/runs/a"
    assert refused("inspect", f"{address}/runs") == (words, 2)
    assert copied == []


def test_a_folder_without_a_complete_checkpoint_is_not_copied(address, copied, tmp_path):
    here = trained(tmp_path / "here", (3, 12))
    Remote(address).own({"id": "this run's"})
    assert refused("inspect", address) == (f"{address} is a run's, and has no checkpoint so far", 2)
    uploaded(address, here)
    fs, root = at(address)
    for checkpoint in here.complete():
        fs.rm_file(f"{root}/{checkpoint.name}/trainer.json")
    words = "holds no complete checkpoint: the upload of step-00000012 was cut short, or is still under way"
    assert refused("inspect", address) == (f"{address} {words}", 1)
    fs.rm_file(f"{root}/owner.json")
    words = f"is a folder of checkpoints; name one of them, such as {address}/step-00000012"
    assert refused("inspect", address) == (f"{address} {words}", 2)
    assert copied == []


def test_the_converter_takes_addresses(address, tmp_path, capsys):
    here = trained(tmp_path / "here", (7,))
    Remote(address).upload(here.latest())
    name = f"{address}/step-00000007"
    main(["ckpt", "inspect", name, "--json"])
    assert json.loads(capsys.readouterr().out)["step"] == 7
    main(["ckpt", "convert", name, str(tmp_path / "out"), "--to", "canonical"])
    for a, b in ((name, None), (name, str(here.latest())), (str(tmp_path / "out"), name)):
        main(["ckpt", "verify", a, *([b] if b else [])])
    assert capsys.readouterr().out.count("the same") == 2
    for args, words in (
        (["inspect", f"{address}/none"], "there is nothing at"),
        (["convert", name, f"{address}/out", "--to", "hf"], "is an address: convert into a folder here"),
    ):
        with pytest.raises(SystemExit, match=words):
            main(["ckpt", *args])
    fs, root = at(address)
    fs.pipe_file(f"{root}/step-00000007/__0_0.distcp", b"torn")
    with pytest.raises(SystemExit, match=rf"{name}/__0_0.distcp is damaged"):
        main(["ckpt", "inspect", name])
    assert not checksums(here.latest()).verify()
    shutil.rmtree(tmp_path / "out")
