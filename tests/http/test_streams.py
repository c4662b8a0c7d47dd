"""Live streams without Ray: the order of the answers, what ``latest`` drops, and what a mistake costs."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.types import Message
from starlette.websockets import WebSocketDisconnect

from deploy.api import create_api
from deploy.api.streams import Frame, FrameQuery, Outcome, run_stream
from deploy.settings import HttpLimits, StreamLimits
from tests.conftest import picture
from tests.http.conftest import LIMITS, OneDetectorFleet

PNG = {"content-type": "image/png"}
FAIL = 77  # see the fixture ``fleet``


class Gate:
    """Frames, whose detection ends when the test says so, and their answers."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.answered: list[tuple[int, int]] = []
        self.done = {number: asyncio.Event() for number in range(1, 10)}
        self.sent: asyncio.Queue[Frame | None] = asyncio.Queue()

    async def frames(self) -> AsyncIterator[Frame]:
        while (frame := await self.sent.get()) is not None:
            yield frame

    async def detect(self, frame: Frame) -> Outcome:
        self.started.append(frame.number)
        await self.done[frame.number].wait()
        return ValueError("of no meaning here")

    async def answer(self, frame: Frame, dropped: int, outcome: Outcome) -> None:
        self.answered.append((frame.number, dropped))

    async def send(self, *numbers: int) -> None:
        for number in numbers:
            self.sent.put_nowait(Frame(number, None, b""))
            await settle()


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("latest", [False, True])
async def test_several_are_computed_at_once_and_answers_keep_the_order(latest: bool) -> None:
    gate = Gate()
    running = asyncio.create_task(run_stream(gate.frames(), gate.detect, gate.answer, window=3, latest=latest))
    await gate.send(1, 2, 3)
    assert gate.started == [1, 2, 3]
    gate.done[3].set()
    gate.done[2].set()
    await settle()
    assert gate.answered == []
    gate.done[1].set()
    await settle()
    assert gate.answered == [(1, 0), (2, 0), (3, 0)]
    gate.sent.put_nowait(None)
    await running


async def test_all_waits_and_skips_nothing() -> None:
    gate = Gate()
    running = asyncio.create_task(run_stream(gate.frames(), gate.detect, gate.answer, window=2, latest=False))
    await gate.send(*range(1, 10))
    assert gate.started == [1, 2]
    assert gate.sent.qsize() > 4  # they are not even read
    gate.sent.put_nowait(None)
    for event in gate.done.values():
        event.set()
    await running
    assert gate.answered == [(number, 0) for number in range(1, 10)]


async def test_latest_drops_what_is_stale_and_counts_it() -> None:
    gate = Gate()
    running = asyncio.create_task(run_stream(gate.frames(), gate.detect, gate.answer, window=2, latest=True))
    await gate.send(*range(1, 7))
    assert gate.started == [1, 2]
    gate.done[1].set()
    await settle()
    assert gate.started == [1, 2, 6]
    await gate.send(7, 8)
    gate.sent.put_nowait(None)
    for event in gate.done.values():
        event.set()
    await running
    assert gate.answered == [(1, 0), (2, 0), (6, 3), (8, 1)]


async def test_who_leaves_ends_the_work_in_hand() -> None:
    gate = Gate()

    async def frames() -> AsyncIterator[Frame]:
        async for frame in gate.frames():
            yield frame
        raise WebSocketDisconnect

    running = asyncio.create_task(run_stream(frames(), gate.detect, gate.answer, window=2, latest=False))
    await gate.send(1)
    gate.sent.put_nowait(None)
    with pytest.raises(ExceptionGroup):
        await running
    assert (gate.started, gate.answered) == ([1], [])


class Socket:
    """A websocket's client, in this process."""

    def __init__(self) -> None:
        self._to_server, self._to_client = asyncio.Queue[Message](), asyncio.Queue[Message]()

    @asynccontextmanager
    async def connected(self, api: FastAPI, path: str) -> AsyncIterator["Socket"]:
        url = httpx.URL(f"http://fleet{path}")
        scope = {"type": "websocket", "path": url.path, "query_string": url.query, "headers": [], "subprotocols": []}
        self._to_server.put_nowait({"type": "websocket.connect"})
        running = asyncio.create_task(api(scope, self._to_server.get, self._to_client.put))
        assert (await self._to_client.get())["type"] == "websocket.accept"
        yield self
        self._to_server.put_nowait({"type": "websocket.disconnect"})
        await running

    def send(self, **content: str | bytes) -> None:
        self._to_server.put_nowait({"type": "websocket.receive", **content})

    async def answer(self, parse_constant: Callable[[str], None] | None = None) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads((await self._to_client.get())["text"], parse_constant=parse_constant)
        return answer

    async def closed(self) -> tuple[int, str]:
        message = await self._to_client.get()
        assert message["type"] == "websocket.close"
        return message["code"], message["reason"]

    async def ask(self, image: bytes, **note: float) -> dict[str, Any]:
        if note:
            self.send(text=json.dumps(note))
        self.send(bytes=image)
        return await self.answer()


