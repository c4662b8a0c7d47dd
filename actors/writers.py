"""Results → rows of one explicit Arrow schema. The same columns in every file, whatever the task or however empty.

ImageResult + uri + sha256 ─ row ─→ dict ─ table ─→ pyarrow.Table(SCHEMA)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from actors.schemas import Detection, ImageResult, Points

STEM_BYTES = 200  # of the 255 that a file's name may have

_COORDINATES = pa.list_(pa.float32())
_POINTS = pa.struct([("x", _COORDINATES), ("y", _COORDINATES), ("visible", _COORDINATES)])

DETECTION = pa.struct(
    [
        ("class_id", pa.int32()),
        ("name", pa.string()),
        ("confidence", pa.float32()),
        ("x1", pa.float32()),
        ("y1", pa.float32()),
        ("x2", pa.float32()),
        ("y2", pa.float32()),
        ("corners", _POINTS),
        ("segments", _POINTS),
        ("keypoints", _POINTS),
        ("track_id", pa.int64()),
    ]
)
"""One detection. Pixels of the upright original; what the task does not have is null."""

_COLUMNS: list[pa.Field[Any]] = [
    pa.field("uri", pa.string()),
    pa.field("version", pa.string()),
    pa.field("sha256", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("model", pa.string()),
    pa.field("task", pa.string()),
    pa.field("detections", pa.list_(DETECTION)),
    pa.field("video", pa.string()),
    pa.field("frame", pa.int64()),
    pa.field("time_s", pa.float64()),
]
SCHEMA = pa.schema(_COLUMNS)
"""One row an image or frame. ``version`` is what the storage said of the file when it was listed, ``sha256`` the hash of the
encoded file, a frame's video; ``video``, ``frame`` and ``time_s`` are null for an image."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a frame is: its video, its number from 1, and its time in seconds from the first."""

    video: str
    frame: int
    time_s: float


def row(
    uri: str,
    sha256: str | None,
    model: str,
    result: ImageResult,
    *,
    version: str | None = None,
    place: Place | None = None,
) -> dict[str, Any]:
    """One image, or the frame at ``place``, as a row of ``SCHEMA``."""
    return {
        "uri": uri,
        "version": version,
        "sha256": sha256,
        "width": result.width,
        "height": result.height,
        "model": model,
        "task": result.task,
        "detections": [_detection(detection) for detection in result.detections],
    } | (asdict(place) if place else {})


def result_of(row: dict[str, Any]) -> ImageResult:
    """The result that ``row`` was made of, but for its timing; the table keeps numbers as the models give them, float32."""
    detections = tuple(_restored(values) for values in row["detections"])
    return ImageResult(row["width"], row["height"], row["task"], detections)


def table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows as an Arrow table of ``SCHEMA``; also for no rows at all."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def picture_name(uri: str) -> str:
    """What the picture with an input's boxes is called in the output folder: readable, and of no other input."""
    return f"annotated/{readable_stem(uri.replace('#', '/'))}-{hashlib.sha256(uri.encode()).hexdigest()[:12]}.jpg"


def readable_stem(path: str) -> str:
    """The name of an input's file without its suffix, cut where it would leave no room for what names of ours have besides."""
    return PurePosixPath(path).stem.encode()[:STEM_BYTES].decode(errors="ignore")


def _detection(detection: Detection) -> dict[str, Any]:
    values = asdict(detection)
    box = values.pop("box")
    if box is not None:
        values["x1"], values["y1"], values["x2"], values["y2"] = box
    return values


def _restored(values: dict[str, Any]) -> Detection:
    values = dict(values)
    box = tuple(values.pop(side) for side in ("x1", "y1", "x2", "y2"))
    for name in ("corners", "segments", "keypoints"):
        values[name] = values[name] and _points(values[name])
    return Detection(box=None if box[0] is None else box, **values)


def _points(values: dict[str, Any]) -> Points:
    visible = values["visible"]
    return Points(tuple(values["x"]), tuple(values["y"]), None if visible is None else tuple(visible))
