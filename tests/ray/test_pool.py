"""Dataset jobs on FakeModel actors: every input exactly once, whatever is in it and whoever dies."""

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pytest

from actors.errors import EngineOutOfMemory
from actors.fake_model import fake_result
from actors.images import decode_image
from actors.schemas import PredictParams
from actors.settings import ActorSettings, ImageLimits, ModelSettings
from deploy.batch import Job, JobProgress, JobSettings
from tests.conftest import picture, processes

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

CRASHES = 250


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Sixty good pictures and three that are none."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:03d}.png").write_bytes(picture(blue=number, red=100 + number))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"hello")
    (folder / "truncated.png").write_bytes(picture()[:-20])
    return folder


def job_of(inputs: Path, options: str = "", actors: int = 2, **settings: Any) -> Job:
    model = ModelSettings(name="fake", weights=f"fake:?{options}")
    out = inputs.parent / "out"
    return Job.open(JobSettings(sources=(str(inputs),), model=model, out=out, actors=actors, **settings))


def run(job: Job, on_progress: Any = lambda progress: None) -> dict[str, Any]:
    job.run(ActorSettings(num_cpus=0.1), on_progress)
    return job.finish(1.0)


def results(inputs: Path) -> dict[str, list[dict[str, Any]]]:
    """File name → detections; fails if an input has two rows."""
    rows = pyarrow.dataset.dataset(inputs.parent / "out" / "detections").to_table().to_pylist()
    assert max(Counter(row["uri"] for row in rows).values()) == 1
    return {Path(row["uri"]).name: row["detections"] for row in rows}


def letters(inputs: Path) -> dict[str, dict[str, str]]:
    lines = (inputs.parent / "out" / "errors.jsonl").read_text().splitlines()
    return {Path(json.loads(line)["uri"]).name: json.loads(line) for line in lines}


def assert_complete(inputs: Path, summary: dict[str, Any], dead: set[str]) -> None:
    """Every input is a result equal to the reference, or a dead letter that is expected."""
    found = results(inputs)
    assert set(letters(inputs)) == dead
    assert set(found) == {path.name for path in inputs.iterdir()} - dead
    assert summary["inputs"] == summary["results"] + summary["dead_letters"] == len(list(inputs.iterdir()))
    assert summary["accounted_for"]
    for name, detections in found.items():
        image = decode_image((inputs / name).read_bytes(), ImageLimits())
        expected = fake_result(image, PredictParams())
        assert [item["class_id"] for item in detections] == [item.class_id for item in expected.detections]
    assert {path.name for path in (inputs.parent / "out").iterdir()} == {
        "job.json", "detections", "errors.jsonl", "summary.json",
    }  # fmt: skip


BAD = {"empty.jpg", "text.jpg", "truncated.png"}


def test_bad_images_cost_their_own_row_only(inputs: Path) -> None:
    summary = run(job_of(inputs))
    assert_complete(inputs, summary, BAD)
    assert {letter["stage"] for letter in letters(inputs).values()} == {"decode"}
    assert summary["detections"] == dict.fromkeys(("zero", "one", "two", "three"), 15)


def test_an_input_that_kills_its_actor_is_found_and_set_aside(inputs: Path) -> None:
    (inputs / "poison.png").write_bytes(picture(blue=CRASHES))
    summary = run(job_of(inputs, f"crash={CRASHES}"))
    assert_complete(inputs, summary, {*BAD, "poison.png"})
    assert letters(inputs)["poison.png"]["stage"] == "crash"


def test_a_killed_actor_loses_nothing(inputs: Path) -> None:
    killed: list[int] = []

    def kill_one(progress: JobProgress) -> None:
        if progress.done and not killed:
            killed.append(processes("ShardActor")[0])
            os.kill(killed[0], signal.SIGKILL)

    summary = run(job_of(inputs, "slow_ms=20"), kill_one)
    assert killed
    assert_complete(inputs, summary, BAD)


def test_an_exception_in_the_model_is_a_dead_letter_with_its_reason(inputs: Path) -> None:
    (inputs / "odd.png").write_bytes(picture(blue=77))
    summary = run(job_of(inputs, "fail=77"))
    assert_complete(inputs, summary, {*BAD, "odd.png"})
    assert letters(inputs)["odd.png"]["stage"] == "predict"
    assert "RuntimeError" in letters(inputs)["odd.png"]["reason"]


def test_an_input_that_wedges_the_engine_is_found_by_the_health_check(inputs: Path) -> None:
    (inputs / "wedge.png").write_bytes(picture(blue=CRASHES))
    summary = run(job_of(inputs, f"hang={CRASHES}", health_timeout_s=2))
    assert_complete(inputs, summary, {*BAD, "wedge.png"})
    assert letters(inputs)["wedge.png"]["stage"] == "crash"


def test_the_same_job_goes_on_with_what_is_left(inputs: Path) -> None:
    late = inputs / "late.png"
    run(job_of(inputs))
    again = job_of(inputs)
    assert again.remaining == []
    late.write_bytes(picture(blue=2))
    third = job_of(inputs)
    assert [Path(uri).name for uri in third.remaining] == ["late.png"]
    assert_complete(inputs, run(third), BAD)


def test_a_model_that_cannot_be_loaded_ends_the_job_with_its_own_sentence(inputs: Path) -> None:
    with pytest.raises(EngineOutOfMemory, match="holds batches of 0"):
        run(job_of(inputs, "oom=0"))
