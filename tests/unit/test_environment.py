"""What stands in the environment before Ray is imported."""

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import httpx
import psutil
import pytest

from actors.errors import BadRequest
from deploy.environment import HAPROXY_PORTS, free_port, haproxy_binary, use_haproxy
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


def test_haproxy_is_started_without_splicing_and_with_the_fleets_own_apology(tmp_path: Path) -> None:
    """See deploy/haproxy.py. Serve's own file is as ray.serve._private.haproxy writes it."""
    use_haproxy()
    (tmp_path / "500.http").write_text("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 21\r\n\r\nInternal Server Error")
    with (tmp_path / "haproxy.cfg").open("w") as config:
        config.write("defaults\nmode http\ntimeout client 9s\ntimeout connect 9s\ntimeout server 9s\n")
        config.write(f"errorfile 503 {tmp_path}/500.http\n")
        config.write(f"frontend all\nbind 127.0.0.1:{(port := free_port())}\n")
    command = [os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", config.name]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as haproxy:
        try:
            until(lambda: is_open(port))
            response = httpx.get(f"http://127.0.0.1:{port}/predict")
            assert "-dS" in psutil.Process(haproxy.pid).cmdline()
        finally:
            haproxy.kill()
    assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "replica_unavailable"


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
