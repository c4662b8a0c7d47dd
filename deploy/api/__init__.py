"""The HTTP interface, free of Ray: ``create_api(fleet)`` makes a FastAPI application over a small protocol.

request → middleware (id, body limit) → a dialect: request → call → fleet.detect → result → response
└── FleetError → problems.py → {"error": {code, message, request_id}}
"""

import time

from fastapi import FastAPI

from deploy.api import fleet as fleet_routes
from deploy.api import problems, ultralytics
from deploy.api.fleet import Fleet
from deploy.api.middleware import BodyLimit, RequestId
from deploy.settings import HttpLimits

__all__ = ["Fleet", "create_api"]


def create_api(fleet: Fleet, limits: HttpLimits) -> FastAPI:
    """Assemble the dialects over ``fleet``.

    Args:
        fleet: answers detections; which topology stands behind it is not known here.
        limits: what one request may ask for.
    """
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
    app.state.started = time.monotonic()
    app.include_router(ultralytics.router)
    app.include_router(fleet_routes.router)
    problems.install(app)
    app.add_middleware(BodyLimit, max_bytes=int(limits.max_body_mb * 1e6))
    app.add_middleware(RequestId)
    return app
