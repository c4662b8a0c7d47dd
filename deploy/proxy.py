"""What Serve's proxy says in the place of an ingress that died with a request in hand: 503, and when to come back.

    client → Serve's Python proxy [ AnswerForTheDead ] → ingress ─ its process dies ─→ nothing
                                          └── 503 replica_unavailable, Retry-After

Serve itself would answer 500. An answer that had begun is cut all the same. ``prepare_environment`` names ``middlewares`` to
Serve, whose proxy on every node calls it. What HAProxy says, where it is switched on, is in deploy/haproxy.py; what it cannot
hand to an ingress goes to Serve's proxy as well.
"""

import asyncio

from ray import serve
from ray.serve.exceptions import RayServeException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.errors import ReplicaUnavailable


class AnswerForTheDead:
    """Answer HTTP requests that the application has left without an answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request."""
        answered = scope["type"] != "http"

        async def noting_send(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        await self.app(scope, receive, noting_send)
        if not answered:
            apologise = await asyncio.to_thread(_apology)
            await apologise(scope, receive, send)


def middlewares() -> list[Middleware]:
    """For ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``. Behind HAProxy ingresses ask as well: they are not in need of it."""
    try:
        serve.get_replica_context()
    except RayServeException:
        return [Middleware(AnswerForTheDead)]
    return []


def _apology() -> ASGIApp:
    """The shape of errors is the dialects' to know, which a proxy need not load as long as all is well."""
    from deploy.api.middleware import RequestId
    from deploy.api.problems import problem_response

    async def apologise(scope: Scope, receive: Receive, send: Send) -> None:
        died = ReplicaUnavailable("The process that had this request in hand has died: send it again")
        await problem_response(Request(scope), died)(scope, receive, send)

    return RequestId(apologise, answered_outside=False)
