"""Committed results against labels: mean average precision with Ultralytics' own metric code.

    rows of the Parquet files + labels (pixels) ─ match by IoU, per image ─→ DetMetrics ─→ Evaluation

Meaningful only for results with a low ``conf`` (0.001, as ``YOLO.val`` has it): a threshold cuts the curve's tail off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from actors.errors import BadSource


@dataclass(frozen=True, slots=True)
class Label:
    """One true object; the box in pixels of the upright image."""

    class_id: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean average precision over all classes that have labels, at IoU 0.50 and averaged over 0.50:0.95."""

    map50: float
    map50_95: float
    precision: float
    recall: float


def evaluate(rows: Iterable[dict[str, Any]], labels_of: Callable[[dict[str, Any]], list[Label]]) -> Evaluation:
    """Score rows of ``writers.SCHEMA`` against labels.

    Args:
        rows: the results, one an image.
        labels_of: the true objects of a row's image.
    """
    import torch
    from ultralytics.models.yolo.detect.val import DetectionValidator
    from ultralytics.utils.metrics import DetMetrics, box_iou

    thresholds = SimpleNamespace(iouv=torch.linspace(0.5, 0.95, 10))  # all that match_predictions wants of a validator
    metrics = DetMetrics()
    for row in rows:
        labels, found = labels_of(row), row["detections"]
        true_boxes = torch.tensor([label.box for label in labels]).reshape(-1, 4)
        boxes = torch.tensor([[item["x1"], item["y1"], item["x2"], item["y2"]] for item in found]).reshape(-1, 4)
        true_classes = torch.tensor([float(label.class_id) for label in labels])
        classes = torch.tensor([float(item["class_id"]) for item in found])
        matches = DetectionValidator.match_predictions(thresholds, classes, true_classes, box_iou(true_boxes, boxes))
        metrics.update_stats(
            {
                "tp": matches.numpy(),
                "conf": np.array([item["confidence"] for item in found]),
                "pred_cls": classes.numpy(),
                "target_cls": true_classes.numpy(),
                "target_img": np.unique(true_classes.numpy()),
                "im_name": row["uri"],
            }
        )
    metrics.names = {int(class_id): str(int(class_id)) for stats in metrics.stats["target_cls"] for class_id in stats}
    metrics.process()
    precision, recall, map50, map50_95 = metrics.mean_results()
    return Evaluation(float(map50), float(map50_95), float(precision), float(recall))


def yolo_labels(row: dict[str, Any]) -> list[Label]:
    """The labels of a row's image in YOLO's layout: ``…/images/…/x.jpg`` → ``…/labels/…/x.txt``, none if there is no file.

    Source of the format: Ultralytics' detection dataset; a line is ``class x_center y_center width height``, as fractions.

    Raises:
        BadSource: the image is in no folder ``images``, or a line is malformed.
    """
    head, separator, tail = str(row["uri"]).rpartition("/images/")
    if not separator:
        raise BadSource(f"{row['uri']} is in no folder 'images', so that its labels cannot be found beside it")
    path = Path(f"{head}/labels/{tail}").with_suffix(".txt")
    return [_parse(line, row, path) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def _parse(line: str, row: dict[str, Any], path: Path) -> Label:
    try:
        class_id, x, y, width, height = (float(part) for part in line.split()[:5])
    except ValueError as error:
        raise BadSource(f"{path}: '{line}' is not 'class x_center y_center width height'") from error
    left, top = (x - width / 2) * row["width"], (y - height / 2) * row["height"]
    return Label(int(class_id), (left, top, left + width * row["width"], top + height * row["height"]))
