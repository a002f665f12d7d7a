"""Checkpoints that are written while the run goes on, share files, stay, and are copied elsewhere."""

import json
import re
import shutil
import threading
import time

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import Crash, at_step, crash, metrics
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from anon_dist.checkpoint import CheckpointError, Checkpoints
from anon_dist.checkpoint.checksums import checksums
from anon_dist.checkpoint.dcp import linking
from anon_dist.checkpoint.dcp.linking import LinkingWriter, Links
from anon_dist.checkpoint.verify import verify
from anon_dist.train import loop
from anon_dist.train.config.errors import RunError

# Refreshes at 1, 2, 3, … 8, 16: the preconditioner stays as it is from 9 to 15, exp_avg_sq until step 14.
QUIET = {"optim__refresh_ratio": 2.0, "optim__window": 2, "checkpoint__every": 1, "checkpoint__keep": 20}


def files(checkpoint):
    return {p.name: p.stat() for p in checkpoint.iterdir() if p.name.endswith(".distcp")}


def steps(folder):
    return sorted(int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-????????"))


@pytest.fixture
def held_back(monkeypatch):
    """Background writes wait for this event."""
    gate, write = threading.Event(), LinkingWriter.write_data

    def waiting(writer, *args):
        if threading.current_thread() is not threading.main_thread():
            gate.wait(60)
        return write(writer, *args)

    monkeypatch.setattr(LinkingWriter, "write_data", waiting)
    yield gate
    gate.set()


def test_what_is_written_is_the_step_that_was_saved(run_config, train, tmp_path, held_back, monkeypatch):
    """Though steps are taken before it is written: weights, state, place in the data and random state, as in the foreground."""
    config = run_config(run_dir=str(tmp_path / "back"), model__dropout=0.1, checkpoint__every=4)
    taken = []
    take_step = loop.take_step

    def stepping(run, *rest):
        done = take_step(run, *rest)
        taken.append((run.step, (run.folder / "checkpoints" / "step-00000004").exists()))
        if run.step == 7:
            held_back.set()
        return done

    monkeypatch.setattr(loop, "take_step", stepping)
    back = train(config)
    assert (7, False) in taken
    config.run_dir, config.checkpoint.async_save = str(tmp_path / "front"), False
    front = train(config)
    assert steps(back) == steps(front) == [12, 14]
    for step in (12, 14):
        a, b = (folder / "checkpoints" / f"step-{step:08d}" for folder in (back, front))
        assert verify(a, b) == []
        assert (a / "random-00000.pt").read_bytes() == (b / "random-00000.pt").read_bytes()
    assert metrics(back) == metrics(front)


def test_what_does_not_change_is_shared_with_the_last_but_one(run_config, train, tmp_path):
    folder = train(run_config(**QUIET)) / "checkpoints"
    at = {step: folder / f"step-{step:08d}" for step in range(1, 15)}
    shared = {
        step: {n for n, s in files(at[step]).items() if s.st_ino == files(at[step - 2])[n].st_ino}
        for step in range(3, 15)
    }
    # exp_avg_sq is 0 but at steps 3, 7 and 15, and precond changes at 2, 4 and 8.
    assert shared[6] == shared[10] == shared[12] == {"__0_1.distcp", "__0_2.distcp"}
    assert (shared[3], shared[8], shared[9]) == (set(), {"__0_1.distcp"}, set())
    for step in range(2, 15):  # nothing that befalls one of the last two befalls the other
        assert not {s.st_ino for s in files(at[step]).values()} & {s.st_ino for s in files(at[step - 1]).values()}
    told = [r for r in read(folder.parent) if "saves" in r]
    assert sum(r["saves"] for r in told) == 14
    sharing = sum(s.st_size for step in shared for n, s in files(at[step]).items() if n in shared[step])
    assert sum(r["save_linked_bytes"] for r in told) == sharing
    alone = [r for r in told if r["saves"] == 1]
    sizes = {n: s.st_size for n, s in files(at[12]).items()}
    one, two = (sizes[name] for name in ("__0_1.distcp", "__0_2.distcp"))
    assert {r["save_linked_bytes"] for r in alone} <= {0, one, two, one + two}
    assert all(r["save_blocked_s"] > 0 for r in told)

    # As plain torch reads it, and as the same state says that was written without sharing.
    plain = (
        train(run_config(**{**QUIET, "checkpoint__every": 12}, run_dir=str(tmp_path / "plain")))
        / "checkpoints"
        / at[12].name
    )
    found = []
    for i, checkpoint in enumerate((at[12], plain)):
        dcp_to_torch_save(checkpoint, tmp_path / f"{i}.pt")
        found.append(torch.load(tmp_path / f"{i}.pt", weights_only=False))
    assert str(found[0]) == str(found[1])
    assert verify(at[12], plain) == []

    # Copied, and after the others are gone, it is what it was.
    shutil.copytree(at[12], tmp_path / "copied")
    for step in (*range(1, 12), 13, 14):
        shutil.rmtree(at[step])
    for checkpoint in (at[12], tmp_path / "copied"):
        assert not checksums(checkpoint).verify()
        assert verify(checkpoint, plain) == []


def read(folder):
    from anon_dist.train.reports.metrics import read_metrics

    return read_metrics(folder / "metrics.jsonl")


def state(value):
    """Of one parameter: what changes, and what does not."""
    name = "optimizer.state.w"
    return {f"{name}.exp_avg": torch.full((1000,), float(value)), f"{name}.precond": torch.ones(1000)}


@pytest.mark.parametrize("how", ["truncated", "flipped", "gone", "no links", "other"])
def test_a_file_that_is_not_what_it_was_is_written_again(how, tmp_path, monkeypatch):
    checkpoints, links = Checkpoints(tmp_path, keep=2), Links(2)

    def write(step, tree):
        with checkpoints.writing(step, {"step": step}) as folder:
            dcp.save(tree, storage_writer=LinkingWriter(folder, links))
        links.published(tmp_path / folder.name)

    write(1, state(1))
    write(2, state(2))
    old = tmp_path / "step-00000001" / "__0_1.distcp"
    data, tree = bytearray(old.read_bytes()), state(3)
    if how == "truncated":
        old.write_bytes(data[:-1])
    if how == "flipped":
        data[len(data) // 2] ^= 1
        old.write_bytes(data)
    if how == "gone":
        old.unlink()
    if how == "no links":
        monkeypatch.setattr(linking.os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "not supported")))
    if how == "other":
        tree["optimizer.state.w.precond"][-1] += 1e-6
    write(3, tree)
    assert links.linked == 0
    assert not checksums(tmp_path / "step-00000003").verify()
    found = {k: torch.zeros_like(v) for k, v in tree.items()}
    dcp.load(found, checkpoint_id=tmp_path / "step-00000003")
    assert all(torch.equal(found[k], tree[k]) for k in tree)
    if how != "no links":
        write(4, state(4))
        assert links.linked > 4000  # of the second


