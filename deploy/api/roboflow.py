"""Roboflow's inference API, for ``inference-sdk`` and whatever else speaks to a Roboflow server.

    JSON, or query and base64 body → PredictParams + images → call.detect, all images at once → centre-based boxes

v1: ``/model/registry`` tells each model's task, the client then posts to that task's ``/infer/…`` path.
v0: everything goes to ``/{project}/{version}``, and the server knows the task.

A model id is ``NAME/VERSION`` or ``NAME``: this fleet has one version of each model, so that any version means it; the
registry calls it 1. Thresholds that a request leaves out have Roboflow's defaults. What would change an answer and cannot be
honoured is refused; what would not (usage counting, line widths) is ignored, and so are unknown fields that are switched off.

Reference: ``inference_sdk.http`` of inference-sdk 1.8.3, and ``inference/core/entities`` of roboflow/inference.
"""

import asyncio
import base64
import binascii
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from importlib import metadata
from typing import Annotated, Any, Literal, TypeVar, cast

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.datastructures import UploadFile
from starlette.routing import Match
from starlette.types import Scope

from actors.errors import BadRequest, DeadlineExceeded, UnknownModel
from actors.schemas import Answer, Detection, ImageResult, ModelInfo, Points, PredictParams
from deploy.api.call import Call, TheCall, all_or_nothing
from deploy.api.fetch import fetch_image

T = TypeVar("T")

VERSION = "1"  # of every model, as the registry tells it
SERVER_ID = uuid.uuid4().hex
DEFAULT_CONFIDENCE, DEFAULT_IOU = 0.4, 0.3  # Roboflow's

TASK_TYPES = {  # our task → Roboflow's
    "detect": "object-detection",
    "segment": "instance-segmentation",
    "pose": "keypoint-detection",
    "classify": "classification",
}
PATHS = {  # our task → where the client posts it
    "detect": "/infer/object_detection",
    "segment": "/infer/instance_segmentation",
    "pose": "/infer/keypoints_detection",
    "classify": "/infer/classification",
}

IGNORED = frozenset(  # nothing of an answer hangs on these
    {
        "api_key",  # not the dialect's business
        "countinference",
        "disable_active_learning",  # nothing is collected
        "disable_model_monitoring",
        "disable_preproc_contrast",  # there are no such steps
        "disable_preproc_grayscale",
        "disable_preproc_static_crop",
        "fix_batch_size",
        "id",
        "labels",  # pictures have labels, and lines that fit their size
        "model_type",
        "service_secret",
        "source",
        "source_info",
        "source_info_origin",
        "start",
        "stroke",
        "usage_billable",
        "visualization_labels",
        "visualization_stroke_width",
    }
)
OFF = (None, False, "", "false", "False")  # an unknown field with such a value asks for nothing
UNSUPPORTED = {  # field: what it may be, and what to do instead
    "active_learning_target_dataset": (None, "nothing is collected; leave it out"),
    "allow_reduced_mask_resolution": (False, "outlines are in pixels of the image; leave it out"),
    "disable_preproc_auto_orient": (False, "images are always turned upright, as their EXIF data say; leave it out"),
    "include_anomaly_map": (False, "there are no anomaly maps; leave it out"),
    "mask_decode_mode": ("accurate", "outlines are those of YOLO.predict; leave it out"),
    "max_candidates": (3000, "suppression sees every candidate; limit 'max_detections' instead"),
    "response_mask_format": ("polygon", "masks are answered as polygons; leave it out"),
    "tradeoff_factor": (0.0, "outlines are those of YOLO.predict; leave it out"),
}


def _confidence(value: Any) -> Any:
    if value == "best":
        raise BadRequest("'confidence' is 'best', but no thresholds are kept with a model: give a number from 0 to 1")
    return DEFAULT_CONFIDENCE if value == "default" else value


def _per_cent(value: float) -> float:
    return value / 100 if value >= 1 else value


def _well_formed(image: Any) -> Any:
    for each in image if isinstance(image, list) else [image]:
        if not isinstance(each, dict) or not isinstance(each.get("type"), str) or "value" not in each:
            raise BadRequest('\'image\' is {"type": "base64", "value": …}, or a list of those')
    return image


Box = tuple[float, float, float, float]
Fraction = Annotated[float, Field(ge=0, le=1)]
PerCent = Annotated[float, AfterValidator(_per_cent), Field(ge=0, le=1)]


