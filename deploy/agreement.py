"""How much two versions of a model agree, and what each of them costs: what a rollout is decided on.

    ImageResult of the old, ImageResult of the new → objects matched one to one → Agreement, added up over all images

Two objects match if their class *names* are the same and their boxes overlap with an IoU of at least 0.5, highest overlap
first, each at most once; as COCO pairs detections with labels, with the old version in the place of the labels. Masks and
keypoints are compared through their boxes, oriented boxes through the upright ones around them. An image's classification
counts as one object, its likeliest class, which matches by its name. Confidences decide nothing but what is reported.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import quantiles

import numpy as np
from numpy.typing import NDArray

from actors.schemas import Detection, ImageResult, Timing

MIN_IOU = 0.5

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Agreement:
    """Objects that the old and the new version found, and how many of them are the same."""

    matched: int = 0
    old: int = 0
    new: int = 0

    @property
    def share(self) -> float:
        """``2 * matched / (old + new)``: the F1 score of the new against the old, and the same the other way round.

        1.0 if neither found anything: there is nothing in which they differ.
        """
        return 2 * self.matched / (self.old + self.new) if self.old + self.new else 1.0

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(self.matched + other.matched, self.old + other.old, self.new + other.new)


def agreement(old: ImageResult, new: ImageResult) -> Agreement:
    """Compare two answers for one image; the order of detections is of no consequence."""
    olds, news = _objects(old), _objects(new)
    if "classify" in (old.task, new.task):
        same = old.task == new.task and [one.name for one in olds] == [other.name for other in news]
        return Agreement(len(olds) if same else 0, len(olds), len(news))
    names = {one.name for one in olds} & {other.name for other in news}
    matched = sum(_matched(_boxes(olds, name), _boxes(news, name)) for name in names)
    return Agreement(matched, len(olds), len(news))


def refused(old: ImageResult) -> Agreement:
    """What an image adds for which the new version has no answer but an error: everything is missed, be it nothing."""
    return Agreement(0, max(len(_objects(old)), 1), 0)


def total(agreements: Iterable[Agreement]) -> Agreement:
    """Objects of all images together, so that each object weighs the same."""
    return sum(agreements, Agreement())


def milliseconds(timing: Timing) -> float:
    """What an image took in its replica without waiting: its decoding, the whole pass of its batch, its suppression."""
    return timing.decode + timing.batch_size * (timing.preprocess + timing.inference) + timing.postprocess


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The median and the 95th percentile of at least one value."""
    cuts = quantiles(values, n=20, method="inclusive") if len(values) > 1 else [values[0]] * 19
    return cuts[9], cuts[18]


def _objects(result: ImageResult) -> Sequence[Detection]:
    if result.task != "classify":
        return result.detections
    return sorted(result.detections, key=lambda one: -one.confidence)[:1]


def _boxes(detections: Iterable[Detection], name: str) -> list[Box]:
    return [_box(detection) for detection in detections if detection.name == name]


def _box(detection: Detection) -> Box:
    if detection.box is not None:
        return detection.box
    assert detection.corners is not None  # noqa: S101 - one of both is there, but for classifications
    x, y = detection.corners.x, detection.corners.y
    return min(x), min(y), max(x), max(y)


def _matched(olds: list[Box], news: list[Box]) -> int:
    """How many pairs can be made, highest overlap first; equal overlaps go by the boxes, so that no order matters."""
    overlaps = _iou(np.array(olds, np.float64), np.array(news, np.float64))
    pairs = [(int(row), int(column)) for row, column in np.argwhere(overlaps >= MIN_IOU)]
    pairs.sort(key=lambda pair: (-overlaps[pair], *sorted((olds[pair[0]], news[pair[1]]))))
    rows, columns = set[int](), set[int]()
    for row, column in pairs:
        if row not in rows and column not in columns:
            rows.add(row)
            columns.add(column)
    return len(rows)


def _iou(olds: NDArray[np.float64], news: NDArray[np.float64]) -> NDArray[np.float64]:
    """Overlaps of (N, 4) and (M, 4) boxes, (N, M)."""
    low = np.maximum(olds[:, None, :2], news[None, :, :2])
    high = np.minimum(olds[:, None, 2:], news[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1) for boxes in (olds, news)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    overlaps: NDArray[np.float64] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return overlaps