def connected(api: FastAPI, path: str) -> AbstractAsyncContextManager[Socket]:
    return Socket().connected(api, path)


async def test_a_frame_is_answered_as_an_image_is_with_its_number_time_and_track(api: FastAPI) -> None:
    async with connected(api, "/streams/door?tracker=bytetrack&decimals=2") as session:
        first = await session.ask(picture(blue=2), frame=12, time_s=0.48)
        second = await session.ask(picture(blue=2))
    image = first.pop("image")
    assert first == {"stream": "door", "frame": 12, "time_s": 0.48, "dropped": 0, "counts": {}}
    assert (image["shape"], set(image["speed"])) == ([48, 64], {"preprocess", "inference", "postprocess"})
    box = {"x1": 16.0, "y1": 12.0, "x2": 48.0, "y2": 36.0}
    assert image["results"] == [{"name": "two", "class": 2, "confidence": 0.78, "box": box, "track_id": 1}]
    assert (second["frame"], second["image"]["results"][0]["track_id"]) == (13, 1)


async def test_a_bad_frame_costs_only_itself(api: FastAPI) -> None:
    async with connected(api, "/streams/bad") as session:
        answers = [await session.ask(data) for data in (picture(), b"hello", picture(blue=FAIL), picture())]
    assert [answer["frame"] for answer in answers] == [1, 2, 3, 4]
    assert [answer.get("error", {}).get("code") for answer in answers] == [None, "bad_image", "internal", None]
    assert answers[1]["error"]["request_id"]
    assert [answers[n]["image"]["results"][0]["track_id"] for n in (0, 3)] == [1, 1]


async def test_a_frame_beyond_the_limit_is_refused(fleet: OneDetectorFleet) -> None:
    api = create_api(fleet, HttpLimits(streams=StreamLimits(max_frame_mb=0.001)))
    async with connected(api, "/streams/large") as session:
        assert (await session.ask(bytes(2000)))["error"]["code"] == "image_too_large"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/streams/s?tracker=sort", "bad_request"),
        ("/streams/s?conf=2", "bad_request"),
        ("/streams/s?colour=red", "bad_request"),
        ("/streams/s?lines=gate", "bad_request"),
        ('/streams/s?lines={"gate":[[1,1],[1,1]]}', "bad_request"),
        ("/streams/s?anchor=nose", "bad_request"),
        ("/streams/s?model=none", "unknown_model"),
        ("/streams/%20", "bad_request"),
    ],
)
async def test_a_mistake_in_the_address_is_told_before_the_close(api: FastAPI, path: str, code: str) -> None:
    async with connected(api, path) as session:
        assert (await session.answer())["error"]["code"] == code
        assert await session.closed() == (1008, code)


async def test_a_note_that_is_none_closes(api: FastAPI) -> None:
    async with connected(api, "/streams/note") as session:
        session.send(text="hello")
        assert (await session.answer())["error"]["code"] == "bad_request"


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.integers(), max_size=2)
FIELDS = {"frame": st.integers() | JSON, "time_s": st.floats() | JSON}
NOTES = st.text(max_size=12) | st.fixed_dictionaries({}, optional=FIELDS).map(json.dumps)


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@settings(max_examples=100, deadline=None)
@example([(['{"frame": 1, "time_s": NaN}'], picture())])
@given(st.lists(st.tuples(st.lists(NOTES, max_size=2), st.just(picture()) | st.binary(max_size=40)), min_size=1, max_size=4))
async def test_no_message_is_too_odd(api: FastAPI, messages: list[tuple[list[str], bytes]]) -> None:
    """Every frame is answered, but for those after a note that is none: that is said, and the connection closed."""
    async with connected(api, "/streams/odd") as session:
        for notes, frame in messages:
            for note in notes:
                session.send(text=note)
            session.send(bytes=frame)
            answer = await session.answer(no_constant)
            assert answer["stream"] == "odd" and isinstance(answer.get("time_s"), float | None)
            if "frame" not in answer:
                assert (answer["error"]["code"], await session.closed()) == ("bad_request", (1008, "bad_request"))
                break
            assert answer["image"]["results"] if frame == picture() else answer["error"]["code"] == "bad_image"


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*FrameQuery.model_fields, "mode", "odd"]), st.text(max_size=8) | st.floats().map(str)),
    st.just(picture()) | st.binary(max_size=40),
)
async def test_no_query_is_too_odd(api: FastAPI, query: dict[str, str], frame: bytes) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://fleet") as client:
        response = await client.post("/streams/odd/frames", params=query, content=frame)
        assert response.status_code == 200 or (400 <= response.status_code < 500 and response.json()["error"]["message"])


async def test_an_idle_connection_is_closed(fleet: OneDetectorFleet) -> None:
    api = create_api(fleet, HttpLimits(streams=StreamLimits(idle_s=0.05)))
    async with connected(api, "/streams/idle") as session:
        assert await session.closed() == (1000, "idle")


