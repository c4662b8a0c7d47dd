"""API keys: a file of their hashes. The keys themselves are nowhere but with those who use them.

    yolofleet key NAME → a fresh key, shown once, and its line for the file: NAME SHA256HEX [requests-per-minute]
    presented key → SHA-256 → held against every line in constant time → Key with its Budget, or nobody

A key has 160 random bits, so a fast hash of it tells as little as a slow one. The file is read again when it changes.
"""

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from actors.errors import BadRequest, FleetError

KEY_NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"
CHECK_PERIOD_S = 1.0  # how often the file is looked at, at most
WINDOW_S = 60.0  # a budget may be spent in one go, and grows back within this time

_LINE = re.compile(rf"({KEY_NAME})\s+([0-9a-fA-F]{{64}})(?:\s+([1-9][0-9]{{0,8}}))?")

log = logging.getLogger(__name__)


class BadKeysFile(FleetError):
    """A file of API keys that cannot be read."""

    code = "bad_keys_file"


class Budget:
    """How many requests one key may still make: a token bucket that holds a minute's worth.

    It is kept as one number, the time at which the bucket will be full again.

    Args:
        per_minute: requests per minute; None for no limit.
        clock: seconds.
    """

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._full_at = 0.0

    def take(self) -> float:
        """Spend one request. Returns 0, or the seconds, to the microsecond, after which one is there to spend."""
        if self.per_minute is None:
            return 0.0
        now = self._clock()
        full_at = max(self._full_at, now) + WINDOW_S / self.per_minute
        wait = round(full_at - now - WINDOW_S, 6)
        if wait > 0:
            return wait
        self._full_at = full_at
        return 0.0


@dataclass(frozen=True)
class Key:
    """One line of the file: whose key, its hash, and what it may still ask for."""

    name: str
    digest: bytes
    budget: Budget


class KeyFile:
    """The keys of a file, as it stands now.

    An edit that cannot be read changes nothing but the log: the keys before it stay valid. Replace the file by a rename, so
    that nobody reads half of it.

    Args:
        path: the file.
        per_minute: requests per minute of a key whose line gives no number; None for no limit.
        clock: seconds.

    Raises:
        BadKeysFile: it cannot be read, or holds no key.
    """

    def __init__(self, path: str | Path, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._per_minute, self._clock = Path(path), per_minute, clock
        self._seen, self._next_check = self._signature(), clock() + CHECK_PERIOD_S
        self._keys = self._read()
        if not self._keys:
            raise BadKeysFile(f"{path} holds no key, so nobody could get in: add the line that 'yolofleet key NAME' prints")

    def find(self, presented: str) -> Key | None:
        """Whose key this is, or None. Takes the same time whichever line it matches, and whether it matches one."""
        self._refresh()
        digest = hashlib.sha256(presented.encode()).digest()
        matches = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]
        return matches[0] if matches else None

    def _refresh(self) -> None:
        now = self._clock()
        if now < self._next_check:
            return
        self._next_check = now + CHECK_PERIOD_S
        try:
            signature = self._signature()
            if signature == self._seen:
                return
            self._seen = signature
            self._keys = self._read()
        except BadKeysFile as error:
            log.error("the API keys stay as they were: %s", error.message)
            return
        log.warning("%s has changed: %d keys are valid now", self._path, len(self._keys))

    def _signature(self) -> tuple[int, ...] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> tuple[Key, ...]:
        try:
            lines = self._path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadKeysFile(f"The API keys in {self._path} cannot be read: {error}") from error
        budgets = {(key.digest, key.budget.per_minute): key.budget for key in getattr(self, "_keys", ())}
        keys: dict[str, Key] = {}
        for number, line in enumerate(lines, 1):
            entry = line.partition("#")[0].strip()
            if not entry:
                continue
            match = _LINE.fullmatch(entry)
            if match is None:  # the line itself is not quoted: somebody may have written a key into it
                raise BadKeysFile(f"{self._path}, line {number}: give NAME SHA256HEX [requests-per-minute]")
            name, digest = match[1], bytes.fromhex(match[2])
            if name in keys or any(key.digest == digest for key in keys.values()):
                raise BadKeysFile(f"{self._path}, line {number}: this name or hash is there already; give each key its own")
            per_minute = int(match[3]) if match[3] else self._per_minute
            keys[name] = Key(name, digest, budgets.get((digest, per_minute)) or Budget(per_minute, self._clock))
        return tuple(keys.values())


def fresh_key(name: str) -> tuple[str, str]:
    """Make a key: itself, and its line for the file.

    It has the form that Ultralytics' own settings insist on (``ul_`` and 40 hexadecimal digits), so that its clients keep it.

    Raises:
        BadRequest: ``name`` cannot stand in the file.
    """
    if not re.fullmatch(KEY_NAME, name):
        raise BadRequest(f"'{name}' cannot name a key: use up to 64 letters, digits and . _ @ -")
    key = f"ul_{secrets.token_hex(20)}"
    return key, f"{name} {hashlib.sha256(key.encode()).hexdigest()}"
