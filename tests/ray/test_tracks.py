"""Videos on the pool: spans in parallel, association in frame order, and the same ids as one sequential ``YOLO.track``."""

import contextlib
import json
import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from ultralytics import YOLO

from actors.clips import list_frames, read_frames, write_clip
from actors.errors import BadImage, BadRequest, TooManyErrors
from actors.ledger import METADATA_KEY
from actors.results import read_rows
from actors.schemas import PredictParams
from actors.settings import ActorSettings, ModelSettings, TrackerSettings
from actors.tracker import TRACK_CONF
from actors.tracks import clip_name
from deploy.batch import ErrorBudget, Job, JobProgress, JobSettings
from deploy.demo.scene import draw_clip
from deploy.weights import EMBEDDED
from tests.conftest import picture, processes, video
from tests.ray.test_pool import run

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

FRAMES = 30
FAKE = ModelSettings(name="fake", weights="fake:")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "belt.mp4"
    path.parent.mkdir()
    write_clip(path, (scene.image for scene in draw_clip(3, FRAMES)), 15)
    return path


def job_of(source: Path, model: ModelSettings = FAKE, **settings: Any) -> Job:
    out = (source if source.is_dir() else source.parent).parent / "out"
    given: dict[str, Any] = {
        "tracker": TrackerSettings(kind="bytetrack"),
        "params": PredictParams(conf=TRACK_CONF),
        "actors": 2,
    } | settings
    return Job.open(JobSettings(sources=(str(source),), model=model, out=out, **given))


def tracks_of(clip: Path) -> list[dict[str, Any]]:
    file = clip.parent.parent / "out" / "tracks" / f"{clip_name(str(clip))}.parquet"
    table = pq.read_table(file)
    assert json.loads(table.schema.metadata[METADATA_KEY]).keys() == {"job", "versions", "tracker"}
    return [dict(row) for row in table.to_pylist()]


@pytest.mark.parametrize("kind", ["bytetrack", pytest.param("botsort", marks=pytest.mark.slow)])
def test_a_video_in_spans_is_tracked_as_yolo_track_does(clip: Path, kind: str) -> None:
    tracker = TrackerSettings.model_validate({"kind": kind})
    summary = run(job_of(clip, EMBEDDED, tracker=tracker, formats=("mot", "jsonl"), annotate=True))
    assert summary["results"] == summary["inputs"] == FRAMES and summary["accounted_for"]
    rows = tracks_of(clip)
    assert [row["frame"] for row in rows] == list(range(1, FRAMES + 1))
    assert [row["time_s"] for row in rows] == pytest.approx(np.arange(FRAMES) / 15, abs=1e-3)
    assert {row["video"] for row in rows} == {str(clip)}
    lines = iter((clip.parent.parent / "out" / "mot" / f"{clip_name(str(clip))}.txt").read_text().splitlines())
    theirs = YOLO(EMBEDDED.weights).track(str(clip), persist=True, tracker=f"{kind}.yaml", stream=True, verbose=False)
    for row, expected in zip(rows, theirs, strict=True):
        found, boxes = row["detections"], expected.boxes
        assert [item["track_id"] for item in found] == ([] if boxes.id is None else boxes.id.int().tolist())
        for item, box in zip(found, boxes.xyxy.tolist(), strict=True):
            assert [item[side] for side in ("x1", "y1", "x2", "y2")] == pytest.approx(box, abs=0.5)
            number, identity, left, top, width, height, *_ = map(float, next(lines).split(","))
            assert (number, identity) == (row["frame"], item["track_id"])
            assert [left, top, left + width, top + height] == pytest.approx(box, abs=0.52)
    assert next(lines, None) is None
    drawn = clip.parent.parent / "out" / "annotated" / f"{clip_name(str(clip))}.mp4"
    assert len(list_frames(str(drawn))) == FRAMES
    assert {path.name for path in (clip.parent.parent / "out").iterdir()} == {
        "annotated", "detections", "detections.jsonl", "errors.jsonl", "job.json", "mot", "summary.json", "tracks",
    }  # fmt: skip
    lines = iter((clip.parent.parent / "out" / "detections.jsonl").read_text().splitlines())
    assert [[item["track_id"] for item in json.loads(line)["detections"]] for line in lines] == [
        [item["track_id"] for item in row["detections"]] for row in rows
    ]


