"""Results → rows of one explicit Arrow schema. The same columns in every file, whatever the task or however empty.

ImageResult + uri + sha256 ─ row ─→ dict ─ table ─→ pyarrow.Table(SCHEMA)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from actors.schemas import Detection, ImageResult

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
    pa.field("sha256", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("model", pa.string()),
    pa.field("task", pa.string()),
    pa.field("detections", pa.list_(DETECTION)),
]
SCHEMA = pa.schema(_COLUMNS)
"""One row an image. ``sha256`` is the hash of the encoded file."""


def row(uri: str, sha256: str, model: str, result: ImageResult) -> dict[str, Any]:
    """One image as a row of ``SCHEMA``."""
    return {
        "uri": uri,
        "sha256": sha256,
        "width": result.width,
        "height": result.height,
        "model": model,
        "task": result.task,
        "detections": [_detection(detection) for detection in result.detections],
    }


def table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows as an Arrow table of ``SCHEMA``; also for no rows at all."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def _detection(detection: Detection) -> dict[str, Any]:
    values = asdict(detection)
    box = values.pop("box")
    if box is not None:
        values["x1"], values["y1"], values["x2"], values["y2"] = box
    return values
