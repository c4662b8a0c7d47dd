"""Roboflow's dialect over ASGI, without Ray, and its conversions on results made by hand."""

import asyncio
import base64
import json
import pickle
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import BadRequest
from actors.schemas import Answer, Detection, ImageResult, ModelInfo, Points, PredictParams, Task, Timing
from deploy.api import create_api
from deploy.api.roboflow import IGNORED, PATHS, InferRequest, LegacyQuery, class_ids, inference_answer, load_source, model_name
from tests.conftest import picture
from tests.http.conftest import LIMITS, OneDetectorFleet

DETECT = PATHS["detect"]


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def image(data: bytes) -> dict[str, str]:
    return {"type": "base64", "value": encoded(data)}


def body(*images: bytes, **fields: Any) -> dict[str, Any]:
    """What the client posts: one image as an object, several as a list."""
    made = [image(data) for data in images]
    return {"api_key": "x", "model_id": "fake/1", "image": made[0] if len(made) == 1 else made} | fields


def without_ids(prediction: dict[str, Any]) -> dict[str, Any]:
    assert len(prediction["detection_id"]) == 36
    return {key: value for key, value in prediction.items() if key != "detection_id"}


async def test_one_image_gets_centre_based_boxes(client: httpx.AsyncClient) -> None:
    response = await client.post(DETECT, json=body(picture(64, 48, blue=2)))
    answer = response.json()
    assert response.status_code == 200
    assert set(answer) == {"inference_id", "time", "image", "predictions"}
    assert answer["image"] == {"width": 64, "height": 48} and answer["time"] > 0
    (found,) = answer["predictions"]
    expected = {"x": 32, "y": 24, "width": 32, "height": 24, "confidence": pytest.approx(200 / 255)}
    assert without_ids(found) == expected | {"class": "two", "class_id": 2}
    assert response.headers["x-replica"] == "here" and "infer;dur=" in response.headers["server-timing"]


async def test_a_list_is_answered_with_a_list_in_its_order(client: httpx.AsyncClient) -> None:
    response = await client.post(DETECT, json=body(*(picture(blue=blue) for blue in (3, 1, 2))))
    assert [answer["predictions"][0]["class_id"] for answer in response.json()] == [3, 1, 2]
    response = await client.post(DETECT, json=body() | {"image": [image(picture(blue=1))]})
    assert [answer["predictions"][0]["class_id"] for answer in response.json()] == [1]


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, True),
        ({"confidence": 0.8}, False),
        ({"confidence": 0.7}, True),
        ({"confidence": "default"}, True),
        ({"confidence": None, "iou_threshold": None}, True),
        ({"class_filter": ["zero", "three"]}, True),
        ({"class_filter": ["one"]}, False),
        ({"class_filter": []}, False),
        ({"max_candidates": 3000, "mask_decode_mode": "accurate", "tradeoff_factor": 0}, True),
        ({"visualization_stroke_width": 5, "source": "app", "fix_batch_size": True}, True),
        ({"made_up_switch": False, "made_up_value": None}, True),
    ],
)
async def test_thresholds_and_what_changes_no_answer(client: httpx.AsyncClient, fields: dict[str, Any], found: bool) -> None:
    response = await client.post(DETECT, json=body(picture(), **fields))
    assert response.status_code == 200, response.text
    assert bool(response.json()["predictions"]) is found


async def test_defaults_are_roboflows(client: httpx.AsyncClient) -> None:
    for red, found in ((104, True), (100, False)):  # confidences 0.408 and 0.392
        response = await client.post(DETECT, json=body(picture(red=red)))
        assert bool(response.json()["predictions"]) is found
        response = await client.post("/fake/1", content=encoded(picture(red=red)))
        assert bool(response.json()["predictions"]) is found


