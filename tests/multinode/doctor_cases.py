"""`anon-dist doctor` on hosts that are broken, each in one way: what it says, by case, as JSON. Run by `test_doctor.py`, once for all.

Every node is forked from this process, which has imported already what takes long, and enters its host's network.

    python doctor_cases.py OUT CONFIG
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from namespaces import INTERFACE, Host, hosts, ip  # noqa: E402

import anon_dist.doctor.over_ssh  # noqa: E402
import anon_dist.doctor.screen  # noqa: E402, F401
from anon_dist.cli import main  # noqa: E402
from anon_dist.doctor import local, meeting, network, storage  # noqa: E402

local.MULTIPLY_SECONDS, local.PRODUCTS["cpu"] = 0.0, 256
network.REACH_SECONDS, meeting.STORE_SECONDS = 1.5, 3.0
storage.WRITTEN, storage.SEEN_SECONDS = 1 << 22, 2.0

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_NET, NEW_UTS, NEW_MOUNTS = 0x40000000, 0x04000000, 0x00020000
SECONDS = 120
OUT, CONFIG = Path(sys.argv[1]), sys.argv[2]
RUN = OUT / "shared" / "run"


def called(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def on(host: Host, case: str, options: list[str], breaking=lambda: None, **variables: str) -> int:
    """Fork a process there that breaks something, if it is to, and calls the doctor; its output goes to CASE-RANK.log. Its id."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        log = os.open(OUT / f"{case}-{host.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        net = os.open(f"/var/run/netns/{host.name}", os.O_RDONLY)
        called(LIBC.setns(net, NEW_NET))
        called(LIBC.unshare(NEW_UTS | NEW_MOUNTS))
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        socket.sethostname(host.name)
        os.environ |= {"GLOO_SOCKET_IFNAME": INTERFACE, **variables}
        for name in [n for n, value in os.environ.items() if not value]:
            del os.environ[name]
        breaking()
        main(["doctor", *options])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def case(
    name: str, nodes: list[Host], broken: dict | None = None, variables: dict | None = None, **given: object
) -> dict:
    """One examination of these hosts. What node 0 (and the last, which may have met nobody) found.

    Args:
        broken: what happens on a host before, by rank.
        variables: of a host, by rank.
        given: `num_nodes`, `wait`, `config`.
    """
    number, wait = given.get("num_nodes", len(nodes)), given.get("wait", 20)
    pids = {}
    for host in nodes:
        options = ["--node-rank", str(host.rank), "--num-nodes", str(number), "--master-addr", "10.203.0.1"]
        options += ["--wait", str(wait), "--json", str(OUT / f"{name}-{host.rank}.json")]
        if given.get("config"):
            options += ["--config", CONFIG, "--run-dir", str(given.get("run_dir", RUN))]
        pids[host.rank] = on(
            host, name, options, (broken or {}).get(host.rank, lambda: None), **(variables or {}).get(host.rank, {})
        )
    codes, end = {}, time.monotonic() + SECONDS
    while pids and time.monotonic() < end:
        for rank, pid in list(pids.items()):
            if (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
                del pids[rank]
        time.sleep(0.02)
    for rank, pid in pids.items():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        codes[rank] = "did not end"
    found = {"codes": codes}
    for host in nodes:
        path = OUT / f"{name}-{host.rank}.json"
        if path.exists():
            found[host.rank] = json.loads(path.read_text())
    return found


def hosts_file(host: Host) -> None:
    """The trap of Debian's installer: the node's own name is 127.0.1.1."""
    path = OUT / f"hosts-{host.rank}"
    path.write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n")
    subprocess.run(["mount", "--bind", path, "/etc/hosts"], check=True)


def other_version() -> None:
    original = metadata.version
    metadata.version = lambda name: "4.0.0" if name == "transformers" else original(name)


def shadowed() -> None:
    """A file of somebody's is found before the package, whose metadata are there."""
    (OUT / "shadow").mkdir()
    (OUT / "shadow" / "sentencepiece.py").write_text("import nothing_of_that_name\n")
    sys.path.insert(0, str(OUT / "shadow"))
    sys.modules.pop("sentencepiece", None)


def skewed(seconds: float):
    def run() -> None:
        original = time.time
        time.time = lambda: original() + seconds

    return run


def mounted(*options: str, **more: object):
    def run() -> None:
        RUN.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", *options, RUN], check=True)
        if more.get("fill"):
            with contextlib.suppress(OSError), (RUN / "filled").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 16))

    return run


