"""Quarantine and its journal: what a dead process had in hand is known to those who come after it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import quarantine
from deploy.quarantine import CrashJournal, Quarantine, Verdict, digest_of
from tests.conftest import REPOSITORY

DIES = """
import os, sys
from pathlib import Path
from deploy.quarantine import CrashJournal, digest_of
journal = CrashJournal(Path(sys.argv[1]))
with journal.in_hand(digest_of(b"company"), alone=False), journal.in_hand(digest_of(b"alone"), alone=True):
    with journal.in_hand(digest_of(b"answered"), alone=True):
        pass
    if sys.argv[2] == "dies":
        os.kill(os.getpid(), 9)
journal.close()
"""


def process(folder: Path, fate: str) -> int:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, "-c", DIES, str(folder), fate], check=False, env=environment).returncode


def verdicts(folder: Path) -> list[Verdict]:
    journal, memory = CrashJournal(folder), Quarantine()
    journal.learn(memory)
    found = [memory.verdict(digest_of(name)) for name in (b"company", b"alone", b"answered")]
    journal.close()
    return found


def test_a_killed_process_leaves_its_suspects_to_every_successor(tmp_path: Path) -> None:
    assert process(tmp_path, "dies") == -9
    expected = [Verdict.SUSPECT, Verdict.CONDEMNED, Verdict.CLEAR]
    assert verdicts(tmp_path) == expected
    assert verdicts(tmp_path) == expected


def test_a_regular_end_leaves_nothing(tmp_path: Path) -> None:
    assert process(tmp_path, "ends") == 0
    assert verdicts(tmp_path) == [Verdict.CLEAR] * 3
    assert not list(tmp_path.iterdir())


def test_a_living_process_blames_nobody(tmp_path: Path) -> None:
    journal = CrashJournal(tmp_path)
    with journal.in_hand(digest_of(b"company"), alone=False):
        assert verdicts(tmp_path) == [Verdict.CLEAR] * 3
    journal.close()


def test_everything_is_forgotten_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process(tmp_path, "dies")
    verdicts(tmp_path)
    monkeypatch.setattr(quarantine, "TTL_S", -1.0)
    assert verdicts(tmp_path) == [Verdict.CLEAR] * 3
    assert not list(tmp_path.iterdir())


def test_an_answer_clears_a_suspect_and_a_condemned_one_stays() -> None:
    memory = Quarantine()
    assert not memory
    memory.suspect(b"a")
    assert memory and memory.verdict(b"a") is Verdict.SUSPECT
    memory.clear(b"a")
    memory.condemn(b"b")
    assert (memory.verdict(b"a"), memory.verdict(b"b")) == (Verdict.CLEAR, Verdict.CONDEMNED)