async def test_the_annotated_picture_comes_with_the_answer_where_it_is_asked_for(client: httpx.AsyncClient) -> None:
    for answer in (await client.post(DETECT, json=body(picture(), picture(), visualize_predictions=True))).json():
        assert base64.b64decode(answer["visualization"]).startswith(b"\xff\xd8")
        assert answer["predictions"]


BAD_BODIES: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "no image": ({"image": None}, 422, "bad_request", "image"),
    "an empty list": ({"image": []}, 422, "bad_request", "1 to 4"),
    "too many images": ({"image": [image(picture())] * 5}, 422, "bad_request", "5 images"),
    "not an object": ({"image": "abc"}, 422, "bad_request", '"type": "base64"'),
    "a list of others": ({"image": [1]}, 422, "bad_request", '"type": "base64"'),
    "no value": ({"image": {"type": "base64"}}, 422, "bad_request", '"value"'),
    "a number as value": ({"image": {"type": "base64", "value": 5}}, 422, "bad_request", "string"),
    "not base64": ({"image": {"type": "base64", "value": "/etc/passwd!"}}, 422, "bad_request", "not base64"),
    "a URL": ({"image": {"type": "url", "value": "http://169.254.169.254/"}}, 422, "bad_request", "not fetched"),
    "pickled": ({"image": {"type": "numpy", "value": "gASV"}}, 422, "bad_request", "never unpickled"),
    "a file": ({"image": {"type": "file", "value": "/etc/passwd"}}, 422, "bad_request", "'file' are not taken"),
    "no picture": ({"image": image(b"hello")}, 400, "bad_image", "not an image"),
    "one bad of two": ({"image": [image(picture()), image(b"x")]}, 400, "bad_image", "image 2: "),
    "too many pixels": ({"image": image(picture(1000, 200))}, 413, "image_too_large", "1000x200"),
    "unknown model": ({"model_id": "nope/1"}, 404, "unknown_model", "served are fake"),
    "deeper id": ({"model_id": "fake/1/2"}, 404, "unknown_model", "fake/1/2"),
    "model is a number": ({"model_id": 5}, 422, "bad_request", "model_id"),
    "confidence of 2": ({"confidence": 2}, 422, "bad_request", "confidence"),
    "confidence nan": ({"confidence": float("nan")}, 422, "bad_request", "confidence"),
    "best confidence": ({"confidence": "best"}, 422, "bad_request", "a number from 0 to 1"),
    "iou of -1": ({"iou_threshold": -1}, 422, "bad_request", "iou_threshold"),
    "no detections": ({"max_detections": 0}, 422, "bad_request", "max_detections"),
    "unknown class": ({"class_filter": ["one", "cat"]}, 422, "bad_request", "no class 'cat'"),
    "masks as RLE": ({"response_mask_format": "rle"}, 422, "bad_request", "polygons"),
    "fast masks": ({"mask_decode_mode": "fast"}, 422, "bad_request", "mask_decode_mode"),
    "no upright": ({"disable_preproc_auto_orient": True}, 422, "bad_request", "upright"),
    "a data set": ({"active_learning_target_dataset": "mine"}, 422, "bad_request", "nothing is collected"),
    "unknown field": ({"confidance": 0.5}, 422, "bad_request", "Unknown field 'confidance'"),
}


@pytest.mark.parametrize("case", BAD_BODIES)
async def test_bad_input_gets_a_sentence_where_the_client_looks_for_it(client: httpx.AsyncClient, case: str) -> None:
    fields, status, code, sentence = BAD_BODIES[case]
    content = json.dumps(body(picture(), **fields))
    response = await client.post(DETECT, content=content, headers={"content-type": "application/json"})
    answer = response.json()
    assert (response.status_code, answer["error"]["code"]) == (status, code), answer
    assert sentence in answer["message"] and answer["message"] == answer["error"]["message"]
    assert "Traceback" not in response.text and answer["error"]["request_id"] == response.headers["x-request-id"]


