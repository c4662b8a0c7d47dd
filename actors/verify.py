"""Whether an engine answers as the original does, on real images.

    images ─┬─ rectangular ─┐                 ┌─ detections: matched one to one, both ways ─┐
            └─ square ──────┴─ both models ───┴─ raw outputs, where the precision is fp32 ──┴─→ Verdict

A detection agrees with one of the same class whose confidence is near and whose box overlaps it by IoU ≥ 0.95, its mask by
IoU ≥ 0.85. The corners of an oriented box and the points of a skeleton have to be near: at fp32 within half a pixel, as then
a box's corners too; at fp16 within 2.5 % of the oriented box's shorter side, and of the longer side of the skeleton's box.
Two images of one shape go through the engine together, as batches do.

What counts as a detection is the first of ``CONFIDENCES`` at which the original finds enough: a model for other things than
are in these images finds them there too, only with less confidence. What no detection shows (a model that finds nothing at
all) the raw outputs do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from actors.model import Model
from actors.schemas import Detection, ImageResult, Points, PredictParams

CONFIDENCES = (0.25, 0.05, 0.01, 0.002)
ENOUGH = 20  # detections, over all images
SHARE = 0.99  # of the detections have to agree
MIN_IOU = 0.95
MIN_MASK_IOU = 0.85  # in 16 bits a good mask of 100 pixels came to 0.87: its edge moves by pixels of a coarse raster
GRID = 256  # pixels a side that a mask is drawn in
MAX_SHIFT = 0.025  # of a side: what an IoU of 0.95 leaves to a box that has moved along it

Image = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How near is near.

    Attributes:
        confidence: of a detection.
        pixels: of a corner or a point; None where the size of the box decides.
        raw: of a raw output, as a share of its largest value; None where they are not compared.
    """

    confidence: float
    pixels: float | None = None
    raw: float | None = None


EXACT = Tolerance(confidence=1e-3, pixels=0.5, raw=1e-3)
CLOSE = Tolerance(confidence=0.02)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the comparison came to.

    Attributes:
        agrees: whether the engine may be used.
        detections: of both models, at ``confidence``.
        agreeing: those of them that have their like.
        images: that both have answered, once for each of their shapes.
        confidence: from which on a detection counts.
        raw: the largest difference of the raw outputs, as a share of the largest value; None if they were not compared.
    """

    agrees: bool
    detections: int
    agreeing: int
    images: int
    confidence: float
    raw: float | None

    @property
    def sentence(self) -> str:
        """For people."""
        share = f"{self.agreeing} of {self.detections} detections in {self.images} images agree with the original"
        raw = "" if self.raw is None else f", raw outputs within {self.raw:.1e}"
        return share + raw

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, for the cache's manifest."""
        return asdict(self)


def verify(original: Model, made: Model, images: Sequence[Image], tolerance: Tolerance) -> Verdict:
    """Compare two models that this thread owns.

    Args:
        original: the reference.
        made: what is to answer like it.
        images: (H, W, 3) uint8 BGR each.
        tolerance: how near is near.
    """
    lowest = CONFIDENCES[-1] / 2
    pairs = [
        (before, after)
        for image in images
        for rect in (True, False)
        for before, after in zip(_answers(original, image, lowest, rect), _answers(made, image, lowest, rect), strict=True)
    ]
    raw = None if tolerance.raw is None else max((_raw(original, made, image) for image in images), default=0.0)
    for confidence in CONFIDENCES:
        found = [_agreeing(before, after, confidence, tolerance) for before, after in pairs]
        agreeing, detections = sum(one for one, _ in found), sum(all_ for _, all_ in found)
        if detections >= 2 * ENOUGH:
            break
    agrees = agreeing >= SHARE * detections and (tolerance.raw is None or raw is None or raw <= tolerance.raw)
    return Verdict(agrees, detections, agreeing, len(pairs), confidence, raw)


def _answers(model: Model, image: Image, confidence: float, rect: bool) -> list[ImageResult]:
    """Of the image and its mirror image, in one batch."""
    params = PredictParams(conf=confidence, rect=rect)
    mirrored = np.ascontiguousarray(image[:, ::-1])
    return model.predict([model.prepare(one, params) for one in (image, mirrored)])


