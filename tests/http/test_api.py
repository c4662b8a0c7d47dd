"""The HTTP interface over ASGI, without Ray: a real Detector on FakeModel stands behind the fleet protocol."""

import asyncio
import base64
from collections.abc import AsyncIterator, Iterator

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from actors.detector import Detector
from actors.errors import ReplicaUnavailable, UnknownModel
from actors.fake_model import FakeModel
from actors.images import encode_jpeg
from actors.schemas import ImageResult, ModelInfo, PredictParams
from actors.settings import ImageLimits, ModelSettings
from deploy.api import create_api
from deploy.settings import HttpLimits
from tests.conftest import picture

LIMITS = HttpLimits(max_body_mb=0.5, max_images_per_request=4)


class OneDetectorFleet:
    """The fleet protocol over one Detector in this process."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self.gone = False

    def model_names(self) -> list[str]:
        return ["fake"]

    async def detect(self, model: str | None, data: bytes, params: PredictParams) -> tuple[ImageResult, str]:
        await self.describe(model)
        return await asyncio.wrap_future(self._detector.submit(data, params)), "here"

    async def check(self, model: str) -> None:
        if self.gone:
            raise ReplicaUnavailable(f"No replica of '{model}' answers")

    async def describe(self, model: str | None) -> ModelInfo:
        if model not in (None, "fake"):
            raise UnknownModel(f"There is no model '{model}': served are fake")
        return self._detector.info


@pytest.fixture(scope="module")
def api() -> Iterator[FastAPI]:
    settings = ModelSettings(name="fake", weights="fake:?fail=77")
    detector = Detector(lambda: FakeModel(settings), ImageLimits(max_megapixels=0.1, max_image_mb=0.2))
    yield create_api(OneDetectorFleet(detector), LIMITS)
    detector.close()


@pytest.fixture
async def client(api: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as made:
        yield made


def upload(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", (f"{number}.png", data)) for number, data in enumerate(images)]


async def test_an_answer_has_the_shape_of_ultralytics_api(client: httpx.AsyncClient) -> None:
    response = await client.post("/predict", files=upload(picture(64, 48, blue=2)))
    answer = response.json()
    assert response.status_code == 200
    assert answer["images"][0]["shape"] == [48, 64]
    assert set(answer["images"][0]["speed"]) == {"preprocess", "inference", "postprocess"}
    box = {"x1": 16.0, "y1": 12.0, "x2": 48.0, "y2": 36.0}
    assert answer["images"][0]["results"] == [{"name": "two", "class": 2, "confidence": 0.78431, "box": box}]
    metadata = answer["metadata"]
    assert (metadata["imageCount"], metadata["model"], metadata["task"]) == (1, "fake", "detect")
    assert metadata["classNames"]["3"] == "three"
    assert metadata["functionTimeAlive"] >= metadata["functionTimeCall"] > 0


async def test_several_images_are_answered_in_their_order(client: httpx.AsyncClient) -> None:
    response = await client.post("/predict", files=upload(*(picture(blue=blue) for blue in (3, 1, 2))))
    assert [image["results"][0]["class"] for image in response.json()["images"]] == [3, 1, 2]


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
async def test_source_takes_base64(client: httpx.AsyncClient, prefix: str) -> None:
    source = prefix + base64.b64encode(picture(blue=1)).decode()
    response = await client.post("/predict", data={"source": source})
    assert response.json()["images"][0]["results"][0]["name"] == "one"


async def test_source_takes_more_than_a_megabyte(api: FastAPI, client: httpx.AsyncClient) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (800, 600, 3), np.uint8)
    source = base64.b64encode(encode_jpeg(noise, quality=100)).decode()
    assert len(source) > 1_100_000
    roomy = create_api(api.state.fleet, HttpLimits())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(roomy), base_url="http://fleet") as made:
        for response in (
            await made.post("/predict", data={"source": source}),
            await made.post("/predict", files={"source": (None, source)}),
        ):
            assert response.json()["error"]["code"] == "image_too_large"  # read as an image, which this fleet limits


async def test_normalised_and_rounded(client: httpx.AsyncClient) -> None:
    fields = {"normalize": "true", "decimals": "2"}
    response = await client.post("/predict", files=upload(picture()), data=fields)
    (found,) = response.json()["images"][0]["results"]
    assert found["box"] == {"x1": 0.25, "y1": 0.25, "x2": 0.75, "y2": 0.75} and found["confidence"] == 0.78


@pytest.mark.parametrize("classes", ["1,3", "[1, 3]", "1, 3"])
async def test_classes_are_read_in_every_usual_spelling(client: httpx.AsyncClient, classes: str) -> None:
    response = await client.post("/predict", files=upload(picture(blue=3)), data={"classes": classes})
    assert len(response.json()["images"][0]["results"]) == 1
    response = await client.post("/predict", files=upload(picture(blue=2)), data={"classes": classes})
    assert response.json()["images"][0]["results"] == []


BAD_REQUESTS = {
    "nothing": ({}, [], 422, "bad_request", "at least one image"),
    "no image": ({}, [b"hello"], 400, "bad_image", "not an image"),
    "zero bytes": ({}, [b""], 400, "bad_image", "empty"),
    "truncated": ({}, [picture()[:-30]], 400, "bad_image", "truncated"),
    "too many pixels": ({}, [picture(1000, 200)], 413, "image_too_large", "1000x200"),
    "too many bytes": ({}, [picture() + bytes(250_000)], 413, "image_too_large", "MB"),
    "too large a body": ({}, [bytes(600_000)], 413, "body_too_large", "0.5 MB"),
    "too many images": ({}, [picture()] * 5, 422, "bad_request", "at most 4"),
    "unknown model": ({"model": "nope"}, [picture()], 404, "unknown_model", "served are fake"),
    "conf out of range": ({"conf": "1.5"}, [picture()], 422, "bad_request", "conf"),
    "conf not a number": ({"conf": "high"}, [picture()], 422, "bad_request", "conf"),
    "conf nan": ({"conf": "nan"}, [picture()], 422, "bad_request", "conf"),
    "iou negative": ({"iou": "-1"}, [picture()], 422, "bad_request", "iou"),
    "max_det zero": ({"max_det": "0"}, [picture()], 422, "bad_request", "max_det"),
    "imgsz too small": ({"imgsz": "1"}, [picture()], 422, "bad_request", "imgsz"),
    "imgsz of three": ({"imgsz": "1,2,3"}, [picture()], 422, "bad_request", "imgsz"),
    "classes of words": ({"classes": "cat"}, [picture()], 422, "bad_request", "classes"),
    "wrong field": ({"confidence": "0.5"}, [picture()], 422, "bad_request", "Unknown field 'confidence'"),
    "a URL": ({"source": "http://169.254.169.254/"}, [], 422, "bad_request", "not fetched"),
    "a path": ({"source": "/etc/passwd"}, [], 422, "bad_request", "not base64"),
    "both kinds": ({"source": "aGk="}, [picture()], 422, "bad_request", "not both"),
    "one bad of three": ({}, [picture(), b"x", picture()], 400, "bad_image", "file 2"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
async def test_bad_input_gets_a_sentence_that_says_what_to_do(client: httpx.AsyncClient, case: str) -> None:
    fields, images, status, code, sentence = BAD_REQUESTS[case]
    response = await client.post("/predict", data=fields, files=upload(*images) or None)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert sentence in error["message"]
    assert "Traceback" not in response.text
    assert error["request_id"] == response.headers["x-request-id"]


async def test_a_body_that_grows_beyond_the_limit_is_refused_without_a_declared_length(client: httpx.AsyncClient) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(20):
            yield bytes(50_000)

    headers = {"content-type": "multipart/form-data; boundary=x"}
    response = await client.post("/predict", content=body(), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


async def test_a_defect_is_an_anonymous_500(client: httpx.AsyncClient) -> None:
    response = await client.post("/predict", files=upload(picture(blue=77)))
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"
    assert "fake" not in response.text and "Traceback" not in response.text


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nope", 404), ("GET", "/predict", 405)])
async def test_wrong_paths_and_methods_have_the_same_shape(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert "/docs" in response.json()["error"]["message"]


async def test_the_request_id_is_the_clients_own_where_it_is_safe(client: httpx.AsyncClient) -> None:
    for sent, kept in (("abc-1", True), ("a b\tc", False), ("x" * 500, False)):
        response = await client.get("/healthz", headers={"x-request-id": sent})
        assert (response.headers["x-request-id"] == sent) is kept


async def test_health_readiness_models_and_documentation(api: FastAPI, client: httpx.AsyncClient) -> None:
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    assert (await client.get("/readyz")).json() == {"status": "ready", "models": ["fake"]}
    api.state.fleet.gone = True
    assert (await client.get("/readyz")).status_code == 503
    api.state.fleet.gone = False
    (model,) = (await client.get("/models")).json()["models"]
    assert (model["name"], model["engine"], model["names"]["0"]) == ("fake", "fake", "zero")
    assert "yolofleet" in (await client.get("/docs")).text
    assert "/predict" in (await client.get("/openapi.json")).json()["paths"]
