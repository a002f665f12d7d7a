"""Whose `checkpoint.remote` is: another run is refused by name, the same one goes on, wherever; and that it can be written."""

import json
import shutil
import threading
import time
from types import SimpleNamespace

import fsspec
import pytest
from helpers import at_step

from anon_dist import stores
from anon_dist.checkpoint import CheckpointError, Checkpoints
from anon_dist.checkpoint.keeping.remote import Remote
from anon_dist.checkpoint.keeping.uploads import TakenError, Uploads
from anon_dist.doctor import storage
from anon_dist.doctor.judge import judge
from anon_dist.doctor.nodes import Nodes, Wanted
from anon_dist.doctor.report import Report
from anon_dist.exits import code_of
from anon_dist.train import loop
from anon_dist.train.config import parsing as c
from anon_dist.train.config.errors import ConfigError, RunError
from anon_dist.train.saves.owner import Owner


@pytest.fixture(autouse=True)
def clean_store():
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def address(tmp_path):
    return f"memory://{tmp_path}/there"


def write(folder, step):
    """A checkpoint of a run in this folder."""
    found = Checkpoints(folder / "checkpoints", keep=9)
    with found.writing(step, {"step": step, "config": {"run_dir": str(folder)}}) as path:
        (path / "x").write_text(str(step))
    return found


def claim(address, folder, lr=1e-3, resume="auto"):
    config = c.Config(optim=c.OptimConfig(lr=lr), run_dir=str(folder), resume=resume)
    owner = Owner(config, folder)
    owner.claim(Remote(address), Checkpoints(folder / "checkpoints", keep=9))
    return owner


@pytest.fixture
def first(address, tmp_path):
    """A run that has the address, with a checkpoint here and there."""
    folder = tmp_path / "machine" / "a"
    claim(address, folder)
    Remote(address).upload(write(folder, 4).latest())
    return folder


def test_another_run_is_refused_by_name_and_told_the_remedy(first, address, tmp_path):
    before = Remote(address).owner()
    with pytest.raises(CheckpointError) as refused:
        claim(address, tmp_path / "machine" / "b")
    said = str(refused.value)
    assert said.startswith(f"{address} is of the run {first}, last started on ")
    assert f"this one is {tmp_path}/machine/b" in said
    assert said.endswith(
        f"Set another one; or, if this run is to go on with what is there, remove {address}/owner.json"
    )
    with pytest.raises(CheckpointError, match=r"whose optim.lr is 0.001, and this one's 0.002"):
        claim(address, tmp_path / "elsewhere" / "a", lr=2e-3)
    shutil.copytree(first, tmp_path / "machine" / "copied")
    with pytest.raises(CheckpointError, match=r"this one is .*/copied"):
        claim(address, tmp_path / "machine" / "copied")
    assert Remote(address).owner() == before
    fsspec.filesystem("memory").rm_file(
        f"{tmp_path}/there/owner.json"
    )  # the remedy; the checkpoint there says whose it is
    claim(address, tmp_path / "machine" / "b")


def test_the_same_run_goes_on_wherever_it_is(first, address, tmp_path):
    known = Remote(address).owner()["id"]
    claim(address, first, lr=2e-3)  # its folder is there: settings may change
    shutil.rmtree(first)
    claim(address, first, lr=2e-3)
    claim(address, tmp_path / "another machine" / "a", lr=2e-3)
    found = Remote(address).owner()
    assert (found["id"], found["run_dir"]) == (known, f"{tmp_path}/another machine/a")


