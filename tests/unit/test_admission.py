"""Admission: who is served next, who is refused, and that no slot is ever lost."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import DeadlineExceeded, Overloaded
from actors.schemas import PRIORITIES, Priority, Terms
from deploy import admission as admission_module
from deploy.admission import Admission


def terms(number: int, priority: Priority = "normal", seconds: float = 60) -> Terms:
    return Terms(time.monotonic() + seconds, priority, str(number))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def holder(admission: Admission, served: list[str]) -> Callable[[Terms], Coroutine[Any, Any, None]]:
    async def hold(its: Terms) -> None:
        async with admission.slot(its):
            served.append(its.request_id)
            await asyncio.sleep(0)

    return hold


async def test_high_is_served_before_normal_before_low_and_each_in_its_order() -> None:
    admission, served = Admission("m", 1, 10), list[str]()
    hold = holder(admission, served)
    async with admission.slot(terms(0)):
        order: list[Priority] = ["low", "normal", "high", "low", "normal", "high"]
        tasks = [asyncio.create_task(hold(terms(number, priority))) for number, priority in enumerate(order, 1)]
        await settle()
        assert admission.waiting == 6
    await asyncio.gather(*tasks)
    assert served == ["3", "6", "2", "5", "1", "4"]


async def test_a_full_queue_refuses_the_newest_of_the_lowest_priority() -> None:
    admission, served = Admission("m", 1, 2), list[str]()
    hold = holder(admission, served)
    async with admission.slot(terms(0)):
        tasks = [asyncio.create_task(hold(terms(number, "low"))) for number in (1, 2)]
        await settle()
        with pytest.raises(Overloaded, match="queue of 'm' is full"):
            await hold(terms(3, "low"))
        tasks.append(asyncio.create_task(hold(terms(4, "high"))))
        await settle()
        with pytest.raises(Overloaded):
            await tasks[1]
    await asyncio.gather(tasks[0], tasks[2])
    assert served == ["4", "1"]


async def test_who_is_patient_waits_for_room_and_not_beyond_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "PAUSE_S", 0)
    admission, served = Admission("m", 1, 1), list[str]()
    hold = holder(admission, served)
    async with admission.slot(terms(0)):
        tasks = [asyncio.create_task(hold(terms(1, "low"))), asyncio.create_task(hold(replace(terms(2), patient=True)))]
        await settle()
        with pytest.raises(Overloaded):
            await tasks[0]
        tasks += [asyncio.create_task(hold(replace(terms(3), patient=True)))]
        await settle()
        with pytest.raises(Overloaded):
            await hold(replace(terms(4, seconds=-1), patient=True))
    await asyncio.gather(*tasks[1:])
    assert served == ["2", "3"]


async def test_a_request_that_is_admitted_may_bring_all_its_images() -> None:
    admission, served = Admission("m", 1, 1), list[str]()
    hold = holder(admission, served)
    async with admission.slot(terms(0)):
        its = terms(1)
        tasks = [asyncio.create_task(hold(its)) for _ in range(5)]
        await settle()
        assert admission.waiting == 1
        with pytest.raises(Overloaded):  # another request, of a client that gives all of its requests one id
            await hold(terms(1))
    await asyncio.gather(*tasks)
    assert served == ["1"] * 5


async def test_who_waits_beyond_its_deadline_is_told_so() -> None:
    admission = Admission("m", 1, 2)
    async with admission.slot(terms(0)):
        with pytest.raises(DeadlineExceeded):
            await holder(admission, [])(terms(1, seconds=0.01))
    assert (admission.waiting, admission.in_flight) == (0, 0)


@given(
    st.lists(
        st.tuples(st.sampled_from(PRIORITIES), st.sampled_from(["serve", "cancel", "late"]), st.integers(0, 3)), max_size=30
    ),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_no_slot_is_lost_and_none_is_made_whatever_happens(
    work: list[tuple[Priority, str, int]], slots: int, waiting: int
) -> None:
    async def play() -> None:
        admission, busiest = Admission("m", slots, waiting), 0

        async def one(number: int, priority: Priority, seconds: float) -> None:
            nonlocal busiest
            async with admission.slot(terms(number, priority, seconds)):
                busiest = max(busiest, admission.in_flight)
                await asyncio.sleep(0)

        tasks = []
        for number, (priority, fate, pause) in enumerate(work):
            tasks.append(asyncio.create_task(one(number, priority, -1 if fate == "late" else 60)))
            for _ in range(pause):
                await asyncio.sleep(0)
            if fate == "cancel":
                tasks[-1].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        unexpected = [each for each in results if each is not None and not isinstance(each, _EXPECTED)]
        assert not unexpected
        assert busiest <= slots
        assert (admission.waiting, admission.in_flight, admission._free) == (0, 0, slots)

    asyncio.run(play())


_EXPECTED = (Overloaded, DeadlineExceeded, asyncio.CancelledError)
