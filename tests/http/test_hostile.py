"""What no request may do: name a path, load a pickle, reach another model, hang on, or make a 500. Over every route there is.

The paths come from the application's own schema, so a dialect that is added is attacked as well.
"""

import asyncio
import base64
import builtins
import io
import json
import pickle
import re
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from actors.errors import BadImage
from deploy.api import create_api
from deploy.api.call import TheCall
from tests.conftest import picture
from tests.http.conftest import LIMITS, OneDetectorFleet

WITHOUT_IMAGE = ("/model/", "/v2/repository/")  # POSTs of other servers' dialects that only list or choose models
PARAMETER = re.compile(r"\{[^}]*\}")


class Bomb:
    """Its pickle calls ``exec`` when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.trace)!r}, 'w').close()",)


def posts(app: FastAPI, name: str = "fake") -> list[str]:
    """Every path that takes a POST, with ``name`` for each of its parameters."""
    return [PARAMETER.sub(name, path) for path, methods in app.openapi()["paths"].items() if "post" in methods]


def is_refused(response: httpx.Response) -> bool:
    """Whether it got a sentence instead of an answer. Paths that take no image may have ignored what they were sent."""
    lowest = 200 if response.request.url.path.startswith(WITHOUT_IMAGE) else 400
    return lowest <= response.status_code < 500 and "Traceback" not in response.text


class Question(BaseModel):
    """A JSON body like those of the dialects that have one."""

    model_id: str
    confidence: float = 0.5
    id: str | None = None
    image: Any = None
    inputs: list[Any] = []


@pytest.fixture
async def asked_in_json(fleet: OneDetectorFleet) -> AsyncIterator[httpx.AsyncClient]:
    """The interface with one more route, which reads JSON, looks for the model and echoes what it was asked."""
    app = create_api(fleet, LIMITS)

    @app.post("/question")
    async def question(call: TheCall, asked: Question) -> dict[str, Any]:
        await call.describe(asked.model_id)
        raise BadImage(f"no image in {asked.id}")

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as made:
        yield made


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A picture on this machine that nobody was sent; its class is 3."""
    path = tmp_path / "secret.png"
    path.write_bytes(picture(blue=3))
    return path


SPELLINGS = [
    "{path}",
    "file://{path}",
    "file:{path}",
    "FILE://localhost{path}",
    "../../../../../../../..{path}",
    "~/../..{path}",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_no_request_names_a_path(
    api: FastAPI, client: httpx.AsyncClient, secret: Path, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    plain = builtins.open

    def spy(file: Any, *rest: Any, **options: Any) -> Any:
        opened.append(str(file))
        return plain(file, *rest, **options)

    monkeypatch.setattr(builtins, "open", spy)
    monkeypatch.setattr(io, "open", spy)
    monkeypatch.chdir(secret.parent)
    named = spelling.format(path=secret)
    for given in (named, secret.name, f"data:{named}", f"data:image/png;base64,{named}"):
        for path in posts(api):
            image = {"type": "base64", "value": given}
            for body in (
                {"data": {"source": given}},
                {"files": {"file": (given, b"")}},
                {"json": {"source": given, "image": image}},
                {
                    "json": {
                        "model_id": "fake/1",
                        "image": [{"type": kind, "value": given} for kind in ("file", "url", "path")],
                    }
                },
                {"content": given.encode()},
            ):
                response = await client.post(path, **body)
                assert is_refused(response), (path, body, response.text)
    assert not [name for name in opened if secret.name in name]


async def test_the_name_of_an_uploaded_file_is_only_a_label(client: httpx.AsyncClient, secret: Path) -> None:
    response = await client.post("/predict", files={"file": (str(secret), picture(blue=1), "image/png")})
    assert [found["class"] for found in response.json()["images"][0]["results"]] == [1]


@pytest.mark.parametrize("form", ["pickle", "numpy", "torch"])
async def test_no_request_loads_a_pickle(api: FastAPI, client: httpx.AsyncClient, tmp_path: Path, form: str) -> None:
    trace = tmp_path / "it-was-loaded"
    bomb = Bomb(trace)
    buffer = io.BytesIO()
    if form == "numpy":
        np.save(buffer, np.array([bomb], object), allow_pickle=True)
    elif form == "torch":
        with zipfile.ZipFile(buffer, "w") as archive:  # what torch.save writes
            archive.writestr("weights/data.pkl", pickle.dumps(bomb))
            archive.writestr("weights/version", "3\n")
    else:
        pickle.dump(bomb, buffer)
    data = buffer.getvalue()
    encoded = base64.b64encode(data).decode()
    for path in posts(api):
        for body in (
            {"files": {"file": ("a.npy", data)}},
            {"data": {"source": encoded}},
            {"json": {"model_id": "fake/1", "image": {"type": "numpy", "value": encoded}}},
            {"json": {"model_id": "fake/1", "image": {"type": "numpy_object", "value": encoded}}},
            {"json": {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [encoded]}]}},
            {"content": data},
        ):
            response = await client.post(path, **body)
            assert is_refused(response), (path, response.text)
    assert not trace.exists()
    pickle.loads(pickle.dumps(bomb))  # the bomb works, so its silence above means something
    assert trace.exists()