class Options(BaseModel):
    """What both forms of a request may ask for."""

    model_config = ConfigDict(protected_namespaces=())

    keypoint_confidence: Annotated[Fraction, Field(description="keypoints below it are left out")] = 0.0
    max_detections: Annotated[int, Field(ge=1, description="most detections per image")] = 300
    active_learning_target_dataset: str | None = None
    allow_reduced_mask_resolution: bool = False
    disable_preproc_auto_orient: bool = False
    include_anomaly_map: bool = False
    mask_decode_mode: str = "accurate"
    max_candidates: int = 3000
    response_mask_format: str = "polygon"
    tradeoff_factor: float = 0.0

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        """Refuse unknown fields unless they are off; a null is as good as leaving the field out."""
        if not isinstance(given, dict):
            return given
        for name, value in given.items():
            if name not in cls.model_fields and name not in IGNORED and value not in OFF:
                raise BadRequest(f"Unknown field {name!r}: see /docs for the fields that this path takes")
        return {name: value for name, value in given.items() if value is not None}

    def refuse_unsupported(self) -> None:
        """Raise BadRequest where an answer would not be what was asked for."""
        for name, (neutral, instead) in UNSUPPORTED.items():
            if getattr(self, name) != neutral:
                raise BadRequest(f"'{name}' cannot be {getattr(self, name)!r} here: {instead}")


class InferRequest(Options):
    """The body of ``POST /infer/…``; one for all tasks, as the client takes the same configuration for all."""

    model_id: Annotated[str | None, Field(description="NAME/VERSION or NAME; the primary model if left out")] = None
    image: Annotated[
        dict[str, Any] | list[dict[str, Any]],
        BeforeValidator(_well_formed),
        Field(description='{"type": "base64", "value": …}, or a list of those, which is answered with a list'),
    ]
    confidence: Annotated[Fraction, BeforeValidator(_confidence)] = DEFAULT_CONFIDENCE
    iou_threshold: Annotated[Fraction, Field(description="highest overlap that suppression leaves")] = DEFAULT_IOU
    class_agnostic_nms: Annotated[bool, Field(description="suppress across classes")] = False
    class_filter: Annotated[list[str] | None, Field(description="names of the classes to keep")] = None
    visualize_predictions: Annotated[bool, Field(description="also answer the annotated picture, JPEG in base64")] = False

    def params(self, info: ModelInfo) -> PredictParams:
        """The thresholds of this request for the model ``info``; BadRequest where one cannot be honoured."""
        self.refuse_unsupported()
        return PredictParams(
            conf=self.confidence,
            iou=self.iou_threshold,
            max_det=self.max_detections,
            classes=class_ids(self.class_filter, info),
            agnostic_nms=self.class_agnostic_nms,
        )


class LegacyQuery(Options):
    """The query of ``POST /{project}/{version}``. Fractions may be per cent: 40 is 0.4, and 1 is 0.01."""

    confidence: Annotated[PerCent, BeforeValidator(_confidence)] = DEFAULT_CONFIDENCE
    overlap: Annotated[PerCent, Field(description="highest overlap that suppression leaves")] = DEFAULT_IOU
    classes: Annotated[str | None, Field(description="names of the classes to keep, separated by commas")] = None
    format: Annotated[
        Literal["json", "image", "image_and_json"], Field(description="image: the annotated picture as JPEG")
    ] = "json"
    image: Annotated[str | None, Field(description="a URL, instead of a body")] = None
    image_type: Annotated[str, Field(description="of the body, where it is not multipart")] = "base64"

    def params(self, info: ModelInfo) -> PredictParams:
        """The thresholds of this request for the model ``info``; BadRequest where one cannot be honoured."""
        self.refuse_unsupported()
        classes = None if not self.classes else [name.strip() for name in self.classes.split(",")]
        return PredictParams(
            conf=self.confidence, iou=self.overlap, max_det=self.max_detections, classes=class_ids(classes, info)
        )


class ModelId(BaseModel):
    """The body of ``/model/add`` and ``/model/remove``."""

    model_config = ConfigDict(protected_namespaces=())
    model_id: Annotated[str, Field(description="NAME/VERSION or NAME")]


async def load_source(request: Request, kind: str, value: Any) -> bytes:
    """The encoded image that a request names: the one place that decides what is taken.

    Args:
        request: that names it.
        kind: Roboflow's type of the value.
        value: what stands for the image.

    Raises:
        BadRequest: not base64, or of a kind that is not taken.
        BadUrl: a URL that cannot be fetched.
    """
    if kind == "numpy":
        raise BadRequest("Pickled numpy arrays are never unpickled, since that can run code: send the image as base64")
    if kind not in ("base64", "url"):
        raise BadRequest(f"Images of the type {kind!r} are not taken: send the image as base64")
    if not isinstance(value, str):
        raise BadRequest(f"An image of the type '{kind}' has a string as its value")
    if kind == "url":
        return await fetch_image(request, value)
    encoded = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest("The image is not base64: encode the image's bytes") from error


