"""Ultralytics' dialect over ASGI: pictures, lines, videos, HUB's and the Platform's addresses, and garbage."""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.detector import Detector
from actors.fake_model import FakeModel
from actors.images import decode_image
from actors.schemas import Answer, PredictParams, Terms
from actors.settings import ImageLimits, ModelSettings
from deploy.api import create_api
from deploy.api.forms import MAX_VID_STRIDE
from deploy.settings import HttpLimits
from tests.conftest import picture, video
from tests.http.conftest import LIMITS, OneDetectorFleet

LINES = {"accept": "application/x-ndjson"}
PICTURE = {"accept": "image/jpeg"}


def upload(*files: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", (f"{number}.bin", data)) for number, data in enumerate(files)]


def parsed(body: bytes) -> list[dict[str, Any]]:
    assert body.endswith(b"\n")
    return [json.loads(line) for line in body.splitlines()]


@pytest.fixture
def clip(tmp_path: Path) -> bytes:
    """Eleven frames of which each is bluer than the one before."""
    return video(tmp_path / "clip.mp4", frames=11)


async def test_the_file_of_a_large_photo_is_not_written_to_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    written = list[SpooledTemporaryFile[bytes]]()
    monkeypatch.setattr(SpooledTemporaryFile, "rollover", written.append)
    detector = Detector(lambda: FakeModel(ModelSettings(name="fake", weights="fake:")), ImageLimits())
    api = create_api(OneDetectorFleet(detector), HttpLimits())
    large = picture() + bytes(4_000_000)  # what follows a PNG's end is passed over
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://fleet") as client:
        answer = await client.post("/predict", files=upload(large))
    detector.close()
    assert (answer.status_code, written) == (200, [])


# -- pictures --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accept", ["image/jpeg", "image/*", "application/json;q=0.5, image/jpeg", "text/html, image/jpeg"])
async def test_the_picture_is_a_jpeg_of_the_images_size_with_the_box_in_it(client: httpx.AsyncClient, accept: str) -> None:
    response = await client.post("/predict", files=upload(picture(160, 120)), headers={"accept": accept})
    assert (response.status_code, response.headers["content-type"]) == (200, "image/jpeg")
    drawn = decode_image(response.content, ImageLimits())
    assert drawn.shape == (120, 160, 3)
    plain = decode_image(picture(160, 120), ImageLimits())
    assert abs(drawn[30, 60:100].astype(int) - plain[30, 60:100]).max() > 40, "the upper edge of the box"
    assert abs(drawn[110, 5].astype(int) - plain[110, 5]).max() < 10, "far from it"
    assert response.headers["x-replica"] == "here" and "infer;dur=" in response.headers["server-timing"]


async def test_a_picture_is_of_one_image(client: httpx.AsyncClient, clip: bytes) -> None:
    for files in (upload(picture(), picture()), upload(clip)):
        response = await client.post("/predict", files=files, headers=PICTURE)
        assert response.status_code == 422
        assert "send one image" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "accept",
    ["*/*", "application/json", "text/html,*/*;q=0.8", "image/jpeg;q=0.1, */*", "text/csv", "image/jpeg;q=x, */*", ""],
)
async def test_whoever_asks_for_nothing_special_gets_json(client: httpx.AsyncClient, accept: str) -> None:
    response = await client.post("/predict", files=upload(picture()), headers={"accept": accept})
    assert response.json()["metadata"]["imageCount"] == 1


# -- lines -----------------------------------------------------------------------------------------------------------------


async def test_lines_say_whose_they_are_and_equal_the_json_answer(client: httpx.AsyncClient) -> None:
    files = upload(*(picture(blue=blue) for blue in (3, 1, 2)))
    response = await client.post("/predict", files=files, headers=LINES)
    assert response.headers["content-type"].startswith("application/x-ndjson")
    found = {line.pop("index"): line for line in parsed(response.content)}
    assert [found[index].pop("file") for index in range(3)] == ["0.bin", "1.bin", "2.bin"]
    together = (await client.post("/predict", files=files)).json()["images"]
    for index, image in enumerate(together):
        assert (found[index]["results"], found[index]["shape"]) == (image["results"], image["shape"])


async def test_an_error_is_a_line_and_the_rest_goes_on(client: httpx.AsyncClient) -> None:
    files = upload(picture(), b"nonsense", picture(blue=77), picture(blue=1))
    response = await client.post("/predict", files=files, headers=LINES | {"x-request-id": "r1"})
    assert response.status_code == 200
    found = {line["index"]: line for line in parsed(response.content)}
    assert found[0]["results"] and found[3]["results"]
    assert found[1]["error"]["code"] == "bad_image" and found[1]["file"] == "1.bin"
    assert found[2]["error"] == {
        "code": "internal",
        "message": "Internal error; the server's log has the details under this request id",
        "request_id": "r1",
    }


