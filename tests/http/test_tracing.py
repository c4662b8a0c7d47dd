"""Traces: the client's is continued and given back; the spans tell where the time of each image went."""

import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_trace_id

from deploy.api import create_api
from tests.conftest import picture, video
from tests.http.conftest import LIMITS, OneDetectorFleet

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
FAIL = 77  # the fixture's model fails for this blue

Spans = Callable[[], list[ReadableSpan]]


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Spans:
    return lambda: list(exporter.get_finished_spans())


@pytest.fixture
async def traced(fleet: OneDetectorFleet, exporter: InMemorySpanExporter) -> AsyncIterator[httpx.AsyncClient]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    api = create_api(fleet, LIMITS, tracer=provider.get_tracer("test"))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(api, raise_app_exceptions=False), base_url="http://fleet"
    ) as made:
        yield made


def files(*blues: int) -> list[tuple[str, bytes]]:
    return [("file", picture(blue=blue)) for blue in blues]


async def test_without_a_tracer_the_clients_own_traceparent_comes_back(client: httpx.AsyncClient) -> None:
    for answer in (
        await client.post("/predict", files=files(1), headers={"traceparent": TRACEPARENT}),
        await client.post("/predict", files=files(FAIL), headers={"traceparent": TRACEPARENT}),
        await client.get("/nowhere", headers={"traceparent": TRACEPARENT}),
    ):
        assert answer.headers["traceparent"] == TRACEPARENT


@pytest.mark.parametrize("sent", ["", "00-abc-def-01", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", "x" * 1000])
async def test_a_traceparent_that_is_none_is_passed_over(client: httpx.AsyncClient, sent: str) -> None:
    answer = await client.get("/healthz", headers={"traceparent": sent})
    assert answer.status_code == 200
    assert "traceparent" not in answer.headers


async def test_a_failures_log_line_has_the_trace_id(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        answer = await client.post("/predict", files=files(FAIL), headers={"traceparent": TRACEPARENT})
    assert answer.status_code == 500
    assert f"request {answer.headers['x-request-id']} (trace {TRACE}) failed" in caplog.text


async def test_a_request_is_a_span_with_a_span_for_each_image_and_its_stages(traced: httpx.AsyncClient, spans: Spans) -> None:
    answer = await traced.post("/predict", files=files(1, 2), headers={"traceparent": TRACEPARENT})
    (server,) = (span for span in spans() if span.kind is SpanKind.SERVER)
    assert server.name == "POST /predict"
    assert server.parent and f"{server.parent.span_id:016x}" == PARENT
    assert dict(server.attributes or {}) == {
        "http.request.method": "POST",
        "url.path": "/predict",
        "http.route": "/predict",
        "http.response.status_code": 200,
    }
    assert {format_trace_id(span.context.trace_id) for span in spans() if span.context} == {TRACE}
    assert server.context and answer.headers["traceparent"] == f"00-{TRACE}-{server.context.span_id:016x}-01"

    images = [span for span in spans() if span.name == "detect"]
    assert len(images) == 2
    for image in images:
        assert image.attributes and image.context and image.start_time
        assert image.parent and image.parent.span_id == server.context.span_id
        assert (image.attributes["yolofleet.model"], image.attributes["yolofleet.replica"]) == ("fake", "here")
        assert image.attributes["yolofleet.batch_size"] in (1, 2)
        stages = [span for span in spans() if span.parent and span.parent.span_id == image.context.span_id]
        assert [stage.name for stage in stages] == ["queue", "decode", "batch-wait", "infer", "post"]
        assert stages[0].start_time == image.start_time
        ends = [stage.end_time for stage in stages]
        assert [stage.start_time for stage in stages[1:]] == ends[:-1]
        durations = {stage.name: (stage.end_time or 0) - (stage.start_time or 0) for stage in stages}
        assert durations["decode"] > 0


async def test_a_request_without_a_trace_starts_one_and_an_unsampled_one_is_not_recorded(
    traced: httpx.AsyncClient, spans: Spans
) -> None:
    unsampled = await traced.post("/predict", files=files(1), headers={"traceparent": f"{TRACEPARENT[:-2]}00"})
    assert not spans()
    assert unsampled.headers["traceparent"].startswith(f"00-{TRACE}-") and unsampled.headers["traceparent"].endswith("-00")
    answer = await traced.get("/healthz")
    (span,) = spans()
    assert span.context and span.parent is None
    assert answer.headers["traceparent"].startswith(f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-")


@pytest.mark.parametrize(
    ("image", "status", "error"), [(b"hello", 400, "bad_image"), (picture(blue=FAIL), 500, None)], ids=["expected", "defect"]
)
async def test_an_error_is_in_its_span(
    traced: httpx.AsyncClient, spans: Spans, image: bytes, status: int, error: str | None
) -> None:
    answer = await traced.post("/predict", files={"file": image}, headers={"traceparent": TRACEPARENT})
    work, server = spans()
    assert (work.name, work.status.status_code) == ("detect", StatusCode.ERROR)
    assert (work.attributes or {}).get("error.type") == error
    assert (server.attributes or {})["http.response.status_code"] == answer.status_code == status
    assert (server.status.status_code is StatusCode.ERROR) is (status == 500)
    assert server.context and f"{server.context.span_id:016x}" in answer.headers["traceparent"]


async def test_a_video_is_one_span_and_a_tensor_has_stages(traced: httpx.AsyncClient, spans: Spans, tmp_path: Path) -> None:
    film = video(tmp_path / "film.mp4", frames=5)
    assert (await traced.post("/predict", files={"file": ("film.mp4", film)})).status_code == 200
    frames, _ = spans()
    assert frames.name == "frames" and frames.attributes and frames.attributes["yolofleet.frames"] == 5

    tensor = {"name": "images", "shape": [1, 3, 32, 32], "datatype": "FP32", "data": [0.5] * 3072}
    assert (await traced.post("/v2/models/fake/infer", json={"inputs": [tensor]})).status_code == 200
    *stages, work, server = spans()[2:]
    assert [stage.name for stage in stages] == ["queue", "decode", "batch-wait", "infer", "post"]
    assert (work.name, server.name) == ("infer", "POST /v2/models/{model}/infer")


async def test_the_query_is_in_no_span(traced: httpx.AsyncClient, spans: Spans) -> None:
    await traced.get("/healthz", params={"api_key": "secret"})
    assert "secret" not in str([span.to_json() for span in spans()])
