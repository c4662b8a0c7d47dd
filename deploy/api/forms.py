"""The form fields of Ultralytics' inference API: multipart or urlencoded body → PredictParams + uploads.

    PredictForm    POST /predict                Ultralytics' fields, and ours: classes, max_det, agnostic_nms, model
    PlatformForm   POST /api/…/predict          the model stands in the path
    HubForm        POST /, /v1/predict/{model}  the retired HUB, whose 'iou' was 0.45 unless told
    Thresholds     what they share with the query of a live stream

Reference: docs.ultralytics.com, platform/deploy/inference and hub/inference-api; thresholds mean what they mean in
``YOLO.predict``.
"""

import base64
import binascii
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Request, UploadFile
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from starlette.formparsers import MultiPartParser

from actors.errors import BadRequest
from actors.schemas import PredictParams
from actors.video import is_video
from deploy.api.fetch import fetch_image, is_url

MAX_FIELD_BYTES = 1 << 30  # of a form field; the body's own limit is BodyLimit's
MAX_VID_STRIDE = 1000
MultiPartParser.spool_max_size = 32 << 20  # beyond it each piece is written to a file by another thread: 8 ms for 4 MB
MULTIPART = "multipart/form-data"  # must be said: FastAPI's schema calls a model of form fields urlencoded, files or not


@dataclass(frozen=True, slots=True)
class Upload:
    """One file of a request.

    Attributes:
        name: what the client calls it.
        label: how messages call it.
        data: the encoded image or video.
    """

    name: str
    label: str
    data: bytes

    @property
    def is_video(self) -> bool:
        """Whether it has frames; by its content, never by its name."""
        return is_video(self.data)


def _numbers(value: Any) -> Any:
    """Accept ``0,2``, ``[0, 2]`` and a repeated field alike."""
    texts = value if isinstance(value, list) else [value]
    parts = [part for text in texts for part in str(text).strip("[] ").split(",")]
    return [part.strip() for part in parts if part.strip()]


def _last_part(model: str) -> str:
    """``NAME`` of ``NAME``, ``ul://owner/project/NAME`` and ``https://hub.ultralytics.com/models/NAME``."""
    return model.rstrip("/").rpartition("/")[2]


Integers = Annotated[list[int], BeforeValidator(_numbers)]
ModelField = Annotated[
    str | None,
    AfterValidator(lambda model: model and _last_part(model)),
    Field(description="name of a served model, or an address that ends in one; the primary one if left out"),
]


class Thresholds(BaseModel):
    """What every request may ask for: thresholds, and how coordinates are written."""

    model_config = ConfigDict(extra="forbid")

    conf: Annotated[float, Field(ge=0, le=1)] = 0.25
    iou: Annotated[float, Field(ge=0, le=1)] = 0.7
    imgsz: Annotated[Integers | None, Field(min_length=1, max_length=2, description="640, or height,width")] = None
    classes: Annotated[Integers | None, Field(description="class ids to keep, such as 0,2")] = None
    max_det: Annotated[int, Field(ge=1)] = 300
    agnostic_nms: Annotated[bool, Field(description="suppress overlaps across classes")] = False
    normalize: Annotated[bool, Field(description="coordinates from 0 to 1 instead of pixels")] = False
    decimals: Annotated[int, Field(ge=0, le=10, description="places that numbers are rounded to")] = 5

    def params(self) -> PredictParams:
        """The thresholds of this request."""
        return PredictParams(
            conf=self.conf,
            iou=self.iou,
            imgsz=None if self.imgsz is None else (self.imgsz[0], self.imgsz[-1]),
            classes=None if self.classes is None else tuple(self.classes),
            max_det=self.max_det,
            agnostic_nms=self.agnostic_nms,
        )


class InferenceForm(Thresholds):
    """What all forms have."""

    file: Annotated[list[UploadFile], Field(description="images or videos; repeat the field for several")] = []
    source: Annotated[str | None, Field(description="one image or video: base64, or its URL where those are fetched")] = None
    vid_stride: Annotated[int, Field(ge=1, le=MAX_VID_STRIDE, description="of a video, every so many-th frame only")] = 1

    async def uploads(self, request: Request) -> list[Upload]:
        """The request's images and videos.

        Raises:
            BadRequest: none, both kinds, or more than the limit.
            BadUrl: ``source`` is a URL that cannot be fetched.
        """
        most = request.app.state.limits.max_images_per_request
        if self.file and self.source is not None:
            raise BadRequest("Send either 'file' or 'source', not both")
        if self.source is not None:
            data = await fetch_image(request, self.source) if is_url(self.source) else _decode_source(self.source)
            return [Upload("source", "source", data)]
        if not self.file:
            raise BadRequest("Send at least one image, as a multipart field 'file' or as base64 in 'source'")
        if len(self.file) > most:
            raise BadRequest(f"{len(self.file)} images in one request; at most {most} are accepted: split them")
        return [
            Upload(file.filename or f"file {number}", f"file {number} ({file.filename})", await file.read())
            for number, file in enumerate(self.file, 1)
        ]


class PredictForm(InferenceForm):
    """The fields of ``POST /predict``."""

    model: ModelField = None


class HubForm(PredictForm):
    """The fields of Ultralytics HUB's inference API, with its own default."""

    iou: Annotated[float, Field(ge=0, le=1)] = 0.45


class PlatformForm(InferenceForm):
    """The fields of Ultralytics Platform's predict routes."""

    bits: Annotated[Literal["8", "12", "16"], Field(description="of depth maps, a task that is not served: no effect")] = "8"


class LargeFieldRoute(APIRoute):
    """A route whose text fields may be as large as a body: Starlette refuses those above 1 MB; an image in base64 is one."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Any]]:
        """The route's handler behind a request that reads large fields."""
        handle = super().get_route_handler()

        async def with_large_fields(request: Request) -> Any:
            return await handle(_LargeFieldRequest(request.scope, request.receive))

        return with_large_fields


class _LargeFieldRequest(Request):
    def form(self, **limits: Any) -> Any:
        return super().form(**limits | {"max_part_size": MAX_FIELD_BYTES})


def _decode_source(source: str) -> bytes:
    encoded = source.partition(",")[2] if source.startswith("data:") else source
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest("'source' is not base64: encode the image's bytes, or send them as the field 'file'") from error
