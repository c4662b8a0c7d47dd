"""OpenTelemetry's own environment variables → a tracer, or none.

    OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318    spans go there, by OTLP over HTTP; needs the extra ``otel``
    OTEL_TRACES_EXPORTER=otlp|console|none               says so explicitly; ``console`` writes them to the ingress's log

The others have OpenTelemetry's meanings, such as OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER and OTEL_EXPORTER_OTLP_HEADERS. They
are read in the ingress's process: set them where Ray's nodes are started. Ray Serve's own traces
(``RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH``) show its proxies and routers, and know nothing of batches and engines; these show
the work on a request, on both data planes.
"""

import logging
import os
import sys

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

log = logging.getLogger(__name__)


def configured_provider() -> TracerProvider | None:
    """What makes and sends spans, as the environment asks; None where it asks for nothing.

    As OpenTelemetry demands, a mistake in these settings is logged and stops nobody from working.
    """
    exporter = _exporter(os.environ.get("OTEL_TRACES_EXPORTER", "otlp" if any(map(os.environ.get, ENDPOINTS)) else "none"))
    if exporter is None:
        return None
    provider = TracerProvider(resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "yolofleet")}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _exporter(kind: str) -> SpanExporter | None:
    if kind == "console":
        return ConsoleSpanExporter(out=sys.stdout)
    if kind == "otlp":
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            return OTLPSpanExporter()
        except ImportError:
            log.warning("no traces are sent: install the exporter with pip install 'yolofleet[otel]'")
    elif kind != "none":
        log.warning("no traces are sent: OTEL_TRACES_EXPORTER is '%s'; give otlp, console or none", kind)
    return None
