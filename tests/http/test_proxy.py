"""What Serve's proxy adds around whatever it calls: an answer where there would be none."""

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from deploy.proxy import middlewares


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    """An application whose process has died."""


async def answering(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def client_of(application: object) -> httpx.AsyncClient:
    (middleware,) = middlewares()
    app = middleware.cls(application, *middleware.args, **middleware.kwargs)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fleet")


@pytest.mark.parametrize("path", ["/predict", "/v2/models/fake/infer", "/infer/object_detection"])
async def test_whose_process_died_is_told_to_come_back_in_its_dialects_shape(path: str) -> None:
    async with client_of(silent) as client:
        response = await client.post(path, content=b"image", headers={"x-request-id": "mine"})
    assert (response.status_code, response.headers["x-request-id"]) == (503, "mine")
    assert int(response.headers["retry-after"]) >= 1
    answer = response.json()
    sentence = {"/predict": lambda: answer["error"]["message"], "/v2/models/fake/infer": lambda: answer["error"]}
    assert "send it again" in sentence.get(path, lambda: answer["message"])()


async def test_an_answer_is_left_alone() -> None:
    async with client_of(answering) as client:
        response = await client.post("/predict")
    assert (response.status_code, response.content) == (204, b"")
    assert "retry-after" not in response.headers
