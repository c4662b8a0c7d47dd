"""The results of a job, read back: rows, a pandas table, ``supervision.Detections``.

DIR, local or in a bucket ─ read_rows ─→ row, row, …  ─ as_supervision ─→ sv.Detections
                          └ as_frame ──→ pandas.DataFrame, one row a detection
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from actors.ledger import DETECTIONS, METADATA_KEY
from actors.storage import Storage

if TYPE_CHECKING:
    import pandas as pd
    import supervision as sv

_FLAT = ("class_id", "name", "confidence", "x1", "y1", "x2", "y2", "track_id")


def read_rows(root: str | Path, folder: str = DETECTIONS) -> Iterator[dict[str, Any]]:
    """The rows of ``writers.SCHEMA`` at ``root``, one file in memory at a time; in ``tracks`` they have track ids."""
    storage = Storage.at(root)
    for name in storage.names(folder):
        with storage.open(name) as file:
            for batch in pq.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()


def read_names(root: str | Path) -> dict[int, str]:
    """Class id → name, as the model has them that computed the results; empty if no model did."""
    storage = Storage.at(root)
    for name in storage.names(DETECTIONS):
        with storage.open(name) as file:
            model = json.loads(pq.read_schema(file).metadata[METADATA_KEY])["model"]
        if model is not None:
            return {int(class_id): label for class_id, label in model["names"].items()}
    return {}


def as_frame(root: str | Path) -> pd.DataFrame:
    """A pandas table of all detections: ``uri``, class, confidence, box in pixels and track id.

    Raises:
        ModuleNotFoundError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("as_frame needs pandas: pip install 'yolofleet[data]'") from error

    found = ([row["uri"], *(item[key] for key in _FLAT)] for row in read_rows(root) for item in row["detections"])
    return pd.DataFrame(found, columns=["uri", *_FLAT])


def as_supervision(row: dict[str, Any]) -> sv.Detections:
    """One row as ``supervision.Detections``; detections without a box are left out."""
    import supervision as sv

    found = [item for item in row["detections"] if item["x1"] is not None]
    tracked = bool(found) and all(item["track_id"] is not None for item in found)
    return sv.Detections(
        xyxy=np.array([[item["x1"], item["y1"], item["x2"], item["y2"]] for item in found], np.float32).reshape(-1, 4),
        confidence=np.array([item["confidence"] for item in found], np.float32),
        class_id=np.array([item["class_id"] for item in found], int),
        tracker_id=np.array([item["track_id"] for item in found], int) if tracked else None,
        data={"class_name": np.array([item["name"] for item in found], str)},
    )
