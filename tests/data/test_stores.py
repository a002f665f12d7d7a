"""Prepared folders at addresses: the samples of a folder here, from stores that fail, with a cache that is small, full or torn."""

import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from anon_dist.cli import main
from anon_dist.data import BatchLoader, DataError, Index, ShardError, Stream, Tokenizer, TokenShards, make_source
from anon_dist.data.preparation.prepare import PrepareConfig, prepare
from anon_dist.data.stored import cache, remote
from anon_dist.exits import code_of
from anon_dist.outages import OUTAGES

SEQ_LEN = 64


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The folder of a cache of this test's own; attempts follow each other without a pause, on small pieces."""
    monkeypatch.setattr(remote, "AT_START", (0.0, 0.0))
    monkeypatch.setattr(remote, "MEANWHILE", (0.0, 0.0))
    monkeypatch.setattr(remote, "BLOCK", 512)
    cache.use(tmp_path / "cache", 1 << 30)
    remote.forget_copies()
    OUTAGES.forget()
    yield tmp_path / "cache"
    gc.collect()
    cache.use(None, None)
    remote.forget_copies()
    fsspec.filesystem("memory").store.clear()


def upload(folder: Path, address: str) -> str:
    fs, root = fsspec.core.url_to_fs(address)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        fs.makedirs(os.path.dirname(f"{root}/{path.relative_to(folder)}"), exist_ok=True)
        fs.pipe_file(f"{root}/{path.relative_to(folder)}", path.read_bytes())
    return address


@pytest.fixture
def address(prepared, tmp_path):
    """The prepared folder, in memory."""
    return upload(prepared, f"memory://{tmp_path}/corpus")


def object_of(address, name):
    fs, root = fsspec.core.url_to_fs(address)
    return fs, f"{root}/{name}"