MODELS = [
    "../other",
    "fake/../../weights.pt",
    "fake/1/..",
    "/etc/passwd",
    "a/b",
    "fake\x00",
    "fake.pt",
    "FAKE",
    "fake ",
    "..",
    "%2e%2e",
    "*",
    "fake,other",
    "ⅎake",
]


@pytest.mark.parametrize("name", MODELS)
async def test_only_configured_names_are_models(api: FastAPI, client: httpx.AsyncClient, name: str) -> None:
    response = await client.post("/predict", files={"file": picture()}, data={"model": name})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_model")
    for path in posts(api, "".join(f"%{byte:02x}" for byte in name.encode())):
        for body in ({"json": {"model_id": name}}, {"files": {"file": picture()}, "data": {"model": name}}):
            response = await client.post(path, **body)
            assert is_refused(response), (path, response.text)


# bodies


def nested(depth: int, opening: str, closing: str) -> str:
    return opening * depth + "1" + closing * depth


JSON_BODIES = {
    "deep lists": nested(100_000, "[", "]"),
    "deep objects": nested(50_000, '{"a":', "}"),
    "unclosed": "[" * 200_000,
    "deep below a field": '{"model_id": "fake/1", "inputs": ' + nested(100_000, "[", "]") + "}",
    "a huge number": '{"confidence": ' + "9" * 100_000 + "}",
    "a huge exponent": '{"confidence": 1e999999, "id": -1e999}',
    "not a number": '{"confidence": NaN, "inputs": [Infinity]}',
    "a lone surrogate": '{"model_id": "\\ud800", "id": "\\udfff", "image": {"type": "\\ud800", "value": "\\ud800"}}',
    "a lone surrogate as id": '{"model_id": "fake", "id": "\\udfff"}',
    "a lone surrogate as field": '{"\\udfff": 1}',
    "twice the same": '{"image": 1, "image": {"type": "base64", "value": "aGk="}}',
    "many fields": json.dumps({str(number): number for number in range(20_000)}),
    "null": "null",
    "text": '"hello"',
    "empty": "",
    "bytes": "\x00\x01\x02",
    "a mark": "\ufeff{}",
}


@pytest.mark.parametrize("case", JSON_BODIES)
async def test_odd_json_is_refused_by_every_route(api: FastAPI, asked_in_json: httpx.AsyncClient, case: str) -> None:
    for path in [*posts(api), "/question"]:
        for headers in ({"content-type": "application/json"}, {"content-type": "application/json; charset=utf-7"}, {}):
            response = await asked_in_json.post(path, content=JSON_BODIES[case].encode(), headers=headers)
            assert is_refused(response), (path, response.status_code, response.text[:200])


def multipart(parts: list[tuple[str, bytes]], boundary: str = "x") -> tuple[bytes, dict[str, str]]:
    body = b"".join(f"--{boundary}\r\n{head}\r\n\r\n".encode() + content + b"\r\n" for head, content in parts)
    return body + f"--{boundary}--\r\n".encode(), {"content-type": f"multipart/form-data; boundary={boundary}"}