async def test_a_body_beyond_the_limit_is_refused_in_the_same_shape(client: httpx.AsyncClient) -> None:
    for path in (DETECT, "/fake/1"):
        response = await client.post(path, content=b"A" * 600_000)
        assert response.status_code == 413 and "0.5 MB" in response.json()["message"]


async def test_a_pickle_is_never_loaded(client: httpx.AsyncClient, tmp_path: Any) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "ran"), "w")

    value = encoded(pickle.dumps(Touch()))
    assert (await client.post(DETECT, json=body() | {"image": {"type": "numpy", "value": value}})).status_code == 422
    for content in (value, pickle.dumps(Touch())):
        response = await client.post("/fake/1", params={"image_type": "numpy"}, content=content)
        assert response.status_code == 422 and "never unpickled" in response.json()["message"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("task", ["segment", "pose", "classify"])
async def test_the_path_of_another_task_names_the_right_one(client: httpx.AsyncClient, task: str) -> None:
    response = await client.post(PATHS[task], json=body(picture()))
    assert response.status_code == 422
    assert response.json()["message"] == f"'fake' is a model of the task 'detect': send this to {DETECT}"


class TypedFleet(OneDetectorFleet):
    """Answers any task by a result made by hand."""

    def __init__(self, task: Task, result: ImageResult) -> None:
        self.task, self.result = task, result
        self.asked: PredictParams | None = None

    async def describe(self, model: str | None) -> ModelInfo:
        return ModelInfo("fake", "", "", self.task, {0: "zero", 1: "one", 2: "two"}, (64, 96), "fake", "cpu", {})

    async def detect(self, model: Any, image: bytes, params: PredictParams, terms: Any, *, annotate: bool = False) -> Answer:
        self.asked = params
        return Answer(self.result, "here", b"\xff\xd8" if annotate else None)


OUTLINE = Points((1.0, 5.0, 3.0), (2.0, 2.0, 7.0))
SKELETON = Points((1.0, 0.0, 3.0), (2.0, 0.0, 7.0), (0.9, 0.1, 0.5))
BOX = (10.0, 20.0, 40.0, 30.0)
RESULTS: dict[Task, tuple[Detection, ...]] = {
    "detect": (Detection(1, "one", 0.875, BOX, track_id=7), Detection(0, "zero", 0.5, (0.0, 0.0, 1.0, 3.0))),
    "segment": (Detection(1, "one", 0.875, BOX, segments=OUTLINE), Detection(0, "zero", 0.5, BOX, segments=Points((), ()))),
    "pose": (Detection(0, "zero", 0.875, BOX, keypoints=SKELETON),),
    "classify": (Detection(2, "two", 0.75), Detection(0, "zero", 0.25), Detection(1, "one", 0.0)),
}
CENTRED = {"x": 25.0, "y": 25.0, "width": 30.0, "height": 10.0, "confidence": 0.875}


def made(task: Task) -> ImageResult:
    return ImageResult(100, 50, task, RESULTS[task], Timing(1.0, 2.0, 4.0, 8.0, 16.0, 32.0))


def test_detections_are_converted() -> None:
    answer = inference_answer(Answer(made("detect"), "here"), PredictParams())
    assert answer["time"] == 0.058 and answer["image"] == {"width": 100, "height": 50}  # 2 + 8 + 16 + 32 ms
    one, other = answer["predictions"]
    assert without_ids(one) == CENTRED | {"class": "one", "class_id": 1, "tracker_id": 7}
    assert (other["x"], other["y"], other["width"], other["height"]) == (0.5, 1.5, 1.0, 3.0) and "tracker_id" not in other
    assert one["detection_id"] != other["detection_id"]


def test_outlines_are_converted() -> None:
    one, other = inference_answer(Answer(made("segment"), "here"), PredictParams())["predictions"]
    points = [{"x": 1.0, "y": 2.0}, {"x": 5.0, "y": 2.0}, {"x": 3.0, "y": 7.0}]
    assert without_ids(one) == CENTRED | {"class": "one", "class_id": 1, "points": points}
    assert other["points"] == []


def test_skeletons_are_converted_and_uncertain_keypoints_left_out() -> None:
    (one,) = inference_answer(Answer(made("pose"), "here"), PredictParams())["predictions"]
    first = {"x": 1.0, "y": 2.0, "confidence": 0.9, "class_id": 0, "class": "0"}
    assert without_ids(one) | {"keypoints": 3} == CENTRED | {"class": "zero", "class_id": 0, "keypoints": 3}
    assert one["keypoints"][0] == first and [point["class_id"] for point in one["keypoints"]] == [0, 1, 2]
    (one,) = inference_answer(Answer(made("pose"), "here"), PredictParams(), 0.5)["predictions"]
    assert [point["class_id"] for point in one["keypoints"]] == [0, 2]


@pytest.mark.parametrize(
    ("params", "kept", "top", "confidence"),
    [
        (PredictParams(conf=0.0), [2, 0, 1], "two", 0.75),
        (PredictParams(conf=0.25), [2, 0], "two", 0.75),
        (PredictParams(conf=0.8), [], "", 0.0),
        (PredictParams(conf=0.0, classes=(0, 1)), [0, 1], "zero", 0.25),
    ],
)
def test_classifications_are_converted(params: PredictParams, kept: list[int], top: str, confidence: float) -> None:
    answer = inference_answer(Answer(made("classify"), "here"), params)
    assert [item["class_id"] for item in answer["predictions"]] == kept
    assert (answer["top"], answer["confidence"]) == (top, confidence)
    if kept:
        assert set(answer["predictions"][0]) == {"class", "class_id", "confidence"}


@pytest.mark.parametrize("task", PATHS)
async def test_every_task_has_its_path_and_the_thresholds_reach_the_model(task: Task) -> None:
    fleet = TypedFleet(task, made(task))
    fields = {
        "confidence": 0.1,
        "iou_threshold": 0.6,
        "max_detections": 7,
        "class_agnostic_nms": True,
        "class_filter": ["two"],
    }
    expected = PredictParams(conf=0.1, iou=0.6, max_det=7, agnostic_nms=True, classes=(2,))
    transport = httpx.ASGITransport(create_api(fleet, LIMITS))
    async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
        for path, json_body in ((PATHS[task], body(b"any", **fields)), (PATHS[task], body(b"any", **fields, model_id="fake"))):
            response = await client.post(path, json=json_body)
            assert response.status_code == 200, response.text
            assert len(response.json()["predictions"]) == (1 if task == "classify" else len(RESULTS[task]))
            assert fleet.asked == expected
        query: dict[str, str | float] = {"confidence": 10, "overlap": 0.6, "max_detections": 7, "classes": "two, one"}
        query["format"] = "image_and_json"
        response = await client.post("/fake/3", params=query, content=encoded(b"any"))
        assert fleet.asked == PredictParams(conf=0.1, iou=0.6, max_det=7, classes=(1, 2))
        assert {"predictions", "visualization"} < set(response.json())
        (listed,) = (await client.get("/model/registry")).json()["models"]
        assert (listed["model_id"], listed["input_height"], listed["input_width"]) == ("fake/1", 64, 96)


async def test_oriented_boxes_are_sent_elsewhere() -> None:
    transport = httpx.ASGITransport(create_api(TypedFleet("obb", made("detect")), LIMITS))
    async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
        assert "/predict" in (await client.post(DETECT, json=body(b"any"))).json()["message"]
        assert "/predict" in (await client.post("/fake/1", content=encoded(b"any"))).json()["message"]
        assert (await client.get("/model/registry")).json()["models"][0]["task_type"] == "obb"


@pytest.mark.parametrize("content_type", ["application/json", "application/x-www-form-urlencoded", "text/plain", None])
async def test_legacy_takes_base64_under_any_content_type(client: httpx.AsyncClient, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    for content in (encoded(picture(blue=1)), "data:image/png;base64," + encoded(picture(blue=1))):
        response = await client.post("/fake/1?api_key=x", content=content, headers=headers)
        assert response.json()["predictions"][0]["class"] == "one"


async def test_legacy_takes_multipart(client: httpx.AsyncClient) -> None:
    response = await client.post("/fake/1", files={"file": ("a.png", picture(blue=1))})
    assert response.json()["predictions"][0]["class"] == "one"


async def test_legacy_answers_with_the_picture(client: httpx.AsyncClient) -> None:
    response = await client.post("/fake/1", params={"format": "image"}, content=encoded(picture()))
    assert response.headers["content-type"] == "image/jpeg" and response.content.startswith(b"\xff\xd8")
    answer = (await client.post("/fake/1", params={"format": "image_and_json"}, content=encoded(picture()))).json()
    assert base64.b64decode(answer["visualization"]).startswith(b"\xff\xd8") and answer["predictions"]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("confidence=79", False),
        ("confidence=77", True),
        ("confidence=0.79", False),
        ("confidence=1", True),  # one per cent, as Roboflow has it
        ("confidence=default&overlap=50", True),
        ("classes=zero,three", True),
        ("classes=one", False),
        ("classes=", True),
        ("labels=on&stroke=5&disable_active_learning=False&allow_reduced_mask_resolution=False&made_up=False", True),
    ],
)
async def test_legacy_thresholds(client: httpx.AsyncClient, query: str, found: bool) -> None:
    response = await client.post(f"/fake/9?{query}", content=encoded(picture()))
    assert response.status_code == 200, response.text
    assert bool(response.json()["predictions"]) is found


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("image=http://example.com/a.jpg", "not fetched"),
        ("confidence=101", "confidence"),
        ("confidence=nan", "confidence"),
        ("confidence=best", "a number from 0 to 1"),
        ("classes=cat", "no class 'cat'"),
        ("format=yaml", "format"),
        ("response_mask_format=rle", "polygons"),
        ("confidance=0.5", "Unknown field 'confidance'"),
        ("image_type=url", "not fetched"),
    ],
)
async def test_legacy_refusals(client: httpx.AsyncClient, query: str, sentence: str) -> None:
    response = await client.post(f"/fake/1?{query}", content=encoded(picture()))
    assert response.status_code == 422 and sentence in response.json()["message"]


