"""Poisoned images: found without blaming the innocent, then kept away from every replica for a while.

    a process died with an image in hand ─→ suspect ─→ its next try is alone in a replica ─ answered ─→ cleared
                                                                └ that process died too ─→ condemned: 422 for TTL_S

A dead process leaves many suspects, since it had several images in hand; only one that also dies *alone* is to blame.

Quarantine is the memory of one process. An ingress learns from the requests whose replica died; but nobody waits any more
for the image of a client that has gone, and in the topology ``direct`` whoever waits dies too. So every replica keeps a
CrashJournal for the other processes of its node: a small memory-mapped file that names what it has in hand, which the
operating system keeps when the process goes, and whose lock it releases then. Nodes learn separately.
"""

import fcntl
import hashlib
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actors.errors import PoisonedImage

TTL_S = 600.0
DIGEST_BYTES = 16
_SLOT_BYTES = DIGEST_BYTES + 1  # and a flag: 0 empty, 1 in company, 2 alone
_SLOTS = 1024


def poisoned(kind: str) -> PoisonedImage:
    """What is said of the condemned; ``kind`` is image, video or tensor."""
    return PoisonedImage(f"This {kind} has crashed the engine twice and is not tried again: check its file, and report it")


class Verdict(Enum):
    """What is known of an image."""

    CLEAR = "clear"
    SUSPECT = "suspect"
    CONDEMNED = "condemned"


def digest_of(data: bytes | NDArray[np.float32]) -> bytes:
    """What an image, a video or a tensor is remembered by."""
    encoded = data if isinstance(data, bytes) else np.ascontiguousarray(data).data
    return hashlib.blake2b(encoded, digest_size=DIGEST_BYTES).digest()


class Quarantine:
    """Suspects and condemned by digest, each for ``TTL_S`` seconds."""

    def __init__(self) -> None:
        self._suspects: dict[bytes, float] = {}
        self._condemned: dict[bytes, float] = {}

    def __bool__(self) -> bool:
        """Whether there is anybody at all; while there is not, nobody need compute a digest."""
        return bool(self._suspects or self._condemned)

    def verdict(self, digest: bytes) -> Verdict:
        """What is known of this image now."""
        now = time.monotonic()
        for kept in (self._suspects, self._condemned):
            for old in [each for each, until in kept.items() if until < now]:
                del kept[old]
        if digest in self._condemned:
            return Verdict.CONDEMNED
        return Verdict.SUSPECT if digest in self._suspects else Verdict.CLEAR

    def suspect(self, digest: bytes) -> None:
        """Its process died, with others in hand."""
        self._suspects[digest] = time.monotonic() + TTL_S

    def condemn(self, digest: bytes) -> None:
        """Its process died with nothing else in hand."""
        self._suspects.pop(digest, None)
        self._condemned[digest] = time.monotonic() + TTL_S

    def clear(self, digest: bytes) -> None:
        """It was answered, alone."""
        self._suspects.pop(digest, None)


class CrashJournal:
    """What this process has in hand, for whoever comes after it on this node.

    Args:
        folder: of all processes with the same model on this node; made if missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._read: set[str] = set()
        self._path = folder / f"live-{os.getpid()}-{time.time_ns()}"
        unlocked = folder / f".{self._path.name}"
        self._file = unlocked.open("w+b")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.truncate(_SLOTS * _SLOT_BYTES)
        unlocked.rename(self._path)  # under this name nobody ever sees it unlocked while this process lives
        self._slots = mmap.mmap(self._file.fileno(), _SLOTS * _SLOT_BYTES)
        self._free = list(range(_SLOTS))

    @contextmanager
    def in_hand(self, digest: bytes, *, alone: bool) -> Iterator[None]:
        """Note an image while the body runs; beyond ``_SLOTS`` at once the rest goes unnoted."""
        slot = self._free.pop() if self._free else None
        if slot is not None:
            self._slots[slot * _SLOT_BYTES : (slot + 1) * _SLOT_BYTES] = bytes([2 if alone else 1]) + digest
        try:
            yield
        finally:
            if slot is not None:
                self._slots[slot * _SLOT_BYTES] = 0
                self._free.append(slot)

    def learn(self, quarantine: Quarantine) -> None:
        """Tell ``quarantine`` what processes that died since the last time had in hand. Old journals are removed."""
        for name in os.listdir(self._folder):  # noqa: PTH208 - names only, on the way of every request
            other = name.startswith("live-") and name != self._path.name
            dead = _bury(self._folder / name) if other else name
            if dead.startswith("dead-") and dead not in self._read:
                self._read.add(dead)
                _learn_from(self._folder / dead, quarantine)

    def close(self) -> None:
        """A regular end: nothing is left for others."""
        self._path.unlink(missing_ok=True)
        self._slots.close()
        self._file.close()


def _bury(path: Path) -> str:
    """The journal's name after its process's death, which tells when that was seen; empty if the process lives."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            dead = path.with_name(f"dead-{int(time.time())}-{path.name}")
            path.rename(dead)
            return dead.name
    except (BlockingIOError, FileNotFoundError):  # it lives; or it has ended regularly, or somebody else has buried it
        return ""


def _learn_from(path: Path, quarantine: Quarantine) -> None:
    if time.time() - int(path.name.split("-")[1]) > TTL_S:
        path.unlink(missing_ok=True)
        return
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    for start in range(0, len(content) - _SLOT_BYTES + 1, _SLOT_BYTES):
        flag, digest = content[start], content[start + 1 : start + _SLOT_BYTES]
        if flag == 1:
            quarantine.suspect(digest)
        elif flag == 2:
            quarantine.condemn(digest)