def _agreeing(before: ImageResult, after: ImageResult, confidence: float, tolerance: Tolerance) -> tuple[int, int]:
    """How many detections of both have their like, and how many there are.

    One that is just above ``confidence`` may have its like just below.
    """
    agreeing = total = 0
    for these, others in ((before.detections, after.detections), (after.detections, before.detections)):
        counted = [one for one in these if one.confidence >= confidence or (one.box is None and one.corners is None)]
        taken = set[int]()
        for one in counted:
            like = next((at for at, other in enumerate(others) if at not in taken and _like(one, other, tolerance)), None)
            if like is not None:
                taken.add(like)
        agreeing, total = agreeing + len(taken), total + len(counted)
    return agreeing, total


def _like(one: Detection, other: Detection, tolerance: Tolerance) -> bool:
    if one.class_id != other.class_id or abs(one.confidence - other.confidence) > tolerance.confidence:
        return False
    if one.box and other.box and _iou(one.box, other.box) < MIN_IOU:
        return False
    if one.segments and other.segments and _mask_iou(one.segments, other.segments) < MIN_MASK_IOU:
        return False
    mine, theirs = (_points(detection, box=tolerance.pixels is not None) for detection in (one, other))
    within = MAX_SHIFT * _side(one) if tolerance.pixels is None else tolerance.pixels
    turns = range(4 if one.corners else 1)  # any corner of an oriented box that is nearly square may come first
    return not mine.size or any(np.abs(mine - np.roll(theirs, turn, axis=0)).max() <= within for turn in turns)


def _points(detection: Detection, *, box: bool) -> NDArray[np.float64]:
    """Everything of a detection that has a place, (N, 2); of an upright box only if that is asked for."""
    upright = [detection.box[:2], detection.box[2:]] if box and detection.box else []
    corners = list(zip(detection.corners.x, detection.corners.y, strict=True)) if detection.corners else []
    skeleton = list(zip(detection.keypoints.x, detection.keypoints.y, strict=True)) if detection.keypoints else []
    return np.array([*upright, *corners, *skeleton], np.float64).reshape(-1, 2)


def _side(detection: Detection) -> float:
    """The shorter one of an oriented box, the longer one of an upright box."""
    if detection.corners:
        first, second, third = np.column_stack((detection.corners.x, detection.corners.y))[:3]
        return float(min(np.linalg.norm(second - first), np.linalg.norm(third - second)))
    left, top, right, bottom = detection.box or (0.0, 0.0, 0.0, 0.0)
    return max(right - left, bottom - top)


def _iou(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    both = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return shared / (both - shared) if both > shared else 1.0


def _mask_iou(one: Points, other: Points) -> float:
    """IoU of what two outlines enclose, drawn into a grid over both."""
    if not (one.x and other.x):
        return float(one.x == other.x)
    outlines = [np.column_stack((points.x, points.y)) for points in (one, other)]
    corner, extent = np.concatenate(outlines).min(axis=0), np.ptp(np.concatenate(outlines), axis=0)
    fitted = [np.rint((outline - corner) / np.maximum(extent, 1e-6) * (GRID - 1)).astype(np.int32) for outline in outlines]
    mine, theirs = (cv2.fillPoly(np.zeros((GRID, GRID), np.uint8), [outline], 1) for outline in fitted)
    return float((mine & theirs).sum() / (mine | theirs).sum())


def _raw(original: Model, made: Model, image: Image) -> float:
    """The largest difference between the raw outputs for one image, as a share of each output's largest value."""
    stride, sides = original.info.stride, zip(image.shape, made.info.imgsz, strict=False)
    height, width = (max(min(side, most) // stride * stride, 2 * stride) for side, most in sides)
    pixels = np.ascontiguousarray(image[:height, :width, ::-1].transpose(2, 0, 1)[None], np.float32) / np.float32(255)
    differences = [
        float(np.abs(before - after).max() / max(np.abs(before).max(), 1e-6))
        for before, after in zip(original.infer(pixels), made.infer(pixels), strict=True)
    ]
    return max(differences)
