"""The HTTP interface over ASGI, without Ray: a real Detector on FakeModel stands behind the fleet protocol."""

import base64
from collections.abc import AsyncIterator

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from actors.images import encode_jpeg
from actors.schemas import Detection, Gallery, ImageResult, JobCounts, JobReport, Sampled
from deploy.api import create_api
from deploy.settings import HttpLimits
from tests.conftest import picture
from tests.http.conftest import OneDetectorFleet


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
    assert metadata["classNames"] == ["zero", "one", "two", "three"]
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
    gone = await client.get("/readyz")
    assert (gone.status_code, int(gone.headers["retry-after"]) >= 1) == (503, True)
    api.state.fleet.gone = False
    (model,) = (await client.get("/models")).json()["models"]
    assert (model["name"], model["engine"], model["names"]["0"]) == ("fake", "fake", "zero")
    assert (model["precision"], len(model["sha256"])) == ("fp32", 64)
    assert model["load"] == {"replicas": 1, "starting": 0, "waiting": 0, "in_flight": 0}
    assert "yolofleet" in (await client.get("/docs")).text
    assert "/predict" in (await client.get("/openapi.json")).json()["paths"]


async def test_the_fleet_is_reported_with_the_last_minute(client: httpx.AsyncClient) -> None:
    await client.post("/predict", files=upload(picture()))
    await client.post("/predict", files=upload(b"not an image"))
    report = (await client.get("/fleet")).json()
    assert (report["ingress"], report["ingresses"]) == ("here", 1)
    (model,) = report["models"]
    assert (model["name"], model["engine"], model["task"], model["target"]) == ("fake", "fake", "detect", 2)
    assert model["reserved"] == {"num_cpus": 0.5, "num_gpus": 0.25}
    told, silent = model["replicas"]
    assert (told["state"], told["node"], told["vitals"]["memory_bytes"]) == ("RUNNING", "10.0.0.1", 300_000_000)
    assert (silent["state"], silent["node"], silent["vitals"]) == ("STARTING", None, None)
    assert model["last_minute"]["outcomes"]["ok"] >= 1 and model["last_minute"]["outcomes"]["bad_image"] >= 1
    assert model["last_minute"]["latency_ms"]["p99"] > 0


async def test_jobs_that_cannot_be_known_are_null(client: httpx.AsyncClient) -> None:
    assert (await client.get("/jobs")).json() == {"jobs": None}


async def test_a_job_tells_how_far_it_is_and_shows_a_few_results(fleet: OneDetectorFleet, client: httpx.AsyncClient) -> None:
    result = ImageResult(64, 48, "detect", (Detection(0, "nut", 0.9, (1.0, 2.0, 3.0, 4.0)),))
    letter = {"uri": "/data/cut.jpg", "stage": "decode", "reason": "truncated", "sha256": None, "version": None}
    gallery = Gallery((Sampled("a.png", b"JPEG", result), Sampled("gone.png", None, result)), (letter,))
    job = JobReport("job-1", "RUNNING", "yolofleet predict", 1e9, None, "", "/data/out", JobCounts(10, 2, 5, 1))
    fleet.submitted, fleet.galleries = [job], {"job-1": gallery}
    try:
        (listed,) = (await client.get("/jobs")).json()["jobs"]
        assert listed["counts"] == {"total": 10, "resumed": 2, "done": 5, "failed": 1}
        shown = (await client.get("/jobs/job-1/gallery")).json()
        pictures = [(sample["name"], sample["picture"]) for sample in shown["samples"]]
        assert pictures == [("a.png", base64.b64encode(b"JPEG").decode()), ("gone.png", None)]
        assert shown["samples"][0]["image"]["results"][0]["name"] == "nut"
        assert shown["dead_letters"] == [{"uri": "/data/cut.jpg", "stage": "decode", "reason": "truncated"}]
    finally:
        fleet.submitted, fleet.galleries = None, {}


@pytest.mark.parametrize("job", ["job-2", "..%2Fjob-1", "%2Fetc%2Fpasswd", "job-1%2F..%2F..%2Fetc"])
async def test_no_request_names_a_path_to_show(client: httpx.AsyncClient, job: str) -> None:
    response = await client.get(f"/jobs/{job}/gallery")
    assert response.status_code == 404
    assert response.json()["error"]["code"] in ("unknown_job", "not_found")


async def test_the_page_keeps_the_address_of_ultralytics_hub(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    assert (
        page.headers["content-type"].startswith("text/html")
        and "default-src 'none'" in page.headers["content-security-policy"]
    )
    assert (await client.post("/", files=upload(picture()), data={"model": "fake"})).status_code == 200
