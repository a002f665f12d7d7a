"""Checkpoints at other addresses: in memory, in a folder, and on an S3 server of this machine; with a store that fails."""

import logging
import threading

import fsspec
import pytest

from anon_dist.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint
from anon_dist.checkpoint.keeping import remote, uploads
from anon_dist.checkpoint.keeping import store as keeping_store
from anon_dist.checkpoint.keeping.remote import Remote, fetch_into
from anon_dist.checkpoint.keeping.uploads import Uploads

pytestmark = pytest.mark.usefixtures("at_once")


def checkpoints(folder, steps=(), keep=9):
    found = Checkpoints(folder, keep=keep)
    for step in steps:
        with found.writing(step, {"step": step}) as path:
            (path / "deepspeed").mkdir()
            (path / "__0_0.distcp").write_bytes(bytes([step]) * 2_500_000)
            (path / "__0_1.distcp").write_bytes(b"s" * 100_000)
            (path / "deepspeed" / "rank").write_text(str(step))
    return found


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def name_in(path):
    """The last part of a file's path, which has an ending while the file is written."""
    return path.rpartition("/")[2].removesuffix(".part")


def at(address):
    """The store, and the path in it."""
    return fsspec.core.url_to_fs(address)


def test_what_is_copied_there_comes_back(address, tmp_path, monkeypatch):
    here, store = checkpoints(tmp_path / "here", (1, 2, 3)), Remote(address)
    fs, _root = at(address)
    put, order = fs.put_file, []
    monkeypatch.setattr(store._store.fs, "put_file", lambda a, b, **k: (order.append(name_in(b)), put(a, b, **k)))
    assert store.steps() == []
    for checkpoint in here.complete():
        assert not store.has(checkpoint)
        store.upload(checkpoint)
        assert store.has(checkpoint)
        assert order[-1] == "trainer.json"  # the marker, last
    assert store.steps() == [1, 2, 3]
    # The file that is the same in all is copied within the store, from the last but one.
    assert [order.count(name) for name in ("__0_0.distcp", "__0_1.distcp", "rank")] == [3, 2, 3]
    order.clear()
    store.upload(here.latest())
    assert order == []
    there = checkpoints(tmp_path / "there again")
    assert contents(fetch_into(Remote(address), 2, there)) == contents(tmp_path / "here" / "step-00000002")
    assert [p.name for p in (tmp_path / "there again").iterdir()] == ["step-00000002"]
    store.set_aside(3)
    assert Remote(address).steps() == [1, 2]
    with here.writing(2, {"step": 2, "again": True}) as path:
        (path / "other").write_text("x")
    assert not store.has(here.latest())
    store.upload(tmp_path / "here" / "step-00000002")
    assert contents(fetch_into(Remote(address), 2, there))["other"] == b"x"


class Killed(BaseException):
    pass


def test_a_copy_that_is_killed_leaves_no_half_file_and_is_begun_again(address, tmp_path, monkeypatch):
    """What it left goes, and what there was of another copy of this step: by more ranks, or set aside."""
    here, store = checkpoints(tmp_path / "here", (1, 2)), Remote(address)
    fs, root = at(address)
    store.upload(tmp_path / "here" / "step-00000002")
    for stale in ("random-00009.pt", "deepspeed/rank-9", "trainer.json.aside"):
        path = f"{root}/step-00000001/{stale}"
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(path, b"old")
    whole = contents(here.complete()[0])

    def die(source, target, **kwargs):
        if name_in(target) == "__0_0.distcp" and not address.startswith("s3"):
            fs.pipe_file(target, whole["__0_0.distcp"][:1000])
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(store._store.fs, "put_file", die)
        store.upload(here.complete()[0])
    if address.startswith("file"):
        names = [path.removeprefix(f"{root}/step-00000001/") for path in fs.find(f"{root}/step-00000001")]
        assert "__0_0.distcp.part" in names
        assert "__0_0.distcp" not in names
    assert Remote(address).steps() == [2]
    Remote(address).upload(here.complete()[0])
    folder = f"{root}/step-00000001/"
    assert {path.removeprefix(folder): fs.cat_file(path) for path in fs.find(folder)} == whole


