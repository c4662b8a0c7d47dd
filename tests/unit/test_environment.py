"""What stands in the environment before Ray is imported."""

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest

from actors.errors import BadRequest
from deploy.environment import HAPROXY_PORTS, haproxy_is_here, use_haproxy


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
    assert not haproxy_is_here()
    with pytest.raises(BadRequest, match="leave out --haproxy"):
        use_haproxy()
