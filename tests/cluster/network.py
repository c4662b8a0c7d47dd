"""Hosts on this machine: network namespaces on one bridge, each with an address of its own, that are cut, slowed and killed.

    test process ── bridge yfXXXX ──┬── veth ── namespace yfXXXX-head    10.N.N.2
    (10.N.N.1)                      ├── veth ── namespace yfXXXX-one     10.N.N.3
                                    └── …

They share the disk, the memory and the processors. Names are unique, and a guard process that outlives the tests takes
everything away when the other end of its standard input is closed, however this process ends.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tests.conftest import REPOSITORY


class Network:
    """A bridge, and the hosts that are plugged into it.

    Attributes:
        folder: a folder with a short path, for sockets; it goes when the network does.
    """

    def __init__(self) -> None:
        self.name = f"yf{uuid.uuid4().hex[:6]}"
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        guard = [sys.executable, "-m", "tests.cluster.network", self.name, str(self.folder)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, cwd=REPOSITORY, start_new_session=True)
        self._subnet = f"10.{random.randrange(64, 250)}.{random.randrange(250)}"
        self._hosts = 1
        _ip("link", "add", self.name, "type", "bridge")
        _ip("address", "add", f"{self._subnet}.1/24", "dev", self.name)
        _ip("link", "set", self.name, "up")

    def host(self, name: str) -> "Host":
        """Plug in another one."""
        self._hosts += 1
        return Host(self.name, name, f"{self._subnet}.{self._hosts}", f"{self.name}v{self._hosts}")

    def close(self) -> None:
        """Kill what runs on the hosts, and take them away."""
        assert self._guard.stdin
        self._guard.stdin.close()
        self._guard.wait(60)


class Host:
    """A network namespace.

    Attributes:
        name: what its tests call it.
        address: of its one interface.
    """

    def __init__(self, network: str, name: str, address: str, cable: str) -> None:
        self.name, self.address, self._cable = name, address, cable
        self._namespace = f"{network}-{name}"
        _ip("netns", "add", self._namespace)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", self._namespace)
        _ip("link", "set", cable, "master", network, "up")
        for line in (f"address add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            _ip("-n", self._namespace, *line.split())

    def start(
        self, command: Sequence[str], environment: dict[str, str], log: Path, folder: Path | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a command on this host; what it prints is appended to ``log``."""
        inside = ["ip", "netns", "exec", self._namespace, *command]
        with log.open("ab") as output:
            return subprocess.Popen(inside, env=environment, stdout=output, stderr=output, cwd=folder or REPOSITORY)

    def processes(self) -> list[str]:
        """The command lines of what runs on it; Ray's workers are named after their actors."""
        lines = []
        for pid in _ip("netns", "pids", self._namespace).split():
            with suppress(psutil.NoSuchProcess):  # it ended meanwhile
                lines.append(" ".join(psutil.Process(int(pid)).cmdline()))
        return lines

    def cut(self) -> None:
        """Pull the cable: everything runs on, and nothing comes through."""
        _ip("link", "set", self._cable, "down")

    def mend(self) -> None:
        """Plug it in again."""
        _ip("link", "set", self._cable, "up")

    def slow(self, megabits: float) -> None:
        """Let no more through than that in a second."""
        shape = ["tbf", "rate", f"{megabits}mbit", "burst", "32kbit", "latency", "400ms"]
        subprocess.run(["tc", "qdisc", "replace", "dev", self._cable, "root", *shape], check=True)

    def kill(self) -> None:
        """Let the power fail: every process on it dies at once."""
        _kill_all(self._namespace)


def why_not() -> str:
    """Why there can be no hosts here, in a line; empty if there can."""
    if missing := [program for program in ("ip", "tc", "redis-server") if not shutil.which(program)]:
        return f"no hosts as network namespaces here: {', '.join(missing)} not found (Debian: iproute2, redis-server)"
    name = f"yf{uuid.uuid4().hex[:6]}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return f"no hosts as network namespaces here: they are not permitted: {made.stderr.strip()}" if made.returncode else ""


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def _kill_all(namespace: str) -> None:
    while pids := _ip("netns", "pids", namespace).split():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _remove(network: str, folder: Path) -> None:
    for line in _ip("netns", "list").splitlines():
        namespace = line.split()[0]
        if namespace.startswith(f"{network}-"):
            _kill_all(namespace)
            _ip("netns", "delete", namespace)
    with suppress(subprocess.CalledProcessError):  # it was not made yet
        _ip("link", "delete", network)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":  # the guard
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.read()
    _remove(sys.argv[1], Path(sys.argv[2]))
