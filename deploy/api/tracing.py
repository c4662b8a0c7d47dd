"""W3C trace context, and OpenTelemetry spans where a tracer is configured (``deploy/tracing.py``).

traceparent → Tracing (middleware): one server span per request → traceparent of the answer
└── Call: a span per image, tensor or video └── its stages: queue, decode, batch-wait, infer, post

Without a tracer nothing is recorded, and the client's own ``traceparent`` is what it gets back. A trace id, where there is
one, also stands in the log line of an unexpected failure.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from opentelemetry.context import Context
from opentelemetry.trace import (
    INVALID_SPAN,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.errors import FleetError
from actors.schemas import Timing

_W3C = TraceContextTextMapPropagator()


class Tracing:
    """Put every request into a span that continues the client's trace, and answer with ``traceparent``.

    Args:
        app: answers.
        tracer: makes the spans; one that makes none passes ``traceparent`` on as it came.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self.app, self.tracer = app, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request with ``request.state.span`` set."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method = scope["method"]
        span = self.tracer.start_span(
            method,
            _W3C.extract(Headers(scope=scope), Context()),
            SpanKind.SERVER,
            {"http.request.method": method, "url.path": scope["path"]},
        )
        scope.setdefault("state", {})["span"] = span

        async def send_with_trace(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(trace_headers(scope))
                _answered(span, message["status"])
            await send(message)

        try:
            await self.app(scope, receive, send_with_trace)
        except Exception as error:
            span.record_exception(error)
            _answered(span, 500)  # which is sent further outside
            raise
        finally:
            if route := _route(scope):
                span.update_name(f"{method} {route}")
                span.set_attribute("http.route", route)
            span.end()


class RequestTrace:
    """Where one request's work is recorded.

    Args:
        tracer: makes the spans.
        span: of the request.
    """

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer, self._parent = tracer, set_span_in_context(span, Context())

    @contextmanager
    def work(self, name: str, model: str) -> Iterator[Callable[[Timing, str], None]]:
        """A span ``name`` around the body, which tells each answer's timing and replica by calling what it gets.

        ``detect`` and ``infer`` get their stages as children. The ``frames`` of a video overlap, and are only counted.
        """
        started, answers = time.time_ns(), 0
        span = self._tracer.start_span(name, self._parent, start_time=started)
        span.set_attribute("yolofleet.model", model)

        def answered(timing: Timing, replica: str) -> None:
            nonlocal answers
            answers += 1
            if span.is_recording():
                span.set_attributes({"yolofleet.batch_size": timing.batch_size, "yolofleet.replica": replica})
                if name == "frames":
                    span.set_attribute("yolofleet.frames", answers)
                else:
                    self._record_stages(span, started, timing)

        try:
            yield answered
        except FleetError as error:
            span.set_attribute("error.type", error.code)
            span.set_status(Status(StatusCode.ERROR, error.message))
            raise
        except Exception as error:
            span.record_exception(error)
            span.set_status(Status(StatusCode.ERROR))
            raise
        finally:
            span.end()

    def _record_stages(self, span: Span, started: int, timing: Timing) -> None:
        """The stages one after the other."""
        stages = {
            "queue": timing.queue,
            "decode": timing.decode,
            "batch-wait": timing.batch_wait,
            "infer": timing.engine,
            "post": timing.postprocess,
        }
        parent = set_span_in_context(span, Context())
        for stage, milliseconds in stages.items():
            child = self._tracer.start_span(stage, parent, start_time=started)
            started += round(1e6 * milliseconds)
            child.end(started)


def span_of(scope: Scope) -> Span:
    """The request's span; an invalid one where the client sent no trace and none is made."""
    span: Span = scope.get("state", {}).get("span", INVALID_SPAN)
    return span


def trace_headers(scope: Scope) -> dict[str, str]:
    """``traceparent`` of the request's span; nothing where it has none."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, set_span_in_context(span_of(scope), Context()))
    return {name: value for name, value in carrier.items() if name == "traceparent"}


def trace_id(scope: Scope) -> str:
    """The request's trace id, hexadecimal; "-" where it has none."""
    context = span_of(scope).get_span_context()
    return format_trace_id(context.trace_id) if context.is_valid else "-"


def _route(scope: Scope) -> str:
    """The path with its parameters' names, such as ``/v2/models/{model}/infer``; empty where nothing is there."""
    included = scope.get("fastapi", {}).get("effective_route_context")  # knows the prefixes, its route does not
    return str(getattr(included or scope.get("route"), "path", ""))


def _answered(span: Span, status: int) -> None:
    span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))
