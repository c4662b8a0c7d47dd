"""Dataset jobs from storage to storage: a real S3 on both ends, what is computed again, every format, Ray Data."""

import asyncio
import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
import pytest
import ray.data

from actors.errors import BadSource
from actors.exports import EXPORTS
from actors.fake_model import fake_result
from actors.images import decode_image
from actors.ledger import Ledger
from actors.results import read_rows
from actors.schemas import JobCounts, JobReport, PredictParams
from actors.settings import ActorSettings, ImageLimits, ModelSettings
from actors.storage import Storage
from actors.worker import OUTPUT, DetectionWorker
from deploy.batch import Job, JobProgress, JobSettings
from deploy.environment import free_port
from deploy.jobs import gallery, list_jobs, recorded
from deploy.weights import EMBEDDED
from tests.conftest import picture, processes
from tests.unit.test_storage import tar_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

PICTURES = {f"{number:03d}.png": picture(blue=number, red=100 + number) for number in range(40)}
FAKE = ModelSettings(name="fake", weights="fake:")


class Interrupted(Exception):
    pass


def job_of(
    *sources: str, out: str | Path, retry_failed: bool = False, model: ModelSettings | None = None, **settings: Any
) -> Job:
    return Job.open(JobSettings(sources=sources, model=model or FAKE, out=out, **settings), retry_failed=retry_failed)


def run(job: Job) -> dict[str, Any]:
    if job.remaining:
        job.run(ActorSettings(num_cpus=0.1), lambda progress: None)
    return job.finish(1.0)


def stop_after_the_first_commit(progress: JobProgress) -> None:
    if progress.done:
        raise Interrupted


def assert_complete(summary: dict[str, Any], out: str | Path, expected: dict[str, bytes]) -> None:
    """Every input of ``expected`` (the end of a URI → its bytes) is one row, equal to the reference."""
    rows = {row["uri"]: row for row in read_rows(out)}
    assert len(rows) == summary["results"] == len(expected)
    assert summary["inputs"] == summary["results"] + summary["dead_letters"]
    assert summary["accounted_for"]
    for name, data in expected.items():
        (row,) = [row for uri, row in rows.items() if uri.endswith(name)]
        reference = fake_result(decode_image(data, ImageLimits()), PredictParams())
        assert [found["class_id"] for found in row["detections"]] == [found.class_id for found in reference.detections]


def test_from_a_bucket_to_a_bucket_cut_off_and_resumed_in_every_format(bucket: str) -> None:
    storage = Storage.at(bucket)
    storage.lease(".pending/test")
    names = list(PICTURES)
    for name in names[:20]:
        storage.put(f"in/{name}", PICTURES[name], ".pending/test")
    storage.put("in/broken.jpg", b"<html>", ".pending/test")
    storage.put("shards/a.tar", tar_of({name: PICTURES[name] for name in names[20:]}), ".pending/test")
    sources, out = (f"{bucket}/in", f"{bucket}/shards/*.tar"), f"{bucket}/out"
    settings: dict[str, Any] = {"out": out, "formats": tuple(EXPORTS), "annotate": True, "price_per_hour": 3.6}
    with pytest.raises(Interrupted):
        job_of(*sources, **settings).run(ActorSettings(num_cpus=0.1), stop_after_the_first_commit)
    again = job_of(*sources, **settings)
    assert 0 < len(again.remaining) < 41
    summary = run(again)
    assert_complete(summary, out, PICTURES)
    assert summary["this_run"]["cost_per_million_images"] == round(1000 / len(again.remaining), 2)
    (letter,) = (storage.read("out/errors.jsonl") or b"").splitlines()
    assert json.loads(letter)["uri"] == f"{bucket}/in/broken.jpg"
    made = {"job.json", "summary.json", "errors.jsonl", "detections", "detections.jsonl", "coco.json", "yolo", "annotated"}
    assert set(Storage.at(out).names()) == made
    assert len(Storage.at(out).names("annotated")) == 40
    assert run(job_of(*sources, **settings))["results"] == 40


