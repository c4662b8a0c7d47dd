"""Streams without Ray: an actor that dies of whatever is asked again in its next life."""

import time
from collections import deque
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnschedulableError, NodeDiedError, OutOfMemoryError

from actors.settings import ImageLimits
from deploy import streams
from deploy.settings import StreamLimits
from deploy.streams import Streams


class Lives:
    """An actor's lives, of which each but the last ends with an error."""

    def __init__(self, *outcomes: Exception | str) -> None:
        self.outcomes = deque(outcomes)
        self.statuses = self

    async def remote(self) -> str:
        outcome = self.outcomes.popleft()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@pytest.mark.parametrize(
    "death", [ActorDiedError(), OutOfMemoryError("killed"), NodeDiedError("gone"), ActorUnschedulableError("nowhere")]
)
async def test_a_tracker_that_dies_is_asked_again(death: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, lives = Streams(ImageLimits(), StreamLimits()), Lives(death, "alive")
    started: list[str] = []

    def start(name: str) -> Any:
        started.append(name)
        return lives

    monkeypatch.setattr(streams, "PAUSE_S", 0)
    monkeypatch.setattr(reached, "_start", start)
    assert await reached._ask("tracker-0", time.monotonic() + 30, "statuses") == "alive"
    assert started == ["tracker-0"] * 2
