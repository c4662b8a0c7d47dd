"""Live streams on FakeModel, over websockets: they do not mix, and their ids survive whoever dies.

An object of FakeModel's lies in the middle of its image, so that images of different widths show it at places that do not
touch: each new place is a new object, and its id tells how many the stream has seen before.
"""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from actors.errors import TooManyStreams
from actors.settings import ActorSettings, ImageLimits, StreamSettings
from deploy.settings import HttpLimits, Replicas, ServedModel, StreamLimits
from deploy.streams import Streams
from tests.conftest import picture, processes, served, until

pytestmark = [pytest.mark.ray, pytest.mark.client, pytest.mark.usefixtures("local_ray")]

WIDTHS = (40, 130, 400, 1300)  # the object from 10 to 30, 32 to 98, 100 to 300, 325 to 975
MANY = (40, 1000, 3600)  # the same, with room for 64 of each
STREAMS = 64
STAY = 3  # frames of each width


async def test_a_stream_that_nobody_uses_ends_and_so_does_its_actor() -> None:
    streams = Streams(ImageLimits(), StreamLimits(trackers=1, idle_s=4))
    await streams.open(StreamSettings(stream="idle", model="fake"), True, lambda _: None)
    assert [status.stream for status in await streams.statuses()] == ["idle"]
    await asyncio.to_thread(until, lambda: not processes("TrackerActor"))
    assert await streams.statuses() == []


async def test_limits_that_are_raised_reach_trackers_that_run() -> None:
    first, second = (StreamSettings(stream=name, model="fake") for name in ("first", "second"))
    before, after = (Streams(ImageLimits(), StreamLimits(trackers=1, max_per_tracker=most, idle_s=2)) for most in (1, 2))
    await before.open(first, True, lambda _: None)
    with pytest.raises(TooManyStreams, match="max_per_tracker"):
        await before.open(second, True, lambda _: None)
    await after.open(second, True, lambda _: None)
    await asyncio.to_thread(until, lambda: not processes("TrackerActor"))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    actor = ActorSettings(num_cpus=0.1)
    model = ServedModel(name="fake", weights="fake:?slow_ms=2", replicas=Replicas(min=2, max=2), actor=actor)
    limits = HttpLimits(streams=StreamLimits(trackers=2, max_per_tracker=STREAMS, idle_s=30))
    with served(model, topology="routed", http=limits) as made:
        yield made
    until(lambda: not processes("TrackerActor"))  # they end with the application


def socket_of(address: str, stream: str, query: str = "") -> str:
    return f"{address.replace('http', 'ws', 1)}/streams/{stream}?tracker=bytetrack{query}"


def ids(answer: dict[str, Any]) -> list[int | None]:
    assert "error" not in answer, answer
    return [found.get("track_id") for found in answer["image"]["results"]]


def ask(socket: ClientConnection, width: int) -> list[int | None]:
    socket.send(picture(width))
    return ids(json.loads(socket.recv(timeout=60)))


async def test_many_streams_at_once_do_not_mix(address: str) -> None:
    async def follow(number: int, order: tuple[int, ...]) -> list[list[int | None]]:
        widths = [width + 4 * number for width in order]  # no two streams have one in common
        async with connect_async(socket_of(address, f"many-{number}"), open_timeout=60) as socket:
            for width in widths:  # without waiting for an answer
                for _ in range(STAY):
                    await socket.send(picture(width, blue=number % 4))
            answers = [json.loads(await socket.recv()) for _ in range(STAY * len(widths))]
        assert not [answer["error"] for answer in answers if "error" in answer]
        assert [answer["frame"] for answer in answers] == list(range(1, STAY * len(widths) + 1))
        assert {answer["stream"] for answer in answers} == {f"many-{number}"}
        assert {found["class"] for answer in answers for found in answer["image"]["results"]} == {number % 4}
        boxes = {(found["track_id"], found["box"]["x1"]) for answer in answers for found in answer["image"]["results"]}
        assert boxes == {(seen, width / 4) for seen, width in enumerate(widths, 1)}
        return [ids(answer) for answer in answers]

    orders = itertools.islice(itertools.cycle(itertools.permutations(MANY)), STREAMS)
    found = await asyncio.gather(*[follow(number, order) for number, order in enumerate(orders)])
    first, *later = ([[n]] * STAY if n == 1 else [[], *[[n]] * (STAY - 1)] for n in range(1, len(MANY) + 1))
    assert found == [sum(later, first)] * STREAMS
    listed = {each["stream"]: each["frames"] for each in httpx.get(f"{address}/streams").json()["streams"]}
    assert all(listed[f"many-{number}"] == STAY * len(MANY) for number in range(STREAMS))


async def test_latest_skips_frames_and_counts_them(address: str) -> None:
    async with connect_async(socket_of(address, "latest", "&mode=latest")) as socket:
        for number in range(200):
            await socket.send(json.dumps({"frame": number}))
            await socket.send(picture())
        answers = [json.loads(await socket.recv())]
        while answers[-1]["frame"] < 199:
            answers.append(json.loads(await socket.recv()))
    numbers = [answer["frame"] for answer in answers]
    assert numbers == sorted(numbers)
    assert answers[-1]["dropped"] == 200 - len(answers) > 0


def kill(title: str) -> Callable[[], None]:
    def killed() -> None:
        before = set(processes(title))
        for process in before:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        until(lambda: not before & set(processes(title)))

    return killed


def a_replica() -> None:
    before = processes("ServeReplica:yolofleet:model-fake")
    os.kill(before[0], signal.SIGKILL)
    until(lambda: before[0] not in processes("ServeReplica:yolofleet:model-fake"))


FAULTS = {
    "a model's replica": a_replica,
    "the ingress": kill("ServeReplica:yolofleet:ingress"),
    "the trackers": kill("TrackerActor"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_ids_survive_the_death_of(fault: str, address: str) -> None:
    url = socket_of(address, f"fault-{fault.rpartition(' ')[2]}")
    first, second, third, _ = WIDTHS
    begun, answers = time.monotonic(), list[list[int | None]]()

    def conversation(widths: Iterable[int]) -> bool:
        """Whether the connection lasted; it is made and closed here."""
        try:
            with connect(url, open_timeout=60) as socket:
                for width in widths:
                    answers.append(ask(socket, width))
        except (OSError, WebSocketException):
            return False
        return True

    def with_the_fault() -> Iterator[int]:
        yield from (first, first, second, second)
        while time.monotonic() - begun < 2:  # until the second object is in a snapshot for sure
            yield second
        FAULTS[fault]()
        yield from (second, third, third)

    while not conversation(with_the_fault() if not answers else (second, third, third)):  # it reconnects, as a client does
        assert time.monotonic() - begun < 60
    assert answers[:4] == [[1], [1], [], [2]]
    assert answers[-3:] == [[2], [], [3]]
