"""`anon-dist doctor` on two and three hosts (network namespaces), each broken in one way: it must name what, where, and the remedy."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest
from torch.distributed import TCPStore

from anon_dist.cli import main
from anon_dist.data import Index
from anon_dist.data.stored import cache
from anon_dist.doctor import examine, meeting, network, storage
from anon_dist.doctor.judge import judge
from anon_dist.doctor.meeting import NoMeetingError
from anon_dist.doctor.network import chosen_interface
from anon_dist.doctor.nodes import Nodes, Wanted
from anon_dist.doctor.options import Doctor
from anon_dist.doctor.place import Place, PlaceError, find
from anon_dist.doctor.report import Folder, Interface, Peer, Report
from anon_dist.train.config import parsing as c

SMALL = """
model: {layers: 2, width: 32, heads: 2, context: 32}
data: {path: PATH, seq_len: 32}
train: {global_batch: 8, micro_batch: 4}
"""


@pytest.fixture(scope="module")
def found(prepared, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("doctor")
    (out / "shared").mkdir()
    config = out / "small.yaml"
    config.write_text(SMALL.replace("PATH", str(prepared)))
    if shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("needs iproute2 (the commands `ip` and `tc`)")
    command = [sys.executable, str(Path(__file__).with_name("doctor_cases.py")), str(out), str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    if "OSError: ip netns" in done.stderr:
        pytest.skip(f"network namespaces cannot be made here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    left = [path for path in (out / "shared").rglob("*") if path.name != "run"]  # which the cases mount on
    assert not left
    return json.loads((out / "found.json").read_text())


BROKEN = {
    "no interface": ("interface", ["{1}: GLOO_SOCKET_IFNAME=eth7: no interface of this node"], "to cable0 there"),
    "wrong interface": ("interface", ["{1}: GLOO_SOCKET_IFNAME=other0: no node reaches 10.99.0.1"], "to cable0 there"),
    "own name": ("interface", ["the name {1} leads to 127.0.1.1"], "to cable0 there"),
    "firewall": ("ports", ["{0} does not reach {1} at 10.203.0.2: no answer at all"], "open all TCP ports"),
    "half a firewall": (
        "ports",
        ["{0} does not reach {1} at 10.203.0.2, port ", " more, of 8 that were tried: no answer at all"],
        "open all TCP ports",
    ),
    "occupied": ("ports", ["port 29500 of node 0 is in use by process "], "another --master-port"),
    "versions": ("versions", ["transformers 4.0.0 on {1}"], "install the same everywhere"),
    "shadowed": (
        "versions",
        ["{1}: sentencepiece: ModuleNotFoundError: No module named 'nothing_of_that_name'"],
        "see what shadows them on PYTHONPATH",
    ),
    "clock": ("clocks", ["{1} is 7.5 s ahead"], "chrony"),
    "not shared": (
        "run_dir",
        ["is not the same folder everywhere: {0} does not see what {1} writes"],
        "tmpfs (tmpfs) on {1}",
    ),
    "read-only": ("run_dir", ["{1}: Read-only file system"], "mount it read-write (tmpfs"),
    "link": ("run_dir", ["{0}: ", "link is a link to unmounted, which is not there"], "mount what it leads to"),
    "full": ("run_dir", ["{0}: No space left on device"], "make room"),
    "slow": ("all-reduce", ["slow: {1} is slow to all others"], "cable"),
    "missing": ("nodes", ["2 of 3; node 2: did not come within 3 s"], "is it started"),
}


def findings(examined: dict) -> dict:
    return {f["check"]: f for f in examined["findings"]}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named_with_its_node_and_a_remedy_and_nothing_else_is(found, case):
    check, texts, remedy = BROKEN[case]
    examined = found[case]
    assert set(examined["codes"].values()) == {1}
    failed = {name: f for name, f in findings(examined["0"]).items() if f["level"] in ("fail", "warn")}
    allowed = {"matmul"}  # of a machine that does other things too
    assert set(failed) - allowed == {check}
    names = found["names"]
    for text in texts:
        assert text.format(*names) in failed[check]["text"]
    assert remedy.format(*names) in failed[check]["remedy"]


def test_of_two_hosts_that_are_well_all_is_measured(found):
    assert found["well"]["codes"] == {"0": 0, "1": 0}
    examined = found["well"]["0"]
    assert examined["ok"]
    assert not examined["absent"]
    assert {f["level"] for name, f in findings(examined).items() if name != "matmul"} == {"ok"}
    here, there = examined["nodes"]
    assert [here["host"], there["host"]] == found["names"][:2]
    assert here["versions"] == there["versions"]
    assert here["data"] == there["data"] != ""
    for report, other in ((here, "1"), (there, "0")):
        peer = report["peers"][other]
        assert 1e6 < peer["bandwidth"] < 1e12
        assert 0 < peer["rtt"] < 1
        assert abs(peer["ahead"]) < 0.2  # one machine, one clock
        assert report["folder"]["written"] > 1e5
        assert report["flops"][0] > 1e8
        assert report["interface"]["address"].startswith("10.203.0.")


def test_a_node_that_meets_nobody_says_so_itself(found):
    """Node 0's port is taken by another program, or nobody is there."""
    (text,) = (findings(found["occupied"][rank])["ports"]["text"] for rank in ("1",))
    assert "something else answers at 10.203.0.1:29500" in text
    alone = findings(found["alone"]["1"])
    assert found["alone"]["codes"] == {"1": 1}
    assert "node 0 does not answer at 10.203.0.1:29500 in 2 s: refused" in alone["ports"]["text"]
    assert alone["nodes"]["level"] == "skip"


@pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"SSH"])
def test_what_is_no_doctor_is_never_let_to_torch(says, monkeypatch, capfd):
    """Which would say it in a trace, go on, and have the process abort at its end. A store is let in, whoever keeps it."""
    monkeypatch.setattr(meeting, "_join", lambda place: pytest.fail("torch was let to it"))
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = Place(1, 2, "127.0.0.1", server.getsockname()[1])

        def serve():
            for _ in range(2):  # the knock, and the greeting
                connection, _ = server.accept()
                heard.append(connection.recv(100))
                with contextlib.suppress(OSError):
                    connection.sendall(says)
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(NoMeetingError) as refused:
            meeting.meet(place, 10.0)
        thread.join()
    said = f"its first bytes are {says!r}" if says else "it says nothing"
    assert str(refused.value) == f"something else answers at 127.0.0.1:{place.port}: {said}"
    assert heard[0] == b""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting._greet(Place(1, 2, "127.0.0.1", store.port))
    assert capfd.readouterr().err == ""


def test_too_little_room_for_the_checkpoints_is_said_in_bytes(found):
    room = findings(found["little room"]["0"])["room"]
    assert room["level"] == "fail"
    assert "2 stay while one is written: " in room["text"]


def test_over_ssh_one_command_looks_at_all_nodes_and_names_the_one_that_is_gone(found):
    names, seen = found["names"], found["ssh"]
    assert seen["code"] == 1, seen["output"]
    assert [node["host"] for node in seen["nodes"]] == names[:2]
    assert max(map(len, seen["output"].splitlines())) <= 100
    failed = {name: f["text"] for name, f in findings(seen).items() if f["level"] == "fail"}
    assert failed == {"nodes": "2 of 3; anon-gone: exit code 255: ssh: no route to anon-gone"}
    assert findings(seen)["all-reduce"]["level"] == "ok"


# -- what needs more nodes, or GPUs, than there are here --------------------------------------------------------------


def healthy(number: int, gpus: int = 8) -> dict[int, Report]:
    """Reports of nodes that are well."""
    return {
        i: Report(
            i,
            f"node-{i}",
            {"torch": "2.13.0"},
            ["NVIDIA H100"] * gpus,
            gpus,
            "580.95",
            backend="nccl",
            interface=Interface("eth0", f"10.0.0.{i}", "", "", "eth0", ["eth0"]),
            peers={j: Peer(rtt=1e-4, bandwidth=40e9) for j in range(number) if j != i},
            folder=Folder(written=1e9, sync=1e-3, free=10**12, device="nfs"),
            data="f",
            flops=[7e14] * gpus,
            kernel="fused",
        )
        for i in range(number)
    }


