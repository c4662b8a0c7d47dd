"""Ultralytics Platform's routes, for its SDK and command line: ``Platform(base_url=…)``, ``ULTRALYTICS_PLATFORM_URL``.

    POST /api/models/{owner}/{project}/{model}/predict   ┐
    POST /api/models/{model}/predict                     ├─ PlatformForm ─→ ultralytics.respond
    POST /api/deployments/{owner}/{deployment}/predict   ┘
    GET  /api/models/{owner}/{project}/{model}           what `ul cloud predict model=yolo26n.pt` asks before it predicts
    GET  /api/account/summary                            who `ul cloud models predict` takes for the owner

``model`` and ``deployment`` are a served name; owner and project may be anything, as there is one workspace. Training,
exports, uploads and data sets are the Platform's own and not served. Errors have their sentence under ``error``, because
the command line prints nothing else (see problems.py).

Reference: the package ``ultralytics-platform``, whose ``types.py`` declares the answers.
"""

import time
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request, Response

from deploy.api.call import TheCall
from deploy.api.fleet import TheFleet
from deploy.api.forms import MULTIPART, LargeFieldRoute, PlatformForm
from deploy.api.ultralytics import ANSWERS, class_names, respond

ACCOUNT = "yolofleet"

router = APIRouter(prefix="/api", tags=["ultralytics-platform"], route_class=LargeFieldRoute)


@router.post("/models/{model}/predict", responses=ANSWERS)
@router.post("/models/{owner}/{project}/{model}/predict", responses=ANSWERS)
async def predict_with_model(
    request: Request, call: TheCall, model: str, form: Annotated[PlatformForm, Form(media_type=MULTIPART)]
) -> Response:
    """Like ``POST /predict``, with the model in the path."""
    return await respond(request, call, form, model)


@router.post("/deployments/{owner}/{deployment}/predict", responses=ANSWERS)
async def predict_with_deployment(
    request: Request, call: TheCall, deployment: str, form: Annotated[PlatformForm, Form(media_type=MULTIPART)]
) -> Response:
    """Like ``POST /predict``; a deployment is called as the model that it serves."""
    return await respond(request, call, form, deployment)


@router.get("/models/{owner}/{project}/{model}")
async def retrieve(request: Request, fleet: TheFleet, owner: str, project: str, model: str) -> dict[str, Any]:
    """A served model in the shape of ``ModelsRetrieveResponse``; its dates are those since when it is served here."""
    info = await fleet.describe(model)
    since = datetime.now(UTC) - timedelta(seconds=time.monotonic() - request.app.state.started)
    described = {
        "id": info.name,
        "owner": owner,
        "project": project,
        "projectName": project,
        "model": info.name,
        "name": info.name,
        "visibility": "private",
        "status": "completed",
        "task": info.task,
        "hasWeights": False,  # to download
        "classNames": class_names(info),
        "starCount": 0,
        "isStarred": False,
        "createdAt": since.isoformat(timespec="seconds"),
        "updatedAt": since.isoformat(timespec="seconds"),
        "metadata": {"weights": info.weights, "sha256": info.sha256, "engine": info.engine, "device": info.device},
    }
    return {"model": described, "isOwner": True}


@router.get("/account/summary")
async def account(fleet: TheFleet) -> dict[str, Any]:
    """The one workspace that this fleet is, in the shape of ``AccountSummaryResponse``."""
    return {
        "username": ACCOUNT,
        "name": ACCOUNT,
        "accountType": "team",
        "plan": "free",
        "creditsCents": 0,
        "counts": {"projects": 1, "datasets": 0, "models": len(fleet.model_names())},
        "teams": [],
    }