async def test_what_is_wrong_with_the_request_itself_is_no_line(client: httpx.AsyncClient) -> None:
    for fields, status in (({"model": "nope"}, 404), ({"conf": "2"}, 422)):
        response = await client.post("/predict", files=upload(picture()), data=fields, headers=LINES)
        assert response.status_code == status and set(response.json()) == {"error"}


class GatedFleet(OneDetectorFleet):
    """Holds each image back until its gate is opened; the gate is named by the image's mean blue."""

    def __init__(self, inner: OneDetectorFleet) -> None:
        super().__init__(inner._detector)
        self.gates: dict[int, asyncio.Event] = {}
        self.begun: list[int] = []
        self.cancelled: list[int] = []

    async def detect(
        self, model: str | None, image: bytes, params: PredictParams, terms: Terms, *, annotate: bool = False
    ) -> Answer:
        gate = int(decode_image(image, ImageLimits())[..., 0].mean())
        self.begun.append(gate)
        try:
            await self.gates.setdefault(gate, asyncio.Event()).wait()
        except asyncio.CancelledError:
            self.cancelled.append(gate)
            raise
        return await super().detect(model, image, params, terms, annotate=annotate)

    async def frames(
        self, model: str | None, video: bytes, params: PredictParams, terms: Terms, stride: int = 1
    ) -> AsyncGenerator[Answer, None]:
        try:
            number = 0
            async for answer in super().frames(model, video, params, terms, stride):
                number += 1
                self.begun.append(number)
                await self.gates.setdefault(number, asyncio.Event()).wait()
                yield answer
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(number)
            raise


class OpenRequest:
    """A request whose answer is read piece by piece, which httpx's transport for ASGI cannot."""

    def __init__(self, api: FastAPI, files: list[tuple[str, tuple[str, bytes]]]) -> None:
        request = httpx.Request("POST", "http://fleet/predict", files=files, headers=LINES)
        self._body = request.read()
        headers = [(name.lower(), value) for name, value in request.headers.raw]
        self._scope: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST"}
        self._scope |= {"path": "/predict", "raw_path": b"/predict", "root_path": "", "query_string": b""}
        self._scope |= {"headers": headers, "scheme": "http"}
        self._sent: asyncio.Queue[Any] = asyncio.Queue()
        self._gone = asyncio.Event()
        self._read = False
        self.task = asyncio.create_task(api(self._scope, self._receive, self._sent.put))

    async def _receive(self) -> dict[str, Any]:
        if not self._read:
            self._read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def line(self) -> dict[str, Any]:
        while True:
            message = await asyncio.wait_for(self._sent.get(), 20)
            if message.get("body"):
                (line,) = parsed(message["body"])
                return line

    def hang_up(self) -> None:
        self._gone.set()


@asynccontextmanager
async def open_request(fleet: GatedFleet, *files: bytes) -> AsyncIterator[OpenRequest]:
    request = OpenRequest(create_api(fleet, LIMITS), upload(*files))
    try:
        yield request
    finally:
        request.hang_up()
        await asyncio.wait_for(asyncio.gather(request.task, return_exceptions=True), 20)


async def test_each_line_comes_as_soon_as_it_is_done(fleet: OneDetectorFleet) -> None:
    gated = GatedFleet(fleet)
    for gate in (1, 2, 3):
        gated.gates[gate] = asyncio.Event()
    async with open_request(gated, *(picture(blue=blue) for blue in (1, 2, 3))) as request:
        for gate in (2, 3, 1):
            gated.gates[gate].set()
            assert (await request.line())["index"] == gate - 1
        await asyncio.wait_for(request.task, 20)
    assert gated.cancelled == []


async def test_a_client_that_goes_cancels_what_it_has_not_got(fleet: OneDetectorFleet) -> None:
    gated = GatedFleet(fleet)
    gated.gates[1] = asyncio.Event()
    gated.gates[1].set()
    async with open_request(gated, *(picture(blue=blue) for blue in (1, 2, 3))) as request:
        assert (await request.line())["index"] == 0
        assert gated.cancelled == []
        request.hang_up()
        await asyncio.wait_for(request.task, 20)
        assert sorted(gated.cancelled) == [2, 3]