def read(shards, steps=6, ranks=1, micro=6, cursor=0):
    """Samples in their global order, read by loaders of so many ranks."""
    stream = Stream([make_source(shards[0], SEQ_LEN, 3)], SEQ_LEN)
    streams = [stream, *(Stream([make_source(s, SEQ_LEN, 3)], SEQ_LEN) for s in shards[1:])]
    loaders = [BatchLoader(streams[r], micro // ranks, r, ranks, 1, cursor) for r in range(ranks)]
    found = []
    for _ in range(steps):
        found += [next(loader) for loader in loaders]
        for loader in loaders:
            loader.advance()
    for loader in loaders:
        loader.close()
    return torch.cat(found)


def contents(shards, split):
    opened = TokenShards(shards, split)
    return opened.tokens(0, len(opened))


# -- the same samples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 0], ids=["copies", "ranges"])
@pytest.mark.parametrize("kind", ["memory", "file", "s3"])
def test_the_samples_are_those_of_the_folder(kind, limit, prepared, tmp_path, request):
    if kind == "s3":
        request.getfixturevalue("s3")
    bases = {"memory": f"memory://{tmp_path}", "file": f"file://{tmp_path}/there", "s3": f"s3://bucket{tmp_path}"}
    address = upload(prepared, f"{bases[kind]}/corpus")
    cache.use(tmp_path / "cache", limit)
    local = TokenShards(prepared)
    steps = 12 if kind == "s3" else int(2.2 * local.num_samples(SEQ_LEN) / 6)  # over the ends of two epochs
    for ranks in (1, 3):
        shards = [TokenShards(address) for _ in range(ranks)]
        assert {s.by_ranges for s in shards} == {limit == 0}
        assert torch.equal(read(shards, steps, ranks), read([local] * ranks, steps, ranks))
    assert np.array_equal(contents(address, "val"), contents(prepared, "val"))
    assert Tokenizer.of(address).hash == Tokenizer.of(prepared).hash
    assert shards[0].index == local.index


def test_a_loader_that_goes_elsewhere_reads_what_is_there(address, prepared, tmp_path):
    cache.use(tmp_path / "cache", 0)
    local, far = TokenShards(prepared), TokenShards(address)
    with BatchLoader(Stream([make_source(far, SEQ_LEN, 3)], SEQ_LEN), 4) as loader:
        state = loader.state_dict()
        first = next(loader)
        loader.load_state_dict(state)
        assert torch.equal(next(loader), first)
        loader.advance()
        loader.pass_over(40)
        again = next(loader)
    assert torch.equal(again, read([local], 1, micro=4, cursor=40))


def test_shards_come_in_the_order_in_which_they_are_read_and_no_others(s3, prepared, tmp_path):
    """Sequential order, so that the first samples are those of the first shards."""
    address = upload(prepared, f"s3://bucket{tmp_path}/corpus")
    shards = TokenShards(address)
    s3.requests.clear()
    shards.expect(np.array([0]), np.array([1500]))
    assert np.array_equal(shards.tokens(0, 1500), TokenShards(prepared).tokens(0, 1500))
    fetched = {path.rpartition("/")[2] for method, path, _ in s3.requests if method == "GET" and path.endswith(".bin")}
    assert fetched == {"train-00000.bin", "train-00001.bin"}


def test_the_cache_of_an_earlier_run_is_used_and_what_is_damaged_in_it_comes_again(s3, prepared, place, tmp_path):
    address = upload(prepared, f"s3://bucket{tmp_path}/corpus")
    everything = contents(address, "train")
    gc.collect()
    s3.requests.clear()
    assert np.array_equal(contents(address, "train"), everything)
    assert not s3.fetched("train-00000.bin")
    (copy,) = place.glob("*/train-00001.bin")
    data = bytearray(copy.read_bytes())
    data[700] ^= 1
    copy.write_bytes(data)
    (place / copy.parent / "train-00002.bin").write_bytes(b"torn")
    gc.collect()
    shards = TokenShards(address, verify="read")
    assert np.array_equal(shards.tokens(0, len(shards)), everything)
    assert s3.fetched("train-00001.bin")
    assert s3.fetched("train-00002.bin")
    assert not s3.fetched("train-00003.bin")


# -- one machine's processes --------------------------------------------------------------------------------------------


def test_two_ranks_share_one_download(s3, prepared, tmp_path, monkeypatch):
    """The second comes for the shard while the first is bringing it."""
    address = upload(prepared, f"s3://bucket{tmp_path}/corpus")
    one, two = TokenShards(address), TokenShards(address)
    second_came, held = threading.Event(), []
    hold = cache._hold

    def holding(path):
        held.append(path)
        if len(held) == 2:
            second_came.set()
        return hold(path)

    monkeypatch.setattr(cache, "_hold", holding)
    s3.requests.clear()
    s3.fault = lambda method, path, _: None if not path.endswith(".bin") or second_came.wait(60) else "503"
    found = []
    threads = [threading.Thread(target=lambda s=s: found.append(s.tokens(0, 900))) for s in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    s3.fault = lambda *_: None
    assert len(held) == 2
    assert np.array_equal(found[0], found[1])
    size = one.info.shards[0].bytes
    assert len(s3.fetched("train-00000.bin")) == -(-size // 512)


KILLED = """
import sys
from anon_dist.data import TokenShards
from anon_dist.data.stored import cache, remote
remote.BLOCK = 512
cache.use(sys.argv[1], 1 << 30)
TokenShards(sys.argv[2]).tokens(0, 900)
"""


def test_a_download_that_was_killed_leaves_nothing_that_is_taken_for_whole(s3, prepared, place, tmp_path):
    address = upload(prepared, f"s3://bucket{tmp_path}/corpus")
    in_the_middle, over = threading.Event(), threading.Event()

    def fault(method, path, range_):
        if path.endswith("train-00000.bin") and range_.startswith("bytes=1024"):
            in_the_middle.set()
            over.wait(60)

    s3.fault = fault
    with subprocess.Popen([sys.executable, "-c", KILLED, str(place), address]) as process:
        assert in_the_middle.wait(100)
        process.send_signal(signal.SIGKILL)
    over.set()
    s3.fault = lambda *_: None
    (partial,) = place.glob("*/*.partial")
    assert partial.name == "train-00000.bin.partial"
    assert len(list((place / "claims").iterdir())) == 1
    assert np.array_equal(contents(address, "train"), contents(prepared, "train"))
    gc.collect()
    TokenShards(address, "val")
    assert not list(place.glob("*/*.partial"))
    assert len(list((place / "claims").iterdir())) <= 1


# -- room ---------------------------------------------------------------------------------------------------------------


def corpora_in_memory(prepared, tmp_path, count):
    """Copies of the prepared folder that count as other corpora: the documents are the same, the number of the end is not used."""
    found = []
    for i in range(count):
        folder = shutil.copytree(prepared, tmp_path / f"other{i}")
        index = json.loads((folder / "index.json").read_text())
        for split in index["splits"].values():
            for shard in split["shards"]:
                tokens = np.fromfile(folder / shard["file"], np.uint16)
                tokens[0] = 65 + i
                tokens.tofile(folder / shard["file"])
                shard["xxh3_64"] = cache.file_checksum(folder / shard["file"]).hexdigest()
        index["fingerprint"] = ""
        (folder / "index.json").write_text(json.dumps(Index.from_json(index).to_json()))
        found.append(upload(folder, f"memory://{tmp_path}/corpus{i}"))
    return found


def sizes_here(place):
    return {folder.name: sum(p.stat().st_size for p in folder.glob("*.bin")) for folder in place.iterdir()}


def test_what_is_read_stays_and_what_was_read_longest_ago_makes_room(prepared, place, tmp_path):
    one, two, three = corpora_in_memory(prepared, tmp_path, 3)
    size = sum(shard.bytes for shard in TokenShards(one).info.shards)
    cache.use(place, int(2.5 * size))
    gc.collect()
    prints = []
    for i, address in enumerate((one, two)):
        shards = TokenShards(address)
        shards.tokens(0, len(shards))
        prints.append(shards.index.fingerprint)
        for path in (place / prints[-1]).glob("*.bin"):
            os.utime(path, (1000 + i, 1000 + i))
    kept = TokenShards(one)  # claims it, though it was read longest ago
    del shards
    gc.collect()
    third = TokenShards(three)
    assert not third.by_ranges
    third.tokens(0, len(third))
    here = sizes_here(place)
    assert here[prints[0]] == size
    assert 0 < here[prints[1]] < size
    assert sum(here.values()) <= 2.5 * size
    assert TokenShards(two).by_ranges  # there is no room beside what is claimed
    del kept, third
    gc.collect()
    assert not TokenShards(two).by_ranges


def test_a_cache_that_cannot_hold_what_it_may_is_refused(address, place, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(
        ShardError, match=r"cache_dir = .*/cache has 5,000 bytes free, and [\d,]+ are to come there; name"
    ):
        TokenShards(address)
    cache.use(place, None)  # by default half of what is free: so they are read one by one
    assert TokenShards(address).by_ranges


def test_a_cache_that_cannot_be_written_is_named(address, tmp_path):
    (tmp_path / "file").write_text("")
    cache.use(tmp_path / "file" / "cache", None)
    remote.forget_copies()
    with pytest.raises(
        ShardError, match=r"data.cache_dir = .*/file/cache cannot be written \(Not a directory\); set it"
    ):
        TokenShards(address)


def test_a_disk_that_fills_up(address, prepared, place, tmp_path, monkeypatch):
    """What nobody claims makes room; if there is nothing, it is said."""
    (other,) = corpora_in_memory(prepared, tmp_path, 1)
    contents(other, "train")
    gc.collect()
    others, before = Index.load(other).fingerprint, sum(sizes_here(place).values())
    full, sync = [1], os.fsync

    def fsync(file):
        if full and full.pop() >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    shards = TokenShards(address)
    monkeypatch.setattr(cache.os, "fsync", fsync)
    assert np.array_equal(shards.tokens(0, 900), TokenShards(prepared).tokens(0, 900))
    assert 0 < sizes_here(place)[others] < before
    full += [1] * 100
    with pytest.raises(
        ShardError, match=r"cache_dir = .*/cache is full: train-0000\d.bin has [\d,]+ bytes, and [\d,]+ are free"
    ):
        for start in range(0, len(shards) - 900, 900):
            shards.tokens(start, 900)


# -- stores that fail ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 0], ids=["copies", "ranges"])
@pytest.mark.parametrize("how", ["503", "cut"])
def test_a_store_that_fails_now_and_then(how, limit, s3, prepared, tmp_path, caplog):
    address = upload(prepared, f"s3://bucket{tmp_path}/corpus")
    cache.use(tmp_path / "cache", limit)
    shards, count = TokenShards(address), iter(range(10**6))
    s3.fault = lambda method, path, _: how if path.endswith(".bin") and next(count) % 5 == 1 else None
    try:
        assert torch.equal(read([shards], 12), read([TokenShards(prepared)], 12))
    finally:
        s3.fault = lambda *_: None
    assert next(count) > 5


@pytest.mark.parametrize("limit", [None, 0], ids=["copies", "ranges"])
def test_a_store_that_goes_away_is_waited_for_and_then_named(limit, s3, prepared, tmp_path, caplog, monkeypatch):
    address = upload(prepared, f"s3://bucket{tmp_path}/corpus")
    cache.use(tmp_path / "cache", limit)
    shards = TokenShards(address)
    stream = Stream([make_source(shards, SEQ_LEN, 3)], SEQ_LEN)
    s3.stop()
    try:
        waits = []
        with BatchLoader(stream, 6) as loader, pytest.raises(ShardError) as raised:
            loader.on_wait = lambda: waits.append(remote.TRAFFIC.last)
            next(loader)
        words = str(raised.value)
        assert f"{address}/train-0" in words
        assert "cannot be read: " in words
        assert "(attempt 3, after " in words
        assert words.endswith("When the store answers again, the same command goes on from the newest checkpoint")
        assert "trying again in 0 s" in caplog.text
    finally:
        s3.start()
    # The same objects go on when it is there again.
    upload(prepared, address)  # moto forgets what it had
    assert torch.equal(read([shards]), read([TokenShards(prepared)]))


@pytest.mark.parametrize("limit", [None, 0], ids=["copies", "ranges"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_what_is_not_there_as_the_index_says_is_named_at_once(how, when, limit, address, tmp_path, monkeypatch):
    cache.use(tmp_path / "cache", limit)
    monkeypatch.setattr(remote, "MEANWHILE", (1000.0,))
    fs, path = object_of(address, "train-00001.bin")

    def damage():
        if how == "missing":
            fs.rm_file(path)
        else:
            fs.pipe_file(path, fs.cat_file(path)[:100])

    words = {
        "missing": "missing|FileNotFound",
        "truncated": r"torn: 100 bytes, the index says [\d,]+\. Copy the folder",
    }
    if when == "before":
        damage()
        with pytest.raises(ShardError, match=f"{address}/train-00001.bin.*({words[how]})"):
            TokenShards(address)
    else:
        shards = TokenShards(address)
        damage()
        with pytest.raises(ShardError, match=f"{address}/train-00001.bin.*({words[how]})"):
            shards.tokens(900, 900)


def test_an_altered_object_is_not_taken(address, place):
    fs, path = object_of(address, "train-00001.bin")
    data = bytearray(fs.cat_file(path))
    data[-1] ^= 1
    fs.pipe_file(path, bytes(data))
    shards = TokenShards(address)
    with pytest.raises(
        ShardError, match=rf"{address}/train-00001.bin is altered: checksum \w+, the index says \w+\. Copy"
    ):
        shards.tokens(0, len(shards))
    assert not list(place.glob("*/train-00001.bin*"))


def test_ranges_are_whole_blocks_that_are_compared(s3, prepared, tmp_path, caplog):
    """An altered one is asked for again, once, and said once of a file; without checksums a request has the sample's bytes alone."""
    address = upload(prepared, f"s3://bucket{tmp_path}/corpus")
    cache.use(tmp_path / "cache", 0)
    shards, local = TokenShards(address, verify="read"), TokenShards(prepared)
    shard, tokens = local.info.shards[1], len(local)
    s3.requests.clear()
    assert np.array_equal(shards.tokens(1100, 50), local.tokens(1100, 50))
    (asked,) = s3.fetched(shard.file)
    assert asked == f"bytes=0-{shard.bytes - 1}"
    assert np.array_equal(shards.tokens(0, tokens), local.tokens(0, tokens))
    bare = TokenShards(address)
    s3.requests.clear()
    assert np.array_equal(bare.tokens(1100, 50), local.tokens(1100, 50))
    assert s3.fetched(shard.file) == ["bytes=200-299"]
    assert "compared with their checksums" in shards.read_how(64)
    assert "no checksum" in bare.read_how(64)

    fs, path = object_of(address, shard.file)
    data = bytearray(fs.cat_file(path))
    data[700] ^= 1
    fs.pipe_file(path, bytes(data))
    s3.requests.clear()
    for times, start in enumerate((1100, 1100, 1200, 1900), 1):
        with pytest.raises(
            ShardError, match=rf"{address}/{shard.file} is altered: bytes 0 to {shard.bytes:,} .*Copy the folder there"
        ):
            shards.tokens(start, 50)
        assert len(s3.fetched(shard.file)) == 2 * times
    (said,) = (record.message for record in caplog.records if "is altered" in record.message)
    assert "It is asked for again, as is whatever else" in said


@pytest.mark.parametrize("limit", [None, 0], ids=["copies", "ranges"])
def test_a_loader_is_closed_while_it_waits_for_a_store(limit, address, tmp_path, monkeypatch):
    cache.use(tmp_path / "cache", limit)
    shards, asked, never = TokenShards(address), threading.Event(), threading.Event()
    monkeypatch.setattr(remote.RemoteFolder, "piece", lambda *_: (asked.set(), never.wait(60))[0])
    loader = BatchLoader(Stream([make_source(shards, SEQ_LEN, 3)], SEQ_LEN), 6)
    loader._read_ahead()
    assert asked.wait(60)
    loader.close()
    never.set()


def test_addresses_where_there_is_no_prepared_folder(address, tmp_path):
    with pytest.raises(ShardError, match=r"not a data folder: memory://.*/none/index.json does not exist\. Prepare"):
        TokenShards(f"memory://{tmp_path}/none")
    with pytest.raises(ShardError, match="no address that fsspec takes") as raised:
        TokenShards("nowhere://x")
    assert code_of(raised.value) == 2
    fs, path = object_of(address, "index.json")
    fs.pipe_file(path, b"{}")
    with pytest.raises(ShardError, match=r"/index.json is not the index of a prepared folder"):
        TokenShards(address)
    fs.rm(path.removesuffix("/index.json") + "/tokenizer", recursive=True)
    with pytest.raises(DataError):
        Tokenizer.of(address)


def test_more_shards_than_open_files(tmp_path):
    """In a process of its own: the limit holds for all of it."""
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (300, int(sys.argv[1])))
from anon_dist.data.stored.reading import allow_files
allow_files(2000)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    found = subprocess.run([sys.executable, "-c", code, "4000"], capture_output=True, text=True, check=True)
    assert int(found.stdout) >= 2256
    found = subprocess.run([sys.executable, "-c", code, "1000"], capture_output=True, text=True, check=False)
    assert "2,000 shards, and this process may open 1,000 files: raise the limit (ulimit -n)" in found.stderr


# -- the commands -------------------------------------------------------------------------------------------------------


def test_verify_and_inspect_read_an_address_and_keep_nothing(s3, prepared, place, tmp_path, capsys):
    address = upload(prepared, f"s3://bucket{tmp_path}/corpus")
    cache.use(None, None)  # as a command does
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANON_DIST_CACHE", str(place))
        main(["data", "verify", address])
        assert "are as they were written" in capsys.readouterr().out
        for folder in (address, str(prepared)):
            main(["data", "inspect", folder, "--json"])
        far, here = (json.loads(text) for text in capsys.readouterr().out.replace("}\n{", "}\0{").split("\0"))
        assert {**far, "folder": ""} == {**here, "folder": ""}
        assert not list(place.rglob("*.bin"))
        fs, path = object_of(address, "train-00001.bin")
        data = fs.cat_file(path)
        fs.pipe_file(path, bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(SystemExit, match=rf"{address}/train-00001.bin is altered: checksum.*Copy the folder there"):
            main(["data", "verify", address])
        fs.pipe_file(path, data[:-2])
        for command in ("verify", "inspect"):
            with pytest.raises(SystemExit, match=rf"{address}/train-00001.bin is torn"):
                main(["data", command, address])


def test_ranges_over_the_borders_of_blocks(tmp_path):
    """A corpus of more than one block: its tokens are its bytes."""
    text = "".join(f"{i:07d} " for i in range(50_000))
    (tmp_path / "a.txt").write_text(text)
    options = {"tokenizer": "bytes", "val_fraction": 0.0, "workers": 1}
    prepare(PrepareConfig(source=str(tmp_path / "a.txt"), out=tmp_path / "data", **options))
    address = upload(tmp_path / "data", f"memory://{tmp_path}/data")
    cache.use(tmp_path / "cache", 0)
    shards = TokenShards(address, verify="read")
    for start, count in ((0, 1), (65_530, 12), (65_536, 65_536), (100, 200_000), (399_990, 11)):
        assert shards.tokens(start, count).tolist() == [*text.encode(), 256][start : start + count]
