"""KServe's Open Inference Protocol v2 as Triton speaks it: ``/v2/…``.

    JSON or binary tensors → one input → call.infer, or call.detect for each image → output tensors → JSON or binary

    input            what it is                           outputs
    images           FP32 [N, 3, H, W], RGB from 0 to 1   output0, output1, …: the engine's own arrays
    encoded_images   BYTES [N], files; base64 in JSON     num_detections, boxes, scores, classes, detections

``images`` is for Ultralytics' Triton backend, ``YOLO("http://host:port/NAME", task=…)``, which does the rest itself. With
``encoded_images`` the thresholds of ``YOLO.predict`` are request parameters, and each element of ``detections`` is what
``Results.summary()`` gives for that image, as JSON. Rows beyond an image's ``num_detections`` are zeros, of class -1.

Reference: KServe's Open Inference Protocol v2 (REST); Triton's extensions for binary tensor data, model configuration, model
repository, schedule policy and statistics; ``ultralytics.utils.triton`` and ``BaseBackend.apply_metadata``.
"""

import asyncio
import base64
import binascii
import json
import time
import zlib
from dataclasses import replace
from importlib.metadata import version
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers

from actors.errors import BadRequest, ReplicaUnavailable, UnknownModel
from actors.schemas import ImageResult, ModelInfo, PredictParams, Priority, Terms
from deploy.api.call import Call, TheCall
from deploy.api.fleet import TheFleet
from deploy.api.forms import Integers
from deploy.api.problems import BodyTooLarge
from deploy.api.statistics import Duration, ModelStatistics, Stages
from deploy.api.tensors import HEADER_LENGTH, Tensor, TensorRequest, bad_request, read_request, strings, write_response
from deploy.api.ultralytics import summary

ONE_VERSION = "1"
EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "schedule_policy", "statistics"]
PRIORITY_LEVELS: tuple[Priority, ...] = ("normal", "high", "normal", "low")  # 0 is Triton's default, 1 its highest
INFER_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "properties": {
                        "id": {"type": "string"},
                        "parameters": {"type": "object"},
                        "inputs": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["name", "datatype", "shape", "data"],
                                "properties": {
                                    "name": {"enum": ["images", "encoded_images"]},
                                    "datatype": {"enum": ["FP32", "BYTES"]},
                                    "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}},
                                    "data": {"type": "array", "items": {}},
                                },
                            },
                        },
                        "outputs": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["name"],
                                "properties": {"name": {"type": "string"}},
                            },
                        },
                    },
                }
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


class RequestParameters(BaseModel):
    """``parameters`` of an inference request: Triton's own, and for encoded images those of ``YOLO.predict``.

    Attributes:
        priority: 0 for the default, else 1 high, 2 normal, 3 and more low.
        timeout: microseconds after which nothing is computed any more for this request.
    """

    model_config = ConfigDict(extra="forbid")

    binary_data_output: bool = False
    priority: Annotated[int, Field(ge=0)] = 0
    timeout: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    conf: Annotated[float, Field(ge=0, le=1)] = 0.25
    iou: Annotated[float, Field(ge=0, le=1)] = 0.7
    imgsz: Annotated[Integers, Field(min_length=1, max_length=2)] | None = None
    classes: Integers | None = None
    max_det: Annotated[int, Field(ge=1)] = 300

    def thresholds(self) -> PredictParams:
        """The thresholds of this request."""
        imgsz = None if self.imgsz is None else (self.imgsz[0], self.imgsz[-1])
        classes = None if self.classes is None else tuple(self.classes)
        return PredictParams(conf=self.conf, iou=self.iou, imgsz=imgsz, classes=classes, max_det=self.max_det)

    def refuse_thresholds(self) -> None:
        """Raw outputs know no thresholds: raise BadRequest where some are given."""
        given = sorted(self.model_fields_set & {"conf", "iou", "imgsz", "classes", "max_det"})
        if given:
            raise BadRequest(f"{given} have no effect on raw outputs: send 'encoded_images', or leave them out")

    def terms(self, terms: Terms) -> Terms:
        """The request's terms, tightened by Triton's parameters."""
        deadline = min(terms.deadline, time.monotonic() + self.timeout / 1e6) if self.timeout else terms.deadline
        priority = PRIORITY_LEVELS[min(self.priority, 3)] if self.priority else terms.priority
        return replace(terms, deadline=deadline, priority=priority)


class IndexRequest(BaseModel):
    """The body of ``/v2/repository/index``, which may be left out."""

    ready: bool = False


def one_version(model: str, version: str) -> None:
    """Refuse any version but the one there is."""
    if version != ONE_VERSION:
        raise UnknownModel(f"There is no version '{version}' of '{model}': the one version is '{ONE_VERSION}'")