def judged(reports: dict[int, Report]) -> dict[str, tuple[str, str]]:
    found = judge(Nodes(reports, {}, {}), None)
    return {f.check: (f.level, f.text) for f in found if f.level not in ("ok", "skip")}


def test_nothing_is_found_where_all_is_well():
    assert judged(healthy(5)) == {}


def test_a_run_dir_that_cannot_be_made_has_no_device_to_be_named():
    reports = healthy(1)
    reports[0].folder = Folder(problem="No such file or directory")
    (found,) = (f for f in judge(Nodes(reports, {}, {}), Wanted("/proc/nope", None, 2)) if f.check == "run_dir")
    assert found.remedy == "choose a run_dir that all nodes can write"


RESTORED = "copy it again from where it came from, or prepare the data again: `anon-dist data prepare … --overwrite`, as at first"


def data_finding(*configs: c.Config):
    """Of nodes with these configurations."""
    reports = healthy(len(configs))
    for report, config in zip(reports.values(), configs, strict=True):
        report.data, report.data_problem, report.data_remedy = storage.data_of(config)
    (found,) = (f for f in judge(Nodes(reports, {}, {}), Wanted("/runs/a", None, 2)) if f.check == "data")
    return found.level, found.text, found.remedy


def of(path: Path, **eval_sets: str) -> c.Config:
    data = c.DataConfig(path=str(path), seq_len=32)
    return c.Config(data=data, eval=c.EvalConfig(sets=eval_sets))


@pytest.mark.parametrize("shard", ["train-00000.bin", "val-00000.bin"])
def test_a_shard_that_is_torn_or_missing_is_named_with_its_nodes_and_the_remedy(shard, prepared, tmp_path):
    """Of the split to validate on too: training opens both."""
    whole, fingerprint = of(prepared), Index.load(prepared).fingerprint
    assert data_finding(whole, whole) == ("ok", f"the same everywhere ({fingerprint})", "")
    torn, gone = tmp_path / "torn", tmp_path / "gone"
    shutil.copytree(prepared, torn)
    shutil.copytree(prepared, gone)
    size = (torn / shard).stat().st_size
    os.truncate(torn / shard, size - 2)
    (gone / shard).unlink()
    was_torn = f"{torn / shard} is torn: {size - 2:,} bytes, the index says {size:,}"
    assert data_finding(of(torn)) == ("fail", f"node-0: {was_torn}", RESTORED)
    assert data_finding(of(torn), whole, of(torn)) == ("fail", f"node-0, node-2: {was_torn}", RESTORED)
    both = f"node-1: {was_torn}; node-2: {gone / shard} is missing"
    assert data_finding(whole, of(torn), of(gone)) == ("fail", both, RESTORED)
    level, text, remedy = data_finding(whole, of(tmp_path / "none"))
    assert (level, remedy) == ("fail", "have data.path there on all nodes (anon-dist data prepare)")
    assert text.startswith("node-1: preparation unfinished or not a data folder: ")


def test_every_source_of_a_mixture_and_every_set_is_looked_at_as_far_as_it_is_read(prepared, tmp_path):
    web, held = tmp_path / "web", tmp_path / "held"
    shutil.copytree(prepared, web)
    shutil.copytree(prepared, held)
    (held / "train-00000.bin").unlink()  # of a set its validation split is read
    config = of(tmp_path / "unused", held=str(held))
    config.data.sources = {"web": c.SourceConfig(str(web), 0.7), "code": c.SourceConfig(str(prepared), 0.3)}
    fingerprint = Index.load(prepared).fingerprint
    places = ("data.sources.web", "data.sources.code", "eval.sets.held")
    same = ", ".join(f"{place} {fingerprint}" for place in places)
    assert data_finding(config) == ("ok", f"the same everywhere ({same})", "")
    assert storage.vocabulary(config) == Index.load(prepared).vocab_size
    (held / "val-00000.bin").unlink()
    assert data_finding(config)[:2] == ("fail", f"node-0: {held}/val-00000.bin is missing")
    (web / "val-00000.bin").unlink()
    assert data_finding(config)[:2] == ("fail", f"node-0: {web}/val-00000.bin is missing")
    shutil.rmtree(web)
    assert data_finding(config)[2] == "have data.sources.web there on all nodes (anon-dist data prepare)"


