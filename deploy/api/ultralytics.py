"""Ultralytics' own inference API: ``POST /predict``, and the addresses of the retired Ultralytics HUB.

    form → PredictParams + uploads → the call, all images at once, videos frame by frame
        ├── Accept: application/json       all answers together, each as ``Results.summary()`` gives it
        ├── Accept: application/x-ndjson   one line per image or frame, each as soon as it is done
        └── Accept: image/jpeg             the one image with what was found drawn in

Reference: the response of Ultralytics' shared and dedicated inference API (``ultralytics_platform.types``,
``ModelsPredictResponse``), and ``ultralytics.engine.results.Results.summary``.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import chain
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import JSONResponse

from actors.errors import BadRequest, FleetError
from actors.schemas import Detection, ImageResult, ModelInfo, Points, PredictParams
from deploy.api import lines
from deploy.api.call import Call, TheCall, all_or_nothing, labelled
from deploy.api.forms import MULTIPART, HubForm, InferenceForm, LargeFieldRoute, PredictForm, Upload
from deploy.api.problems import problem

Entry = dict[str, Any]

JSON, JPEG = "application/json", "image/jpeg"
ACCEPTED = {
    JSON: JSON,
    "*/*": JSON,
    JPEG: JPEG,
    "image/*": JPEG,
    lines.MEDIA_TYPE: lines.MEDIA_TYPE,
    "application/ndjson": lines.MEDIA_TYPE,
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "What was found, in the form that the header Accept asks for",
        "content": {JSON: {}, lines.MEDIA_TYPE: {}, JPEG: {}},
    }
}

router = APIRouter(tags=["ultralytics"], route_class=LargeFieldRoute)


@router.post("/predict", responses=ANSWERS)
async def predict(request: Request, call: TheCall, form: Annotated[PredictForm, Form(media_type=MULTIPART)]) -> Response:
    """Detect, segment, classify, estimate poses or oriented boxes in one or several images or short videos."""
    return await respond(request, call, form, form.model)


@router.post("/", responses=ANSWERS)
async def hub_shared(request: Request, call: TheCall, form: Annotated[HubForm, Form(media_type=MULTIPART)]) -> Response:
    """What https://predict.ultralytics.com was: the model is a field, by its address or its name."""
    return await respond(request, call, form, form.model)


@router.post("/v1/predict/{model}", responses=ANSWERS)
async def hub(request: Request, call: TheCall, model: str, form: Annotated[HubForm, Form(media_type=MULTIPART)]) -> Response:
    """What https://api.ultralytics.com/v1/predict/MODEL_ID was."""
    return await respond(request, call, form, model)


async def respond(request: Request, call: Call, form: InferenceForm, model: str | None) -> Response:
    """Answer an inference request in the form that its ``Accept`` asks for."""
    started = time.monotonic()
    params = form.params()
    info = await call.describe(model)
    uploads = await form.uploads(request)
    asked = _asked_for(request)
    if asked == JPEG:
        return await _picture(call, model, uploads, params)
    if asked == lines.MEDIA_TYPE:
        return _lines(request, call, model, uploads, form)
    entries = await _all_entries(call, model, uploads, form)
    now = time.monotonic()
    metadata = {
        "imageCount": len(entries),
        "functionTimeAlive": round(now - request.app.state.started, 3),
        "functionTimeCall": round(now - started, 4),
        "model": info.name,
        "task": info.task,
        "classNames": class_names(info),
        "version": info.versions,
    }
    return JSONResponse({"images": entries, "metadata": metadata})


def class_names(info: ModelInfo) -> list[str]:
    """The names by class id, which Ultralytics numbers without gaps."""
    return [info.names[class_id] for class_id in sorted(info.names)]


def _asked_for(request: Request) -> str:
    """The first of the ``Accept`` header's media types, by weight, that there is; JSON where none is."""

    def weight(entry: str) -> float:
        _, _, value = entry.partition("q=")
        try:
            return float(value or 1)
        except ValueError:
            return 0.0

    entries = ",".join(request.headers.getlist("accept")).lower().split(",")
    ranked = (entry.partition(";")[0].strip() for entry in sorted(entries, key=weight, reverse=True))
    return next((ACCEPTED[media_type] for media_type in ranked if media_type in ACCEPTED), JSON)