async def _in_time(call: Call, loading: Awaitable[T]) -> T:
    """What a request loads, or DeadlineExceeded where that takes longer than the request has."""
    try:
        async with asyncio.timeout(call.terms.deadline - time.monotonic()):
            return await loading
    except TimeoutError:
        raise DeadlineExceeded("The images did not arrive within this request's time: allow more, or send fewer") from None


def model_name(model_id: str | None) -> str | None:
    """The served name in ``NAME/VERSION`` or ``NAME``; of any other shape nothing is cut off."""
    if model_id is None:
        return None
    name, _, its_version = model_id.partition("/")
    return model_id if "/" in its_version else name


def class_ids(names: Sequence[str] | None, info: ModelInfo) -> tuple[int, ...] | None:
    """The ids of classes given by name; BadRequest where the model has no such class."""
    if names is None:
        return None
    unknown = sorted(set(names) - set(info.names.values()))
    if unknown:
        raise BadRequest(f"'{info.name}' has no class {unknown[0]!r}: GET /models has the names of its classes")
    return tuple(class_id for class_id, name in info.names.items() if name in names)


def inference_answer(answer: Answer, params: PredictParams, keypoint_confidence: float = 0.0) -> dict[str, Any]:
    """One image in the shape of Roboflow's API; ``time`` is in seconds, coordinates in pixels of the image.

    Of ``classify`` models the five likeliest classes are known; those that ``params`` leave are answered.
    """
    result, timing = answer.result, answer.result.timing
    milliseconds = timing.decode + timing.preprocess + timing.inference + timing.postprocess
    made: dict[str, Any] = {
        "inference_id": str(uuid.uuid4()),
        "time": round(milliseconds / 1e3, 6),
        "image": {"width": result.width, "height": result.height},
    }
    if result.task == "classify":
        made |= _classification(result, params)
    else:
        made["predictions"] = [_prediction(detection, keypoint_confidence) for detection in result.detections]
    if answer.picture is not None:
        made["visualization"] = base64.b64encode(answer.picture).decode()
    return made


def _classification(result: ImageResult, params: PredictParams) -> dict[str, Any]:
    kept = [
        {"class": found.name, "class_id": found.class_id, "confidence": found.confidence}
        for found in result.detections
        if found.confidence >= params.conf and (params.classes is None or found.class_id in params.classes)
    ]
    likeliest = kept[0] if kept else {"class": "", "confidence": 0.0}  # Roboflow's answer where nothing is left
    return {"predictions": kept, "top": likeliest["class"], "confidence": likeliest["confidence"]}


def _prediction(detection: Detection, keypoint_confidence: float) -> dict[str, Any]:
    x1, y1, x2, y2 = cast("Box", detection.box)  # obb models have none, and do not come here
    made: dict[str, Any] = {
        "x": (x1 + x2) / 2,
        "y": (y1 + y2) / 2,
        "width": x2 - x1,
        "height": y2 - y1,
        "confidence": detection.confidence,
        "class": detection.name,
        "class_id": detection.class_id,
        "detection_id": str(uuid.uuid4()),
    }
    if detection.track_id is not None:
        made["tracker_id"] = detection.track_id
    if detection.segments is not None:
        made["points"] = [{"x": x, "y": y} for x, y in zip(detection.segments.x, detection.segments.y, strict=True)]
    if detection.keypoints is not None:
        made["keypoints"] = _keypoints(detection.keypoints, keypoint_confidence)
    return made


def _keypoints(points: Points, least: float) -> list[dict[str, Any]]:
    """Those of at least ``least`` confidence; ``class_id`` is the place in the skeleton, and its name as weights have none."""
    confidences = points.visible if points.visible is not None else (1.0,) * len(points.x)
    return [
        {"x": x, "y": y, "confidence": confidence, "class_id": number, "class": str(number)}
        for number, (x, y, confidence) in enumerate(zip(points.x, points.y, confidences, strict=True))
        if confidence >= least
    ]


router = APIRouter(tags=["roboflow"])


@router.get("/info")
async def info() -> dict[str, str]:
    """What this server is, as the client's ``get_server_info`` asks."""
    return {"name": "yolofleet", "version": metadata.version("yolofleet"), "uuid": SERVER_ID}


@router.get("/model/registry")
async def registry(call: TheCall) -> dict[str, Any]:
    """The served models with their tasks, which tell the client where to post."""
    return {"models": [_entry(await call.describe(name)) for name in call.fleet.model_names()]}