def test_shards_at_an_address_are_looked_for_there(prepared, tmp_path, request):
    cache.use(tmp_path / "cache", 1 << 30)
    request.addfinalizer(lambda: cache.use(None, None))
    there, memory = f"memory://{tmp_path}/data", fsspec.filesystem("memory")
    memory.put(str(prepared), f"{tmp_path}/data", recursive=True)
    assert data_finding(of(there))[0] == "ok"
    memory.rm_file(f"{tmp_path}/data/val-00000.bin")
    again = "copy the folder there again, all of it, from where it came from"
    assert data_finding(of(there)) == ("fail", f"node-0: {there}/val-00000.bin is missing", again)


def test_a_slow_gpu_is_named():
    reports = healthy(3)
    reports[1].flops[6] *= 0.85
    (check,) = judged(reports).items()
    assert check[0] == "matmul"
    assert "node-1 GPU 6 has 595" in check[1][1]


@pytest.mark.parametrize("nodes", [3, 4, 9])
def test_a_slow_node_and_a_slow_pair_are_told_apart(nodes):
    slow = healthy(nodes)
    for i, report in slow.items():
        for j, peer in report.peers.items():
            peer.bandwidth *= 0.2 if 1 in (i, j) else 1.0
    assert "node-1 is slow to all others, 8 GB/s at worst" in judged(slow)["all-reduce"][1]
    pair = healthy(nodes)
    pair[0].peers[2].bandwidth = pair[2].peers[0].bandwidth = 8e9
    assert "slow: node-0 and node-2: 8 GB/s; 40 GB/s between two nodes" in judged(pair)["all-reduce"][1]


def test_a_gpu_fewer_or_another_driver_is_named():
    reports = healthy(3)
    reports[2].gpus, reports[2].devices = 7, ["NVIDIA H100"] * 7
    assert "7 GPUs, driver 580.95 on node-2" in judged(reports)["devices"][1]
    reports = healthy(3)
    reports[0].driver = "570.1"
    assert "8 GPUs, driver 570.1 on node-0" in judged(reports)["devices"][1]


def test_node_0_whose_clock_alone_is_wrong_is_named():
    reports = healthy(4)
    for peer in reports[0].peers.values():
        peer.ahead = -30.0
    assert judged(reports)["clocks"] == ("fail", "node-0 is 30.0 s ahead of all others")


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, Place()),
        (
            {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "a"},
            None,
        ),
        (
            {
                **{"RANK": "8", "WORLD_SIZE": "16", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1"},
                **{"MASTER_ADDR": "a", "MASTER_PORT": "7", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            },
            Place(1, 2, "a", 7, True),
        ),
        (
            {
                **{"RANK": "8", "WORLD_SIZE": "16", "LOCAL_RANK": "0", "LOCAL_SIZE": "8", "CROSS_RANK": "1"},
                **{"MASTER_ADDR": "a", "MASTER_PORT": "7"},
            },
            Place(1, 2, "a", 7),
        ),
        (
            {
                **{"SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "3", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "120007"},
                "MASTER_ADDR": "a",
            },
            Place(3, 4, "a", 20007),
        ),
        ({"SLURM_JOB_NUM_NODES": "4", "SLURM_NODEID": "0"}, Place()),  # a batch script, not a task of srun's
    ],
)
def test_launchers_say_which_node_this_is(variables, place):
    """As torchrun, DeepSpeed's launcher and srun set them."""
    assert find(Doctor(), variables) == place


def unknown(*_, **__):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_a_name_of_node_0_that_node_0_does_not_know_ends_at_once(monkeypatch, capsys):
    """With the remedy; before anything is looked at."""
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(examine, "examine", lambda *_: pytest.fail("it went on"))
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--node-rank", "0", "--num-nodes", "2", "--master-addr", "no-such-host"])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: node 0's name, no-such-host, is not known on node 0: give --master-addr (MASTER_ADDR)"
    )