def test_memory_stays_over_twenty_saves(tmp_path):
    """One copy of the state, whatever the number of saves."""
    from anon_dist.checkpoint.keeping.staging import Copies

    def resident():
        return int(re.search(r"VmRSS:\s+(\d+)", open("/proc/self/status").read())[1]) << 10

    checkpoints, links, copies = Checkpoints(tmp_path, keep=2), Links(2), Copies()
    tree = {f"optimizer.state.{i}.{k}": torch.randn(1 << 19) for i in range(4) for k in ("exp_avg", "precond")}
    size = sum(t.nbytes for t in tree.values())
    seen = []
    for step in range(20):
        staged = copies(tree)
        tree["optimizer.state.0.exp_avg"] += 1

        def job(step=step, staged=staged):
            with checkpoints.writing(step, {"step": step}) as folder:
                dcp.save(staged, storage_writer=LinkingWriter(folder, links))
            links.published(tmp_path / folder.name)

        thread = threading.Thread(target=job)
        thread.start()
        thread.join()
        seen.append(resident())
    assert max(seen) - seen[2] < size, [x >> 20 for x in seen]


def failing(monkeypatch, times):
    """The first so many writes fail, as on a full disk."""
    write, left = LinkingWriter.write_data, [times]

    def fail(writer, *args):
        if left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        return write(writer, *args)

    monkeypatch.setattr(LinkingWriter, "write_data", fail)


