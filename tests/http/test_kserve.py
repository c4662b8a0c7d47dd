"""The KServe v2 dialect over ASGI. Requests are written and answers read by tritonclient's own functions."""

import base64
import gzip
import json
import math
import threading
import zlib
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, InferResult

from actors.errors import BadRequest
from actors.schemas import Detection, ImageResult, Points
from deploy.api import kserve
from deploy.api.kserve import _ready_tensors
from deploy.api.tensors import HEADER_LENGTH, Tensor, read_request, strings, write_response
from tests.conftest import picture
from tests.http.conftest import LIMITS, OneDetectorFleet

FAKE = "/v2/models/fake"


def images_input(values: np.ndarray[Any, Any], binary: bool = True) -> InferInput:
    return InferInput("images", list(values.shape), "FP32").set_data_from_numpy(values, binary_data=binary)


def files_input(*files: bytes, binary: bool = True) -> InferInput:
    elements = [file if binary else base64.b64encode(file) for file in files]
    made = InferInput("encoded_images", [len(files)], "BYTES")
    return made.set_data_from_numpy(np.array(elements, dtype=object), binary_data=binary)


def written(
    inputs: list[InferInput], outputs: list[InferRequestedOutput] | None = None, **rest: Any
) -> tuple[bytes, dict[str, str]]:
    """A request's body and headers, as tritonclient writes them."""
    body, length = InferenceServerClient.generate_request_body(inputs, outputs=outputs, **rest)
    return body, {} if length is None else {HEADER_LENGTH: str(length)}


def read(response: httpx.Response) -> InferResult:
    """An answer as tritonclient reads it."""
    assert response.status_code == 200, response.text
    length = response.headers.get(HEADER_LENGTH)
    return InferenceServerClient.parse_response_body(response.content, header_length=None if length is None else int(length))


async def infer(client: httpx.AsyncClient, *args: Any, **rest: Any) -> InferResult:
    body, headers = written(*args, **rest)
    return read(await client.post(f"{FAKE}/infer", content=body, headers=headers))


async def test_server_health_and_repository(client: httpx.AsyncClient, fleet: OneDetectorFleet) -> None:
    server = (await client.get("/v2")).json()
    assert server["name"] == "yolofleet" and "binary_tensor_data" in server["extensions"]
    assert (await client.get("/v2/health/live")).json() == {"live": True}
    assert (await client.get("/v2/health/ready")).json() == {"ready": True}
    assert (await client.get(f"{FAKE}/ready")).json() == {"name": "fake", "ready": True}
    entry = {"name": "fake", "version": "1", "state": "READY", "reason": ""}
    assert (await client.post("/v2/repository/index")).json() == [entry]
    fleet.gone = True
    try:
        for path in ("/v2/health/ready", f"{FAKE}/ready"):
            response = await client.get(path)
            assert (response.status_code, response.json()["error"]) == (503, "No replica of 'fake' answers")
        (entry,) = (await client.post("/v2/repository/index", content="{}")).json()
        assert (entry["state"], entry["reason"]) == ("UNAVAILABLE", "No replica of 'fake' answers")
        assert (await client.post("/v2/repository/index", json={"ready": True})).json() == []
    finally:
        fleet.gone = False


async def test_metadata_and_configuration(client: httpx.AsyncClient) -> None:
    metadata = (await client.get(FAKE)).json()
    assert metadata == (await client.get(f"{FAKE}/versions/1")).json()
    assert {tensor["name"]: (tensor["datatype"], tensor["shape"]) for tensor in metadata["inputs"]} == {
        "images": ("FP32", [-1, 3, -1, -1]),
        "encoded_images": ("BYTES", [-1]),
    }
    outputs = ["output0", "num_detections", "boxes", "scores", "classes", "detections"]
    assert [tensor["name"] for tensor in metadata["outputs"]] == outputs
    config = (await client.get(f"{FAKE}/config")).json()
    assert config["output"] == [{"name": "output0", "data_type": "TYPE_FP32", "dims": [-1, 3]}]
    assert [tensor["name"] for tensor in config["input"]] == ["images"]


@pytest.mark.parametrize("binary", [True, False])
async def test_a_raw_tensor_comes_back_as_the_engines_own_outputs(client: httpx.AsyncClient, binary: bool) -> None:
    values = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
    answer = await infer(client, [images_input(values, binary)], [InferRequestedOutput("output0", binary_data=binary)])
    np.testing.assert_allclose(answer.as_numpy("output0"), values.mean(axis=(2, 3)), rtol=1e-6)
    assert ("binary_data_size" in answer.get_output("output0").get("parameters", {})) is binary


