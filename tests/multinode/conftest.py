"""The hosts, and a run on one host to compare with."""

import secrets
import shutil
from pathlib import Path

import pytest
from two_hosts import INTERFACE, SMALL, Host, go_on, ip


@pytest.fixture(scope="module")
def hosts():
    """Two hosts, joined; whatever still runs on them is killed in the end."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2 (the command `ip`)")
    token = secrets.token_hex(3)
    pair = [Host(i, f"anon-{token}-{i}", f"10.203.0.{i + 1}") for i in range(2)]
    first, second = pair
    made: list[Host] = []
    try:
        try:
            for host in pair:
                ip("netns", "add", host.name)
                made.append(host)
            ip(
                *("-n", first.name, "link", "add", INTERFACE, "type", "veth"),
                *("peer", "name", INTERFACE, "netns", second.name),
            )
            for host in pair:
                ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
                ip("-n", host.name, "link", "set", "lo", "up")
                host.cable("up")
            ip("netns", "exec", first.name, "true")
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield pair
    finally:
        for host in made:
            host.kill()
            ip("netns", "delete", host.name)  # the cable goes with it


@pytest.fixture
def quiet(hosts):
    """No test leaves processes to the next, nor the cable out."""
    yield
    for host in hosts:
        host.kill()
        host.cable("up")


@pytest.fixture(scope="module")
def config(prepared, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("multinode") / "small.yaml"
    path.write_text(SMALL.replace("PATH", str(prepared)))
    return path


@pytest.fixture(scope="module")
def on_one_host(config, tmp_path_factory) -> Path:
    """The folder of a run of engine ddp on two ranks of one host, with all its checkpoints."""
    run = tmp_path_factory.mktemp("one-host") / "run"
    go_on(config, run, "ddp", "--checkpoint.keep", "100")
    return run