router = APIRouter(prefix="/v2", tags=["kserve"])
of_a_model = APIRouter()  # included twice below: with and without a version in the path


@router.get("")
async def server() -> dict[str, Any]:
    """The server's name, version and protocol extensions."""
    return {"name": "yolofleet", "version": version("yolofleet"), "extensions": EXTENSIONS}


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """Whether this process answers at all."""
    return {"live": True}


@router.get("/health/ready")
async def ready(fleet: TheFleet) -> dict[str, bool]:
    """Whether every model has a replica that answers; 503 where one has none."""
    for name in fleet.model_names():
        await fleet.check(name)
    return {"ready": True}


@router.post("/repository/index")
async def index(request: Request, fleet: TheFleet) -> list[dict[str, str]]:
    """The configured models and whether they can answer; with ``{"ready": true}`` those that can."""
    only_ready = await _wants_ready_only(request)
    entries = []
    for name in fleet.model_names():
        try:
            await fleet.check(name)
            entries.append({"name": name, "version": ONE_VERSION, "state": "READY", "reason": ""})
        except ReplicaUnavailable as error:
            if not only_ready:
                entries.append({"name": name, "version": ONE_VERSION, "state": "UNAVAILABLE", "reason": error.message})
    return entries


@router.post("/repository/models/{model}/load")
@router.post("/repository/models/{model}/unload")
async def refuse_control(model: str, fleet: TheFleet) -> None:
    """Models come from the server's configuration, never from a request."""
    await fleet.describe(model)
    raise BadRequest(f"'{model}' is served as the server's configuration has it: change it there, not by a request")


@router.get("/models/stats")
async def all_statistics(request: Request, fleet: TheFleet) -> dict[str, Any]:
    """The counters of every model, of this process since it started."""
    return {"model_stats": [_statistics(name, request.app.state.statistics.of(name)) for name in fleet.model_names()]}


