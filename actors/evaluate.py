"""Committed results against labels: mean average precision with Ultralytics' own metric code.

    rows of the Parquet files + labels (pixels) ─ match by IoU, per image ─→ DetMetrics ─→ Evaluation

Meaningful only for results with a low ``conf`` (0.001, as ``YOLO.val`` has it): a threshold cuts the curve's tail off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np

from actors.errors import BadSource


@dataclass(frozen=True, slots=True)
class Label:
    """One true object; the box in pixels of the upright image."""

    class_id: int
    box: tuple[float, float, float, float]


LabelsOf = Callable[[dict[str, Any]], list[Label]]


@dataclass(frozen=True, slots=True)
class Score:
    """Mean average precision at IoU 0.50 and averaged over 0.50:0.95; precision and recall where their F1 is best."""

    map50: float
    map50_95: float
    precision: float
    recall: float


@dataclass(frozen=True, slots=True)
class Evaluation(Score):
    """The mean over all classes that have labels, each class's own score, and how much there was to compare with."""

    images: int
    labels: int
    by_class: dict[str, Score]


def evaluate(rows: Iterable[dict[str, Any]], labels_of: LabelsOf, names: dict[int, str] | None = None) -> Evaluation:
    """Score rows of ``writers.SCHEMA`` against labels.

    Args:
        rows: the results, one an image.
        labels_of: the true objects of a row's image.
        names: class id → name; ids stand for names that are missing.

    Raises:
        BadSource: no image has a label.
    """
    import torch
    from ultralytics.models.yolo.detect.val import DetectionValidator
    from ultralytics.utils.metrics import DetMetrics, box_iou

    thresholds = SimpleNamespace(iouv=torch.linspace(0.5, 0.95, 10))  # all that match_predictions wants of a validator
    metrics = DetMetrics()
    images = labelled = 0
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
        images, labelled = images + 1, labelled + len(labels)
    if not labelled:
        raise BadSource("No image has a label: are these the labels of these inputs?")
    true_ids = {int(class_id) for stats in metrics.stats["target_cls"] for class_id in stats}
    metrics.names = {class_id: (names or {}).get(class_id, str(class_id)) for class_id in sorted(true_ids)}
    metrics.process()
    scores = [Score(*_numbers(metrics.class_result(place))) for place in range(len(metrics.ap_class_index))]
    by_class = {metrics.names[class_id]: score for class_id, score in zip(metrics.ap_class_index, scores, strict=True)}
    return Evaluation(*_numbers(metrics.mean_results()), images, labelled, by_class)


def _numbers(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Ultralytics' order is precision, recall, mAP50, mAP50-95."""
    precision, recall, map50, map50_95 = (float(value) for value in values)
    return map50, map50_95, precision, recall


def labels_at(path: Path, names: dict[int, str]) -> LabelsOf:
    """Labels in whatever form ``path`` has them: a folder of YOLO's, or a COCO file.

    Args:
        path: the folder, or the ``.json``.
        names: class id → name of the model; a COCO category is matched to a class by its name.

    Returns:
        What the labels of a row's image are; none for an image that the labels do not know.

    Raises:
        BadSource: there are no such labels, or none of the model's classes is in them.
    """
    if path.is_dir():
        return _YoloFolder(path)
    if path.suffix.lower() == ".json" and path.is_file():
        return _CocoFile(path, names)
    raise BadSource(f"There are no labels at {path}: give a folder of YOLO labels (.txt) or a COCO file (.json)")


def yolo_labels(row: dict[str, Any]) -> list[Label]:
    """The labels of a row's image in YOLO's layout: ``…/images/…/x.jpg`` → ``…/labels/…/x.txt``, none if there is no file.

    Raises:
        BadSource: the image is in no folder ``images``, or a line is malformed.
    """
    head, separator, tail = str(row["uri"]).rpartition("/images/")
    if not separator:
        raise BadSource(f"{row['uri']} is in no folder 'images', so that its labels cannot be found beside it")
    return _read_yolo(Path(f"{head}/labels/{tail}").with_suffix(".txt"), row)


class _YoloFolder:
    """Labels by the longest end of the image's path that exists in the folder: ``train/x.txt`` before ``x.txt``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, row: dict[str, Any]) -> list[Label]:
        parts = PurePosixPath(str(row["uri"]).replace("#", "/")).with_suffix(".txt").parts
        files = (self._folder.joinpath(*parts[start:]) for start in range(1, len(parts)))
        return _read_yolo(next((file for file in files if file.is_file()), self._folder / parts[-1]), row)


class _CocoFile:
    """Labels by the longest end of the image's path that is a ``file_name``. Crowds are left out, as Ultralytics does."""

    def __init__(self, path: Path, names: dict[int, str]) -> None:
        try:
            coco = json.loads(path.read_text())
            categories = {item["id"]: item["name"] for item in coco["categories"]}
            self._files = {item["file_name"]: item["id"] for item in coco["images"]}
            annotations = [item for item in coco["annotations"] if not item.get("iscrowd")]
            boxes = [(item["image_id"], item["category_id"], tuple(map(float, item["bbox"]))) for item in annotations]
        except (ValueError, LookupError, TypeError) as error:
            raise BadSource(f"{path} is no COCO file with images, annotations and categories: {error!r}") from error
        ids = {name: class_id for class_id, name in names.items()}
        known = {category: ids[name] for category, name in categories.items() if name in ids}
        if not known:
            raise BadSource(f"No category of {path} is a class of the model: the names have to be the same")
        strangers = {category: max(names) + 1 + number for number, category in enumerate(sorted(categories.keys() - known))}
        self._labels: dict[Any, list[Label]] = {}
        for image, category, (left, top, width, height) in boxes:
            label = Label((known | strangers)[category], (left, top, left + width, top + height))
            self._labels.setdefault(image, []).append(label)

    def __call__(self, row: dict[str, Any]) -> list[Label]:
        parts = str(row["uri"]).replace("#", "/").split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        return self._labels.get(next((self._files[end] for end in ends if end in self._files), None), [])


def _read_yolo(path: Path, row: dict[str, Any]) -> list[Label]:
    """Source of the format: Ultralytics' detection dataset; a line is ``class x_center y_center width height``, fractions."""
    return [_parse(line, row, path) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def _parse(line: str, row: dict[str, Any], path: Path) -> Label:
    try:
        class_id, x, y, width, height = (float(part) for part in line.split()[:5])
    except ValueError as error:
        raise BadSource(f"{path}: '{line}' is not 'class x_center y_center width height'") from error
    left, top = (x - width / 2) * row["width"], (y - height / 2) * row["height"]
    return Label(int(class_id), (left, top, left + width * row["width"], top + height * row["height"]))