def test_a_truncated_video_costs_its_missing_frames_and_nobody_else(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    whole, cut, broken = folder / "whole.avi", folder / "cut.avi", folder / "broken.mp4"
    data = video(whole, frames=20, codec="MJPG")
    cut.write_bytes(data[: len(data) * 6 // 10])
    broken.write_bytes(video(folder / "x.mp4")[:200])
    (folder / "x.mp4").unlink()
    (folder / "photo.png").write_bytes(picture(blue=3))
    left = len(list(read_frames(str(cut), range(1, 21))))
    assert 0 < left < 20
    summary = run(job_of(folder))
    assert summary["accounted_for"]
    assert (summary["results"], summary["dead_letters"]) == (20 + left + 1, 20 - left + 1)
    letters = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert {letter["stage"] for letter in letters} == {"decode"}
    assert sum("truncated" in letter["reason"] for letter in letters) == len(letters)
    assert len(tracks_of(whole)) == 20 and len(tracks_of(cut)) == left


def test_what_is_tracked_is_not_tracked_again_and_other_formats_can_be_had_later(clip: Path) -> None:
    """With more actors than there is room for, which are used as it comes, and step back for whatever else runs."""
    policies = set[int]()

    def look(progress: JobProgress) -> None:
        for actor in processes("ShardActor") if progress.done else []:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # it has ended meanwhile, or a thread of its
                policies.update(os.sched_getscheduler(thread.id) for thread in psutil.Process(actor).threads())

    job = job_of(clip, max_actors=50, background=True)
    job.run(ActorSettings(num_cpus=3), look)  # two fit at a time
    assert job.finish(1.0)["accounted_for"]
    assert os.SCHED_IDLE in policies
    file = clip.parent.parent / "out" / "tracks" / f"{clip_name(str(clip))}.parquet"
    before = file.stat().st_mtime_ns
    again = job_of(clip, formats=("mot",))
    assert again.remaining == []
    run(again)
    assert file.stat().st_mtime_ns == before
    assert (clip.parent.parent / "out" / "mot" / f"{clip_name(str(clip))}.txt").exists()


def test_a_video_that_can_no_longer_be_read_costs_no_other_its_tracks(clip: Path) -> None:
    other = shutil.copy(clip, clip.with_name("other.mp4"))
    run(job_of(clip.parent, actors=1))
    job = job_of(clip.parent, actors=1, annotate=True)
    assert job.remaining == []
    clip.write_bytes(b"gone")
    with pytest.raises(BadImage, match=r"belt\.mp4"):
        run(job)
    (drawn,) = (clip.parent.parent / "out" / "annotated").iterdir()
    assert drawn.name == f"{clip_name(str(other))}.mp4"


def test_a_job_whose_inputs_fail_is_stopped_with_a_sentence_and_goes_on_with_more_patience(clip: Path) -> None:
    """Of bad pictures, and of a video whose frames ``predict`` takes as well."""
    for number in range(30):
        (clip.parent / f"{number}.jpg").write_bytes(b"no picture")
    job = job_of(clip.parent, max_errors=ErrorBudget(count=10), tracker=None)
    with pytest.raises(TooManyErrors, match="--max-errors"):
        run(job)
    assert run(job_of(clip.parent, tracker=None))["accounted_for"]
    rows = sorted(read_rows(clip.parent.parent / "out"), key=lambda row: row["frame"])
    assert [(row["video"], row["frame"]) for row in rows] == [(str(clip), 1 + number) for number in range(FRAMES)]
    assert [row["time_s"] for row in rows] == pytest.approx(np.arange(FRAMES) / 15, abs=1e-3)
    assert {row["sha256"] for row in rows} == {sha256(clip.read_bytes()).hexdigest()}


def test_a_tracker_that_does_not_fit_is_refused_before_any_frame(clip: Path) -> None:
    with pytest.raises(BadRequest, match="with_reid"):
        run(job_of(clip, tracker=TrackerSettings(overrides={"with_reid": True})))
    assert not (clip.parent.parent / "out" / "detections").exists()
