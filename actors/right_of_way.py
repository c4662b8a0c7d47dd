"""Who answers goes first: the processes of a background job stand still while a replica of their node has something in hand.

    replica: RightOfWay.held ─ 1: the first in hand, 0: none any more ─→ guardian ─ SIGSTOP, SIGCONT ─→ process of the job
             kept in any process                  a socket for each guardian       one beside each, with its life

The scheduler alone does not do it. Threads that compute one image together wait for each other at every layer, and give their
core away while they wait, to whoever wants it: a job in Linux's idle class (sched(7)) then keeps it for a whole tick. On two
cores that doubled the time of an image. On a GPU no scheduler tells the two apart at all.

Nobody has to clean up: a replica that dies closes its connections, and counts as having nothing in hand; a guardian ends with
its process; and if a guardian is killed, the next replica that would have told it wakes its process. Linux only, as pidfd is.
"""

from __future__ import annotations

import logging
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

STILL_S = 5.0  # at a stretch: who expects an answer of that process, Ray above all, has to get one now and then
BREATH_S = 0.25  # then it runs as long, so that a node that always has something in hand only slows the job down
BUSY, FREE = b"1", b"0"

log = logging.getLogger(__name__)


def node_folder() -> Path:
    """What the processes of this Ray session on this node share; it goes when the session does."""
    import ray  # here: a guardian does without

    context = ray.get_runtime_context()
    return Path(str(context.get_temp_dir()), context.get_session_name(), "yolofleet", str(context.get_node_id())[:8])


class RightOfWay:
    """A replica's side. On one thread.

    Args:
        folder: of this node, see ``node_folder``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = _meeting_place(folder)
        self._in_hand = 0
        self._guardians: dict[str, socket.socket] = {}  # by the id of the process that each stands beside

    @contextmanager
    def held(self) -> Iterator[None]:
        """One more in hand, within the block."""
        self._in_hand += 1
        if self._in_hand == 1:
            self._meet()
            self._tell(BUSY)
        try:
            yield
        finally:
            self._in_hand -= 1
            if not self._in_hand:
                self._tell(FREE)

    def _meet(self) -> None:
        """Connect to guardians that are new."""
        for path in self._folder.iterdir():
            if path.name in self._guardians or path.name.startswith("."):
                continue
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.setblocking(False)
            try:
                connection.connect(str(path))
            except BlockingIOError:  # it has many to greet: next time
                connection.close()
            except OSError:  # gone, and its process with it
                connection.close()
                path.unlink(missing_ok=True)
            else:
                self._guardians[path.name] = connection

    def _tell(self, what: bytes) -> None:
        for name, connection in list(self._guardians.items()):
            try:
                connection.send(what, socket.MSG_NOSIGNAL)
            except OSError:
                connection.close()
                del self._guardians[name]
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(int(name), signal.SIGCONT)


@cache
def give_way(folder: Path) -> None:
    """Put a guardian beside this process: from now on it stands still while a replica of this node has something in hand.

    Args:
        folder: of this node, see ``node_folder``.
    """
    if sys.platform != "linux":
        return
    path = _meeting_place(folder) / str(os.getpid())
    silent = path.with_name(f".{path.name}")
    silent.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(silent))  # at most 107 bytes
    except OSError as error:
        log.warning("%s: this process goes on while replicas compute, in the idle class only (%s)", path, error)
        return
    listener.listen(64)
    silent.rename(path)  # under this name nobody ever sees it refuse a connection while its guardian lives
    process = os.pidfd_open(os.getpid())
    command = [sys.executable, "-m", __name__, str(listener.fileno()), str(process), str(path)]
    subprocess.Popen(command, pass_fds=(listener.fileno(), process), start_new_session=True)
    listener.close()
    os.close(process)


def _meeting_place(folder: Path) -> Path:
    place = folder / "way"
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    return place


def guard(listener: socket.socket, process: int, path: Path) -> None:
    """Stop and wake a process until it ends.

    Args:
        listener: where replicas connect.
        process: file descriptor of the process, pidfd_open(2).
        path: of the listener; removed at the end.
    """
    busy: dict[socket.socket, bool] = {}
    still, woken, due = False, -math.inf, 0.0  # since when it runs, or until when it stands still at most
    listener.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(process, selectors.EVENT_READ)  # readable when the process has ended
        try:
            while True:
                wait = max((due if still else woken + BREATH_S) - time.monotonic(), 0.0) if any(busy.values()) else None
                for key, _ in selector.select(wait):
                    if key.fileobj == process:
                        return
                    if key.fileobj is listener:
                        selector.register(listener.accept()[0], selectors.EVENT_READ)
                    elif isinstance(replica := key.fileobj, socket.socket):
                        if said := _said(replica):
                            busy[replica] = said.endswith(BUSY)
                        else:
                            busy.pop(replica, None)
                            selector.unregister(replica)
                            replica.close()
                now, asked = time.monotonic(), any(busy.values())
                if still and (not asked or now >= due):
                    signal.pidfd_send_signal(process, signal.SIGCONT)
                    still, woken = False, now
                elif not still and asked and (now < due or now - woken >= BREATH_S):
                    if now - woken >= BREATH_S:
                        due = now + STILL_S
                    signal.pidfd_send_signal(process, signal.SIGSTOP)
                    still = True
        finally:
            path.unlink(missing_ok=True)
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGCONT)


def _said(connection: socket.socket) -> bytes:
    try:
        return connection.recv(4096)
    except OSError:
        return b""


if __name__ == "__main__":
    guard(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3]))