async def test_a_client_that_goes_ends_its_video_too(fleet: OneDetectorFleet, clip: bytes) -> None:
    gated = GatedFleet(fleet)
    for gate in (1, 2):
        gated.gates.setdefault(gate, asyncio.Event()).set()
    async with open_request(gated, clip) as request:
        assert [(await request.line())["frame"] for _ in range(2)] == [1, 2]
        while gated.begun != [1, 2, 3]:
            await asyncio.sleep(0.01)
        request.hang_up()
        await asyncio.wait_for(request.task, 20)
    assert gated.cancelled == [3] and gated.begun == [1, 2, 3]


async def test_past_the_deadline_each_line_says_so(fleet: OneDetectorFleet) -> None:
    class Late(OneDetectorFleet):
        async def detect(
            self, model: str | None, image: bytes, params: PredictParams, terms: Terms, *, annotate: bool = False
        ) -> Answer:
            await asyncio.sleep(0.05)
            return await super().detect(model, image, params, terms, annotate=annotate)

    transport = httpx.ASGITransport(create_api(Late(fleet._detector), LIMITS))
    async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as late:
        response = await late.post(
            "/predict", files=upload(picture(), picture()), headers=LINES | {"x-request-timeout-ms": "20"}
        )
    assert [line["error"]["code"] for line in parsed(response.content)] == ["deadline_exceeded"] * 2


# -- videos ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 3])
async def test_a_video_is_answered_frame_by_frame(client: httpx.AsyncClient, clip: bytes, stride: int) -> None:
    fields = {"vid_stride": str(stride)}
    answer = (await client.post("/predict", files=upload(clip), data=fields)).json()
    expected = list(range(stride, 12, stride))
    assert [image["frame"] for image in answer["images"]] == expected
    assert answer["metadata"]["imageCount"] == len(expected)
    # each frame is 10 bluer than the one before, which FakeModel's class follows, give or take the codec
    lines = parsed((await client.post("/predict", files=upload(clip), data=fields, headers=LINES)).content)
    assert [line["frame"] for line in lines] == expected
    assert [line["results"] for line in lines] == [image["results"] for image in answer["images"]]
    assert {line["index"] for line in lines} == {0} and all(line["shape"] == [48, 64] for line in lines)


async def test_images_and_videos_keep_their_order_in_one_request(client: httpx.AsyncClient, clip: bytes) -> None:
    answer = (await client.post("/predict", files=upload(picture(blue=3), clip, picture(blue=1)))).json()
    assert [image.get("frame") for image in answer["images"]] == [None, *range(1, 12), None]
    assert [answer["images"][at]["results"][0]["class"] for at in (0, -1)] == [3, 1]


async def test_a_video_in_base64(client: httpx.AsyncClient, clip: bytes) -> None:
    source = "data:video/mp4;base64," + base64.b64encode(clip).decode()
    answer = (await client.post("/predict", data={"source": source, "vid_stride": "5"})).json()
    assert [image["frame"] for image in answer["images"]] == [5, 10]


async def test_videos_at_fault_get_a_sentence(client: httpx.AsyncClient, clip: bytes, tmp_path: Path) -> None:
    long = video(tmp_path / "long.mp4", frames=21)
    for data, status, sentence in (
        (clip[:-20], 400, "truncated"),
        (long, 413, "vid_stride"),
        (video(tmp_path / "wide.mp4", width=1000, height=120), 413, "1000x120"),
    ):
        response = await client.post("/predict", files=upload(data))
        assert response.status_code == status and sentence in response.json()["error"]["message"]
        (line,) = parsed((await client.post("/predict", files=upload(data), headers=LINES)).content)
        assert sentence in line["error"]["message"]
    response = await client.post("/predict", files=upload(picture(), clip[:-20]))
    assert response.json()["error"]["message"].startswith("file 2 (1.bin): ")
    assert len((await client.post("/predict", files=upload(long), data={"vid_stride": "2"})).json()["images"]) == 10


# -- Ultralytics HUB's old addresses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/", "https://hub.ultralytics.com/models/fake"),
        ("/", "fake"),
        ("/", None),
        ("/v1/predict/fake", None),
        ("/predict", "ul://me/project/fake"),
    ],
)
async def test_hub_clients_need_another_address_only(client: httpx.AsyncClient, path: str, model: str | None) -> None:
    data = {"imgsz": "640", "conf": "0.25", "iou": "0.45"} | ({"model": model} if model else {})
    response = await client.post(path, headers={"x-api-key": "any"}, data=data, files={"file": picture()})
    answer = response.json()
    assert response.status_code == 200, answer
    assert set(answer["images"][0]) == {"shape", "speed", "results"} and answer["metadata"]["model"] == "fake"