@pytest.mark.parametrize("binary", [True, False])
async def test_encoded_images_come_back_as_detections(client: httpx.AsyncClient, binary: bool) -> None:
    files = picture(64, 48, blue=2), picture(32, 32, blue=1, red=10)
    answer = await infer(client, [files_input(*files, binary=binary)], parameters={"conf": 0.1}, request_id="mine")
    head = answer.get_response()
    assert (head["model_name"], head["model_version"], head["id"]) == ("fake", "1", "mine")
    assert answer.as_numpy("num_detections").tolist() == [1, 0]
    assert answer.as_numpy("boxes").tolist() == [[[16, 12, 48, 36]], [[0, 0, 0, 0]]]
    assert answer.as_numpy("classes").tolist() == [[2], [-1]]
    np.testing.assert_allclose(answer.as_numpy("scores"), np.array([[200 / 255], [0]]), rtol=1e-6)
    first, second = (json.loads(text) for text in answer.as_numpy("detections"))
    box = {"x1": 16.0, "y1": 12.0, "x2": 48.0, "y2": 36.0}
    assert first == [{"name": "two", "class": 2, "confidence": 0.78431, "box": box}]
    assert second == []


async def test_only_the_wanted_outputs_are_answered_each_as_it_was_asked(client: httpx.AsyncClient) -> None:
    wanted = [InferRequestedOutput("detections", binary_data=False), InferRequestedOutput("scores", binary_data=True)]
    answer = await infer(client, [files_input(picture(blue=3))], wanted)
    outputs = answer.get_response()["outputs"]
    assert [(output["name"], "data" in output) for output in outputs] == [("detections", True), ("scores", False)]
    assert json.loads(answer.as_numpy("detections")[0])[0]["name"] == "three"
    nothing = await infer(client, [files_input(picture(red=0))], [InferRequestedOutput("boxes")])
    assert nothing.as_numpy("boxes").shape == (1, 0, 4)


@pytest.mark.parametrize("classes", [[1, 3], "1,3", 3])
async def test_parameters_are_the_thresholds_of_predict(client: httpx.AsyncClient, classes: Any) -> None:
    for blue, kept in ((3, 1), (2, 0)):
        answer = await infer(client, [files_input(picture(blue=blue))], parameters={"classes": classes, "imgsz": [64, 64]})
        assert answer.as_numpy("num_detections").tolist() == [kept]


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_compressed_bodies(client: httpx.AsyncClient, encoding: str, compress: Any) -> None:
    body, headers = written([files_input(picture(blue=1))])
    response = await client.post(f"{FAKE}/infer", content=compress(body), headers=headers | {"content-encoding": encoding})
    assert read(response).as_numpy("classes").tolist() == [[1]]
    for bad, status, sentence in (
        (compress(body)[:-9], 422, "truncated"),
        (b"garbage", 422, "as its Content-Encoding says"),
        (compress(bytes(int(LIMITS.max_body_mb * 1e6) + 1)), 413, "0.5 MB"),
    ):
        response = await client.post(f"{FAKE}/infer", content=bad, headers={"content-encoding": encoding})
        assert response.status_code == status and sentence in response.json()["error"]


async def test_bodies_are_decompressed_beside_the_event_loop(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, threads = kserve._decompressed, list[threading.Thread]()

    def noting(*arguments: Any) -> bytes:
        threads.append(threading.current_thread())
        return plain(*arguments)

    monkeypatch.setattr(kserve, "_decompressed", noting)
    await infer(client, [files_input(picture(), binary=False)])
    assert threads and threading.current_thread() not in threads


async def test_a_time_out_and_a_priority_are_the_requests_terms(client: httpx.AsyncClient) -> None:
    for priority in (0, 1):
        body, headers = written([files_input(picture())], timeout=1, priority=priority)
        response = await client.post(f"{FAKE}/infer", content=body, headers=headers)
        assert response.status_code == 504 and "time ran out" in response.json()["error"]
    for level in (1, 2, 3, 99):
        assert (await infer(client, [files_input(picture(blue=1))], priority=level)).as_numpy("classes").tolist() == [[1]]


async def test_statistics_count_what_was_answered(api: FastAPI, fleet: OneDetectorFleet) -> None:
    from deploy.api import create_api

    fresh = create_api(fleet, LIMITS)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(fresh), base_url="http://fleet") as client:
        (before,) = (await client.get("/v2/models/stats")).json()["model_stats"]
        assert (before["inference_count"], before["last_inference"], before["batch_stats"]) == (0, 0, [])
        await infer(client, [images_input(np.zeros((3, 3, 8, 8), np.float32))])
        await infer(client, [files_input(picture())])
        await client.post("/predict", files={"file": picture()})  # the other dialects count as well
        body, headers = written([files_input(b"no image")])
        assert (await client.post(f"{FAKE}/infer", content=body, headers=headers)).status_code == 400
        (stats,) = (await client.get(f"{FAKE}/stats")).json()["model_stats"]
        assert (stats["name"], stats["version"], stats["inference_count"], stats["execution_count"]) == ("fake", "1", 5, 3)
        counts = {name: duration["count"] for name, duration in stats["inference_stats"].items()}
        stages = {"queue": 3, "compute_input": 3, "compute_infer": 3, "compute_output": 3}
        assert counts == {"success": 3, "fail": 1, **stages, "cache_hit": 0}
        assert stats["inference_stats"]["success"]["ns"] > stats["inference_stats"]["compute_infer"]["ns"] > 0
        sizes = {batch["batch_size"]: batch["compute_infer"]["count"] for batch in stats["batch_stats"]}
        assert sizes == {1: 2, 3: 1}
        assert (await client.post("/predict", files={"file": picture()}, data={"model": "nope"})).status_code == 404
        assert [each["name"] for each in (await client.get("/v2/models/stats")).json()["model_stats"]] == ["fake"]


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "images", "datatype": "FP32", "shape": [1, 3, 1, 1], "data": [0, 0.5, 1]} | changes


