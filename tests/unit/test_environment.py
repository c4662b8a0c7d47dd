"""What stands in the environment before Ray is imported."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import psutil
import pytest

from actors.errors import BadRequest
from deploy.environment import HAPROXY_PORTS, QUIET_PORTS, free_port, haproxy_binary, use_haproxy
from tests.conftest import until


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    with patch.dict(os.environ):
        for variable in [name for name in os.environ if name.startswith("RAY_SERVE_HAPROXY") or name in HAPROXY_PORTS]:
            del os.environ[variable]
        yield


def test_where_haproxy_is_every_fleet_gets_ports_and_files_of_its_own() -> None:
    use_haproxy()
    assert len({os.environ[variable] for variable in HAPROXY_PORTS}) == len(HAPROXY_PORTS)
    assert str(os.getuid()) in os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]


def test_where_it_is_not_a_sentence_says_what_to_do() -> None:
    os.environ |= {"RAY_SERVE_HAPROXY_BINARY_PATH": "/nowhere", "PATH": ""}
    assert not haproxy_binary()
    with pytest.raises(BadRequest, match="leave out --haproxy"):
        use_haproxy()


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """As Serve starts HAProxy; its files are as ray.serve._private.haproxy writes them."""
    use_haproxy()
    (tmp_path / "500.http").write_text("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 21\r\n\r\nInternal Server Error")
    with (tmp_path / "haproxy.cfg").open("w") as config:
        config.write("defaults\nmode http\ntimeout client 9s\ntimeout connect 9s\ntimeout server 9s\n")
        config.write(f"errorfile 503 {tmp_path}/500.http\n")
        config.write(f"frontend metrics\nbind :{free_port()}\n")
        config.write(f"frontend all\nbind 127.0.0.1:{free_port()}\n")
        config.write(f"listen stats\n  bind *:{free_port()}\n")
    return [os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", config.name]


def test_haproxy_is_started_without_splicing_beside_the_endpoint_and_with_the_fleets_own_apology(command: list[str]) -> None:
    """See deploy/haproxy.py."""
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as haproxy:
        try:
            until(lambda: len(listening(haproxy.pid)) == 3)
            addresses = listening(haproxy.pid)
            response = httpx.get(f"http://127.0.0.1:{addresses[1].port}/predict")
            assert "-dS" in psutil.Process(haproxy.pid).cmdline()
        finally:
            haproxy.kill()
    assert {address.ip for address in addresses} == {"127.0.0.1"}
    assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "replica_unavailable"


def test_haproxy_ends_with_the_process_that_has_started_it(command: list[str]) -> None:
    start = f"import subprocess, time; print(subprocess.Popen({command}).pid, flush=True); time.sleep(1000)"
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as serve:
        try:
            assert serve.stdout
            haproxy = int(serve.stdout.readline())
            until(lambda: listening(haproxy))
        finally:
            serve.kill()
    until(lambda: not psutil.pid_exists(haproxy) or psutil.Process(haproxy).status() == psutil.STATUS_ZOMBIE)


def listening(process: int) -> list[Any]:
    """Its addresses, in the order in which it opened them."""
    connections = psutil.Process(process).net_connections("tcp")
    return [each.laddr for each in sorted(connections, key=lambda each: each.fd) if each.status == psutil.CONN_LISTEN]


def test_a_free_port_is_none_that_the_system_gives_to_others_and_is_looked_for_on_own_addresses_only() -> None:
    ports = {free_port() for _ in range(100)}
    assert len(ports) == 100 and ports <= set(QUIET_PORTS)
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(QUIET_PORTS) < lowest
    with pytest.raises(OSError, match="assign"):
        free_port("192.0.2.77")


def test_a_free_port_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, free = free_port(), free_port()
    monkeypatch.setattr("deploy.environment._given", set())
    monkeypatch.setattr("deploy.environment.secrets.choice", offering(taken, free))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", taken))
        assert free_port() == free


def test_no_port_is_given_twice_nor_the_endpoints_to_haproxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given is not listened on at once, so that it looks free."""
    endpoint, *own, after = (free_port() for _ in range(2 + len(HAPROXY_PORTS)))
    monkeypatch.setattr("deploy.environment._given", set())
    monkeypatch.setattr("deploy.environment.secrets.choice", offering(endpoint, *own, own[1], after))
    use_haproxy(endpoint)
    assert [os.environ[variable] for variable in HAPROXY_PORTS] == [str(port) for port in own]
    assert free_port() == after


def offering(*ports: int) -> Callable[[range], int]:
    """What takes the place of ``secrets.choice``."""
    left = iter(ports)
    return lambda _: next(left)