async def test_legacy_without_an_image(client: httpx.AsyncClient) -> None:
    response = await client.post("/fake/1")
    assert response.status_code == 400 and "empty" in response.json()["message"]
    response = await client.post("/fake/1", files={"image": picture()})
    assert response.status_code == 422 and "'file'" in response.json()["message"]
    response = await client.post("/fake/1", content=b"x", headers={"content-type": "multipart/form-data"})
    assert response.status_code == 400 and response.json()["message"]


async def test_legacy_hides_no_other_path(client: httpx.AsyncClient) -> None:
    for path, status in (("/nope/1", 404), ("/model/registry", 405), ("/fake/1/2", 404), ("/v2/models", 404)):
        assert (await client.post(path)).status_code == status, path
    assert (await client.get("/fake/1")).status_code == 405
    assert (await client.get("/docs/oauth2-redirect")).status_code == 200


async def test_the_registry_and_what_may_be_added(client: httpx.AsyncClient) -> None:
    entry = {"task_type": "object-detection", "batch_size": None, "input_height": 64, "input_width": 64}
    ours = {"model_id": "fake/1"} | entry
    assert (await client.get("/model/registry?api_key=x")).json() == {"models": [ours]}
    for model_id, more in (
        ("fake/1", []),
        ("fake", [{"model_id": "fake"} | entry]),
        ("fake/8", [{"model_id": "fake/8"} | entry]),
    ):
        response = await client.post("/model/add", json={"model_id": model_id, "api_key": "x"})
        assert response.json() == {"models": [ours, *more]}
    response = await client.post("/model/add", json={"model_id": "coco/3"})
    assert response.status_code == 404
    assert "served are fake" in response.json()["message"] and "not over HTTP" in response.json()["message"]
    for response in (await client.post("/model/remove", json={"model_id": "fake/1"}), await client.post("/model/clear")):
        assert response.status_code == 422 and "configuration" in response.json()["message"]


