"""What each model has answered through this process within the last minute: how fast, and with which outcomes.

ModelStatistics.succeeded / failed → Recent.add(outcome, milliseconds) → percentiles and counts, for ``/fleet``

Another ingress process has a minute of its own.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

WINDOW_S = 60.0
MOST = 20_000  # of the latest, so that the memory is bounded


class Recent:
    """One model's latest outcomes."""

    def __init__(self) -> None:
        self._entries: deque[tuple[float, str, float]] = deque(maxlen=MOST)

    def add(self, outcome: str, milliseconds: float) -> None:
        """Note an answer (``ok``) or an error (its code), and how long it took."""
        self._entries.append((time.monotonic(), outcome, milliseconds))

    def summary(self) -> dict[str, Any]:
        """Outcomes with their counts, and the percentiles of the answers' times; null where there was no answer."""
        since = time.monotonic() - WINDOW_S
        while self._entries and self._entries[0][0] < since:
            self._entries.popleft()
        took = sorted(milliseconds for _, outcome, milliseconds in self._entries if outcome == "ok")
        return {
            "outcomes": Counter(outcome for _, outcome, _ in self._entries),
            "latency_ms": {f"p{share}": _percentile(took, share) for share in (50, 95, 99)},
        }


def _percentile(ordered: Sequence[float], share: int) -> float | None:
    """The least value that ``share`` percent do not exceed."""
    return round(ordered[math.ceil(len(ordered) * share / 100) - 1], 2) if ordered else None
