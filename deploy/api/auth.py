"""API keys → who may ask, and how often. Plain ASGI, in front of every route and websocket; no route can forget it.

    Authorization: Bearer KEY ┐
    x-api-key: KEY            ├→ KeyFile.find → Budget.take → the request, with the key's name in its state
    ?api_key=KEY              │        └── 401 Unauthorized      └── 429 RateLimited, Retry-After
    {"api_key": "KEY", …}     ┘

The last two are how Roboflow's client sends its key. The query's is taken out before anything can log it. Of a JSON body only
the beginning is read: ``inference_sdk`` writes the key before the images.
"""

import math
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote_plus

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from actors.errors import FleetError
from deploy.api.problems import RateLimited, Unauthorized, problem_response
from deploy.keys import KeyFile

OPEN_PATHS = frozenset(
    {"/", "/docs", "/openapi.json", "/favicon.ico", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"}
)
OPEN_FOLDER = "/web/"  # the page's own files, which a browser loads without a key
PEEK_BYTES = 8192

# A JSON object's fields with plain values, up to and with "api_key".
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_API_KEY = re.compile(
    rb'\s*\{(?:\s*(?!"api_key")%b\s*:\s*(?:%b|[^\s"{}\[\],]++)\s*,)*+\s*"api_key"\s*:\s*"([^"\\]*)"' % (_STRING, _STRING)
)


class ApiKeys:
    """Refuse whoever has no valid key, but for ``GET`` of the ``OPEN_PATHS`` and of the page's files.

    Args:
        app: answers the others.
        keys: the valid ones; None lets everybody in.
    """

    def __init__(self, app: ASGIApp, keys: KeyFile | None) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request if its key allows."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        in_query = _take_from_query(scope)
        if self.keys is None or _is_open(scope):
            await self.app(scope, receive, send)
            return
        try:
            presented = _in_headers(Headers(scope=scope)) or in_query
            if not presented and scope["type"] == "http":
                presented, receive = await _in_json(Headers(scope=scope), receive)
        except FleetError as error:  # the body is too large or too slow
            await _refuse(scope, receive, send, error)
            return
        key = self.keys.find(presented) if presented else None
        if key is None:
            what = "This API key is not known here" if presented else "This needs an API key"
            how = "send a valid one as 'Authorization: Bearer KEY', as the header 'x-api-key' or as the query's 'api_key'"
            await _refuse(scope, receive, send, Unauthorized(f"{what}: {how}"))
            return
        if wait_s := math.ceil(key.budget.take()):
            sentence = f"The key '{key.name}' may ask {key.budget.per_minute} times a minute: ask again in {wait_s} s"
            await _refuse(scope, receive, send, RateLimited(sentence), wait_s)
            return
        scope.setdefault("state", {})["key_name"] = key.name
        await self.app(scope, receive, send)


def describe_keys(app: FastAPI) -> None:
    """Say in the OpenAPI schema how a key is sent, so that ``/docs`` has a place to enter one."""
    plain = app.openapi

    def with_keys() -> dict[str, Any]:
        schema = plain()
        schema.setdefault("components", {})["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        schema["security"] = [{"bearer": []}, {"x-api-key": []}]
        return schema

    app.openapi = with_keys  # type: ignore[method-assign] # FastAPI's documented way


def _is_open(scope: Scope) -> bool:
    if scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD"):
        return False
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _in_headers(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else headers.get("x-api-key", "").strip()


def _take_from_query(scope: Scope) -> str:
    """The query's ``api_key``. It leaves the scope itself, from which servers write their access logs."""
    key, others = "", []
    for pair in scope["query_string"].split(b"&"):
        name, _, value = pair.decode("latin-1").partition("=")
        if unquote_plus(name) == "api_key":
            key = key or unquote_plus(value)
        else:
            others.append(pair)
    scope["query_string"] = b"&".join(others)
    return key


async def _in_json(headers: Headers, receive: Receive) -> tuple[str, Receive]:
    """The ``api_key`` at the beginning of a JSON body, and a ``receive`` that gives the whole body again."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return "", receive
    messages: list[Message] = []
    start = b""
    while len(start) < PEEK_BYTES:
        messages.append(await receive())
        start += messages[-1].get("body", b"")[:PEEK_BYTES]
        if not messages[-1].get("more_body"):
            break
    found = _API_KEY.match(start)
    return found[1].decode(errors="replace") if found else "", _replay(messages, receive)


def _replay(messages: Iterable[Message], receive: Receive) -> Receive:
    held = iter(messages)

    async def again() -> Message:
        message = next(held, None)
        return await receive() if message is None else message

    return again


async def _refuse(scope: Scope, receive: Receive, send: Send, error: FleetError, retry_after_s: int | None = None) -> None:
    if scope["type"] == "http":
        await problem_response(Request(scope), error, retry_after_s)(scope, receive, send)
    elif "websocket.http.response" in scope.get("extensions", {}):
        answer = problem_response(Request({**scope, "type": "http"}), error, retry_after_s)
        await WebSocket(scope, receive, send).send_denial_response(answer)
    else:
        await WebSocket(scope, receive, send).close(code=1008, reason=error.code)
