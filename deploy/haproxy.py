"""HAProxy, with four things put right that Serve gets wrong: the command that ``use_haproxy`` names to Serve.

    Serve's HAProxyManager ─ yolofleet-haproxy -f CONFIG … ─→ [ main ] ─ becomes ─→ haproxy -dS -f CONFIG …

- ``-dS``: no splicing, which Serve switches on. A request that HAProxy 2.8 has spliced through is not given up when its client
  goes (in about half of the cases; ``option abortonclose`` is of no help then), and what nobody waits for is computed.
- Serve has written the answer for an ingress that died with a request in hand, a bare 500, beside CONFIG. Before HAProxy reads
  it, it becomes what deploy/proxy.py says: 503 replica_unavailable, and when to come back. A client whose connection has
  brought an answer before sees it closed instead, which is HAProxy's way to say that the request may be sent again.
- Statistics and metrics listen on all addresses: they go where the endpoint is.
- HAProxy ends with Serve's process, however that ends. Else it would keep the endpoint's port, and send requests to replicas
  that were.
"""

import ctypes
import os
import re
import signal
import sys
from http import HTTPStatus
from pathlib import Path

from actors.errors import ReplicaUnavailable
from deploy.environment import haproxy_binary

PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> None:
    """Become HAProxy. Serve starts another one at every change of its configuration, hence no imports that are not needed."""
    config = Path(sys.argv[sys.argv.index("-f") + 1])
    config.write_text(_close_to_strangers(config.read_text()))
    apology = config.parent / "500.http"
    if b"retry-after" not in apology.read_bytes():
        apology.write_bytes(_apology())
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # names this command
    binary = haproxy_binary() or "haproxy"
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])  # noqa: S606 - this process is what Serve stops


def _close_to_strangers(config: str) -> str:
    """Serve's configuration, with every listener on the endpoint's own addresses."""
    endpoint = re.search(r"^\s*bind ([\w.-]+):", config, re.MULTILINE)
    return re.sub(r"^(\s*bind )\*?:", rf"\g<1>{endpoint[1]}:", config, flags=re.MULTILINE) if endpoint else config


def _apology() -> bytes:
    """An answer as it goes over the wire."""
    from starlette.requests import Request

    from deploy.api.problems import problem_response

    died = ReplicaUnavailable("The process that had this request in hand has died, or there is none at present: send it again")
    response = problem_response(Request({"type": "http", "path": "/", "headers": []}), died)
    status = f"HTTP/1.1 {response.status_code} {HTTPStatus(response.status_code).phrase}\r\n".encode()
    headers = [b"%b: %b\r\n" % header for header in response.raw_headers if header[1]]  # HAProxy knows no request's id
    return status + b"".join(headers) + b"\r\n" + bytes(response.body)
