"""StreamTracker without a model: its own ids, its whole state in a pickle, and refusals that say why."""

import pickle
from dataclasses import replace

import cv2
import numpy as np
import pytest

from actors.errors import BadRequest
from actors.schemas import Detection, ImageResult
from actors.settings import TrackerSettings
from actors.tracker import StreamTracker, _centred, _cornered

STREAMS = 64
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 255, (480, 640, 3), np.uint8)


def frame(number: int, objects: int = 3, offset: float = 0) -> ImageResult:
    """Objects that drift to the right, far apart; ``offset`` moves them all, into no one's way."""
    boxes = [(x := 10 + 3.0 * number + offset, 20 + 100.0 * index, x + 60, 80 + 100.0 * index) for index in range(objects)]
    return ImageResult(640, 480, "detect", tuple(Detection(0, "thing", 0.9, box) for box in boxes))


def ids(result: ImageResult) -> list[int | None]:
    return [found.track_id for found in result.detections]


@pytest.mark.parametrize("kind", ["bytetrack", "botsort"])
def test_streams_in_one_process_share_no_ids(kind: str) -> None:
    settings = TrackerSettings.model_validate({"kind": kind})
    trackers = [StreamTracker(settings) for _ in range(STREAMS)]
    for number in range(4):
        for index, tracker in enumerate(trackers):
            assert sorted(map(int, filter(None, ids(tracker.update(frame(number, 1 + index % 4), PIXELS[:60, :80]))))) == list(
                range(1, 2 + index % 4)
            )


@pytest.mark.parametrize("kind", ["bytetrack", "botsort"])
def test_a_pickled_tracker_goes_on_as_the_original_does(kind: str) -> None:
    original = StreamTracker(TrackerSettings.model_validate({"kind": kind}))
    shifts = [np.roll(PIXELS, number, axis=1) for number in range(12)]
    for number in range(5):
        original.update(frame(number), shifts[number])
    twin = pickle.loads(pickle.dumps(original))
    for number in range(5, 12):
        result = frame(number, objects=3 + number % 2)  # a fourth comes and goes: it gets the same new id in both
        assert twin.update(result, shifts[number]) == original.update(result, shifts[number])


@pytest.mark.parametrize("method", ["sparseOptFlow", "orb"])
def test_the_camera_is_followed_after_the_frames_change_their_size(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("ultralytics.utils.LOGGER.warning", warnings.append)
    tracker = StreamTracker(TrackerSettings(kind="botsort", overrides={"gmc_method": method}))
    smooth = cv2.GaussianBlur(PIXELS, (0, 0), 6)
    scene = cv2.normalize(smooth, smooth, 0, 255, cv2.NORM_MINMAX)
    tracker.update(frame(0), scene[:400, :600])
    assert ids(tracker.update(frame(0), scene)) == [1, 2, 3]
    panned = tracker.update(frame(0, offset=48), np.roll(scene, 48, axis=1))
    assert (ids(panned), warnings) == ([1, 2, 3], [])


def test_an_object_that_is_seen_once_is_not_reported() -> None:
    tracker = StreamTracker(TrackerSettings(kind="bytetrack"))
    tracker.update(frame(0, objects=0))
    assert ids(tracker.update(frame(1))) == []
    assert ids(tracker.update(frame(2))) == [1, 2, 3]


def test_oriented_boxes_keep_their_corners() -> None:
    for box in ([100.0, 50.0, 40.0, 20.0, 0.7], [100.0, 50.0, 20.0, 40.0, 2.0], [10.0, 50.0, 30.0, 30.0, -0.5]):
        assert _centred(_cornered(box)) == pytest.approx(box, abs=1e-4)
    tracker = StreamTracker(TrackerSettings(kind="bytetrack"))
    found = Detection(0, "ship", 0.9, corners=_cornered([100.0, 50.0, 40.0, 20.0, 0.7]))
    result = ImageResult(640, 480, "obb", (found,))
    (first,) = tracker.update(result).detections
    assert first.track_id == 1 and first.corners and found.corners
    assert first.corners.x == pytest.approx(found.corners.x, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"overrides": {"track_bufer": 3}}, "has no setting 'track_bufer'.*track_buffer"),
        ({"overrides": {"with_reid": True}}, "with_reid"),
    ],
)
def test_settings_that_cannot_be_had_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence):
        StreamTracker(TrackerSettings.model_validate(settings))


def test_what_cannot_be_tracked_is_refused() -> None:
    tracker = StreamTracker(TrackerSettings(kind="botsort"))
    with pytest.raises(BadRequest, match="pixels"):
        tracker.update(frame(0))
    with pytest.raises(BadRequest, match="classification"):
        tracker.update(replace(frame(0), task="classify"), PIXELS)
    still = StreamTracker(TrackerSettings(kind="botsort", overrides={"gmc_method": "none"}))
    assert ids(still.update(frame(0))) == [1, 2, 3]