def test_a_write_that_fails_is_said_and_the_run_saves_again(run_config, train, tmp_path, monkeypatch, caplog):
    whole = train(run_config(run_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        failing(patch, 1)
        folder = train(run_config(checkpoint__every=7))
    assert "the checkpoint of step 7 could not be written (rank 0: [Errno 28] No space left on device" in caplog.text
    written = [int(n) for n in re.findall(r"; step (\d+) is written in its place", caplog.text)]
    assert len(written) == 1
    assert 7 <= written[0] <= 14  # as soon as it is known
    assert steps(folder) == sorted({*written, 14})
    assert metrics(folder)[-1] == metrics(whole)[-1]


def test_a_disk_that_stays_full_ends_the_run(run_config, train, tmp_path, monkeypatch):
    config = run_config(checkpoint__every=5)
    at_step(monkeypatch, 8, lambda: failing(monkeypatch, 2))
    words = r"of step 10 could not be written \(.*\), nor could one in its place: .*goes on from .*step-00000005"
    with pytest.raises(RuntimeError, match=words):
        train(config)
    assert steps(tmp_path / "run") == [5]


def test_the_last_save_is_waited_for(run_config, train, monkeypatch):
    """And tried again if it fails: a finished run has its last step."""
    failing(monkeypatch, 1)
    assert steps(train(run_config(checkpoint__every=0))) == [14]


def test_a_run_that_ends_by_an_error_leaves_what_it_was_writing(run_config, train, monkeypatch, held_back):
    threading.Timer(1.0, held_back.set).start()
    config = run_config()
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, 5, crash)
        train(config)
    assert [p.name for p in Checkpoints(loop.Path(config.run_dir) / "checkpoints", 1).complete()] == ["step-00000004"]


def test_a_run_that_is_killed_while_it_writes_goes_on_from_the_checkpoint_before(
    run_config, train, tmp_path, monkeypatch
):
    """What a kill leaves: half of a checkpoint, and no thread that finishes it."""
    whole = train(run_config(run_dir=str(tmp_path / "whole")))
    write, dead = LinkingWriter.write_data, threading.Event()

    def die(writer, *args):
        done = write(writer, *args)
        if "step-00000008" in str(writer.path):
            dead.set()
            threading.Event().wait()  # this thread does nothing more, as if it were gone
        return done

    def kill():
        assert dead.wait(60)  # the steps may be faster than the writing
        raise KeyboardInterrupt

    config = run_config()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LinkingWriter, "write_data", die)
        at_step(patch, 10, kill)
        train(config)
    assert steps(tmp_path / "run") == [4]
    assert list((tmp_path / "run" / "checkpoints" / ".unfinished" / "step-00000008").iterdir())
    train(config)
    assert steps(tmp_path / "run") == [12, 14]
    assert metrics(tmp_path / "run") == metrics(whole)


def test_some_checkpoints_stay_for_ever(run_config, train):
    folder = train(run_config(checkpoint__keep=1, checkpoint__keep_every=6, checkpoint__keep_steps=(1, 5)))
    assert steps(folder) == [1, 5, 6, 12, 14]


def test_a_run_whose_folder_is_lost_goes_on_from_the_address(run_config, train, tmp_path, monkeypatch, capsys):
    address = f"memory://{tmp_path}"
    whole = train(run_config(run_dir=str(tmp_path / "whole")))
    config = run_config(checkpoint__remote=address, checkpoint__keep=1)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, 14, crash)
        train(config)
    folder, store = tmp_path / "run", fsspec.filesystem("memory")
    wait(lambda: store.exists(f"{tmp_path}/step-00000012/trainer.json"))
    there = [p.rpartition("/")[2] for p in store.ls(str(tmp_path), detail=False)]
    assert there == ["owner.json", *(f"step-{s:08d}" for s in (4, 8, 12))]
    store.pipe_file(f"{tmp_path}/step-00000012/random-00000.pt", b"torn")
    shutil.rmtree(folder)
    train(config)
    said = capsys.readouterr().out
    assert "step-00000012/random-00000.pt is damaged" in said
    assert f"step-00000008 has been copied from {address}" in said
    assert metrics(folder)[-1] == metrics(whole)[-1]

    # What is damaged here is brought from there.
    (folder / "result.json").unlink()
    newest = folder / "checkpoints" / "step-00000014"
    (newest / "__0_0.distcp").write_bytes(b"torn")
    train(config)
    said = capsys.readouterr().out
    assert "set aside as step-00000014.damaged" in said
    assert "step-00000014 has been copied from" in said
    assert not checksums(newest).verify()

    # What is damaged here and there is taken again from the newest that is whole there.
    (folder / "result.json").unlink()
    (newest / "__0_0.distcp").write_bytes(b"torn")
    store.pipe_file(f"{tmp_path}/step-00000014/__0_0.distcp", b"torn")
    assert steps(folder) == [14]
    train(config)
    said = capsys.readouterr().out
    assert f"{newest} is damaged, and so is its copy: {address}/step-00000014/__0_0.distcp is damaged" in said
    assert f"step-00000012 has been copied from {address}" in said
    assert re.search(r"step-00000014 is damaged, and set aside as step-00000014.damaged-2: .*__0_0.distcp is dam", said)
    assert "step-00000012: steps 13 to 14 are taken again" in said
    assert metrics(folder)[-1] == metrics(whole)[-1]
    assert not checksums(newest).verify()
    train(config)  # what was damaged there is replaced
    assert store.size(f"{tmp_path}/step-00000014/__0_0.distcp") == (newest / "__0_0.distcp").stat().st_size

    # What was left behind by going back counts no more there.
    shutil.copytree(whole / "checkpoints" / "step-00000012", folder / "checkpoints" / "step-00000012")
    config.resume, config.checkpoint.every = str(folder / "checkpoints" / "step-00000012"), 0
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, 13, crash)
        train(config)
    assert not store.exists(f"{tmp_path}/step-00000014/trainer.json")
    store.store.clear()