def encoded(*files: bytes, **changes: Any) -> dict[str, Any]:
    data = [base64.b64encode(file).decode() for file in files]
    return {"name": "encoded_images", "datatype": "BYTES", "shape": [len(files)], "data": data} | changes


BAD_REQUESTS: dict[str, tuple[Any, int, str]] = {
    "not JSON": (b"{", 422, "Invalid JSON"),
    "empty": (b"", 422, "Invalid JSON"),
    "a list": ([], 422, "not readable"),
    "no inputs": ({"inputs": []}, 422, "inputs"),
    "two inputs": ({"inputs": [tensor(), tensor()]}, 422, "Send one input"),
    "unknown input": ({"inputs": [tensor(name="input0")]}, 422, "Send one input"),
    "no data": ({"inputs": [tensor(data=None)]}, 422, "has no data"),
    "another type": ({"inputs": [tensor(datatype="FP16")]}, 422, "FP16: send FP32"),
    "too few numbers": ({"inputs": [tensor(shape=[1, 3, 2, 2])]}, 422, "has 3 elements"),
    "negative": ({"inputs": [tensor(shape=[-1, 3, 1, 1])]}, 422, "inputs.0.shape.0"),
    "no images": ({"inputs": [tensor(shape=[0, 3, 1, 1], data=[])]}, 422, "inputs.0.shape.0"),
    "huge": ({"inputs": [tensor(shape=[2**31 - 1] * 8)]}, 422, "elements"),
    "beyond huge": ({"inputs": [tensor(shape=[10**400])]}, 422, "inputs.0.shape.0"),
    "many dimensions": ({"inputs": [tensor(shape=[1] * 99)]}, 422, "inputs.0.shape"),
    "fractional": ({"inputs": [tensor(shape=[1.5, 3, 1, 1])]}, 422, "inputs.0.shape.0"),
    "flat": ({"inputs": [tensor(shape=[3])]}, 422, "[batch, 3, height, width]"),
    "one channel": ({"inputs": [tensor(shape=[1, 1, 1, 3])]}, 422, "[batch, 3, height, width]"),
    "words": ({"inputs": [tensor(data=["a", "b", "c"])]}, 422, "has to be numbers"),
    "nothing": ({"inputs": [tensor(data=[None, 0, 0])]}, 422, "has to be numbers"),
    "a number beyond all": ({"inputs": [tensor(data=[10**400, 0, 0])]}, 422, "no FP32 can hold"),
    "NaN as JSON": ({"inputs": [tensor(data=[math.nan, 0, 0])]}, 422, "NaN or infinity"),
    "too many images": ({"inputs": [tensor(shape=[5, 3, 1, 1], data=[0] * 15)]}, 422, "at most 4"),
    "images as BYTES": ({"inputs": [encoded(b"", name="images")]}, 422, "send FP32"),
    "files as FP32": ({"inputs": [tensor(name="encoded_images")]}, 422, "send BYTES"),
    "thresholds for a tensor": ({"inputs": [tensor()], "parameters": {"conf": 0.5}}, 422, "no effect on raw outputs"),
    "shared memory": ({"inputs": [tensor(parameters={"shared_memory_region": "x"})]}, 422, "shared_memory_region"),
    "binary without bytes": ({"inputs": [tensor(data=None, parameters={"binary_data_size": 12})]}, 422, "0 bytes are left"),
    "data twice": ({"inputs": [tensor(parameters={"binary_data_size": 0})]}, 422, "send one of them"),
    "unknown output": ({"inputs": [tensor()], "outputs": [{"name": "boxes"}]}, 422, "ask for output0"),
    "classification": (
        {"inputs": [tensor()], "outputs": [{"name": "output0", "parameters": {"classification": 3}}]},
        422,
        "classification' is not supported",
    ),
    "unknown parameter": ({"inputs": [encoded(picture())], "parameters": {"sequence_id": 3}}, 422, "sequence_id"),
    "conf": ({"inputs": [encoded(picture())], "parameters": {"conf": 2}}, 422, "'conf'"),
    "imgsz": ({"inputs": [encoded(picture())], "parameters": {"imgsz": 7}}, 422, "imgsz"),
    "timeout": ({"inputs": [encoded(picture())], "parameters": {"timeout": 10**400}}, 422, "timeout"),
    "not base64": ({"inputs": [encoded(picture(), data=["http://169.254.169.254/"])]}, 422, "image 1: in JSON an image"),
    "files nested": ({"inputs": [encoded(picture(), data=[["aGk="]])]}, 422, "flat list of strings"),
    "no file": ({"inputs": [encoded(b"hello")]}, 400, "not an image"),
    "second file": ({"inputs": [encoded(picture(), b"hello")]}, 400, "image 2: "),
    "a pickle": ({"inputs": [encoded(b"\x80\x04\x95N.")]}, 400, "not an image"),
    "many files": ({"inputs": [encoded(*[b""] * 5)]}, 422, "at most 4"),
    "a million files": ({"inputs": [encoded(b"", shape=[1_000_000])]}, 422, "more than 10000"),
    "a defect": ({"inputs": [encoded(picture(blue=77))]}, 500, "Internal error"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
async def test_bad_input_gets_a_sentence_in_tritons_shape(client: httpx.AsyncClient, case: str) -> None:
    body, status, sentence = BAD_REQUESTS[case]
    content = body if isinstance(body, bytes) else json.dumps(body)
    response = await client.post(f"{FAKE}/infer", content=content)
    assert response.status_code == status and sentence in response.json()["error"]


@pytest.mark.parametrize("length", ["-1", "9999", "x", "1_0", "9" * 5000, ""])
async def test_a_header_length_that_cannot_be(client: httpx.AsyncClient, length: str) -> None:
    body, _ = written([files_input(picture())])
    response = await client.post(f"{FAKE}/infer", content=body, headers={HEADER_LENGTH: length})
    assert response.status_code == 422 and HEADER_LENGTH in response.json()["error"]


@pytest.mark.parametrize(("extra", "sentence"), [(b"x", "1 bytes follow"), (None, "bytes are left")])
async def test_bytes_that_are_too_many_or_too_few(client: httpx.AsyncClient, extra: bytes | None, sentence: str) -> None:
    body, headers = written([images_input(np.zeros((1, 3, 2, 2), np.float32))])
    response = await client.post(f"{FAKE}/infer", content=body + extra if extra else body[:-1], headers=headers)
    assert response.status_code == 422 and sentence in response.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "sentence"),
    [
        ("GET", "/v2/models/nope", 404, "served are fake"),
        ("GET", "/v2/models/nope/ready", 404, "served are fake"),
        ("GET", "/v2/models/nope/config", 404, "served are fake"),
        ("GET", "/v2/models/nope/stats", 404, "served are fake"),
        ("POST", "/v2/models/nope/infer", 404, "served are fake"),
        ("POST", "/v2/models/fake/versions/2/infer", 404, "the one version is '1'"),
        ("GET", "/v2/models/fake/versions/2", 404, "the one version is '1'"),
        ("POST", "/v2/repository/models/fake/load", 422, "configuration"),
        ("POST", "/v2/repository/models/nope/unload", 404, "served are fake"),
        ("GET", "/v2/nope", 404, "/docs"),
        ("DELETE", "/v2", 405, "/docs"),
    ],
)
async def test_wrong_paths_are_in_tritons_shape(
    client: httpx.AsyncClient, method: str, path: str, status: int, sentence: str
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status and sentence in response.json()["error"]


async def test_a_body_beyond_the_limit(client: httpx.AsyncClient) -> None:
    response = await client.post(f"{FAKE}/infer", content=bytes(600_000))
    assert response.status_code == 413 and "0.5 MB" in response.json()["error"]


def test_oriented_boxes_and_classes_without_boxes() -> None:
    corners = Points((0.0, 2.0, 2.0, 0.0), (0.0, 0.0, 1.0, 1.0))
    oriented = ImageResult(4, 4, "obb", (Detection(0, "ship", 0.5, corners=corners),))
    assert _ready_tensors([oriented])["corners"].values.tolist() == [[[[0, 0], [2, 0], [2, 1], [0, 1]]]]
    classified = ImageResult(4, 4, "classify", (Detection(7, "cat", 0.5), Detection(1, "dog", 0.25)))
    tensors = _ready_tensors([classified, oriented])
    assert tensors["classes"].values.tolist() == [[7, 1], [0, -1]]


SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(st.data(), SHAPES, st.booleans())
def test_what_tritonclient_writes_is_read_and_what_is_written_it_reads(
    data: st.DataObject, shape: list[int], binary: bool
) -> None:
    size = math.prod(shape)
    floats = data.draw(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=size, max_size=size))
    texts = data.draw(st.lists(st.text(), min_size=size, max_size=size))
    numbers = np.array(floats, np.float32).reshape(shape)
    files = np.array([text.encode() for text in texts] + [None], dtype=object)[:-1].reshape(shape)
    inputs = [
        InferInput("a", shape, "FP32").set_data_from_numpy(numbers, binary_data=binary),
        InferInput("b", shape, "BYTES").set_data_from_numpy(files, binary_data=binary),
    ]
    body, headers = written(inputs, request_id="é")
    asked = read_request(body, headers.get(HEADER_LENGTH))
    assert [(tensor.name, tensor.datatype, tensor.from_json) for tensor in asked.inputs] == [
        ("a", "FP32", not binary),
        ("b", "BYTES", not binary),
    ]
    for found, expected in zip(asked.inputs, (numbers, files), strict=True):
        np.testing.assert_array_equal(found.values, expected)
    back, length = write_response({"id": asked.id}, asked.inputs, ["a", "b"] if binary else ["b"])
    answer = InferenceServerClient.parse_response_body(back, header_length=length)
    assert answer.get_response()["id"] == "é"
    np.testing.assert_array_equal(answer.as_numpy("a"), numbers)
    np.testing.assert_array_equal(answer.as_numpy("b"), files)


