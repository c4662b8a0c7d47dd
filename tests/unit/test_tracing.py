"""OpenTelemetry's environment variables: what is sent where, and that a mistake in them stops nobody."""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from deploy.tracing import ENDPOINTS, configured_provider


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*ENDPOINTS, "OTEL_TRACES_EXPORTER", "OTEL_SERVICE_NAME", "OTEL_EXPORTER_OTLP_COMPRESSION"):
        monkeypatch.delenv(variable, raising=False)


class Collector(HTTPServer):
    """Keeps what an OTLP exporter sends."""

    def __init__(self) -> None:
        self.received: list[tuple[str, ExportTraceServiceRequest]] = []
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert isinstance(self.server, Collector)
        self.server.received.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def collecting() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as server:
        yield server


def test_nothing_is_made_where_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configured_provider() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert configured_provider() is None


def test_spans_reach_an_otlp_collector(monkeypatch: pytest.MonkeyPatch, collector: Collector) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    provider = configured_provider()
    assert provider is not None
    provider.get_tracer("test").start_span("made here").end()
    provider.shutdown()
    ((path, request),) = collector.received
    assert path == "/v1/traces"
    (resource,) = request.resource_spans
    assert {"service.name": "yolofleet"}.items() <= {
        each.key: each.value.string_value for each in resource.resource.attributes
    }.items()
    assert [span.name for span in resource.scope_spans[0].spans] == ["made here"]


def test_the_console_gets_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    provider = configured_provider()
    assert provider is not None
    provider.get_tracer("test").start_span("made here").end()
    provider.shutdown()
    assert '"name": "made here"' in capsys.readouterr().out


def test_a_mistake_is_logged_and_stops_nobody(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
        assert configured_provider() is None
        assert "'zipkin'; give otlp, console or none" in caplog.text
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
        monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
        assert configured_provider() is None
        assert "pip install 'yolofleet[otel]'" in caplog.text
