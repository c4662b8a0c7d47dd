"""What an ingress adds to an answer, and how it asks its streams to leave. No Ray."""

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from actors.schemas import Answer, ImageResult, TensorAnswer, Timing
from deploy import ingress
from deploy.ingress import Ingress, _with_queue

TIMING = Timing(decode=1, batch_wait=20, preprocess=1, inference=10, postprocess=4, batch_size=1, engine=95)


@pytest.mark.parametrize(("total_ms", "queue"), [(200, 80), (100, 0)])
def test_what_an_image_waited_for_is_what_is_left_of_it_beside_its_stay_in_the_engine(total_ms: float, queue: float) -> None:
    image = _with_queue(Answer(ImageResult(4, 4, "detect", (), TIMING), "a"), total_ms)
    tensor = _with_queue(TensorAnswer((), "a", TIMING), total_ms)
    assert image.result.timing.queue == tensor.timing.queue == queue


async def test_streams_are_asked_to_leave_after_serve_was_away_and_beside_one_that_leaves_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = iter(["the controller starts again", ""])

    def is_wanted(actor: str) -> bool:
        if why := next(told, ""):
            raise RuntimeError(why)
        return False

    monkeypatch.setattr(ingress, "TTL_S", 0.0)
    monkeypatch.setattr(ingress, "is_wanted", is_wanted)
    monkeypatch.setattr(ingress, "_own_actor", lambda: "a1")
    stays: set[asyncio.Timeout] = set()
    leaving = SimpleNamespace(_stays=stays)

    async def stream(stay: asyncio.Timeout, *, expires: bool) -> None:
        with pytest.raises(TimeoutError):
            async with stay:
                stays.add(stay)
                if expires:
                    stay.reschedule(0)
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    if expires:  # it says good-bye to its client
                        await both.wait()
                    raise
        both.set()

    both = asyncio.Event()
    streams = [asyncio.create_task(stream(asyncio.timeout(None), expires=expires)) for expires in (True, False)]
    while len(stays) < 2:
        await asyncio.sleep(0)
    watch = asyncio.create_task(Ingress._leave_in_time(cast("Ingress", leaving)))
    async with asyncio.timeout(10):
        await asyncio.gather(*streams)
    stays.clear()
    watch.cancel()