@router.post("/model/add")
async def add(call: TheCall, body: ModelId) -> dict[str, Any]:
    """The registry, with a served model also under the very id that was asked for, since the client looks for that.

    Models are configured, not added: an unknown one is refused.
    """
    try:
        asked = _entry(await call.describe(model_name(body.model_id)), body.model_id)
    except UnknownModel as error:
        raise UnknownModel(f"{error.message}; models are added to the server's configuration, not over HTTP") from error
    known = (await registry(call))["models"]
    return {"models": known if asked in known else [*known, asked]}


@router.post("/model/remove")
@router.post("/model/clear")
async def remove() -> None:
    """Refused: models are served until the server's configuration changes."""
    raise BadRequest("Models cannot be removed over HTTP: change the server's configuration")


def _entry(info: ModelInfo, model_id: str | None = None) -> dict[str, Any]:
    height, width = info.imgsz
    return {
        "model_id": model_id or f"{info.name}/{VERSION}",
        "task_type": TASK_TYPES.get(info.task, info.task),
        "batch_size": None,
        "input_height": height,
        "input_width": width,
    }


def _endpoint(task: str) -> Callable[..., Awaitable[Any]]:
    async def infer(request: Request, call: TheCall, body: InferRequest) -> Any:
        info = await call.describe(model_name(body.model_id))
        if info.task != task:
            raise BadRequest(f"'{info.name}' is a model of the task '{info.task}': send this to {_path(info)}")
        params = body.params(info)
        given = body.image if isinstance(body.image, list) else [body.image]
        most = request.app.state.limits.max_images_per_request
        if not 1 <= len(given) <= most:
            raise BadRequest(f"{len(given)} images in one request; 1 to {most} are accepted")
        loading = all_or_nothing([load_source(request, each["type"], each["value"]) for each in given])
        images = [(f"image {number}", image) for number, image in enumerate(await _in_time(call, loading), 1)]
        answers = await call.detect_all(info.name, images, params, annotate=body.visualize_predictions)
        made = [inference_answer(answer, params, body.keypoint_confidence) for answer in answers]
        return made if isinstance(body.image, list) else made[0]

    infer.__doc__ = f"One image, or several, through a model of the task ``{task}``."
    return infer


def _path(info: ModelInfo) -> str:
    return PATHS.get(info.task, "/predict, since Roboflow's API has no form for it")


for _task, _its_path in PATHS.items():
    router.add_api_route(_its_path, _endpoint(_task), methods=["POST"], name=f"infer_{_task}", response_model=None)


class _ServedProjectRoute(APIRoute):
    """Matches where ``project`` is the name of a served model only, so that it hides no other path."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        if match != Match.NONE and child["path_params"]["project"] not in scope["app"].state.fleet.model_names():
            return Match.NONE, {}
        return match, child


legacy_router = APIRouter(tags=["roboflow"], route_class=_ServedProjectRoute)  # to be included last
_LEGACY_BODY = {
    "required": True,
    "content": {
        "text/plain": {"schema": {"type": "string", "format": "byte", "description": "base64, under any content type"}},
        "multipart/form-data": {
            "schema": {"type": "object", "required": ["file"], "properties": {"file": {"type": "string", "format": "binary"}}}
        },
    },
}


@legacy_router.post("/{project}/{version}", response_model=None, openapi_extra={"requestBody": _LEGACY_BODY})
async def legacy_infer(
    request: Request,
    call: TheCall,
    project: Annotated[str, Path(description="name of a served model")],
    version: Annotated[str, Path(description="any; a model has one version")],
    query: Annotated[LegacyQuery, Query()],
) -> Any:
    """One image, base64 as the body or multipart, through a model of any task; everything else is in the query."""
    info = await call.describe(project)
    if info.task not in TASK_TYPES:
        raise BadRequest(f"'{info.name}' is a model of the task '{info.task}': send this to {_path(info)}")
    params = query.params(info)
    image = await _legacy_image(request, query, call)
    answer = await call.detect(info.name, image, params, annotate=query.format != "json")
    if query.format == "image":
        return Response(answer.picture, media_type="image/jpeg")
    return inference_answer(answer, params, query.keypoint_confidence)


async def _legacy_image(request: Request, query: LegacyQuery, call: Call) -> bytes:
    if query.image is not None:
        return await _in_time(call, load_source(request, "url", query.image))
    if "multipart/form-data" in request.headers.get("content-type", "").lower():
        async with request.form() as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise BadRequest("Send the image as the multipart field 'file', or as base64 in the body")
            return await file.read()
    body = await request.body()
    return await load_source(request, query.image_type, body.decode("ascii", "replace"))