async def test_server_info(client: httpx.AsyncClient) -> None:
    assert set((await client.get("/info")).json()) == {"name", "version", "uuid"}


async def test_the_fault_of_an_image_stays_anonymous_in_this_shape_too(client: httpx.AsyncClient) -> None:
    response = await client.post(DETECT, json=body(picture(blue=77)))
    assert response.status_code == 500 and response.json()["message"].startswith("Internal error")


@pytest.mark.parametrize(
    ("model_id", "name"), [(None, None), ("a", "a"), ("a/1", "a"), ("a/b", "a"), ("a/", "a"), ("a/1/2", "a/1/2"), ("", "")]
)
def test_model_ids(model_id: str | None, name: str | None) -> None:
    assert model_name(model_id) == name


async def test_a_name_that_two_classes_share_keeps_both() -> None:
    info = ModelInfo("m", "", "", "detect", {0: "a", 1: "b", 2: "a"}, (64, 64), "fake", "cpu", {})
    assert class_ids(["a"], info) == (0, 2) and class_ids(None, info) is None and class_ids([], info) == ()


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # lone surrogates too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(sorted({*InferRequest.model_fields, *LegacyQuery.model_fields, *IGNORED}))
IMAGES = st.sampled_from([image(picture()), [image(picture())] * 2]) | st.fixed_dictionaries(
    {"type": st.sampled_from(["base64", "url", "numpy"]) | st.text(max_size=5), "value": JSON}
)


