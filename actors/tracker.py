"""StreamTracker: association state of one stream. No model in it.

    ImageResult (conf from 0.1 up), frame ─ Ultralytics' BYTETracker or BOTSORT ─→ ImageResult with track ids

What comes back equals ``YOLO.track(source, persist=True)``, of which this is the second half,
``ultralytics.trackers.track.on_predict_postprocess_end``: boxes are the tracker's smoothed ones, and an object that the
tracker does not follow is left out. Trackers: Zhang et al., ByteTrack, ECCV 2022; Aharon et al., BoT-SORT, 2022.

Ids start at 1 in every tracker, however many live in a process. A tracker pickles with all its state, so that Ray can keep a
copy of it elsewhere. One thread at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.errors import BadRequest
from actors.schemas import Detection, ImageResult, Points
from actors.settings import TrackerSettings

TRACK_CONF = 0.1  # the lowest confidence that Model.track asks of its model


class StreamTracker:
    """Follows the objects of one stream or video, frame by frame.

    Args:
        settings: which algorithm, and what differs from Ultralytics' own settings of it.

    Raises:
        BadRequest: a setting that this algorithm does not have, or one that needs a model.
    """

    def __init__(self, settings: TrackerSettings) -> None:
        from ultralytics.trackers.track import TRACKER_MAP
        from ultralytics.utils import YAML, IterableSimpleNamespace
        from ultralytics.utils.checks import check_yaml

        known = YAML.load(check_yaml(f"{settings.kind}.yaml"))
        if unknown := sorted(set(settings.overrides) - set(known)):
            raise BadRequest(f"{settings.kind} has no setting '{unknown[0]}'; it has {', '.join(sorted(known))}")
        arguments = IterableSimpleNamespace(**known | settings.overrides)
        if getattr(arguments, "with_reid", False):
            raise BadRequest("'with_reid' needs a model of its own, which a tracker here has not: leave it out")
        self.needs_frames = getattr(arguments, "gmc_method", None) not in (None, "none")
        self._tracker = TRACKER_MAP[settings.kind](arguments)

    @property
    def followed(self) -> set[int]:
        """The ids that may come again: of objects that are seen, and of those that are lost and not given up yet."""
        return {track.track_id for track in (*self._tracker.tracked_stracks, *self._tracker.lost_stracks)}

    def update(self, result: ImageResult, frame: NDArray[np.uint8] | None = None) -> ImageResult:
        """Associate the next frame's detections with the tracks.

        Args:
            result: what was found in it with ``conf`` at ``TRACK_CONF``; every frame counts, those without objects too.
            frame: its pixels, (H, W, 3) uint8 BGR; used if ``needs_frames``, which compensates the camera's motion.

        Returns:
            The tracked objects in the tracker's order, boxes in pixels clipped to the frame. While nothing is tracked, and
            nothing is about to be, the detections as they were, without ids; this is what ``YOLO.track`` does.

        Raises:
            BadRequest: a classification, which has no boxes; or there are no pixels where they are needed.
        """
        if result.task == "classify":
            raise BadRequest("A classification model finds no boxes, so that nothing can be tracked: give another model")
        if self.needs_frames:
            if frame is None:
                raise BadRequest("This tracker compensates the camera's motion and needs every frame's pixels: send them")
            _reset_at_another_size(self._tracker.gmc, frame)
        tracks = self._tracker.update(_boxes(result), frame)
        if len(tracks):
            return replace(result, detections=tuple(_tracked(result, track) for track in tracks.tolist()))
        pending = any(not track.is_activated for track in self._tracker.tracked_stracks)
        return replace(result, detections=()) if pending else result


def _reset_at_another_size(gmc: Any, frame: NDArray[np.uint8]) -> None:
    """Ultralytics' GMC compares each frame with the one before; where their sizes differ it fails, and keeps the old one."""
    height, width = frame.shape[:2]
    if gmc.prevFrame is not None and gmc.prevFrame.shape != (height // gmc.downscale, width // gmc.downscale):
        gmc.reset_params()


def _boxes(result: ImageResult) -> Any:
    """The detections as the numpy-backed ``Boxes`` or ``OBB`` that Ultralytics' trackers take."""
    from ultralytics.engine.results import OBB, Boxes

    shape = (result.height, result.width)
    if result.task == "obb":
        rows = [(*_centred(found.corners), found.confidence, found.class_id) for found in result.detections if found.corners]
        return OBB(np.array(rows, np.float32).reshape(-1, 7), shape)
    rows = [(*found.box, found.confidence, found.class_id) for found in result.detections if found.box]
    return Boxes(np.array(rows, np.float32).reshape(-1, 6), shape)


def _tracked(result: ImageResult, track: list[float]) -> Detection:
    """One row of a tracker's output, ``[*box, id, confidence, class, index]``, upon the detection that it came from."""
    *box, identity, confidence, class_id, index = track
    found = result.detections[int(index)]
    known = replace(found, class_id=int(class_id), confidence=confidence, track_id=int(identity))
    if found.corners:
        return replace(known, corners=_cornered(box))
    clipped = np.clip(np.array(box, np.float32), 0, (result.width, result.height) * 2)
    return replace(known, box=tuple(clipped.tolist()))


def _centred(corners: Points) -> tuple[float, ...]:
    """Centre x and y, width, height, rotation in radians: the inverse of ``ultralytics.utils.ops.xywhr2xyxyxyxy``."""
    points = np.array((corners.x, corners.y)).T
    centre = points.mean(0)
    along, across = (points[0] + points[1]) / 2 - centre, (points[0] + points[3]) / 2 - centre
    return (*centre, 2 * np.hypot(*along), 2 * np.hypot(*across), np.arctan2(along[1], along[0]))


def _cornered(box: list[float]) -> Points:
    from ultralytics.utils.ops import xywhr2xyxyxyxy

    x, y = xywhr2xyxyxyxy(np.array(box, np.float32)).T.tolist()
    return Points(tuple(x), tuple(y))