def test_parts_of_files_that_were_left_in_a_bucket_go(s3, tmp_path):
    """Of this checkpoint alone: whoever has a bucket pays for them."""
    here, store = checkpoints(tmp_path / "here", (1,)), Remote("s3://bucket/run")
    for key in ("run/step-00000001/__0_0.distcp", "run/step-00000002/__0_0.distcp", "mine"):
        store._store.fs.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
    store.upload(here.latest())
    left = store._store.fs.call_s3("list_multipart_uploads", Bucket="bucket")["Uploads"]
    assert {each["Key"] for each in left} == {"run/step-00000002/__0_0.distcp", "mine"}


def test_an_owner_is_written_whole_and_probes_of_killed_starts_go(address, monkeypatch):
    fs, root = at(address)
    store = Remote(address)
    store.own({"id": "first"})
    fs.pipe_file(f"{root}/.probe-01234567", b"probe")
    store.own({"id": "second"})
    assert store.owner() == {"id": "second"}
    assert [path.rpartition("/")[2] for path in fs.ls(root, detail=False)] == ["owner.json"]
    if address.startswith("file"):

        def die(path, data):
            with open(path, "wb") as file:
                file.write(data[:5])
            raise Killed

        monkeypatch.setattr(store._store.fs, "pipe_file", die)
        with pytest.raises(Killed):
            store.own({"id": "third"})
        assert store.owner() == {"id": "second"}


def test_file_systems_that_rename_get_files_whole(tmp_path, monkeypatch):
    """sftp, hdfs, smb: by a stand-in whose move replaces nothing."""
    from fsspec.implementations.local import LocalFileSystem

    here, store, moved = checkpoints(tmp_path / "here", (1,)), Remote(f"file://{tmp_path}/store"), []

    class Renaming(LocalFileSystem):
        def mv(self, old, new, **kwargs):
            assert not self.exists(new)
            moved.append(name_in(new))
            super().mv(old, new)

    files = store._store
    files.fs, files._scheme = Renaming(), "sftp"
    store.upload(here.latest())
    with here.writing(1, {"step": 1, "again": True}) as path:
        (path / "__0_0.distcp").write_bytes(b"x")
    store.upload(here.latest())
    assert contents(tmp_path / "store" / "step-00000001") == contents(here.latest())
    assert moved.count("__0_0.distcp") == moved.count("trainer.json") == 2


def test_damage_there_is_not_copied_for_ever(tmp_path):
    """Of a file that stays the same: into one more checkpoint, and never into both of the last two."""
    here, store = checkpoints(tmp_path / "here", range(1, 8)), Remote("memory://there")
    fs, root = at(store.address)
    for i, checkpoint in enumerate(here.complete(), 1):
        store.upload(checkpoint)
        if i == 1:
            fs.pipe_file(f"{root}/{checkpoint.name}/__0_1.distcp", b"t" * 100_000)
    files = [fs.cat_file(f"{root}/{p.name}/__0_1.distcp") for p in here.complete()]
    assert [i for i, file in enumerate(files, 1) if file != b"s" * 100_000] == [1, 3]