def test_the_doctor_says_whose_it_is_and_leaves_nothing_there(first, address, tmp_path, monkeypatch):
    store, (reports, wanted) = fsspec.filesystem("memory"), ({0: Report(0, "node-a")}, Wanted(str(first), None, 2))
    before = store.find(str(tmp_path))

    def told(folder):
        config = c.Config(optim=c.OptimConfig(lr=1e-3), run_dir=str(folder))
        config.checkpoint.remote = address
        reports[0].remote = address
        reports[0].remote_problem, reports[0].remote_remedy = storage.try_address(config)
        (found,) = (f for f in judge(Nodes(reports, {}, {}), wanted) if f.check == "remote")
        return found.level, found.text, found.remedy

    assert told(first) == ("ok", f"{address}: can be written, and is this run's or nobody's", "")
    level, text, remedy = told(tmp_path / "b")
    assert level == "fail"
    assert text.startswith(f"{address} is of the run {first}, ")
    assert text.endswith(": each run needs an address of its own")
    assert remedy == f"set another one; or, if this run is to go on with what is there, remove {address}/owner.json"
    monkeypatch.setattr(type(store), "pipe_file", lambda *_, **__: (_ for _ in ()).throw(PermissionError("Forbidden")))
    level, text, remedy = told(first)
    assert (level, text) == ("fail", f"{address} cannot be written: PermissionError: Forbidden")
    assert "the right to write there" in remedy
    assert store.find(str(tmp_path)) == before


def test_the_doctor_does_not_wait_for_an_address_that_does_not_answer(address, tmp_path, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(storage, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_file", lambda *_, **__: answer.wait(60))
    config = c.Config(run_dir=str(tmp_path / "run"))
    config.checkpoint.remote = address
    problem, remedy = storage.try_address(config)
    (looking,) = (thread for thread in threading.enumerate() if thread.name == "checkpoint.remote")
    answer.set()
    looking.join()  # or it writes there while the next test is at work
    assert problem == f"{address} does not answer within 0 s"
    assert "network" in remedy


@pytest.mark.parametrize("resume", ["never", "FOLDER"])
def test_a_run_that_begins_anew_writes_over_no_checkpoints(resume, first, address):
    shutil.rmtree(first)
    with pytest.raises(
        CheckpointError, match=rf"has checkpoints, up to step 4, and resume is {resume}. Set another address"
    ):
        claim(address, first, resume=resume)


@pytest.mark.parametrize(
    "error", [PermissionError("Forbidden"), FileNotFoundError("no such bucket"), OSError(30, "ro")]
)
def test_where_nothing_can_be_written_the_start_says_so(error, address, run_config, train, monkeypatch):
    """At once, before anything is built, with the remedy."""

    def refused(*_, **__):
        raise error

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "pipe_file", refused)
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: pytest.fail("it was tried again"))
    monkeypatch.setattr(stores, "time", clock)  # of no other thread
    monkeypatch.setattr(loop, "set_up", lambda *_: pytest.fail("set up"))
    words = (
        rf"checkpoint.remote: {address} cannot be written: \w+: .*See to the address .*or leave checkpoint.remote out"
    )
    with pytest.raises(RunError, match=words) as raised:
        train(run_config(checkpoint__remote=address))
    assert code_of(raised.value) == 1  # it may be well the next time


def test_an_address_that_fsspec_cannot_open_is_the_configurations_fault(run_config, train, monkeypatch):
    """Of a training, too, that is not told so before torch is imported, as on several nodes."""
    monkeypatch.setattr(loop, "set_up", lambda *_: pytest.fail("set up"))
    with pytest.raises(ConfigError, match=r"^checkpoint.remote: foo://b/r is no address that fsspec takes") as raised:
        train(run_config(checkpoint__remote="foo://b/r"))
    assert code_of(raised.value) == 2


def test_a_run_folder_that_is_full_is_not_taken_for_the_address(address, run_config, train, monkeypatch):
    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("anon_dist.train.saves.owner.write_json", full)
    config = run_config(checkpoint=c.CheckpointConfig(remote=address))
    with pytest.raises(RunError, match=rf"cannot be written to {config.run_dir}/owner.json: .*No space left"):
        train(config)


