"""Admission: who is served now, who waits, and who is refused at once. One per model and ingress.

    slot(terms) ─ a slot is free ─────────────────────────────→ served
                └ else: queue of its priority ─ a slot is freed ─→ served, high before normal before low
                                              ├ deadline passed ─→ DeadlineExceeded
                                              └ queue full ──────→ Overloaded, at once; it is the newest of the lowest
                                                                   priority that goes, be it the newcomer or one who waits;
                                                                   who is patient asks again until its deadline

The queue is bounded in requests, not in images: a request that was admitted may bring all its images. A request is known by
its Terms object and not by its id, which a client may choose. It belongs to one event loop and needs no lock.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from actors.errors import DeadlineExceeded, Overloaded
from actors.schemas import PRIORITIES, Terms

PAUSE_S = 0.05  # before a patient request asks again for a place in a full queue


@dataclass(frozen=True, slots=True, eq=False)
class _Ticket:
    terms: Terms
    turn: asyncio.Future[None]


class Admission:
    """Slots for images in flight, and a bounded queue before them.

    Args:
        model: its name, for messages.
        slots: images that may be in flight at once.
        max_waiting: requests that may wait.
    """

    def __init__(self, model: str, slots: int, max_waiting: int) -> None:
        self._model, self._free, self._max_waiting = model, slots, max_waiting
        self._queues: dict[str, deque[_Ticket]] = {priority: deque() for priority in PRIORITIES}
        self.in_flight = 0

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._requests())

    @asynccontextmanager
    async def slot(self, terms: Terms) -> AsyncIterator[None]:
        """Hold a slot for one image.

        Raises:
            Overloaded: the queue is full, or filled up with requests of a higher priority.
            DeadlineExceeded: no slot was free in time.
        """
        while True:
            try:
                await self._take(terms)
                break
            except Overloaded:
                if not terms.patient or time.monotonic() > terms.deadline:
                    raise
                await asyncio.sleep(PAUSE_S)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            self._pass_on()

    def _requests(self) -> set[int]:
        return {id(ticket.terms) for queue in self._queues.values() for ticket in queue}

    async def _take(self, terms: Terms) -> None:
        if self._free and not any(self._queues.values()):
            self._free -= 1
        else:
            await self._wait(terms)

    async def _wait(self, terms: Terms) -> None:
        self._make_room(terms)
        ticket = _Ticket(terms, asyncio.get_running_loop().create_future())
        queue = self._queues[terms.priority]
        queue.append(ticket)
        try:
            async with asyncio.timeout(terms.deadline - time.monotonic()):
                await ticket.turn
        except BaseException as error:
            if ticket in queue:
                queue.remove(ticket)
            elif ticket.turn.done() and not ticket.turn.cancelled() and ticket.turn.exception() is None:
                self._pass_on()  # its turn had come in the very moment in which it left
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(
                    f"The queue of '{self._model}' is longer than this request's time: allow more, or come back later"
                ) from None
            raise

    def _make_room(self, newcomer: Terms) -> None:
        waiting = self._requests()
        if len(waiting) < self._max_waiting or id(newcomer) in waiting:
            return
        full = Overloaded(f"The queue of '{self._model}' is full ({self._max_waiting} requests): send it again later")
        for priority in reversed(PRIORITIES):
            queue = self._queues[priority]
            if priority == newcomer.priority:
                break
            if queue:
                leaving = queue[-1].terms
                for ticket in [ticket for ticket in queue if ticket.terms is leaving]:
                    queue.remove(ticket)
                    if not ticket.turn.done():
                        ticket.turn.set_exception(full)
                return
        raise full

    def _pass_on(self) -> None:
        for priority in PRIORITIES:
            queue = self._queues[priority]
            while queue:
                ticket = queue.popleft()
                if not ticket.turn.done():
                    ticket.turn.set_result(None)
                    return
        self._free += 1
