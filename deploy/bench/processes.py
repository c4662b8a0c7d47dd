"""What a server's processes take, all of them: CPU time and memory, told apart by what each process is there for.

Popen ─ running_server ─→ Server ─ usage() before and after ─→ CPU seconds by role
             │
             └ ready when it answers a real request; its whole tree is gone on leaving
"""

import contextlib
import re
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import httpx
import psutil

from deploy.bench import BenchError
from deploy.environment import free_port

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
LEFT_S = 3.0  # for what a server's end ends
POLL_S = 0.05

# What Ray and Serve write into the command lines of their processes. The first that matches counts.
_ROLES = [
    (re.compile(r"^ray::ServeReplica:[^:]+:([^.\s]+)"), None),  # the deployment's own name
    (re.compile(r"^ray::(ProxyActor|HAProxyManager)|/haproxy "), "proxy"),
    (re.compile(r"^ray::ServeController"), "controller"),
    (re.compile(r"^ray::|/ray/core/src/ray/|/ray/dashboard/|/ray/_private/|/ray/autoscaler/"), "ray"),
]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tree of processes has taken so far.

    Attributes:
        at: when this was seen, on the monotonic clock.
        cpu_s: process id → CPU seconds, user and system.
        roles: process id → what it is there for.
        memory_mb: process id → its resident set.
    """

    at: float
    cpu_s: Mapping[int, float]
    roles: Mapping[int, str]
    memory_mb: Mapping[int, float]

    def since(self, before: "Usage") -> dict[str, float]:
        """CPU seconds by role, of the processes that still live, since ``before``."""
        spent = defaultdict[str, float](float)
        for pid, seconds in self.cpu_s.items():
            spent[self.roles[pid]] += seconds - before.cpu_s.get(pid, 0.0)
        return dict(spent)

    def memory_of(self, role: str) -> list[float]:
        """MB of each process of that role."""
        return [self.memory_mb[pid] for pid, its_role in self.roles.items() if its_role == role]


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers.

    Attributes:
        address: ``http://HOST:PORT``.
        process: the root of its tree.
        start_s: seconds from its start to its first answer.
    """

    address: str
    process: psutil.Process
    start_s: float

    def usage(self) -> Usage:
        """What its processes have taken so far."""
        cpu_s, roles, memory_mb = {}, {}, {}
        for process in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess), process.oneshot():  # it may end at any line
                role = "driver" if process == self.process else role_of(" ".join(process.cmdline()))
                spent, memory = process.cpu_times(), process.memory_info().rss / 1e6
                cpu_s[process.pid], roles[process.pid], memory_mb[process.pid] = spent.user + spent.system, role, memory
        return Usage(time.monotonic(), cpu_s, roles, memory_mb)


def role_of(command: str) -> str:
    """What a process with this command line is for: a deployment's name, ``proxy``, ``controller``, ``ray`` or ``server``."""
    for pattern, role in _ROLES:
        if match := pattern.search(command):
            return role or match[1]
    return "server"


@contextmanager
def running_server(
    command: Callable[[int], Sequence[str]],
    ask: Callable[[str], httpx.Response],
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Start a server on a free port; on leaving, end it with all its processes.

    Args:
        command: port → command line.
        ask: address → the answer to a request such as will be measured.
        environment: of its processes; this one's if None.

    Raises:
        BenchError: it ended before it answered, or does not answer with 200.
    """
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        started = time.monotonic()
        line = command(port)
        child = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait_until_it_answers(child, lambda: ask(address), log, " ".join(line[:5]))
            yield Server(address, psutil.Process(child.pid), time.monotonic() - started)
        finally:
            _end(child)


def _wait_until_it_answers(
    child: "subprocess.Popen[bytes]", ask: Callable[[], httpx.Response], log: IO[str], name: str
) -> None:
    give_up = time.monotonic() + START_TIMEOUT_S
    answer = "nothing"
    while time.monotonic() < give_up:
        if child.poll() is not None:
            log.seek(0)
            raise BenchError(f"'{name}' ended before it answered: {' '.join(log.read().strip().splitlines()[-1:])}")
        try:
            response = ask()
            if response.status_code == 200:
                return
            answer = f"{response.status_code} {response.text[:200]}"
        except httpx.HTTPError as error:
            answer = repr(error)
        time.sleep(POLL_S)
    raise BenchError(f"'{name}' did not answer within {START_TIMEOUT_S:g} s, at last with {answer}")


def _end(child: "subprocess.Popen[bytes]") -> None:
    """By SIGTERM, as a user would; what is left of its tree after that is killed."""
    try:
        tree = psutil.Process(child.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(STOP_TIMEOUT_S)
    child.kill()  # of no effect where it has ended
    _, left = psutil.wait_procs(tree, LEFT_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, LEFT_S)
    child.wait()
