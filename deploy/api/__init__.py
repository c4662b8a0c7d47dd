"""The HTTP interface, free of Ray: ``create_api(fleet)`` makes a FastAPI application over a small protocol.

request → middleware (trace, id, body limit, API key) → a dialect: request → call → fleet.detect → result → response
└── FleetError → problems.py → {"error": {code, message, request_id}}
"""

import time

from fastapi import FastAPI
from opentelemetry.trace import NoOpTracer, Tracer

from deploy.api import fleet as fleet_routes
from deploy.api import jobs, kserve, page, platform, problems, roboflow, streams, ultralytics
from deploy.api.auth import ApiKeys, describe_keys
from deploy.api.fetch import UrlFetcher
from deploy.api.fleet import Fleet
from deploy.api.middleware import BodyLimit, RequestId
from deploy.api.statistics import Statistics
from deploy.api.tracing import Tracing
from deploy.keys import KeyFile
from deploy.settings import AuthSettings, HttpLimits

__all__ = ["Fleet", "create_api"]


def create_api(
    fleet: Fleet,
    limits: HttpLimits,
    auth: AuthSettings | None = None,
    tracer: Tracer | None = None,
    *,
    behind_serve: bool = False,
) -> FastAPI:
    """Assemble the dialects over ``fleet``.

    Args:
        fleet: answers detections; which topology stands behind it is not known here.
        limits: what one request may ask for.
        auth: who may ask; everybody if None.
        tracer: makes a span of every request; nobody does if None.
        behind_serve: Ray Serve gives requests an ``X-Request-Id`` and answers with it.

    Raises:
        BadKeysFile: ``auth`` names a file of API keys that cannot be read.
    """
    auth = auth or AuthSettings()
    keys = None if auth.keys_file is None else KeyFile(auth.keys_file, auth.requests_per_minute)
    app = FastAPI(
        title="yolofleet",
        description=(
            "YOLO inference: one private model per Ray actor. Any Ultralytics weights, Ultralytics' own API.\n\n"
            "The model `parts` is a demonstration: it knows drawn nuts, bolts, washers and gears only."
            " Use `yolofleet serve --model yolo26n=yolo26n.pt` for real pictures."
        ),
        version="1",
    )
    app.state.fleet = fleet
    app.state.limits = limits
    app.state.urls = UrlFetcher(limits.urls)
    app.state.tracer = tracer or NoOpTracer()
    app.state.statistics = Statistics(fleet)
    app.state.started = time.monotonic()
    for dialect in (streams, jobs):
        app.include_router(dialect.router, responses=problems.documented(dialect.router, dialect.ERRORS))
    for router in (
        ultralytics.router,
        platform.router,
        kserve.router,
        fleet_routes.router,
        roboflow.router,
        roboflow.legacy_router,  # last: its path is /{project}/{version}
    ):
        app.include_router(router, responses=problems.documented(router))
    page.install(app)
    problems.install(app)
    app.add_middleware(ApiKeys, keys=keys)
    app.add_middleware(BodyLimit, max_bytes=int(limits.max_body_mb * 1e6), max_seconds=limits.request_timeout_s)
    app.add_middleware(RequestId, answered_outside=behind_serve)
    app.add_middleware(Tracing, tracer=app.state.tracer)
    if keys is not None:
        describe_keys(app)
    return app