async def _entries(call: Call, model: str | None, upload: Upload, form: InferenceForm) -> AsyncGenerator[Entry, None]:
    """One entry for an image, one per frame for a video, with its number there as Ultralytics counts: from 1."""
    if not upload.is_video:
        answer = await call.detect(model, upload.data, form.params())
        yield image_answer(answer.result, form.normalize, form.decimals)
        return
    number = 0
    async with aclosing(call.frames(model, upload.data, form.params(), form.vid_stride)) as answers:
        async for answer in answers:
            number += form.vid_stride
            yield {"frame": number} | image_answer(answer.result, form.normalize, form.decimals)


async def _all_entries(call: Call, model: str | None, uploads: list[Upload], form: InferenceForm) -> list[Entry]:
    async def entries_of(upload: Upload) -> list[Entry]:
        try:
            return [entry async for entry in _entries(call, model, upload, form)]
        except FleetError as error:
            raise labelled(error, upload.label) if len(uploads) > 1 else error from error

    return list(chain.from_iterable(await all_or_nothing([entries_of(upload) for upload in uploads])))


async def _picture(call: Call, model: str | None, uploads: list[Upload], params: PredictParams) -> Response:
    if len(uploads) > 1 or uploads[0].is_video:
        raise BadRequest("'Accept: image/jpeg' is answered with one picture: send one image, or ask for application/json")
    answer = await call.detect(model, uploads[0].data, params, annotate=True)
    return Response(answer.picture, media_type=JPEG)


def _lines(request: Request, call: Call, model: str | None, uploads: list[Upload], form: InferenceForm) -> lines.LinesResponse:
    async def lines_of(index: int, upload: Upload) -> AsyncGenerator[lines.Line, None]:
        async with aclosing(_entries(call, model, upload, form)) as entries:
            async for entry in entries:
                yield {"index": index, "file": upload.name} | entry

    def line_of_error(index: int, error: Exception) -> lines.Line:
        return {"index": index, "file": uploads[index].name, "error": problem(request, error)}

    return lines.LinesResponse([lines_of(*numbered) for numbered in enumerate(uploads)], line_of_error)


def image_answer(result: ImageResult, normalize: bool = False, decimals: int = 5) -> Entry:
    """One image in the shape of Ultralytics' API: its size, the milliseconds it took, and its detections."""
    timing = result.timing
    speed = {"preprocess": timing.decode + timing.preprocess, "inference": timing.inference}
    speed["postprocess"] = timing.postprocess
    return {
        "shape": [result.height, result.width],
        "speed": {stage: round(milliseconds, 3) for stage, milliseconds in speed.items()},
        "results": summary(result, normalize, decimals),
    }


def summary(result: ImageResult, normalize: bool = False, decimals: int = 5) -> list[dict[str, Any]]:
    """What ``Results.summary(normalize, decimals)`` gives for the same image, key by key and digit by digit."""
    scale = (result.width, result.height) if normalize else (1, 1)
    return [_detection(detection, scale, decimals) for detection in result.detections]


def _detection(detection: Detection, scale: tuple[int, int], decimals: int) -> dict[str, Any]:
    width, height = scale
    answer: dict[str, Any] = {
        "name": detection.name,
        "class": detection.class_id,
        "confidence": round(detection.confidence, decimals),
    }
    if detection.box is not None:
        x1, y1, x2, y2 = detection.box
        corners = [(x1, y1), (x2, y2)]
    elif detection.corners is not None:
        corners = list(zip(detection.corners.x, detection.corners.y, strict=True))
    else:
        return answer
    box = answer["box"] = {}
    for number, (x, y) in enumerate(corners, 1):
        box[f"x{number}"] = round(x / width, decimals)
        box[f"y{number}"] = round(y / height, decimals)
    if detection.track_id is not None:
        answer["track_id"] = detection.track_id
    if detection.segments is not None:
        answer["segments"] = _points(detection.segments, scale, decimals)
    if detection.keypoints is not None:
        answer["keypoints"] = _points(detection.keypoints, scale, decimals)
    return answer


def _points(points: Points, scale: tuple[int, int], decimals: int) -> dict[str, list[float]]:
    # numpy's rounding, and division in single precision, because Results.summary() does it so
    answer = {}
    for axis, values, length in (("x", points.x, scale[0]), ("y", points.y, scale[1])):
        answer[axis] = (np.array(values, np.float32) / length).astype(float).round(decimals).tolist()
    if points.visible is not None:
        answer["visible"] = np.array(points.visible).round(decimals).tolist()
    return answer
