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


def test_a_checkpoint_whose_upload_was_cut_short_is_not_read(address, copied, tmp_path):
    """Told by its checksums, which are copied last but one; or by what lies beside it, whatever has arrived of it."""
    uploaded(address, trained(tmp_path / "here", (3, 12, 40)))
    fs, root = at(address)
    fs.rm_file(f"{root}/step-00000040/trainer.json")
    name = f"{address}/step-00000040"
    cut = f"{name} is incomplete (no trainer.json): its upload was cut short, or is still under way"
    beside = f"{cut}; the newest complete one beside it is {address}/step-00000012"
    assert refused("inspect", name) == (beside, 1)
    assert refused("verify", f"{address}/step-00000012", name) == (beside, 1)
    assert refused("convert", f"{name}/", str(tmp_path / "out"), "--to", "hf") == (beside, 1)
    copied.clear()
    fs.rm_file(f"{root}/step-00000040/checksums.json")
    assert refused("inspect", name) == (beside, 1)
    for step in (3, 12):
        Remote(address).set_aside(step)
    assert refused("inspect", name) == (f"{cut}; there is no complete one beside it", 1)  # known by owner.json
    aside = "does not count: its run went on from an earlier one, and trainer.json there is trainer.json.aside now"
    assert refused("inspect", f"{address}/step-00000012") == (f"{address}/step-00000012 {aside}", 1)
    (moved := tmp_path / "moved").mkdir()
    for path in (tmp_path / "here" / "step-00000012").iterdir():
        if path.name != "trainer.json":
            (moved / path.name).write_bytes(path.read_bytes())
    put(f"{address}/else/best", moved)
    assert refused("inspect", f"{address}/else/best")[1] == 1  # known by its checksums
    assert copied == []


def test_checkpoints_of_others_have_no_marker_and_are_read(address, tmp_path, capsys):
    """Also under a name as ours, with random states as ours beside them, and with a file of our checksums' name."""
    source = trained(tmp_path / "here", (7,)).latest()
    out = tmp_path / "out"
    kinds = {
        "dcp": "step-00000007",
        "hf": "step-00000009",
        "zero2": "global_step7",
        "canonical": "canonical",
        "consolidated": "step-00000007.pt",
    }
    for kind, name in kinds.items():
        target = out / kind / name
        main(["ckpt", "convert", str(source), str(target), "--to", kind])
        if target.is_dir():
            for ours in ("trainer.json", "checksums.json"):
                (target / ours).unlink(missing_ok=True)
            torch.save({"torch": torch.get_rng_state()}, target / "random-00000.pt")
            (target / "checksums.json").write_text('{"model.safetensors": "d41d8cd9"}')
    put(address, out)
    for kind, name in kinds.items():
        here = inspected(capsys, str(out / kind / name))[0]
        assert inspected(capsys, f"{address}/{kind}/{name}") == (here, ""), kind
    put(f"{address}/dcp/step-00000008", out / "dcp" / "step-00000007")  # beside others of theirs
    assert inspected(capsys, f"{address}/dcp/step-00000008")[1] == ""


def test_what_lies_around_a_checkpoint_may_be_forbidden(tmp_path, monkeypatch, capsys):
    address = f"memory://{tmp_path}"
    source = trained(tmp_path / "here", (7,)).latest()
    main(["ckpt", "convert", str(source), str(tmp_path / "step-00000007"), "--to", "hf"])
    put(f"{address}/step-00000007", tmp_path / "step-00000007")
    fs = Remote(address)._store.fs

    def forbidden(*args, **kwargs):
        raise PermissionError("ListBucket")

    monkeypatch.setattr(
        fs, "ls", lambda path, *a, _ls=fs.ls, **k: (_ls if "step-" in path else forbidden)(path, *a, **k)
    )
    assert inspected(capsys, f"{address}/step-00000007")[0]["format"] == "hf"


def test_what_is_wrong_with_a_checkpoint_is_said_of_the_address_not_of_the_copy(address, tmp_path, monkeypatch, capsys):
    """Formats without our checksums are looked at here; and a lone file is one too."""
    source = trained(tmp_path / "here", (7,)).latest()
    for kind in ("canonical", "hf", "dcp"):
        main(["ckpt", "convert", str(source), str(tmp_path / "out" / kind), "--to", kind])
    for ours in ("trainer.json", "checksums.json"):
        (tmp_path / "out" / "dcp" / ours).unlink()
    (tmp_path / "out" / "none").mkdir()
    (tmp_path / "out" / "none" / "notes.txt").write_text("x")
    (tmp_path / "out" / "torn.pt").write_bytes(b"\x80torn")
    (data,) = (tmp_path / "out" / "dcp").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:100])
    (weights,) = (tmp_path / "out" / "hf").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    (tensors,) = (tmp_path / "out" / "canonical").glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-256] + b"?" * 256)
    put(address, tmp_path / "out")
    for args, words in (
        (("convert", f"{address}/dcp", str(tmp_path / "x"), "--to", "hf"), f"{address}/dcp/{data.name}"),
        (("inspect", f"{address}/hf"), f"{address}/hf/{weights.name}"),
        (("inspect", f"{address}/none"), f"{address}/none is no checkpoint of a known format"),
        (("verify", f"{address}/dcp"), f"{address}/dcp"),
        (("inspect", f"{address}/torn.pt"), f"{address}/torn.pt "),
    ):
        line, _ = refused(*args)
        assert words in line, args
        assert "anon-dist-" not in line
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit, match="1"):
        main(["ckpt", "verify", f"{address}/canonical"])
    shown = capsys.readouterr().out
    assert f"{address}/canonical/{tensors.name}" in shown
    assert "anon-dist-" not in shown


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