def test_the_longest_names_have_a_picture_of_their_own_too(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for end in "ab":
        (folder / f"{'é' * 125}{end}.png").write_bytes(picture())  # 255 bytes
    summary = run(job_of(str(folder), out=out, annotate=True))
    assert (summary["results"], len(list((out / "annotated").iterdir()))) == (2, 2)


def test_what_changed_and_what_is_retried_is_computed_again_and_nothing_else(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, data in list(PICTURES.items())[:8]:
        (folder / name).write_bytes(data)
    (folder / "late.png").write_bytes(b"still being copied")
    summary = run(job_of(str(folder), out=out))
    assert (summary["results"], summary["dead_letters"]) == (8, 1)

    (folder / "000.png").write_bytes(picture(width=70, blue=3))
    changed = job_of(str(folder), out=out)
    assert [Path(uri).name for uri in changed.remaining] == ["000.png"]
    expected = dict(list(PICTURES.items())[:8]) | {"000.png": picture(width=70, blue=3)}
    assert_complete(run(changed), out, expected)

    (folder / "late.png").write_bytes(picture(blue=5))
    retried = Job.open(JobSettings.retried(str(out)), retry_failed=True)
    assert [Path(uri).name for uri in retried.remaining] == ["late.png"]
    summary = run(retried)
    assert_complete(summary, out, expected | {"late.png": picture(blue=5)})
    assert (out / "errors.jsonl").read_text() == ""

    shutil.move(folder / "001.png", tmp_path / "elsewhere.png")  # what is gone from the source stays in the output
    assert run(job_of(str(folder), out=out))["inputs"] == 9
    assert Ledger.requested(out)["sources"] == [str(folder)]


def test_names_in_a_list_that_cannot_be_read_cost_their_own_rows_and_name_the_reason(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(picture(blue=2))
    bad = {
        "missing.png": "No such file",
        f"http://127.0.0.1:{free_port()}/nobody.png": "Connect call failed",
        "ftpx://nowhere/at/all.png": "ftpx",
    }
    (tmp_path / "list.txt").write_text("\n".join(["good.png", *bad]))
    out = tmp_path / "out"
    assert_complete(run(job_of(str(tmp_path / "list.txt"), out=out)), out, {"good.png": picture(blue=2)})
    letters = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
    assert {letter["stage"] for letter in letters} == {"read"}
    for name, reason in bad.items():
        (letter,) = [letter for letter in letters if letter["uri"].endswith(name)]
        assert reason in letter["reason"]


def test_a_worker_in_ray_data_gives_every_row_its_result_or_its_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURES["003.png"])
    rows = [
        {"uri": str(tmp_path / "a.png"), "image": None},
        {"uri": "in the table", "image": PICTURES["005.png"]},
        {"uri": str(tmp_path / "none.png"), "image": None},
        {"uri": "broken", "image": b"<html>"},
    ]
    found = ray.data.from_items(rows).map_batches(
        DetectionWorker,
        fn_constructor_args=[FAKE],
        fn_constructor_kwargs={"content": "image"},
        batch_format="pyarrow",
        num_cpus=0.1,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    assert found.schema().names == OUTPUT.names
    by_uri = {row["uri"]: row for row in found.take_all()}
    assert [item["name"] for item in by_uri[str(tmp_path / "a.png")]["detections"]] == ["three"]
    assert [item["name"] for item in by_uri["in the table"]["detections"]] == ["one"]
    assert "No such file" in by_uri[str(tmp_path / "none.png")]["error"]
    assert "not an image" in by_uri["broken"]["error"]
    assert by_uri["broken"]["detections"] is None


def watched_job(folder: Path, inputs: int, model: ModelSettings) -> tuple[float, list[int]]:
    """CPU milliseconds an image, and bytes in memory after each shard: of the job's driver, which is here, and its actors."""
    spent: list[tuple[int, float]] = []
    resident: list[int] = []

    def sample(progress: JobProgress) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # an actor has ended meanwhile
            if progress.done:
                watched = [psutil.Process(pid) for pid in (os.getpid(), *processes("ShardActor"))]
                spent.append((progress.done, sum(sum(process.cpu_times()[:2]) for process in watched)))
                resident.append(sum(process.memory_info().rss for process in watched))

    before = time.process_time()
    small = PredictParams(imgsz=(64, 64))
    job = job_of(str(folder / "*.png"), out=folder / f"out-{inputs}", actors=2, model=model, params=small)
    opening = time.process_time() - before
    job.run(ActorSettings(num_cpus=0.1), sample)
    before = time.process_time()
    assert job.finish(1.0)["results"] == inputs
    finishing = time.process_time() - before
    (first, loaded), (last, end) = spent[0], spent[-3]  # by then both actors have begun, and neither has ended
    return 1e3 * ((end - loaded) / (last - first) + (opening + finishing) / inputs), resident


@pytest.mark.parametrize(
    ("few", "many", "model"),
    [
        pytest.param(1000, 4000, FAKE, marks=pytest.mark.slow),
        pytest.param(10_000, 100_000, EMBEDDED, marks=[pytest.mark.long, pytest.mark.timeout(1800)]),
    ],
)
def test_memory_and_cost_do_not_grow_with_the_number_of_inputs(
    few: int, many: int, model: ModelSettings, tmp_path: Path
) -> None:
    costs = []
    for inputs in (few, many):
        for number in range(inputs):
            file = tmp_path / f"{number:06d}.png"
            if not file.exists():
                file.write_bytes(PICTURES[f"{number % 40:03d}.png"])
        cost, resident = watched_job(tmp_path, inputs, model)
        costs.append(cost)
        third = len(resident) // 3
        print(f"{inputs}: {cost:.3f} ms of CPU an image, {resident[third] / 1e6:.0f} to {resident[-1] / 1e6:.0f} MB")
    assert max(resident) < 3e9
    assert mean(resident[-third:]) <= 1.05 * mean(resident[third : 2 * third])
    if many >= 100_000:  # a measurement, for a quiet machine
        assert costs[1] <= 1.05 * costs[0]


async def test_a_job_is_known_to_the_fleet_from_its_start_to_its_end(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name, data in PICTURES.items():
        (source / name).write_bytes(data)
    (source / "cut.png").write_bytes(PICTURES["000.png"][:50])
    job, seen = job_of(str(source), out=out), list[JobReport]()

    def told(progress: JobProgress) -> None:
        tell(JobCounts(**progress.model_dump()))
        seen.extend(asyncio.run(_known(out)))

    with recorded(str(out)) as tell:
        await asyncio.to_thread(job.run, ActorSettings(num_cpus=0.1), told)
    (done,) = await _known(out)
    assert {report.status for report in seen} == {"RUNNING"} and seen[0].counts == JobCounts(41, 0, 0, 0)
    assert (done.status, done.counts) == ("SUCCEEDED", JobCounts(41, 0, 41, 1))
    assert done.started_at and done.ended_at and done.started_at < done.ended_at
    shown = await gallery(done, ImageLimits())
    assert len({sampled.name for sampled in shown.samples}) == 12
    assert all(sampled.picture and sampled.result.detections for sampled in shown.samples)
    assert [Path(letter["uri"]).name for letter in shown.dead_letters] == ["cut.png"]
    with contextlib.suppress(Interrupted), recorded(str(out)):
        raise Interrupted
    (failed,) = await _known(out)
    assert failed.status == "FAILED"
    (out / "detections" / "broken.parquet").write_bytes(b"no table")
    with pytest.raises(BadSource, match="cannot be read"):
        await gallery(failed, ImageLimits())


async def _known(out: Path) -> list[JobReport]:
    return [report for report in await list_jobs() or () if report.out == str(out)]
