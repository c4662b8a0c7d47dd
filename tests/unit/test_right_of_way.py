"""A job's process stands still while a replica of its node has something in hand: real processes, real signals, no Ray."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from actors import right_of_way
from actors.right_of_way import RightOfWay
from tests.conftest import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pidfd_open(2) is Linux")

GIVES_WAY = """
import sys, time
from pathlib import Path
from actors import right_of_way
right_of_way.give_way(Path(sys.argv[1]))
right_of_way.give_way(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    time.sleep(0.001)
"""
HOLDS = """
import sys, time
from pathlib import Path
from actors.right_of_way import RightOfWay
with RightOfWay(Path(sys.argv[1])).held():
    print("ready", flush=True)
    time.sleep(3600)
"""


@contextmanager
def process(code: str, folder: Path) -> Iterator[psutil.Process]:
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout and running.stdout.readline() == "ready\n"
        try:
            yield psutil.Process(running.pid)
        finally:
            running.kill()


def still(job: psutil.Process) -> bool:
    return job.status() == psutil.STATUS_STOPPED


def guardians(job: psutil.Process) -> list[psutil.Process]:
    return [child for child in job.children() if child.status() != psutil.STATUS_ZOMBIE]


def test_a_job_stands_still_from_the_first_in_hand_to_the_last(tmp_path: Path) -> None:
    replica = RightOfWay(tmp_path)
    with replica.held():
        pass  # with nobody there
    with process(GIVES_WAY, tmp_path) as one, process(GIVES_WAY, tmp_path) as another:
        assert [len(guardians(job)) for job in (one, another)] == [1, 1]
        for _ in range(3):
            with replica.held():
                with replica.held():
                    until(lambda: still(one) and still(another))
                assert still(one) and still(another)
            until(lambda: not still(one) and not still(another))


def test_two_replicas_have_it_until_the_last_of_them_is_done(tmp_path: Path) -> None:
    first, second = RightOfWay(tmp_path), RightOfWay(tmp_path)
    with process(GIVES_WAY, tmp_path) as job:
        with first.held():
            with second.held():
                until(lambda: still(job))
            for _ in range(20):  # long enough for what the second has said to be heard
                assert still(job)
                time.sleep(0.01)
        until(lambda: not still(job))


def test_a_replica_that_is_killed_has_nothing_in_hand(tmp_path: Path) -> None:
    with process(GIVES_WAY, tmp_path) as job:
        with process(HOLDS, tmp_path):
            until(lambda: still(job))
        until(lambda: not still(job))


def test_a_job_whose_guardian_is_killed_is_woken_by_the_next_answer(tmp_path: Path) -> None:
    replica = RightOfWay(tmp_path)
    with process(GIVES_WAY, tmp_path) as job:
        with replica.held():
            until(lambda: still(job))
            (guardian,) = guardians(job)
            guardian.kill()
            until(lambda: not guardians(job))
            assert still(job)
        until(lambda: not still(job))


def test_a_guardian_ends_with_its_process_and_takes_its_socket_along(tmp_path: Path) -> None:
    with process(GIVES_WAY, tmp_path) as job:
        (guardian,) = guardians(job)
    until(lambda: not guardian.is_running())
    assert not list((tmp_path / "way").iterdir())
    with RightOfWay(tmp_path).held():
        pass


def test_the_socket_of_a_process_that_is_no_more_is_cleared_away(tmp_path: Path) -> None:
    with process(GIVES_WAY, tmp_path) as job:
        (guardian,) = guardians(job)
        guardian.kill()
        until(lambda: not guardians(job))
        assert list((tmp_path / "way").iterdir())
        with RightOfWay(tmp_path).held():
            assert not list((tmp_path / "way").iterdir())


def test_a_node_that_is_always_busy_lets_a_job_breathe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else Ray would take it for dead."""
    monkeypatch.setattr(right_of_way, "STILL_S", 0.3)
    (tmp_path / "way").mkdir()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]) as running:
        job, descriptor, path = psutil.Process(running.pid), os.pidfd_open(running.pid), tmp_path / "way" / str(running.pid)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen()
            guardian = threading.Thread(target=right_of_way.guard, args=(listener, descriptor, path))
            guardian.start()
            with RightOfWay(tmp_path).held():
                for _ in range(3):
                    until(lambda: still(job))
                    until(lambda: not still(job))
                running.kill()
            guardian.join()
        os.close(descriptor)