def test_a_start_that_is_refused_takes_the_address_from_nobody(run_config, train, tmp_path, monkeypatch):
    """By a setting that makes another run, by other data, or by what it would go on from: it is named, and nothing is left of it."""
    address, store = f"memory://{tmp_path}/there", fsspec.filesystem("memory")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, 7, crash)
        train(run_config(checkpoint__remote=address, checkpoint__every=5))
    wait(lambda: store.exists(f"{tmp_path}/there/step-00000005/trainer.json"))
    owner = f"{tmp_path}/there/owner.json"
    known = store.cat_file(owner)

    def refused(words, error=RunError, **changes):
        before = {path: store.cat_file(path) for path in store.find(f"{tmp_path}/there")}
        folder = tmp_path / "another machine" / "run"
        with pytest.raises(error, match=words):
            train(run_config(run_dir=str(folder), checkpoint__remote=address, **changes))
        assert {path: store.cat_file(path) for path in store.find(f"{tmp_path}/there")} == before
        assert not list(folder.glob("checkpoints/*"))
        assert not (folder / "owner.json").exists()

    refused(r"\(whose data.seed is 0, and this one's 7\): each run needs an address", data__seed=7)
    refused("step-00000005 is past train.steps = 4", CheckpointError, train__steps=4)
    store.pipe_file(owner, json.dumps(json.loads(known) | {"data": ["feed"]}).encode())
    refused(r"whose data have the fingerprint feed, and this one's \w{16,}")
    store.pipe_file(owner, known)
    with monkeypatch.context() as patch, pytest.raises(Crash):  # the same run, on another machine
        at_step(patch, 6, crash)
        train(run_config(run_dir=str(tmp_path / "another machine" / "run"), checkpoint__remote=address))
    assert json.loads(store.cat_file(owner))["id"] == json.loads(known)["id"]
    assert store.cat_file(owner) != known
    store.store.clear()


def wait(condition):
    """Until it holds; a thread is at work."""
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    assert condition()


def test_a_run_does_not_end_well_before_all_is_there(run_config, train, tmp_path, monkeypatch):
    from anon_dist.checkpoint.keeping import store

    monkeypatch.setattr(store, "PAUSES", (0.0,))
    config = run_config(checkpoint__remote=f"memory://{tmp_path}", checkpoint__keep=1, train__steps=5)
    store = fsspec.filesystem("memory")
    with (
        monkeypatch.context() as patch,
        pytest.raises(RunError, match=r"2 checkpoints are not at .*Away: gone .*The same command tries again"),
    ):
        patch.setattr(type(store), "put_file", lambda *a, **k: (_ for _ in ()).throw(Away("gone")))
        train(config)
    assert steps(tmp_path / "run") == [4, 5]
    assert (tmp_path / "run" / "result.json").exists()
    train(config)
    assert sorted(p.rpartition("/")[2] for p in store.ls(str(tmp_path), detail=False)) == [
        "owner.json",
        "step-00000004",
        "step-00000005",
    ]
    assert steps(tmp_path / "run") == [5]
    store.store.clear()


class Away(Exception):  # noqa: N818 - a store's own
    pass