def test_a_start_whose_address_another_has_taken_ends_and_copies_nothing_more(
    run_config, train, address, tmp_path, monkeypatch
):
    """One of the same run on another machine, say: it is told so at its next copy, and ends at the save after."""
    store, owner = fsspec.filesystem("memory"), f"{tmp_path}/there/owner.json"
    begin, made = Uploads.__init__, []

    def known(self, *args):
        begin(self, *args)
        made.append(self)

    def taken():
        made[0].finish()
        store.pipe_file(owner, json.dumps({**json.loads(store.cat_file(owner)), "host": "another"}).encode())

    def told():
        with pytest.raises(TakenError):
            made[0].finish()

    monkeypatch.setattr(Uploads, "__init__", known)
    at_step(monkeypatch, 6, taken)
    at_step(monkeypatch, 10, told)
    with pytest.raises(
        RunError, match=r"is now that of the run .*/run, process \d+ on another, since .*: this one ends"
    ):
        train(run_config(checkpoint__remote=address, checkpoint__async_save=False))
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000004", "step-00000008"]
    assert Remote(address).steps() == [4]


def test_a_place_that_vanishes_while_the_run_is_at_work_is_not_made_anew(
    run_config, train, tmp_path, monkeypatch, caplog, capsys
):
    """An unmount, say: nothing lands below the mount point, no checkpoint is removed here, and the end is an error."""
    there, away, folder = tmp_path / "there", tmp_path / "away", tmp_path / "run"
    begin, made = Uploads.__init__, []

    def known(self, *args):
        begin(self, *args)
        made.append(self)

    def vanish():
        made[0].finish()
        there.rename(away)

    config = run_config(checkpoint__remote=f"file://{there}", checkpoint__async_save=False, checkpoint__keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(Uploads, "__init__", known)
        at_step(patch, 6, vanish)
        words = rf"\d checkpoints are not at file://{there}, and stay in .*file://{there}/owner.json is gone: .*Mount it again; or, if"
        with pytest.raises(RunError, match=words):
            train(config)
    assert not there.exists()
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept[:3] == ["step-00000004", "step-00000008", "step-00000012"]
    assert (folder / "result.json").exists()
    assert caplog.text.count("owner.json is gone") == 1
    capsys.readouterr()
    assert Remote(f"file://{away}").steps() == [4]

    train(config)  # begins anew there
    said = capsys.readouterr().out
    assert f"WARNING: file://{there} is empty, and was this run's: checkpoints that were copied there are gone" in said
    assert [f"step-{step:08d}" for step in Remote(f"file://{there}").steps()] == kept
    train(config)
    assert "is empty" not in capsys.readouterr().out


def test_a_place_that_is_back_is_gone_on_with(tmp_path, caplog):
    there, folder = tmp_path / "there", tmp_path / "run"
    owner, store = claim(f"file://{there}", folder), Remote(f"file://{there}")
    here = write(folder, 4)
    copies = Uploads(store, here, owner.confirm)
    copies.finish()
    there.rename(tmp_path / "away")
    there.mkdir()  # the mount point
    write(folder, 8)
    with pytest.raises(CheckpointError, match=r"^2 checkpoints are not at .*\(the newest: step-00000008\)"):
        copies.finish()
    assert list(there.iterdir()) == []
    there.rmdir()
    (tmp_path / "away").rename(there)
    copies.finish()
    assert store.steps() == [4, 8]
    assert f"file://{there} is there again" in caplog.text


def test_a_place_that_vanishes_in_the_middle_of_a_copy_is_not_made_anew(tmp_path, monkeypatch):
    there, folder = tmp_path / "there", tmp_path / "run"
    owner, store = claim(f"file://{there}", folder), Remote(f"file://{there}", ())
    here, put = write(folder, 4), store._store.fs.put_file

    def vanishing(*args, **kwargs):
        put(*args, **kwargs)
        there.rename(tmp_path / "away")

    monkeypatch.setattr(store._store.fs, "put_file", vanishing)
    with pytest.raises(CheckpointError, match=r"owner\.json is gone"):
        Uploads(store, here, owner.confirm).finish()
    assert not there.exists()
