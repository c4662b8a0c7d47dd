"""API keys over ASGI: who gets in, by which door, how often; and that no door was forgotten."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, WebSocket
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Scope

from deploy.api import create_api
from deploy.api.auth import OPEN_PATHS, ApiKeys, _in_json
from deploy.keys import BadKeysFile, KeyFile, fresh_key
from deploy.settings import AuthSettings
from tests.conftest import picture
from tests.http.conftest import LIMITS, OneDetectorFleet

KEY, LINE = fresh_key("alice")
SLOW_KEY, SLOW_LINE = fresh_key("bob")
WRONG = fresh_key("mallory")[0]


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"{LINE}\n{SLOW_LINE} 2\n")
    return path


@pytest.fixture
def guarded(fleet: OneDetectorFleet, keys_file: Path) -> FastAPI:
    """The whole interface, with keys, and an echo that stands for all websockets."""
    app = create_api(fleet, LIMITS, AuthSettings(keys_file=str(keys_file)))

    @app.websocket("/echo")
    async def echo(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(f"{socket.state.key_name} {socket.url.query}")
        await socket.close()

    return app


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fleet") as made:
        yield made


DOORS: dict[str, dict[str, Any]] = {
    "bearer": {"headers": {"authorization": "Bearer KEY"}},
    "bearer in lower case": {"headers": {"authorization": "bearer  KEY "}},
    "x-api-key": {"headers": {"x-api-key": "KEY"}},
    "beside a proxy's own authorization": {"headers": {"authorization": "Basic abc", "x-api-key": "KEY"}},
    "query": {"params": {"api_key": "KEY"}},
    "query, among others": {"params": {"a": "1", "api_key": "KEY", "b": "2"}},
    "json": {"json": {"api_key": "KEY"}},
    "json, as inference_sdk loads a model": {"json": {"model_id": "a/1", "api_key": "KEY"}},
    "json, as inference_sdk asks": {
        "json": {"api_key": "KEY", "model_id": "a/1", "confidence": 0.5, "image": {"value": "x" * 9999}}
    },
    "json, after numbers and constants": {"json": {"a": -1.5e3, "b": None, "c": True, "d": "", "api_key": "KEY"}},
}


def with_key(door: str, key: str) -> dict[str, Any]:
    replaced: dict[str, Any] = json.loads(json.dumps(DOORS[door]).replace("KEY", key))
    return replaced


@pytest.mark.parametrize("door", DOORS)
async def test_a_valid_key_opens_every_door_and_a_wrong_one_none(guarded: FastAPI, door: str) -> None:
    async with client_of(guarded) as client:
        opened = await client.post("/nowhere", **with_key(door, KEY))
        refused = await client.post("/nowhere", **with_key(door, WRONG))
    assert opened.status_code == 404
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "unauthorized")
    assert "not known" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "content",
    [
        '{"image": {"api_key": "KEY"}}',
        '{"image": [{"api_key": "KEY"}], "api_key": "KEY"}',
        '{"a": "\\"api_key\\": \\"KEY\\""}',
        '["api_key", "KEY"]',
        '{"api_key": ["KEY"]}',
        '{"x": "' + "x" * 10_000 + '", "api_key": "KEY"}',
        '"api_key": "KEY"',
        "",
    ],
)
async def test_a_key_elsewhere_in_a_body_is_none(guarded: FastAPI, content: str) -> None:
    headers = {"content-type": "application/json"}
    async with client_of(guarded) as client:
        response = await client.post("/predict", content=content.replace("KEY", KEY), headers=headers)
    assert response.status_code == 401


async def test_a_refusal_says_how_to_send_a_key_and_has_our_shape(guarded: FastAPI) -> None:
    async with client_of(guarded) as client:
        response = await client.post("/predict", files={"file": picture()})
    error = response.json()["error"]
    assert response.headers["www-authenticate"] == "Bearer"
    assert "x-api-key" in error["message"] and error["request_id"] == response.headers["x-request-id"]


async def test_with_a_key_requests_are_answered_as_ever(guarded: FastAPI, client: httpx.AsyncClient) -> None:
    async with client_of(guarded) as allowed:
        for door in ("bearer", "query"):
            answer = await allowed.post("/predict", files={"file": picture(blue=3)}, **with_key(door, KEY))
            expected = await client.post("/predict", files={"file": picture(blue=3)})
            assert answer.json()["images"][0]["results"] == expected.json()["images"][0]["results"] != []


async def test_only_health_and_the_page_are_open_and_only_for_reading(guarded: FastAPI) -> None:
    paths = {re.sub(r"\{[^}]*\}", "fake", getattr(route, "path", "/")) for route in guarded.routes}
    paths |= (
        set(guarded.openapi()["paths"])
        | OPEN_PATHS
        | {"/nowhere", "/v2/health/x", "/healthz/", "//healthz", "/healthz/../models"}
    )
    async with client_of(guarded) as client:
        for path in sorted(paths):
            for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
                status = (await client.request(method, f"http://fleet{path}")).status_code
                is_open = path in OPEN_PATHS and method in ("GET", "HEAD")
                assert (status != 401) is is_open, (method, path, status)
        assert (await client.get("/healthz")).status_code == (await client.get("/readyz")).status_code == 200


async def test_under_a_route_prefix_the_open_paths_are_those_behind_it(guarded: FastAPI) -> None:
    transport = httpx.ASGITransport(guarded, root_path="/yolo")
    async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
        assert (await client.get("/yolo/healthz")).status_code == 200
        assert (await client.get("/yolo/models")).status_code == 401


async def test_without_a_file_everybody_gets_in_and_a_key_still_leaves_the_query(client: httpx.AsyncClient) -> None:
    response = await client.post("/predict", files={"file": picture()}, params={"api_key": "None"})
    assert response.status_code == 200


async def test_a_missing_file_stops_the_start(fleet: OneDetectorFleet, tmp_path: Path) -> None:
    with pytest.raises(BadKeysFile):
        create_api(fleet, LIMITS, AuthSettings(keys_file=str(tmp_path / "nowhere")))


async def test_a_key_over_its_rate_is_told_when_to_come_back_and_others_are_not_held_up(guarded: FastAPI) -> None:
    async with client_of(guarded) as client:
        slow: dict[str, Any] = {"headers": {"x-api-key": SLOW_KEY}}
        assert [(await client.get("/models", **slow)).status_code for _ in range(3)] == [200, 200, 429]
        refused = await client.get("/models", **slow)
        assert refused.json()["error"]["code"] == "rate_limited" and "'bob' may ask 2 times" in refused.text
        assert 25 <= int(refused.headers["retry-after"]) <= 30  # less where the machine is busy
        assert (await client.get("/models", headers={"x-api-key": KEY})).status_code == 200
        assert (await client.get("/healthz", **slow)).status_code == 200


async def test_the_schema_says_how_a_key_is_sent(guarded: FastAPI, api: FastAPI) -> None:
    assert set(guarded.openapi()["components"]["securitySchemes"]) == {"bearer", "x-api-key"}
    assert "security" not in api.openapi()


async def socket_events(app: FastAPI, query: bytes, headers: list[tuple[bytes, bytes]], *extensions: str) -> list[Message]:
    sent: list[Message] = []
    scope: Scope = {
        "type": "websocket",
        "path": "/echo",
        "raw_path": b"/echo",
        "root_path": "",
        "scheme": "ws",
        "query_string": query,
        "headers": headers,
        "subprotocols": [],
        "extensions": {name: {} for name in extensions},
        "server": ("fleet", 80),
        "client": ("me", 1),
    }

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


async def test_websockets_need_a_key_too(guarded: FastAPI) -> None:
    for query, headers in ((f"a=1&api_key={KEY}", []), ("a=1", [(b"authorization", f"Bearer {KEY}".encode())])):
        sent = await socket_events(guarded, query.encode(), headers)
        assert [message["type"] for message in sent] == ["websocket.accept", "websocket.send", "websocket.close"]
        assert sent[1]["text"] == "alice a=1"
    for query in ("", f"api_key={WRONG}"):
        (closed,) = await socket_events(guarded, query.encode(), [])
        assert (closed["type"], closed["code"], closed["reason"]) == ("websocket.close", 1008, "unauthorized")
        start, *_ = await socket_events(guarded, query.encode(), [], "websocket.http.response")
        assert (start["type"], start["status"]) == ("websocket.http.response.start", 401)


async def test_a_key_in_the_query_is_in_no_access_log(guarded: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    """With a real server, since it is the server that writes the log."""
    caplog.set_level(logging.DEBUG)
    server = uvicorn.Server(uvicorn.Config(guarded, port=0, log_config=None))
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    caplog.clear()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        for key, status in ((KEY, 200), (WRONG, 401)):
            response = await client.get("/models", params={"page": "7", "api_key": key})
            assert response.status_code == status
    server.should_exit = True
    await running
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith("http")]  # not the client's own
    assert sum("/models?page=7" in line for line in ours) == 2
    assert not any(key in line for key in (KEY, WRONG) for line in ours)


async def test_a_body_that_never_comes_does_not_wait_for_its_key_without_end(fleet: OneDetectorFleet, keys_file: Path) -> None:
    app = create_api(fleet, LIMITS.model_copy(update={"request_timeout_s": 0.2}), AuthSettings(keys_file=str(keys_file)))

    async def body() -> AsyncIterator[bytes]:
        yield b'{"api_'
        await asyncio.sleep(30)

    async with client_of(app) as client:
        response = await client.post("/predict", content=body(), headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (408, "body_too_slow")


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50)


@given(
    fields=st.dictionaries(st.text(max_size=8).filter(lambda name: name != "api_key"), plain, max_size=5),
    key=st.text("abcdefghijklmnopqrstuvwxyz0123456789_-", min_size=1),
    after=st.binary(max_size=20_000),
    data=st.data(),
)
def test_the_peek_finds_the_key_and_leaves_the_body_whole(
    fields: dict[str, Any], key: str, after: bytes, data: st.DataObject, loop: asyncio.AbstractEventLoop
) -> None:
    body = json.dumps({**fields, "api_key": key}, ensure_ascii=data.draw(st.booleans()))[:-1].encode() + after
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=5)))
    pieces = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    left = range(len(pieces))[::-1]
    messages = iter(
        [{"type": "http.request", "body": piece, "more_body": more > 0} for piece, more in zip(pieces, left, strict=True)]
    )

    async def receive() -> Message:
        return next(messages)

    async def check() -> None:
        found, again = await _in_json({"content-type": "application/json; charset=utf-8"}, receive)  # type: ignore[arg-type]
        assert found == key
        whole = [await again() for _ in pieces]
        assert b"".join(message["body"] for message in whole) == body

    loop.run_until_complete(check())


@given(st.binary(max_size=300) | st.text('{}[]",: \\api_key1', max_size=300).map(str.encode))
def test_whatever_a_body_is_the_peek_survives_it(body: bytes) -> None:
    class Nobody(KeyFile):
        def __init__(self) -> None:
            pass

        def find(self, presented: str) -> None:
            return None

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    statuses = []

    async def send(message: Message) -> None:
        statuses.append(message.get("status"))

    async def run() -> None:
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/predict",
            "query_string": body,
            "headers": [(b"content-type", b"application/json"), (b"x-api-key", body[:3])],
        }
        await ApiKeys(FastAPI(), Nobody())(scope, receive, send)

    asyncio.run(run())
    assert statuses[0] == 401
