"""A Ray cluster over hosts: a head that keeps its memory in Redis on a host of its own, and a raylet on every other one.

host store   redis-server
host head    GCS, Serve's controller, a raylet without CPUs; what operators run
host …       a raylet with CPUs and a pretended GPU
"""

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.cluster.network import Host, Network
from tests.conftest import until

GCS, REDIS, ENDPOINT = 6379, 6379, 8000
CPUS = 6
BIN = Path(sys.executable).parent
TOKEN = secrets.token_hex(16)
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "2",
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1",  # see "When the head is lost" in docs/operations.md
}


class Cluster:
    """Redis, a head, and who has joined.

    Attributes:
        hosts: the raylets' hosts by name, the head's among them.
        workers: names of those that have joined and not been taken away.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._password = secrets.token_hex(16)
        self._store = network.host("store")
        self._redis()
        self.hosts = {"head": network.host("head")}
        self.workers: set[str] = set()
        self.start_head()

    @property
    def head(self) -> Host:
        """Where the control plane is."""
        return self.hosts["head"]

    def url(self, host: str) -> str:
        """The endpoint by that host's proxy."""
        return f"http://{self.hosts[host].address}:{ENDPOINT}"

    def log(self, host: str) -> Path:
        """What has been printed there."""
        return self._network.folder / f"{host}.log"

    def start_head(self) -> None:
        """Start Ray on the head: anew, or with all that Redis remembers."""
        redis = {"RAY_REDIS_ADDRESS": f"{self._store.address}:{REDIS}"}
        options = ["--head", f"--port={GCS}", "--num-cpus=0", "--num-gpus=0", "--include-dashboard=false"]
        self._start_ray(self.head, [*options, f"--redis-password={self._password}"], redis)

    def kill(self, name: str) -> None:
        """Let a host's power fail."""
        self.workers.discard(name)
        self.hosts[name].kill()

    def join(self, name: str) -> None:
        """Let a host join: a new one, or one whose raylet has ended."""
        host = self.hosts.get(name) or self._network.host(name)
        self.hosts[name] = host
        self._start_ray(host, [f"--address={self.head.address}:{GCS}", f"--num-cpus={CPUS}", "--num-gpus=1"])
        self.workers.add(name)

    def run(self, *command: str, host: str = "head") -> "subprocess.Popen[bytes]":
        """Start a command as an operator would, on the head; its output goes to that host's log."""
        environment = self._environment() | {"RAY_ADDRESS": f"{self.head.address}:{GCS}"}
        program = str(BIN / command[0])
        return self.hosts[host].start([program, *command[1:]], environment, self.log(host))

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return inherited | ENVIRONMENT

    def _start_ray(self, host: Host, options: list[str], environment: dict[str, str] | None = None) -> None:
        log = self.log(host.name)
        started = log.read_text().count("Ray runtime started") if log.exists() else 0
        folder = self._network.folder / f"{host.name}{started}"
        folder.mkdir()
        common = [f"--node-ip-address={host.address}", f"--temp-dir={folder}", "--object-store-memory=100000000"]
        command = [str(BIN / "ray"), "start", "--block", *common, "--include-log-monitor=false", *options]
        raylet = host.start(command, self._environment() | (environment or {}), log)
        until(lambda: raylet.poll() is not None or log.read_text().count("Ray runtime started") > started)
        assert raylet.poll() is None, log.read_text()

    def _redis(self) -> None:
        address = self._store.address
        options = ["--bind", address, "--port", str(REDIS), "--requirepass", self._password, "--save", ""]
        command = ["redis-server", *options, "--dir", str(self._network.folder)]
        self._store.start(command, dict(os.environ), self.log("store"))
        until(lambda: _listens(address, REDIS))


@contextmanager
def cluster_over_hosts() -> Iterator[Cluster]:
    """A cluster with a head and nothing else; it is gone afterwards."""
    network = Network()
    try:
        yield Cluster(network)
    finally:
        network.close()


def _listens(address: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False