FILE, FIELD = 'Content-Disposition: form-data; name="file"; filename="a.png"', 'Content-Disposition: form-data; name="conf"'
MULTIPART_BODIES = {
    "thousands of files": multipart([(FILE, b"")] * 3000),
    "thousands of fields": multipart([(FIELD, b"1")] * 3000),
    "thousands of names": multipart([(f'Content-Disposition: form-data; name="f{number}"', b"") for number in range(3000)]),
    "a thousand headers": multipart([(FIELD + "".join(f"\r\nX-{number}: a" for number in range(1000)), b"1")]),
    "a huge header": multipart([(FIELD + "\r\nX-A: " + "a" * 100_000, b"1")]),
    "a huge name": multipart([('Content-Disposition: form-data; name="' + "a" * 100_000 + '"', b"1")]),
    "no name": multipart([("Content-Disposition: form-data", b"1")]),
    "no head": multipart([("", b"1")]),
    "no end": (multipart([(FILE, picture())])[0][:-20], {"content-type": "multipart/form-data; boundary=x"}),
    "no start": (b"hello", {"content-type": "multipart/form-data; boundary=x"}),
    "no boundary": (b"--x", {"content-type": "multipart/form-data"}),
    "a huge boundary": (b"--x", {"content-type": "multipart/form-data; boundary=" + "x" * 5000}),
    "another charset": (b"--x", {"content-type": "multipart/form-data; boundary=x; charset=nonsense"}),
    "thousands of form fields": (b"conf=1&" * 3000, {"content-type": "application/x-www-form-urlencoded"}),
    "odd percent signs": (b"conf=%zz&%=%&source=%00%ff", {"content-type": "application/x-www-form-urlencoded"}),
}


@pytest.mark.parametrize("case", MULTIPART_BODIES)
async def test_odd_forms_are_refused_by_every_route(api: FastAPI, client: httpx.AsyncClient, case: str) -> None:
    content, headers = MULTIPART_BODIES[case]
    for path in posts(api):
        response = await client.post(path, content=content, headers=headers)
        assert is_refused(response), (path, response.status_code, response.text[:200])


@pytest.mark.parametrize(
    "kind", ["application/json", "multipart/form-data; boundary=x", "image/png", "application/octet-stream"]
)
async def test_a_body_without_a_length_is_counted_as_it_comes(api: FastAPI, client: httpx.AsyncClient, kind: str) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' if "multipart" in kind else b'["'
        while True:  # ends only because it is refused
            yield bytes(50_000)

    for path in posts(api):
        response = await client.post(path, content=body(), headers={"content-type": kind})
        assert is_refused(response), (path, response.text)  # some refuse the kind without reading on
        assert response.status_code == 413 or "multipart" not in kind or path != "/predict"


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x", "image/png"])
async def test_a_body_that_drips_is_given_up(fleet: OneDetectorFleet, kind: str) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' if "multipart" in kind else b"["
        while True:
            yield b"x"
            await asyncio.sleep(0.05)

    hurried = create_api(fleet, LIMITS.model_copy(update={"request_timeout_s": 0.1}))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(hurried), base_url="http://fleet") as client:
        for path in posts(hurried):
            response = await client.post(path, content=body(), headers={"content-type": kind})
            assert is_refused(response), (path, response.text)  # some refuse the kind without reading on
            assert response.status_code == 408 or "multipart" not in kind or path != "/predict"


async def test_waiting_for_the_answer_is_not_waiting_for_the_body(fleet: OneDetectorFleet) -> None:
    """A streamed answer waits for the client's disconnect by ``receive``; that may take as long as it likes."""
    hurried = create_api(fleet, LIMITS.model_copy(update={"request_timeout_s": 0.2}))

    async def watch(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(receive(), 0.5)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    hurried.mount("/watch", watch)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(hurried), base_url="http://fleet") as client:
        assert (await client.post("/watch/", content=b"all of it")).status_code == 204