def test_another_node_that_does_not_know_it_says_so_and_waits(monkeypatch, capsys):
    """A name may become known when its node is up."""
    said = []
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(
        examine, "examine", lambda place, *_: (said.append(capsys.readouterr().err), (Report(1, "b"), None))[1]
    )
    main(["doctor", "--node-rank", "1", "--num-nodes", "2", "--master-addr", "no-such-host", "--wait", "7"])
    assert "no-such-host, is not known on this node 1 yet; waiting up to 7 s for it. Or give --master-addr" in said[0]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_node_says_for_whom_it_waits_and_does_not_wait_longer(capsys):
    alone = meeting.meet(Place(0, 3, "127.0.0.1", free_port()), 1)
    assert alone.absent == dict.fromkeys((1, 2), "did not come within 1 s")
    assert capsys.readouterr().err == "waiting up to 1 s for nodes 1, 2\n"
    port = free_port()
    with pytest.raises(NoMeetingError, match="does not answer"):
        meeting.meet(Place(1, 2, "127.0.0.1", port), 1)
    said = capsys.readouterr().err
    assert (
        said
        == f"waiting up to 1 s for node 0 at 127.0.0.1:{port}: refused (the machine is there, and nobody listens)\n"
    )


def test_later_too_a_node_says_for_whom_and_for_what_it_waits(monkeypatch, capsys):
    monkeypatch.setattr(meeting, "QUIET_SECONDS", 0.0)
    met = meeting.meet(Place(0, 2, "127.0.0.1", free_port()), 0)
    met.absent.clear()
    capsys.readouterr()
    met.all_at("the optimizer's kernel", 1)
    assert capsys.readouterr().err == "waiting up to 1 s for node 1 (the optimizer's kernel)\n"
    assert met.absent == {1: "did not get through its part (the optimizer's kernel) in 1 s"}


def test_an_address_of_another_machine_is_not_waited_for_long_by_node_0(monkeypatch, capsys):
    """torch goes back to it for minutes."""
    answer = threading.Event()
    monkeypatch.setattr(meeting, "STORE_SECONDS", 0.1)
    monkeypatch.setattr(meeting, "TCPStore", lambda *_, **__: answer.wait(60))
    port = free_port()
    with pytest.raises(
        NoMeetingError, match=rf"port {port} of node 0 cannot be opened at 192.0.2.1, or that is another"
    ):
        meeting.meet(Place(0, 2, "192.0.2.1", port), 1)
    answer.set()
    assert f"for the store at 192.0.2.1:{port}" in capsys.readouterr().err


def test_without_an_address_of_node_0_it_is_asked_for():
    with pytest.raises(PlaceError, match="--master-addr"):
        find(Doctor(node_rank=1, num_nodes=2), {})


def test_a_node_that_is_alone_has_the_interface_that_is_named(monkeypatch):
    """gloo takes it there too, and would not begin."""

    def told(name):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
        report = Report(0, "node-a", interface=chosen_interface(Place(), "gloo"))
        return [f for f in judge(Nodes({0: report}, {}, {}), None) if f.check == "interface"]

    (finding,) = told("eth9")
    assert finding.level == "fail"
    assert finding.text.startswith("node-a: GLOO_SOCKET_IFNAME=eth9: no interface of this node has that name")
    assert finding.remedy == "unset GLOO_SOCKET_IFNAME, or name an interface that is there"
    assert told("lo") == []


LOOPING = "give as MASTER_ADDR (--master-addr) an address of node 0 that the others reach"
CANDIDATES = ": 10.0.0.1 of eth0 or fd00::1 of ib0"
THERE = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.1", "fe80::1"], "ib0": ["fe80::2", "fd00::1"], "ib1": ["fe80::3"]}


