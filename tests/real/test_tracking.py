"""Association apart from detection: ids, boxes and frames of ``YOLO.track`` on the same file, and of the drawn world."""

import shutil
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from ultralytics import YOLO

from actors.clips import list_frames, read_frames, write_clip
from actors.model import YoloModel
from actors.schemas import ImageResult, PredictParams
from actors.settings import ModelSettings, TrackerSettings
from actors.tracker import TRACK_CONF, StreamTracker
from deploy.demo.scene import Scene, draw_clip
from deploy.weights import EMBEDDED
from tests.conftest import ASSETS
from tests.ray.test_pool import run
from tests.ray.test_tracks import job_of, tracks_of

pytestmark = pytest.mark.real

Kind = Literal["bytetrack", "botsort"]
KINDS: tuple[Kind, ...] = ("bytetrack", "botsort")
FRAMES = 45


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first frames of the real video, as a file of their own."""
    path = tmp_path_factory.mktemp("clips") / "traffic.mp4"
    source = str(ASSETS / "data" / "traffic.mp4")
    write_clip(path, (frame.image for frame in read_frames(source, range(1, FRAMES + 1))), 24)
    return path


def detected(path: Path, weights: str, **params: Any) -> list[ImageResult]:
    model = YoloModel(ModelSettings(name="m", weights=weights), 2)
    thresholds = PredictParams(conf=TRACK_CONF, **params)
    frames = read_frames(str(path), range(1, len(list_frames(str(path))) + 1))
    return [model.predict([model.prepare(frame.image, thresholds)])[0] for frame in frames]


def tracked(path: Path, results: list[ImageResult], kind: Kind) -> list[ImageResult]:
    tracker = StreamTracker(TrackerSettings(kind=kind))
    frames = read_frames(str(path), range(1, len(results) + 1))
    return [tracker.update(result, frame.image) for result, frame in zip(results, frames, strict=True)]


def reference(path: Path, weights: str, kind: Kind) -> list[Any]:
    model = YOLO(weights)
    return list(model.track(str(path), persist=True, tracker=f"{kind}.yaml", stream=True, verbose=False))


@pytest.mark.parametrize("weights_name", ["yolo26n", "yolo11n-seg"])
def test_a_real_video_is_tracked_as_yolo_track_does(weights_name: str, weights: Path, traffic: Path) -> None:
    path = str(weights / f"{weights_name}.pt")
    results = detected(traffic, path)
    for kind in KINDS[: None if weights_name == "yolo26n" else 1]:
        ours, theirs = tracked(traffic, results, kind), reference(traffic, path, kind)
        assert len(ours) == len(theirs) == FRAMES
        assert len({found.track_id for result in ours for found in result.detections}) > 2
        for result, expected in zip(ours, theirs, strict=True):
            boxes = expected.boxes
            ids = [None] * len(boxes) if boxes.id is None else boxes.id.int().tolist()
            assert [found.track_id for found in result.detections] == ids
            assert [found.class_id for found in result.detections] == boxes.cls.int().tolist()
            if ids:
                assert np.abs(np.array([found.box for found in result.detections]) - boxes.xyxy.numpy()).max() < 0.5
                assert np.abs([found.confidence for found in result.detections] - boxes.conf.numpy()).max() < 1e-3
            if expected.masks is not None:
                for found, outline in zip(result.detections, expected.masks.xy, strict=True):
                    assert found.segments is not None  # and the mask stays with the object that it belongs to
                    assert np.abs(np.mean((found.segments.x, found.segments.y), 1) - outline.mean(0)).max() < 3


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_the_whole_video_in_spans_over_the_pool_is_tracked_as_yolo_track_does(weights: Path, tmp_path: Path) -> None:
    video = tmp_path / "in" / "traffic.mp4"
    video.parent.mkdir()
    shutil.copy(ASSETS / "data" / "traffic.mp4", video)
    model = ModelSettings(name="yolo26n", weights=str(weights / "yolo26n.pt"), engine="torch")
    summary = run(job_of(video, model))
    rows, theirs = tracks_of(video), reference(video, model.weights, "bytetrack")
    assert summary["results"] == len(rows) == len(theirs) > 200
    for row, expected in zip(rows, theirs, strict=True):
        found, boxes = row["detections"], expected.boxes
        assert [item["track_id"] for item in found] == ([None] * len(boxes) if boxes.id is None else boxes.id.int().tolist())
        ours = np.array([[item[side] for side in ("x1", "y1", "x2", "y2")] for item in found]).reshape(-1, 4)
        assert np.abs(ours - boxes.xyxy.numpy()).max(initial=0) < 0.5


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Scene]]:
    scenes = list(draw_clip(3, 60))
    path = tmp_path_factory.mktemp("clips") / "drawn.mp4"
    write_clip(path, (scene.image for scene in scenes), 15)
    return path, scenes


@pytest.mark.parametrize("kind", KINDS)
def test_the_drawn_world_s_parts_keep_one_id_each(kind: Kind, drawn: tuple[Path, list[Scene]]) -> None:
    path, scenes = drawn
    ours = tracked(path, detected(path, EMBEDDED.weights), kind)
    ids_of: dict[int, set[int]] = {}
    for scene, result in islice(zip(scenes, ours, strict=True), 2, None):  # an object is confirmed by its second frame
        for part in scene.parts:
            near = [found for found in result.detections if found.box and _overlap(part, found.box) > 0.5]
            if near and part.track_id is not None:
                (found,) = near
                assert found.track_id is not None
                ids_of.setdefault(part.track_id, set()).add(found.track_id)
    assert len(ids_of) > 10
    assert all(len(ids) == 1 for ids in ids_of.values()), "an identity switched"
    assert len(set.union(*ids_of.values())) == len(ids_of), "two parts had one identity"


def _overlap(part: Any, box: tuple[float, float, float, float]) -> float:
    width = min(part.x2, box[2]) - max(part.x1, box[0])
    height = min(part.y2, box[3]) - max(part.y1, box[1])
    shared = max(width, 0) * max(height, 0)
    areas = (part.x2 - part.x1) * (part.y2 - part.y1) + (box[2] - box[0]) * (box[3] - box[1])
    return float(shared / (areas - shared))