def ask(api: FastAPI, path: str, **request: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
            return await client.post(path, **request)

    return asyncio.run(send())


def assert_answered(response: httpx.Response) -> None:
    assert response.status_code == 200 or (400 <= response.status_code < 500 and response.json()["message"]), response.text


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([*PATHS.values(), "/model/add"]), st.dictionaries(FIELDS | ANY_TEXT, JSON, max_size=4), st.none() | IMAGES
)
def test_no_body_is_too_odd(api: FastAPI, path: str, fields: dict[str, Any], images: Any) -> None:
    whole = fields if images is None else fields | {"image": images}
    assert_answered(ask(api, path, content=json.dumps(whole), headers={"content-type": "application/json"}))


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(FIELDS, st.text(max_size=8) | st.floats().map(str), max_size=3), st.binary(max_size=40) | st.just(None))
def test_no_query_is_too_odd(api: FastAPI, query: dict[str, str], content: bytes | None) -> None:
    data = encoded(picture()).encode() if content is None else content
    assert_answered(ask(api, "/fake/1", params=query, content=data))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["application/json", "multipart/form-data; boundary=x; charset=odd", "\x7f"]))
def test_no_raw_body_is_too_odd(api: FastAPI, content: bytes, content_type: str) -> None:
    for path in (DETECT, "/fake/1", "/model/add"):
        assert_answered(ask(api, path, content=content, headers={"content-type": content_type}))


@given(st.binary(max_size=50))
def test_base64_is_read_back(api: FastAPI, data: bytes) -> None:
    for prefix in ("", "data:image/png;base64,"):
        assert asyncio.run(load_source(request_to(api), "base64", prefix + encoded(data))) == data


@given(st.text(max_size=12) | st.just("url"), JSON)
def test_a_source_is_bytes_or_refused(api: FastAPI, kind: str, value: Any) -> None:
    try:
        assert isinstance(asyncio.run(load_source(request_to(api), kind, value)), bytes)
    except BadRequest as error:
        assert error.message


def request_to(app: FastAPI) -> Request:
    return Request({"type": "http", "app": app, "headers": []})
