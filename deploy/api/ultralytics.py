"""Ultralytics' own inference API: ``POST /predict``.

    multipart form → PredictParams + images → fleet.detect, all images at once → as ``Results.summary()`` gives them

Reference: the response of Ultralytics' shared and dedicated inference API, and ``ultralytics.engine.results.Results.summary``.
"""

import asyncio
import base64
import binascii
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Form, Request, Response, UploadFile
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from actors.errors import BadRequest, FleetError
from actors.schemas import Detection, ImageResult, Points, PredictParams
from deploy.api.fleet import TheFleet

MAX_FIELD_BYTES = 1 << 30  # of a form field; the body's own limit is BodyLimit's


class _LargeFieldRequest(Request):
    """Starlette refuses text fields above 1 MB; an image in base64 is one."""

    def form(self, **limits: Any) -> Any:
        return super().form(**limits | {"max_part_size": MAX_FIELD_BYTES})


class _LargeFieldRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Any]]:
        handle = super().get_route_handler()

        async def with_large_fields(request: Request) -> Any:
            return await handle(_LargeFieldRequest(request.scope, request.receive))

        return with_large_fields


router = APIRouter(tags=["ultralytics"], route_class=_LargeFieldRoute)


def _numbers(value: Any) -> Any:
    """Accept ``0,2``, ``[0, 2]`` and a repeated field alike."""
    texts = value if isinstance(value, list) else [value]
    parts = [part for text in texts for part in str(text).strip("[] ").split(",")]
    return [part.strip() for part in parts if part.strip()]


Integers = Annotated[list[int], BeforeValidator(_numbers)]


class PredictForm(BaseModel):
    """The fields of ``POST /predict``. Thresholds mean what they mean in ``YOLO.predict``."""

    model_config = ConfigDict(extra="forbid")

    file: Annotated[list[UploadFile], Field(description="images; repeat the field for several")] = []
    source: Annotated[str | None, Field(description="one image as base64, with or without a data: prefix")] = None
    model: Annotated[str | None, Field(description="name of a served model; the primary one if left out")] = None
    conf: Annotated[float, Field(ge=0, le=1)] = 0.25
    iou: Annotated[float, Field(ge=0, le=1)] = 0.7
    imgsz: Annotated[Integers | None, Field(min_length=1, max_length=2, description="640, or height,width")] = None
    classes: Annotated[Integers | None, Field(description="class ids to keep, such as 0,2")] = None
    max_det: Annotated[int, Field(ge=1)] = 300
    normalize: Annotated[bool, Field(description="coordinates from 0 to 1 instead of pixels")] = False
    decimals: Annotated[int, Field(ge=0, le=10, description="places that numbers are rounded to")] = 5

    def params(self) -> PredictParams:
        """The thresholds of this request."""
        imgsz = None if self.imgsz is None else (self.imgsz[0], self.imgsz[-1])
        classes = None if self.classes is None else tuple(self.classes)
        return PredictParams(conf=self.conf, iou=self.iou, imgsz=imgsz, classes=classes, max_det=self.max_det)

    async def images(self, most: int) -> list[tuple[str, bytes]]:
        """The request's images as (label for messages, encoded bytes).

        Raises:
            BadRequest: none, both kinds, or more than ``most``.
        """
        if self.file and self.source is not None:
            raise BadRequest("Send either 'file' or 'source', not both")
        if self.source is not None:
            return [("source", _decode_source(self.source))]
        if not self.file:
            raise BadRequest("Send at least one image, as a multipart field 'file' or as base64 in 'source'")
        if len(self.file) > most:
            raise BadRequest(f"{len(self.file)} images in one request; at most {most} are accepted: split them")
        return [(f"file {number} ({file.filename})", await file.read()) for number, file in enumerate(self.file, 1)]


@router.post("/predict")
async def predict(
    request: Request, response: Response, fleet: TheFleet, form: Annotated[PredictForm, Form()]
) -> dict[str, Any]:
    """Detect, segment, classify, estimate poses or oriented boxes in one or several images."""
    started = time.monotonic()
    params = form.params()
    info = await fleet.describe(form.model)
    images = await form.images(request.app.state.limits.max_images_per_request)
    answers = await asyncio.gather(*(_detect(fleet, form.model, label, data, params, images) for label, data in images))
    now = time.monotonic()
    response.headers["x-replica"] = ",".join(sorted({replica for _, replica in answers}))
    return {
        "images": [image_answer(result, form.normalize, form.decimals) for result, _ in answers],
        "metadata": {
            "imageCount": len(images),
            "functionTimeAlive": round(now - request.app.state.started, 3),
            "functionTimeCall": round(now - started, 4),
            "model": info.name,
            "task": info.task,
            "classNames": {str(class_id): name for class_id, name in info.names.items()},
            "version": info.versions,
        },
    }


def image_answer(result: ImageResult, normalize: bool = False, decimals: int = 5) -> dict[str, Any]:
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


async def _detect(
    fleet: TheFleet, model: str | None, label: str, data: bytes, params: PredictParams, images: list[tuple[str, bytes]]
) -> tuple[ImageResult, str]:
    try:
        return await fleet.detect(model, data, params)
    except FleetError as error:
        if len(images) > 1:
            raise type(error)(f"{label}: {error.message}") from error
        raise


def _decode_source(source: str) -> bytes:
    if source.lower().startswith(("http:", "https:", "ftp:", "s3:", "gs:", "file:")):
        raise BadRequest("URLs in 'source' are not fetched: send the image itself, as 'file' or as base64")
    encoded = source.partition(",")[2] if source.startswith("data:") else source
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest("'source' is not base64: encode the image's bytes, or send them as the field 'file'") from error