@pytest.fixture
def interface_of(monkeypatch):
    """The finding of node 0, of two, that comes by this address and has an interface named; and of others."""
    known = {"localhost": "127.0.0.1", "node-a": "127.0.1.1"}
    monkeypatch.setattr(network, "_addresses", lambda: THERE)
    monkeypatch.setattr(network, "_towards", lambda place, _: "lo")
    monkeypatch.setattr(network.socket, "gethostname", lambda: "node-a")
    monkeypatch.setattr(
        network.socket, "getaddrinfo", lambda name, *_, **__: [(2, 1, 6, "", (known.get(name, name), 0))]
    )

    def finding(address, named, rank=0, others=(), meeting=""):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", named)
        own = Report(rank, "node-a", interface=chosen_interface(Place(rank, 2, address), "gloo"), meeting=meeting)
        reports = {rank: own} | {other.rank: other for other in others}
        absent = {} if others or rank else {1: "did not come within 10 s"}
        (found,) = (f for f in judge(Nodes(reports, absent, {}, 2), None) if f.check == "interface")
        return found.level, found.text, found.remedy

    return finding


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "localhost, 127.0.0.1"),
        ("node-a", "node-a, 127.0.1.1"),
        ("::1", "::1"),
    ],
)
def test_a_master_addr_that_is_the_loopback_is_named_with_the_addresses_to_give(interface_of, address, shown):
    """As Debian's installer has it, 127.0.1.1, too. No interface is to be set to the loopback."""
    level, text, remedy = interface_of(address, "")
    assert level == "fail"
    assert text.startswith(f"MASTER_ADDR leads to the loopback on node-a ({shown}); node-a: nothing names one")
    between = "; and set INTERFACE (GLOO_ and NCCL_SOCKET_IFNAME) to the interface between the nodes on node-a"
    assert remedy == f"{LOOPING}{CANDIDATES}{between}"
    text = f"MASTER_ADDR leads to the loopback on node-a ({shown})"
    assert interface_of(address, "eth0") == ("fail", text, f"{LOOPING}{CANDIDATES}")
    assert interface_of("10.0.0.1", "eth0")[0] == "ok"


def test_of_another_node_whose_master_addr_is_the_loopback_the_addresses_of_node_0_are_not_guessed(interface_of):
    said = interface_of("127.0.0.1", "eth0", rank=1, meeting="node 0 does not answer")
    text = "MASTER_ADDR leads to the loopback on node-a (127.0.0.1)"
    assert said == ("fail", text, f"{LOOPING} (ip -br address lists them there)")


def test_nodes_that_meet_by_the_loopback_or_by_a_name_that_is_it_on_node_0_alone_are_let_go_on(interface_of):
    other = Report(1, "node-b", interface=Interface("eth0", "10.0.0.2", "", "", "eth0", ["eth0"]))
    assert interface_of("node-a", "eth0", others=[other])[0] == "ok"


@pytest.mark.parametrize(
    ("nccl", "gloo", "named", "text"),
    [
        ("eth0", "eth0", "10.0.0.1", ""),
        ("=ib0", "eth0", "10.1.0.1", ""),
        ("eth0", "eth9", "to eth0 there", "node-a: GLOO_SOCKET_IFNAME=eth9: no interface of this node has that name"),
        ("eth0", "lo", "to eth0 there", "node-a: GLOO_SOCKET_IFNAME=lo: no other node can reach the loopback"),
        ("eth0", "", "to eth0 there", "the name node-a leads to 127.0.1.1: no other node can reach the loopback"),
        ("eth9", "eth0", "to eth0 there", "node-a: NCCL_SOCKET_IFNAME=eth9: no interface of this node has that name"),
    ],
)
def test_of_a_run_under_nccl_the_interfaces_of_gloo_and_of_nccl_are_looked_at(monkeypatch, nccl, gloo, named, text):
    there = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "ib0": ["10.1.0.1"]}
    monkeypatch.setattr(network, "_addresses", lambda: there)
    monkeypatch.setattr(network, "_towards", lambda *_: "eth0")
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.1.1", 0))])
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", nccl)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", gloo)
    reports = {0: Report(0, "node-a", interface=chosen_interface(Place(nodes=2), "nccl"))}
    (finding,) = [f for f in judge(Nodes(reports, {}, {}, 2), None) if f.check == "interface"]
    assert finding.level == ("fail" if text else "ok")
    assert text in finding.text
    assert named in (finding.remedy if text else finding.text)
