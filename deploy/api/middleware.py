"""What happens to every request before a dialect sees it. Plain ASGI: no copy of the body, no task per request."""

import asyncio
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.api.problems import BodyTooLarge, BodyTooSlow, problem_response

_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestId:
    """Give every request and websocket an id, the client's own ``X-Request-Id`` where it is a safe one, and answer with it.

    What the request's Call has to tell (``Server-Timing``, ``X-Replica``) joins the headers here too; the ``total`` of
    ``Server-Timing``, milliseconds until the answer begins, is in every answer, be it an error.

    Args:
        app: what is within.
        answered_outside: whoever calls this answers with the request's ``X-Request-Id``, which must not be there twice.
    """

    def __init__(self, app: ASGIApp, *, answered_outside: bool) -> None:
        self.app, self.answered_outside = app, answered_outside

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request with ``request.state.request_id`` set."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        offered = Headers(scope=scope).get("x-request-id", "")
        request_id = offered if _SAFE_ID.fullmatch(offered) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        began = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if self.answered_outside and request_id == offered:
                    del headers["x-request-id"]
                if call := state.get("call"):
                    headers.update(call.headers())
                stages, total = headers.get("server-timing"), f"total;dur={1e3 * (time.perf_counter() - began):.2f}"
                headers["server-timing"] = f"{stages}, {total}" if stages else total
            await send(message)

        await self.app(scope, receive, send_with_id)


class BodyLimit:
    """Refuse a body of more than ``max_bytes`` or that takes longer than ``max_seconds`` to arrive.

    Too large is known by the declared length at once, else as soon as it is exceeded.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_seconds: float) -> None:
        self.app, self.max_bytes, self.max_seconds = app, max_bytes, max_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request while its body stays within the limits."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_large = BodyTooLarge(f"The request body exceeds {self.max_bytes / 1e6:g} MB: send fewer images at once")
        declared = Headers(scope=scope).get("content-length", "0")
        if re.fullmatch("[0-9]{1,18}", declared) and int(declared) > self.max_bytes:
            await problem_response(Request(scope), too_large)(scope, receive, send)
            return
        deadline: float | None = asyncio.get_running_loop().time() + self.max_seconds
        received = 0

        async def limited_receive() -> Message:
            nonlocal deadline, received
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                sentence = f"The request body did not arrive within {self.max_seconds:g} s: send less at once"
                raise BodyTooSlow(sentence) from None
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise too_large
            if not message.get("more_body"):
                deadline = None  # what may come now is the client's disconnect, whenever
            return message

        await self.app(scope, limited_receive, send)
