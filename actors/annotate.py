"""An image and what was found in it → the picture with it drawn in, by Ultralytics' own Annotator and colours.

    bytes ─→ (H, W, 3) BGR + ImageResult ─→ masks, then boxes with labels, then skeletons; or the likeliest classes ─→ JPEG

What ``Results.plot()`` draws for the same result, but for the holes in masks: a result keeps outlines, not pixels.
Any thread may draw; no model is involved, and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.images import decode_image, encode_jpeg
from actors.schemas import Counts, Detection, ImageResult, Points
from actors.settings import ImageLimits, Regions

Array = NDArray[np.uint8]

MASK_OPACITY = 0.5
KEYPOINT_RADIUS = 5


def draw(data: bytes, result: ImageResult, limits: ImageLimits) -> bytes:
    """Draw ``result`` into the encoded image that it is about.

    Args:
        data: the image, as it was sent.
        result: what was found in it, of any task.
        limits: what it may weigh.

    Returns:
        A JPEG of the same size, upright.

    Raises:
        BadImage: ``data`` cannot be decoded.
    """
    return encode_jpeg(annotate(decode_image(data, limits), result))


def annotate(image: Array, result: ImageResult) -> Array:
    """Draw ``result`` into a copy of an (H, W, 3) uint8 BGR array."""
    from ultralytics.utils.plotting import colors

    canvas = image.copy()
    if result.task == "segment":
        _tint(canvas, result.detections)
    names = {found.class_id: found.name for found in result.detections}
    annotator = _annotator(canvas, names, use_pillow=result.task == "classify")
    if result.task == "classify":
        lines = "\n".join(f"{found.name} {found.confidence:.2f}" for found in result.detections)
        margin = round(result.height * 0.03)
        annotator.text([margin, margin], lines, box_color=(64, 64, 64, 128))
    for found in reversed(result.detections):  # the likeliest on top
        if outline := _outline(found):
            annotator.box_label(outline, _label(found), color=colors(found.class_id, True))
    for found in reversed(result.detections):
        if found.keypoints is not None:
            annotator.kpts(_columns(found.keypoints), radius=KEYPOINT_RADIUS)
    return np.asarray(annotator.result(), np.uint8)


def mark(image: Array, regions: Regions, counts: Counts) -> Array:
    """Draw a live stream's lines and zones, each with its counts, into an (H, W, 3) uint8 BGR array, in place."""
    import supervision as sv

    for name, shape in (regions.lines | regions.zones).items():
        sv.draw_polygon(image, np.rint(shape).astype(int), sv.Color.WHITE, thickness=2)
        centre = sv.Point(*np.mean(shape, 0).round().astype(int).tolist())
        ways = ", ".join(f"{way} {sum(passed.values())}" for way, passed in counts.get(name, {}).items())
        sv.draw_text(image, f"{name}: {ways}", centre, sv.Color.BLACK, background_color=sv.Color.WHITE)
    return image


def _label(found: Detection) -> str:
    identity = "" if found.track_id is None else f"id:{found.track_id} "
    return f"{identity}{found.name} {found.confidence:.2f}"


def _outline(found: Detection) -> list[Any] | None:
    """x1, y1, x2, y2, or the four points of an oriented box, as ``Annotator.box_label`` tells them apart."""
    if found.box is not None:
        return list(found.box)
    return None if found.corners is None else _columns(found.corners).tolist()


def _columns(points: Points) -> NDArray[np.float32]:
    """(N, 2) or, with visibility, (N, 3)."""
    axes = (points.x, points.y) if points.visible is None else (points.x, points.y, points.visible)
    return np.array(axes, np.float32).T


def _tint(canvas: Array, detections: Sequence[Detection]) -> None:
    """Lay the masks over ``canvas``: each halves what is below, and the brightest tint of each channel is added."""
    from ultralytics.utils.plotting import colors

    tints, layers = np.zeros_like(canvas), np.zeros(canvas.shape[:2], np.uint8)
    for found in detections:
        if found.segments is not None and found.segments.x:  # a mask may be empty
            where, inside = _inside(found.segments, canvas.shape[0], canvas.shape[1])
            tint = np.array(colors(found.class_id, True)) * MASK_OPACITY
            tints[where][inside] = np.maximum(tints[where][inside], tint)
            layers[where][inside] += 1
    covered = layers > 0
    share = np.float32(1 - MASK_OPACITY) ** layers[covered]
    canvas[covered] = canvas[covered] * share[:, None] + tints[covered]


def _inside(outline: Points, height: int, width: int) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """The rectangle of an outline within the image, and which of its pixels are inside: many small masks cost little."""
    from ultralytics.data.utils import polygon2mask

    points = _columns(Points(outline.x, outline.y))
    left, top = np.clip(np.floor(points.min(0)), 0, (width - 1, height - 1)).astype(int)
    right, bottom = np.clip(np.ceil(points.max(0)), (left, top), (width - 1, height - 1)).astype(int) + 1
    mask = polygon2mask((bottom - top, right - left), [(points - (left, top)).ravel()])
    return (slice(top, bottom), slice(left, right)), mask.astype(bool)


def _annotator(image: Array, names: dict[int, str], *, use_pillow: bool) -> Any:
    from ultralytics.utils import plotting

    plotting.check_font = _installed_font  # Ultralytics' own would download Arial while a request waits
    return plotting.Annotator(image, pil=use_pillow, example=names)


def _installed_font(font: str) -> Path:
    """The font in Ultralytics' settings folder where somebody has put it there, else the one that comes with matplotlib."""
    from matplotlib import font_manager
    from ultralytics.utils import USER_CONFIG_DIR

    chosen = Path(USER_CONFIG_DIR) / Path(font).name
    return chosen if chosen.is_file() else Path(font_manager.findfont("DejaVu Sans"))