def test_integers_and_empty_tables_are_written_as_tritonclient_reads_them() -> None:
    tensors = [Tensor("n", "INT32", np.array([1, -2], np.int64)), Tensor("e", "FP32", np.zeros((2, 0, 4), np.float32))]
    for binary in ([], ["n", "e"]):
        back, length = write_response({}, [*tensors, Tensor("s", "BYTES", strings([]))], binary)
        answer = InferenceServerClient.parse_response_body(back, header_length=length)
        assert answer.as_numpy("n").tolist() == [1, -2] and answer.as_numpy("e").shape == (2, 0, 4)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
INPUT = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["images", "encoded_images"]) | JSON,
        "datatype": st.sampled_from(["FP32", "BYTES", "INT64"]) | JSON,
        "shape": st.lists(st.integers(1, 4) | st.integers(), max_size=5) | JSON,
    },
    optional={
        "data": st.lists(JSON | st.floats() | st.text(), max_size=24) | JSON,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-2, 64) | JSON}) | JSON,
    },
)
REQUEST = st.fixed_dictionaries(
    {"inputs": st.lists(INPUT, max_size=2) | JSON},
    optional={
        "id": JSON,
        "outputs": st.lists(st.fixed_dictionaries({"name": st.just("output0") | JSON}, optional={"parameters": JSON})) | JSON,
        "parameters": st.dictionaries(st.sampled_from(["conf", "imgsz", "classes", "timeout", "max_det"]), JSON) | JSON,
    },
)


@given(REQUEST, st.binary(max_size=80), st.none() | st.integers(-3, 3))
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_no_request_makes_the_parser_fail_otherwise(request: Any, tail: bytes, off: int | None) -> None:
    text = json.dumps(request).encode()
    try:
        asked = read_request(text + tail, None if off is None else str(len(text) + off))
    except BadRequest as error:
        assert error.message
    else:
        assert asked.inputs


@given(st.lists(st.tuples(REQUEST, st.binary(max_size=80)), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
async def test_no_request_is_a_500(api: FastAPI, requests: list[tuple[Any, bytes]]) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://fleet") as client:
        for request, tail in requests:
            text = json.dumps(request).encode()
            response = await client.post(f"{FAKE}/infer", content=text + tail, headers={HEADER_LENGTH: str(len(text))})
            assert response.status_code < 500 and (response.status_code == 200 or response.json()["error"])