async def test_who_connects_last_has_the_stream(api: FastAPI) -> None:
    async with connected(api, "/streams/taken") as old:
        assert (await old.ask(picture()))["image"]["results"][0]["track_id"] == 1
        async with connected(api, "/streams/taken") as new:
            assert (await new.ask(picture()))["image"]["results"][0]["track_id"] == 1
            assert (await old.ask(picture()))["error"]["code"] == "stream_conflict"
            assert (await new.ask(picture()))["image"]["results"][0]["track_id"] == 1


async def test_frames_by_post_and_the_list_of_streams(client: httpx.AsyncClient) -> None:
    query = {"tracker": "bytetrack", "frame": "7", "time_s": "0.5"}
    as_body = await client.post(
        "/streams/posted/frames", params=query, content=picture(), headers={"content-type": "image/png"}
    )
    as_form = await client.post("/streams/posted/frames", params=query, files={"file": picture()})
    for response in (as_body, as_form):
        assert response.status_code == 200, response.text
        assert (response.json()["frame"], response.json()["time_s"]) == (7, 0.5)
        assert response.json()["image"]["results"][0]["track_id"] == 1
    listed = [each for each in (await client.get("/streams")).json()["streams"] if each["stream"] == "posted"]
    status = {"stream": "posted", "model": "fake", "tracker": "bytetrack", "frames": 2, "dropped": 0, "idle_s": 0.0}
    nowhere = {"lines": {}, "zones": {}, "anchor": "center"}
    assert listed == [status | {"regions": nowhere, "counts": {}}]
    other = await client.post("/streams/posted/frames", params={"tracker": "botsort"}, content=picture())
    assert (other.status_code, other.json()["error"]["code"]) == (409, "stream_conflict")
    assert (await client.delete("/streams/posted")).status_code == 204
    assert (await client.delete("/streams/posted")).json()["error"]["code"] == "unknown_stream"


GATE, DOCK = [[40, 0], [40, 48]], [[0, 0], [36, 0], [36, 48], [0, 48]]
WIDER = range(
    64, 90, 4
)  # FakeModel's object lies in the middle, from 32 to 44 pixels: it passes the gate, and leaves the dock


async def test_what_passes_lines_and_zones_is_counted_by_class_and_direction(api: FastAPI, client: httpx.AsyncClient) -> None:
    query = urlencode({"tracker": "bytetrack", "lines": json.dumps({"gate": GATE}), "zones": json.dumps({"dock": DOCK})})
    async with connected(api, f"/streams/counted?{query}") as session:
        there = [(await session.ask(picture(width)))["counts"] for width in WIDER]
        back = [(await session.ask(picture(width)))["counts"] for width in reversed(WIDER)]
    assert there[0] == {"gate": {"in": {}, "out": {}}, "dock": {"in": {}, "out": {}, "inside": {"zero": 1}}}
    assert there[-1] == {"gate": {"in": {"zero": 1}, "out": {}}, "dock": {"in": {}, "out": {"zero": 1}, "inside": {}}}
    both = {"in": {"zero": 1}, "out": {"zero": 1}}
    assert back[-1] == {"gate": both, "dock": both | {"inside": {"zero": 1}}}
    (listed,) = [each for each in (await client.get("/streams")).json()["streams"] if each["stream"] == "counted"]
    assert listed["regions"] == {"lines": {"gate": GATE}, "zones": {"dock": DOCK}, "anchor": "center"}
    assert listed["counts"] == back[-1]


async def test_lines_are_put_on_a_stream_that_runs_and_stay_when_its_client_comes_back(
    api: FastAPI, client: httpx.AsyncClient
) -> None:
    path = "/streams/put?tracker=bytetrack"
    async with connected(api, path) as session:
        assert (await session.ask(picture(64)))["counts"] == {}
        put = await client.put("/streams/put/regions", json={"lines": {"gate": GATE}})
        assert put.status_code == 204
        assert [await session.ask(picture(width)) for width in WIDER][-1]["counts"]["gate"]["in"] == {"zero": 1}
    async with connected(api, path) as session:
        assert (await session.ask(picture(WIDER[-1])))["counts"]["gate"]["in"] == {"zero": 1}
    unknown = await client.put("/streams/none/regions", json={"lines": {"gate": GATE}})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_stream")
    wrong = await client.put("/streams/put/regions", json={"lines": {"gate": [[0, 0]]}})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (422, "bad_request")


async def test_what_is_wrong_with_a_posted_frame_is_said(client: httpx.AsyncClient) -> None:
    async def code(path: str, **request: Any) -> str:
        return str((await client.post(path, **request)).json()["error"]["code"])

    assert await code("/streams/wrong/frames", content=b"hello") == "bad_image"
    assert await code("/streams/wrong/frames", data={"file": "text"}, files={"other": b""}) == "bad_request"
    assert await code("/streams/wrong/frames?mode=latest", content=picture()) == "bad_request"
    assert await code("/streams/wr ong/frames", content=picture()) == "bad_request"
    assert await code("/streams/wrong/frames", content=bytes(600_000)) == "body_too_large"
    assert "wrong" not in (await client.get("/streams")).text
    assert LIMITS.max_body_mb < 0.6