@pytest.mark.parametrize(
    ("path", "iou"), [("/", 0.45), ("/v1/predict/fake", 0.45), ("/predict", 0.7), ("/api/models/fake/predict", 0.7)]
)
async def test_iou_is_each_services_own_where_it_is_left_out(fleet: OneDetectorFleet, path: str, iou: float) -> None:
    asked = []

    class Listening(OneDetectorFleet):
        async def detect(
            self, model: str | None, image: bytes, params: PredictParams, terms: Terms, *, annotate: bool = False
        ) -> Answer:
            asked.append(params)
            return await super().detect(model, image, params, terms, annotate=annotate)

    transport = httpx.ASGITransport(create_api(Listening(fleet._detector), LIMITS))
    async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
        await client.post(path, files=upload(picture()), data={"agnostic_nms": "true"})
    assert asked == [PredictParams(iou=iou, agnostic_nms=True)]


# -- Ultralytics Platform's routes -----------------------------------------------------------------------------------------


async def test_the_platforms_errors_are_sentences(client: httpx.AsyncClient) -> None:
    for path, files, status, sentence in (
        ("/api/models/me/project/nope/predict", upload(picture()), 404, "served are fake"),
        ("/api/deployments/me/fake/predict", upload(b"hello"), 400, "not an image"),
        ("/api/models/fake/predict", None, 422, "at least one image"),
        ("/api/datasets/me", None, 404, "/docs"),
    ):
        response = await client.post(path, files=files)
        answer = response.json()
        assert response.status_code == status and sentence in answer["error"]
        assert answer["request_id"] == response.headers["x-request-id"]


async def test_a_model_tells_the_platforms_client_what_it_is(client: httpx.AsyncClient) -> None:
    answer = (await client.get("/api/models/me/project/fake")).json()
    assert answer["isOwner"] and answer["model"]["model"] == "fake" and answer["model"]["task"] == "detect"
    assert answer["model"]["classNames"] == ["zero", "one", "two", "three"]
    assert (await client.get("/api/models/me/project/nope")).status_code == 404


# -- garbage ---------------------------------------------------------------------------------------------------------------

FIELDS = ["source", "model", "conf", "iou", "imgsz", "classes", "max_det", "agnostic_nms", "vid_stride", "normalize"]
FIELDS += ["decimals", "bits", "file", "unknown"]
VALUES = st.one_of(
    st.text(max_size=20),
    st.floats().map(str),
    st.integers().map(str),
    st.integers(0, 5000).map(lambda digits: "9" * digits),
    st.lists(st.integers(), max_size=4).map(str),
)
PATHS = ["/predict", "/", "/v1/predict/fake", "/api/models/fake/predict", "/api/models/a/b/fake/predict"]
PATHS += ["/api/deployments/a/fake/predict"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(PATHS),
    fields=st.dictionaries(st.sampled_from(FIELDS), st.one_of(VALUES, st.lists(VALUES, max_size=3)), max_size=5),
    with_file=st.booleans(),
    accept=st.one_of(st.sampled_from(["*/*", "image/jpeg", "application/x-ndjson"]), st.text("aq/*;=,.x-1 ", max_size=12)),
)
async def test_no_field_can_break_the_server(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], with_file: bool, accept: str
) -> None:
    files = upload(picture()) if with_file else None
    response = await client.post(path, data=fields, files=files, headers={"accept": accept})
    assert response.status_code in (200, 400, 404, 413, 422), response.text
    if response.status_code != 200:
        assert "error" in response.json()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(PATHS),
    body=st.one_of(st.binary(max_size=300), st.binary(max_size=100).map(lambda middle: b"--x\r\n" + middle + b"\r\n--x--")),
    kind=st.sampled_from(
        [
            "multipart/form-data; boundary=x",
            "multipart/form-data",
            "application/x-www-form-urlencoded",
            "application/json",
            "?",
        ]
    ),
)
async def test_no_body_can_break_the_server(client: httpx.AsyncClient, path: str, body: bytes, kind: str) -> None:
    response = await client.post(path, content=body, headers={"content-type": kind})
    assert 400 <= response.status_code < 500, response.text
    assert "error" in response.json()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"vid_stride": "0"}, "vid_stride"),
        ({"vid_stride": str(MAX_VID_STRIDE + 1)}, "vid_stride"),
        ({"agnostic_nms": "perhaps"}, "agnostic_nms"),
        ({"bits": "9"}, "Unknown field 'bits'"),
    ],
)
async def test_fields_out_of_range_are_named(client: httpx.AsyncClient, fields: dict[str, str], sentence: str) -> None:
    response = await client.post("/predict", files=upload(picture()), data=fields)
    assert response.status_code == 422 and sentence in response.json()["error"]["message"]
