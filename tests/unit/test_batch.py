"""A job before and after its pool: what is an input, how many may fail, and what is written whatever happens."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.dataset import Shard, into_shards
from actors.detector import Detector
from actors.errors import BadRequest, BadSource, TooManyErrors
from actors.fake_model import FakeModel
from actors.ledger import Manifest, totals
from actors.pool import PoolSettings, ShardActor
from actors.schemas import ImageResult, Task
from actors.settings import ActorSettings, ModelSettings, TrackerSettings
from actors.writers import row
from deploy import batch
from deploy.batch import ErrorBudget, Job, JobSettings, _leave_out, run_job
from tests.conftest import picture

FAKE = ModelSettings(name="fake", weights="fake:")


@pytest.mark.parametrize(
    ("flag", "done", "failed", "stops"),
    [
        ("0", 1, 1, True),
        ("10", 500, 10, False),
        ("10", 11, 11, True),
        ("5%", 99, 99, False),  # too few to judge
        ("5%", 100, 5, False),
        ("5%", 100, 6, True),
    ],
)
def test_a_budget_stops_a_run_that_exceeds_it(flag: str, done: int, failed: int, stops: bool) -> None:
    budget = ErrorBudget.from_flag(flag)
    if stops:
        with pytest.raises(TooManyErrors, match=f"{failed} of {done}"):
            budget.check(done, failed)
    else:
        budget.check(done, failed)


@pytest.mark.parametrize("flag", ["many", "-1", "101%", "%", ""])
def test_what_is_no_budget_is_refused(flag: str) -> None:
    with pytest.raises(BadRequest, match="N or P%"):
        ErrorBudget.from_flag(flag)


def job_of(folder: Path, *, retry_failed: bool = False, **settings: Any) -> Job:
    given: dict[str, Any] = {"sources": (str(folder),), "out": folder / "out"} | settings
    return Job.open(JobSettings(model=FAKE, **given), retry_failed=retry_failed)


def run(job: Job) -> dict[str, Any]:
    """What an actor does, in this process."""
    settings = job.settings
    actor = ShardActor(PoolSettings(FAKE, ActorSettings(), settings.limits, settings.params, job.ledger))
    actor._detector = Detector(lambda: FakeModel(FAKE), settings.limits)
    for shard in into_shards(job.remaining, 1, versions=job.versions):
        actor.process(shard)
    actor._detector.close()
    return job.finish(1.0)


def commit(job: Job, *uris: str, task: Task = "detect") -> None:
    """Results without a detection."""
    rows = [row(uri, "f" * 64, "fake", ImageResult(64, 48, task, ())) for uri in uris]
    job.ledger.commit(Shard(uris), rows, Manifest(len(uris)), {"names": {}})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(picture())
    return tmp_path


def test_a_name_that_is_not_utf8_is_a_dead_letter_in_each_run(folder: Path) -> None:
    bad = [f"{folder}/\udcff{suffix}" for suffix in (".mp4", ".png")]
    for name in bad:
        Path(name).write_bytes(picture())
    summary = run(job_of(folder))
    assert (summary["results"], summary["dead_letters"], summary["accounted_for"]) == (2, 2, True)
    errors = (folder / "out" / "errors.jsonl").read_text()
    assert "\\udcff.png" in errors
    assert [json.loads(line)["uri"] for line in errors.splitlines()] == bad
    assert all("name is not UTF-8" in json.loads(line)["reason"] for line in errors.splitlines())
    assert job_of(folder).remaining == []
    again = job_of(folder, retry_failed=True)
    assert again.remaining == bad
    assert run(again)["accounted_for"]


def test_what_lies_in_the_output_folder_is_no_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    job_of(Path(), out="sub/../out")
    for name in ("out/annotated/a-1.jpg", "out.png", "outer/c.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(picture())
    job = job_of(Path(), out="sub/../out")
    assert job.uris == [str(folder / name) for name in ("a.png", "b.png", "out.png", "outer/c.png")]


def test_what_lies_in_the_output_bucket_is_no_input() -> None:
    versions: dict[str, str | None] = dict.fromkeys(["s3://b/a.png", "s3://b/out/annotated/a.jpg", "s3://b/outer.png"])
    _leave_out("s3://b/out/", versions)
    assert list(versions) == ["s3://b/a.png", "s3://b/outer.png"]


def test_a_job_without_any_other_input_is_refused(folder: Path) -> None:
    with pytest.raises(BadSource, match="Every input lies in the output folder"):
        job_of(folder, out=folder)
    assert {path.name for path in folder.iterdir()} == {"a.png", "b.png"}


@pytest.mark.parametrize("task", ["classify", "obb"])
def test_a_score_without_boxes_is_refused_and_costs_no_summary(task: Task, folder: Path) -> None:
    job = job_of(folder, labels=folder, formats=("coco",))
    commit(job, *job.uris, task=task)
    with pytest.raises(BadRequest, match=f"'{task}'"):
        job.finish(1.0)
    assert json.loads((folder / "out" / "summary.json").read_text())["results"] == 2
    assert (folder / "out" / "errors.jsonl").exists()


def test_a_job_that_was_stopped_counts_what_it_did_and_scores_and_exports_nothing(folder: Path) -> None:
    job = job_of(folder, labels=folder, formats=("jsonl",), price_per_hour=3600.0)
    commit(job, job.uris[0])
    summary = job.finish(2.0, stopped=True)
    assert summary["this_run"]["inputs"] == 1
    assert summary["this_run"]["images_per_s"] == 0.5
    assert summary["this_run"]["cost_per_million_images"] == 2e6
    assert summary["eval"] is None
    assert not (folder / "out" / "detections.jsonl").exists()


def test_a_run_that_is_stopped_tells_why_whatever_its_labels_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(job: Job, actor: ActorSettings, report: Any) -> float:
        commit(job, job.uris[0], task="classify")
        raise TooManyErrors("Stopped")

    monkeypatch.setattr(Job, "run", fail)
    monkeypatch.setattr(batch, "local_ray", lambda log: nullcontext())
    monkeypatch.setattr(batch, "recorded", lambda root: nullcontext(lambda counts: None))
    monkeypatch.setattr(batch, "check_fits", lambda *needs: None)
    settings = JobSettings(sources=(str(folder),), model=FAKE, out=folder / "out", labels=folder)
    with pytest.raises(TooManyErrors):
        run_job(settings, ActorSettings, lambda progress: None)
    assert (folder / "out" / "summary.json").exists()


def test_a_model_without_boxes_is_refused_before_it_computes_what_is_to_be_scored(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any, on_ready: Any, **more: Any) -> None:
        on_ready(SimpleNamespace(task="obb", engine="torch", precision="fp32"))

    monkeypatch.setattr(batch, "run_pool", load)
    with pytest.raises(BadRequest, match="'obb'"):
        job_of(folder, labels=folder).run(ActorSettings(), lambda progress: None)


def test_a_frame_that_two_runs_committed_is_tracked_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(folder, tracker=TrackerSettings())
    tracked: list[int] = []

    def twice(*arguments: Any, **more: Any) -> None:
        commit(job, *job.uris)
        commit(job, job.uris[0])

    monkeypatch.setattr(batch, "run_pool", twice)
    monkeypatch.setattr(batch, "track_clips", lambda *arguments: tracked.append(totals(job.ledger.manifests()).results))
    job.run(ActorSettings(), lambda progress: None)
    assert tracked == [2]
