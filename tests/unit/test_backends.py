"""A model's deployment seen from an ingress: deaths are survived, the innocent are not condemned, deadlines hold. No Ray."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError
from ray.serve.exceptions import DeploymentUnavailableError

from actors.errors import DeadlineExceeded, PoisonedImage, ReplicaUnavailable
from actors.schemas import Answer, ImageResult, ModelInfo, PredictParams, Terms
from deploy import backends
from deploy.backends import RemoteModel
from deploy.quarantine import Verdict, digest_of

VIDEO = b"video"
NEVER = object()  # an item that does not come
ANSWER = Answer(ImageResult(64, 48, "detect", ()), "replica")
INFO = ModelInfo("m", "m.pt", "00", "detect", {}, (64, 64), "fake", "cpu", {})
LOST = ObjectLostError("00", None, "")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "PAUSE_S", 0.0)
    monkeypatch.setattr(backends, "GRACE_S", 0.01)


class FakeResponse:
    """What a replica does, item by item; awaited it is the first one."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = iter(items)
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        try:
            item = next(self._items)
        except StopIteration:
            raise StopAsyncIteration from None
        if item is NEVER:
            await asyncio.Event().wait()
        if isinstance(item, Exception):
            raise item
        return item

    def __await__(self) -> Any:
        return self.__anext__().__await__()


class FakeHandle:
    """One script for each call, in the order of the calls, whatever the method."""

    def __init__(self, *scripts: Sequence[Any]) -> None:
        self.responses = [FakeResponse(items) for items in scripts]
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def options(self, *, stream: bool) -> "FakeHandle":
        return self

    def __getattr__(self, method: str) -> Any:
        return _Method(lambda arguments: self._called(method, arguments))

    def _called(self, method: str, arguments: tuple[Any, ...]) -> FakeResponse:
        self.calls.append((method, arguments))
        return self.responses[len(self.calls) - 1]


class _Method:
    def __init__(self, called: Callable[[tuple[Any, ...]], FakeResponse]) -> None:
        self._called = called

    def remote(self, *arguments: Any) -> FakeResponse:
        return self._called(arguments)


def model(handle: FakeHandle) -> RemoteModel:
    return RemoteModel(handle, lambda died: None)


def terms(seconds: float = 60.0) -> Terms:
    return Terms(time.monotonic() + seconds)


async def frames(asked: RemoteModel, within: Terms) -> int:
    return len([answer async for answer in asked.frames(VIDEO, PredictParams(), within, 1)])


async def test_a_video_that_waits_while_another_kills_its_replica_is_not_condemned() -> None:
    handle = FakeHandle([ActorDiedError()], [ActorDiedError()], [ActorDiedError()], [None, ANSWER, ANSWER])
    asked = model(handle)
    assert await frames(asked, terms()) == 2
    assert asked._quarantine.verdict(digest_of(VIDEO)) is Verdict.CLEAR
    assert [arguments[-1] for _, arguments in handle.calls] == [False, True, True, True]


async def test_a_video_that_kills_a_replica_with_nothing_else_in_hand_is_condemned() -> None:
    handle = FakeHandle([ANSWER, ActorDiedError()], [None, ActorDiedError()])
    with pytest.raises(PoisonedImage):
        await frames(model(handle), terms())
    assert [arguments[-2] for _, arguments in handle.calls] == [0, 1]


async def test_a_frame_between_two_deaths_acquits_what_came_before_it() -> None:
    handle = FakeHandle([ActorDiedError()], [None, ANSWER, ActorDiedError()], [None, ANSWER])
    assert await frames(model(handle), terms()) == 2


@pytest.mark.parametrize("answered", [(), (None, ANSWER)])
async def test_a_video_of_which_no_more_comes_ends_with_its_deadline(answered: tuple[Any, ...]) -> None:
    handle = FakeHandle([*answered, NEVER])
    with pytest.raises(DeadlineExceeded):
        async with asyncio.timeout(10):
            await frames(model(handle), terms(0.2))
    assert handle.responses[0].cancelled


async def test_who_leaves_takes_the_work_of_a_unary_call_along() -> None:
    handle = FakeHandle([NEVER])
    asked = asyncio.create_task(model(handle).detect(b"image", PredictParams(), terms(), False))
    while not handle.calls:
        await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert handle.responses[0].cancelled


async def test_a_unary_call_that_comes_too_late_is_cancelled() -> None:
    handle = FakeHandle([NEVER])
    with pytest.raises(DeadlineExceeded):
        await model(handle).detect(b"image", PredictParams(), terms(0.2), False)
    assert handle.responses[0].cancelled


async def test_an_answer_that_was_lost_with_its_node_is_asked_for_again_and_nobody_is_condemned_for_it() -> None:
    handle = FakeHandle([LOST], [None, LOST], [None, ANSWER])
    assert await model(handle).detect(b"image", PredictParams(), terms(), False) is ANSWER
    handle = FakeHandle([LOST], [None, LOST], [None, ANSWER])
    assert await frames(model(handle), terms()) == 1


async def test_another_replica_describes_the_model_if_one_dies_of_it() -> None:
    handle = FakeHandle([ActorDiedError()], [ActorDiedError()], [INFO])
    assert await model(handle).describe() is INFO


async def test_replicas_that_could_not_be_started_are_said_to_be_so() -> None:
    class Failed(FakeResponse):
        def cancel(self) -> None:  # as Ray's: it raises what the call has failed with
            raise error

    error = DeploymentUnavailableError("model-m")
    handle = FakeHandle([])
    handle.responses = [Failed([error])]
    with pytest.raises(ReplicaUnavailable):
        await frames(model(handle), terms())