@contextlib.contextmanager
def firewall(host: Host, ports: str = "1024-65534"):
    """All that comes from the network to these ports is lost, but what comes from node 0's store."""
    at = ("-n", host.name, "rule")
    ip(*at, "add", "pref", "100", "lookup", "local")
    ip(*at, "del", "pref", "0")
    ip(*at, "add", "pref", "1", "iif", INTERFACE, "ipproto", "tcp", "sport", "29500", "lookup", "local")
    ip(*at, "add", "pref", "2", "iif", INTERFACE, "ipproto", "tcp", "dport", ports, "blackhole")
    try:
        yield
    finally:
        ip(*at, "add", "pref", "0", "lookup", "local")
        for pref in ("1", "2", "100"):
            ip(*at, "del", "pref", pref)


@contextlib.contextmanager
def shaped(host: Host):
    """Its cable carries 20 Mbit/s."""
    tc = ["ip", "netns", "exec", host.name, "tc", "qdisc"]
    subprocess.run(
        [*tc, "add", "dev", INTERFACE, "root", "tbf", "rate", "20mbit", "burst", "64kb", "latency", "50ms"], check=True
    )
    try:
        yield
    finally:
        subprocess.run([*tc, "del", "dev", INTERFACE, "root"], check=True)


@contextlib.contextmanager
def occupied(host: Host):
    """Something else listens at the port."""
    program = "import socket, time; s = socket.create_server(('', 29500)); print('here', flush=True); time.sleep(600)"
    process = subprocess.Popen(host.command(sys.executable, "-c", program), stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()


def over_ssh(name: str, pair: list[Host]) -> dict:
    """From outside, with a stand-in for ssh that enters the hosts; a third node cannot be reached."""
    script, path = OUT / "ssh", OUT / f"{name}.json"
    script.write_text(
        "#!/bin/sh\n[ $1 != anon-gone ] || { echo 'ssh: no route to anon-gone' >&2; exit 255; }\n"
        'exec ip netns exec $1 unshare --uts sh -c \'echo $0 > /proc/sys/kernel/hostname; eval "$1"\' $1 "$2"\n'
    )
    script.chmod(0o755)
    nodes = ",".join([pair[0].name, pair[1].name, "anon-gone"])
    command = [sys.executable, "-m", "anon_dist.cli", "doctor", "--nodes", nodes, "--ssh", str(script)]
    command += ["--master-addr", "10.203.0.1", "--wait", "12", "--json", str(path)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    found = json.loads(path.read_text()) if path.exists() else {}
    return {"code": done.returncode, "output": done.stdout + done.stderr, **found}


def main_of_cases() -> None:
    found = {}
    with hosts(3) as three:
        pair = three[:2]
        a, b, _ = three
        found["names"] = [host.name for host in three]
        found["well"] = case("well", pair, config=True)
        ip("-n", b.name, "link", "add", "other0", "type", "bridge")
        ip("-n", b.name, "address", "add", "10.99.0.1/24", "dev", "other0")
        ip("-n", b.name, "link", "set", "other0", "up")
        found["no interface"] = case("no-interface", pair, variables={1: {"GLOO_SOCKET_IFNAME": "eth7"}})
        found["wrong interface"] = case("wrong-interface", pair, variables={1: {"GLOO_SOCKET_IFNAME": "other0"}})
        ip("-n", b.name, "link", "del", "other0")
        found["own name"] = case("own-name", pair, {1: lambda: hosts_file(b)}, {1: {"GLOO_SOCKET_IFNAME": ""}})
        with firewall(b):
            found["firewall"] = case("firewall", pair, config=True)
        with firewall(b, "47000-65534"):
            found["half a firewall"] = case("half-a-firewall", pair, config=True)
        with occupied(a):
            found["occupied"] = case("occupied", pair, wait=3)
        found["versions"] = case("versions", pair, {1: other_version})
        found["shadowed"] = case("shadowed", pair, {1: shadowed})
        found["clock"] = case("clock", pair, {1: skewed(7.5)})
        found["not shared"] = case("not-shared", pair, {1: mounted("-t", "tmpfs", "tmpfs")}, config=True)
        found["read-only"] = case("read-only", pair, {1: mounted("-t", "tmpfs", "-o", "ro", "tmpfs")}, config=True)
        (OUT / "link").symlink_to("unmounted")
        found["link"] = case("link", pair, config=True, run_dir=OUT / "link" / "run")
        full = mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs", fill=True)
        found["full"] = case("full", pair[:1], {0: full}, config=True)
        little = mounted("-t", "tmpfs", "-o", "size=400k", "tmpfs")
        found["little room"] = case("little-room", pair[:1], {0: little}, config=True)
        with shaped(b):
            found["slow"] = case("slow", three)
        found["missing"] = case("missing", pair, num_nodes=3, wait=3)
        found["alone"] = case("alone", [b], num_nodes=2, wait=2)
        found["ssh"] = over_ssh("ssh", pair)
    (OUT / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main_of_cases()