@pytest.mark.parametrize("how", ["truncated", "flipped", "a file is missing", "a marker alone", "a torn marker"])
def test_what_is_damaged_there_is_not_brought_here(how, address, tmp_path):
    here, store = checkpoints(tmp_path / "here", (1,)), Remote(address)
    store.upload(here.latest())
    fs, root = at(address)
    names = {"a marker alone": "checksums.json", "a torn marker": "trainer.json"}
    name = f"{root}/step-00000001/{names.get(how, '__0_0.distcp')}"
    data = bytearray(fs.cat_file(name))
    if "missing" in how or "alone" in how:
        fs.rm_file(name)
    elif how == "flipped":
        data[1_999_999] ^= 1
        fs.pipe_file(name, bytes(data))
    else:
        fs.pipe_file(name, bytes(data[: len(data) // 2]))
    there = checkpoints(tmp_path / "there")
    with pytest.raises(DamagedCheckpoint, match=rf"{address}/step-00000001/.*(damaged|missing)"):
        fetch_into(Remote(address), 1, there)
    assert not there.folder.exists() or not list(there.folder.iterdir())


def test_a_copy_that_was_killed_leaves_no_checkpoint(tmp_path, monkeypatch):
    """Its marker is here already, some of its files are not."""
    here, store = checkpoints(tmp_path / "here", (1,)), Remote(f"memory://{tmp_path}")
    store.upload(here.latest())
    there = checkpoints(tmp_path / "there")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(remote, "_read", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(Checkpoints, "clean", lambda self: None)
        fetch_into(store, 1, there)
    assert any(there.folder.rglob("trainer.json"))
    there.clean()
    assert there.present() == []


def test_a_server_that_goes_away_in_the_middle(s3, tmp_path, monkeypatch):
    """Said with the last error; what is there does not count; what is here stays, and is copied when the server is back."""
    address = f"s3://bucket{tmp_path}"
    here = checkpoints(tmp_path / "here", (1, 2, 3), keep=1)
    assert [p.name for p in here.complete()] == ["step-00000003"]
    store = Remote(address)
    put, count = store._store.fs.put_file, []

    def stopping(*args, **kwargs):
        count.append(args)
        if len(count) == 2:
            s3.stop()
        return put(*args, **kwargs)

    monkeypatch.setattr(store._store.fs, "put_file", stopping)
    copies = Uploads(store, here)
    with pytest.raises(CheckpointError, match=r"s3://bucket.*: \w+: .*\(attempt 3, after \d+ s\).*stays where it is"):
        copies.finish()
    with here.writing(4, {"step": 4}) as path:
        (path / "x").write_text("x")
    assert [p.name for p in here.complete()] == ["step-00000003", "step-00000004"]  # though one is to be kept
    with pytest.raises(CheckpointError, match="cannot be listed"):
        Remote(address).steps()
    s3.start()
    assert Remote(address).steps() == []
    copies.finish()
    assert Remote(address).steps() == [3, 4]
    (last,) = here.complete()
    assert last.name == "step-00000004"
    assert copies.sent >= sum(file.stat().st_size for file in last.iterdir())


def test_a_store_that_fails_now_and_then(tmp_path, monkeypatch, caplog):
    here, store = checkpoints(tmp_path / "here", (1,)), Remote(f"memory://{tmp_path}")
    put, failures = store._store.fs.put_file, {}

    def flaky(source, target, **kwargs):
        failures[target] = failures.get(target, 0) + 1
        if failures[target] == 1:
            raise TimeoutError("slow down")
        if failures[target] == 2:  # half of it arrives
            return store._store.fs.pipe_file(target, b"half")
        return put(source, target, **kwargs)

    monkeypatch.setattr(store._store.fs, "put_file", flaky)
    with caplog.at_level(logging.WARNING):
        store.upload(here.latest())
    assert "TimeoutError: slow down; trying again" in caplog.text
    assert "has 4 bytes there" in caplog.text
    assert contents(fetch_into(store, 1, checkpoints(tmp_path / "there"))) == contents(here.latest())


def test_what_failed_is_tried_once_more_before_the_end(tmp_path, monkeypatch):
    """A place that is full, and gets room after all attempts of a copy; or gets none."""
    here, store = checkpoints(tmp_path / "here", (1, 2, 3)), Remote(f"file://{tmp_path}/there")
    put, full = store._store.fs.put_file, [OSError(28, "No space left on device")] * 3

    def filling(*args, **kwargs):
        if full:
            raise full.pop()
        return put(*args, **kwargs)

    monkeypatch.setattr(remote, "_THREADS", 1)
    monkeypatch.setattr(store._store.fs, "put_file", filling)
    copies = Uploads(store, here)
    copies.finish()
    assert store.steps() == [1, 2, 3]

    with here.writing(4, {"step": 4}) as path:
        (path / "x").write_text("x")
    full[:] = [OSError(28, "No space left on device")] * 1000
    with pytest.raises(CheckpointError, match=r"step-00000004/x cannot be copied .*No space left.* stays where it is"):
        copies.finish()
    with here.writing(5, {"step": 5}) as path:
        (path / "x").write_text("x")
    words = rf"2 checkpoints are not at file://{tmp_path}/there, and stay in {here.folder} \(the newest: step-00000005\): .*No space"
    with pytest.raises(CheckpointError, match=words):
        copies.finish()
    assert store.steps() == [1, 2, 3]


def test_a_store_that_is_full_is_waited_for_once_not_for_each_checkpoint(tmp_path, monkeypatch, caplog):
    """Else the end of a run whose store was full for days would be taken for a hang."""
    here, store = checkpoints(tmp_path / "here", range(1, 9)), Remote(f"file://{tmp_path}/there")
    put, full, waited = store._store.fs.put_file, [True], []

    def filling(*args, **kwargs):
        if full:
            raise OSError(28, "No space left on device")
        return put(*args, **kwargs)

    monkeypatch.setattr(remote, "_THREADS", 1)
    monkeypatch.setattr(store._store.fs, "put_file", filling)
    monkeypatch.setattr(store._store._leaving, "wait", waited.append)
    copies = Uploads(store, here)
    with pytest.raises(CheckpointError, match="8 checkpoints are not at"):
        copies.finish()
    files = 4  # those of one checkpoint; there are two attempts at all
    assert len(waited) <= 2 * files * len(keeping_store.PAUSES)
    lines = [r.message for r in caplog.records if r.levelno == logging.ERROR]
    assert 2 <= len(lines) <= 4, "a failing store is said once in each, with how many more it does not take"
    assert any(line.endswith("too: 7") for line in lines)

    del waited[:]
    again = iter((True, True, False))  # twice full, then there is room
    monkeypatch.setattr(
        store._store.fs, "put_file", lambda *a, **k: filling(*a, **k) if next(again, False) else put(*a, **k)
    )
    copies.finish()
    assert (store.steps(), len(waited)) == ([*range(1, 9)], 2), "the next attempt is patient again"


def test_the_end_says_what_it_waits_for(tmp_path, monkeypatch):
    here, store = checkpoints(tmp_path / "here", (1, 2, 3)), Remote(f"memory://{tmp_path}")
    said, put, told = threading.Event(), store._store.fs.put_file, []
    monkeypatch.setattr(uploads, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(store._store.fs, "put_file", lambda *a, **k: said.wait(60) and put(*a, **k))
    uploads.Uploads(store, here).finish(lambda count: (told.append(count), said.set()))
    assert told == [3]
    assert store.steps() == [1, 2, 3]


def test_what_is_damaged_here_is_not_copied_there(tmp_path):
    here, store = checkpoints(tmp_path / "here", (1,)), Remote(f"memory://{tmp_path}")
    path = here.latest() / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpoint, match=r"is not copied to memory://.*__0_0.distcp"):
        store.upload(here.latest())
    assert store.steps() == []


def test_addresses_that_are_none(monkeypatch):
    with pytest.raises(CheckpointError, match="no address that fsspec takes"):
        Remote("nowhere://x")
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *a, **k: (_ for _ in ()).throw(ImportError("Install gcsfs")))
    with pytest.raises(CheckpointError, match=r"gs://x needs gcsfs: pip install gcsfs"):
        Remote("gs://x")