@of_a_model.get("")
async def metadata(model: str, fleet: TheFleet) -> dict[str, Any]:
    """The tensors that a model takes and gives."""
    info = await fleet.describe(model)
    return {
        "name": info.name,
        "versions": [ONE_VERSION],
        "platform": f"ultralytics_{info.engine}",
        "inputs": [
            {"name": "images", "datatype": "FP32", "shape": _input_shape(info)},
            {"name": "encoded_images", "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [
            *({"name": name, "datatype": "FP32", "shape": shape} for name, shape in _raw_outputs(info).items()),
            *({"name": name, "datatype": kind, "shape": shape} for name, (kind, shape) in _ready_outputs(info).items()),
        ],
    }


@of_a_model.get("/ready")
async def model_ready(model: str, fleet: TheFleet) -> dict[str, Any]:
    """Whether a model has a replica that answers; 503 where it has none."""
    await fleet.check(model)
    return {"name": model, "ready": True}


@of_a_model.get("/config")
async def config(model: str, fleet: TheFleet) -> dict[str, Any]:
    """Triton's model configuration of the raw tensors.

    ``encoded_images`` is left out: Ultralytics' client sends every configured input, asks for every configured output, and
    knows numbers only. ``parameters.metadata`` is what it reads names, stride and the like from.
    """
    info = await fleet.describe(model)
    return {
        "name": info.name,
        "platform": "",
        "backend": f"ultralytics_{info.engine}",
        "version_policy": {"specific": {"versions": [int(ONE_VERSION)]}},
        "max_batch_size": 0,
        "input": [{"name": "images", "data_type": "TYPE_FP32", "dims": _input_shape(info)}],
        "output": [{"name": name, "data_type": "TYPE_FP32", "dims": shape} for name, shape in _raw_outputs(info).items()],
        "parameters": {"metadata": {"string_value": repr(_export_metadata(info))}},
    }


@of_a_model.get("/stats")
async def statistics(request: Request, model: str, fleet: TheFleet) -> dict[str, Any]:
    """A model's counters, of this process since it started."""
    await fleet.describe(model)
    return {"model_stats": [_statistics(model, request.app.state.statistics.of(model))]}


@of_a_model.post("/infer", openapi_extra=INFER_BODY)
async def infer(request: Request, model: str, call: TheCall) -> Response:
    """Run raw tensors through the engine, or detect in encoded images."""
    info = await call.describe(model)
    limits = request.app.state.limits
    body = await request.body()
    asked = await asyncio.to_thread(_read, body, request.headers, int(limits.max_body_mb * 1e6))
    parameters = _parameters(asked)
    call.terms = parameters.terms(call.terms)
    tensor = _the_input(asked, limits.max_images_per_request)
    known = _raw_outputs(info) if tensor.name == "images" else _ready_outputs(info)
    binary = _wanted(asked, list(known), parameters.binary_data_output)
    if tensor.name == "images":
        parameters.refuse_thresholds()
        outputs = await _run_engine(call, model, tensor)
    else:
        answers = await call.detect_all(model, _images(tensor), parameters.thresholds())
        outputs = _ready_tensors([answer.result for answer in answers])
    head = {"model_name": model, "model_version": ONE_VERSION} | ({"id": asked.id} if asked.id else {})
    wanted = [outputs[name] for name in binary]
    content, length = await asyncio.to_thread(write_response, head, wanted, [name for name in binary if binary[name]])
    if length is None:
        return Response(content, media_type="application/json")
    return Response(content, media_type="application/octet-stream", headers={HEADER_LENGTH: str(length)})


router.include_router(of_a_model, prefix="/models/{model}")
router.include_router(of_a_model, prefix="/models/{model}/versions/{version}", dependencies=[Depends(one_version)])


# -- request → call ------------------------------------------------------------------------------------------------------


def _read(body: bytes, headers: Headers, most: int) -> TensorRequest:
    return read_request(_decompressed(body, headers.get("content-encoding", ""), most), headers.get(HEADER_LENGTH))


def _decompressed(body: bytes, encoding: str, most: int) -> bytes:
    """The body without its Content-Encoding, of ``most`` bytes at most: tritonclient compresses where it is told to."""
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise BadRequest(f"Content-Encoding is '{encoding}': send gzip, deflate or none")
    inflate = zlib.decompressobj(zlib.MAX_WBITS | (16 if encoding == "gzip" else 0))
    try:
        content = inflate.decompress(body, most + 1)
    except zlib.error as error:
        raise BadRequest(f"The body is not {encoding}, as its Content-Encoding says") from error
    if len(content) > most:
        raise BodyTooLarge(f"The request body exceeds {most / 1e6:g} MB: send fewer images at once")
    if not inflate.eof:
        raise BadRequest(f"The {encoding} body is truncated: send all of it")
    return content


def _parameters(asked: TensorRequest) -> RequestParameters:
    try:
        return RequestParameters.model_validate(asked.parameters)
    except ValidationError as error:
        raise bad_request(error) from error


def _the_input(asked: TensorRequest, most: int) -> Tensor:
    """The request's one input, its datatype and shape checked as far as they are the same for every model."""
    names = [tensor.name for tensor in asked.inputs]
    if names not in (["images"], ["encoded_images"]):
        raise BadRequest("Send one input: 'images', a tensor, or 'encoded_images', which are files")
    (tensor,) = asked.inputs
    shape = list(tensor.values.shape)
    if tensor.name == "images" and (tensor.datatype != "FP32" or len(shape) != 4 or shape[1] != 3):
        raise BadRequest(f"'images' is {tensor.datatype} {shape}: send FP32 [batch, 3, height, width]")
    if tensor.name == "encoded_images" and (tensor.datatype != "BYTES" or len(shape) != 1):
        raise BadRequest(f"'encoded_images' is {tensor.datatype} {shape}: send BYTES [batch]")
    if shape[0] > most:
        raise BadRequest(f"{shape[0]} images in one request; at most {most} are accepted: split them")
    return tensor


def _wanted(asked: TensorRequest, known: list[str], binary_by_default: bool) -> dict[str, bool]:
    """The outputs to answer with, and whether each is written behind the JSON; all ``known`` ones where none is named."""
    if not asked.outputs:
        return dict.fromkeys(known, binary_by_default)
    unknown = [output.name for output in asked.outputs if output.name not in known]
    if unknown:
        raise BadRequest(f"This input has no output '{unknown[0][:64]}': ask for {', '.join(known)}")
    given = {output.name: output.parameters.binary_data for output in asked.outputs}
    return {name: binary_by_default if binary is None else binary for name, binary in given.items()}


def _images(tensor: Tensor) -> list[tuple[str, bytes]]:
    """The encoded images, each with a label for messages."""
    images = []
    for number, element in enumerate(tensor.values.tolist(), 1):
        try:
            images.append((f"image {number}", base64.b64decode(element, validate=True) if tensor.from_json else element))
        except binascii.Error as error:
            raise BadRequest(f"image {number}: in JSON an image is a string of base64") from error
    return images


async def _wants_ready_only(request: Request) -> bool:
    try:
        return IndexRequest.model_validate_json(await request.body() or b"{}").ready
    except ValidationError as error:
        raise bad_request(error) from error


# -- result → response ---------------------------------------------------------------------------------------------------


async def _run_engine(call: Call, model: str, tensor: Tensor) -> dict[str, Tensor]:
    answer = await call.infer(model, tensor.values)
    return {f"output{i}": Tensor(f"output{i}", "FP32", array) for i, array in enumerate(answer.outputs)}


def _ready_tensors(results: list[ImageResult]) -> dict[str, Tensor]:
    """Every ready-made output; the rows of an image with fewer detections than the richest are filled up."""
    found = [result.detections for result in results]
    table = (len(found), max(map(len, found)))
    boxes, corners = np.zeros((*table, 4), np.float32), np.zeros((*table, 4, 2), np.float32)
    scores, classes = np.zeros(table, np.float32), np.full(table, -1, np.int32)
    for image, detections in enumerate(found):
        for row, detection in enumerate(detections):
            scores[image, row], classes[image, row] = detection.confidence, detection.class_id
            if detection.box is not None:
                boxes[image, row] = detection.box
            if detection.corners is not None:
                corners[image, row] = np.stack((detection.corners.x, detection.corners.y), axis=1)
    summaries = [json.dumps(summary(result)).encode() for result in results]
    tensors = [
        Tensor("num_detections", "INT32", np.array([len(detections) for detections in found], np.int32)),
        Tensor("boxes", "FP32", boxes),
        Tensor("corners", "FP32", corners),
        Tensor("scores", "FP32", scores),
        Tensor("classes", "INT32", classes),
        Tensor("detections", "BYTES", strings(summaries)),
    ]
    return {tensor.name: tensor for tensor in tensors}


# -- what a model is -----------------------------------------------------------------------------------------------------


def _input_shape(info: ModelInfo) -> list[int]:
    return [-1, 3, -1, -1] if info.dynamic else [-1, 3, *info.imgsz]


def _raw_outputs(info: ModelInfo) -> dict[str, list[int]]:
    """Raw output → shape. The names are those of Ultralytics' exports, whose alphabetical order is the engine's."""
    return {f"output{number}": list(shape) for number, shape in enumerate(info.output_shapes)}


def _ready_outputs(info: ModelInfo) -> dict[str, tuple[str, list[int]]]:
    """Ready-made output → datatype and shape, for the model's task."""
    shapes = {
        "detect": {"boxes": ("FP32", [-1, -1, 4])},
        "segment": {"boxes": ("FP32", [-1, -1, 4])},
        "pose": {"boxes": ("FP32", [-1, -1, 4])},
        "obb": {"corners": ("FP32", [-1, -1, 4, 2])},
        "classify": {},
    }
    return {
        "num_detections": ("INT32", [-1]),
        **shapes[info.task],
        "scores": ("FP32", [-1, -1]),
        "classes": ("INT32", [-1, -1]),
        "detections": ("BYTES", [-1]),
    }


def _export_metadata(info: ModelInfo) -> dict[str, Any]:
    """What Ultralytics' exporter writes beside a model, and its clients read back.

    ``dynamic`` makes the client letterbox to rectangles and keep its caller's ``imgsz``, as it does with ``.pt``. A
    classifier has to say no: the client would otherwise take 640 pixels instead of the model's own size.
    """
    described: dict[str, Any] = {
        "description": f"{info.weights}, SHA-256 {info.sha256}",
        "version": info.versions.get("ultralytics", ""),
        "stride": info.stride,
        "task": info.task,
        "batch": 1,
        "imgsz": list(info.imgsz),
        "names": info.names,
        "args": {"batch": 1, "dynamic": info.dynamic and info.task != "classify"},
        "channels": 3,
        "end2end": info.end2end,
    }
    return described | ({} if info.kpt_shape is None else {"kpt_shape": list(info.kpt_shape)})


def _statistics(name: str, of: ModelStatistics) -> dict[str, Any]:
    """One model's counters as Triton's statistics extension has them; there is no cache, so that nothing hits it."""
    stages = {"queue": _duration(of.stages.queue), **_compute(of.stages), "cache_hit": _duration(Duration())}
    return {
        "name": name,
        "version": ONE_VERSION,
        "last_inference": of.last_inference_ms,
        "inference_count": of.images,
        "execution_count": of.executions,
        "inference_stats": {"success": _duration(of.success), "fail": _duration(of.fail), **stages},
        "batch_stats": [
            {"batch_size": size, **_compute(batch.stages, batch.executions(size))}
            for size, batch in sorted(of.batches.items())
        ],
    }


def _compute(stages: Stages, count: int | None = None) -> dict[str, Any]:
    return {name: _duration(getattr(stages, name), count) for name in ("compute_input", "compute_infer", "compute_output")}


def _duration(duration: Duration, count: int | None = None) -> dict[str, int]:
    return {"count": duration.count if count is None else count, "ns": duration.ns}
