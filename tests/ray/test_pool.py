"""Dataset jobs on FakeModel actors: every input exactly once, whatever is in it and whoever dies."""

import json
import os
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from actors.errors import EngineOutOfMemory
from actors.fake_model import fake_result
from actors.images import decode_image
from actors.ledger import METADATA_KEY
from actors.schemas import PredictParams
from actors.settings import ActorSettings, ImageLimits, ModelSettings
from deploy.batch import Job, JobProgress, JobSettings
from tests.conftest import picture, processes
from tests.unit.test_corrupt import BAD, GOOD

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

CRASHES, HANGS, FAILS = 250, 251, 249  # of FakeModel; no good picture is as blue
DAMAGED = {f"{kind}.jpg": data for kind, (data, _) in BAD.items()}
ODD = {f"{kind}.png": data for kind, data in GOOD.items()}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Sixty good pictures, odd ones, and twenty kinds of damaged ones."""
    folder = tmp_path / "in"
    folder.mkdir()
    plain = {f"{number:03d}.png": picture(blue=number, red=100 + number) for number in range(60)}
    for name, data in (plain | ODD | DAMAGED).items():
        (folder / name).write_bytes(data)
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


def test_each_input_is_a_result_or_a_dead_letter_with_its_reason(inputs: Path) -> None:
    """Damaged files, an exception in the model, memory for three images at once."""
    (inputs / "odd.png").write_bytes(picture(blue=FAILS))
    summary = run(job_of(inputs, f"fail={FAILS}&oom=3"))
    assert_complete(inputs, summary, {*DAMAGED, "odd.png"})
    failed = letters(inputs)
    assert {failed[name]["stage"] for name in DAMAGED} == {"decode"}
    assert all(re.search(says, failed[f"{kind}.jpg"]["reason"]) for kind, (_, says) in BAD.items())
    assert failed["odd.png"]["stage"] == "predict" and "RuntimeError" in failed["odd.png"]["reason"]
    assert summary["detections"] == Counter(item["name"] for found in results(inputs).values() for item in found)
    assert summary["stage_ms_per_image"].keys() >= {"read", "decode", "inference"}


def test_inputs_that_kill_or_wedge_their_actors_are_found_and_set_aside(inputs: Path) -> None:
    (inputs / "poison.png").write_bytes(picture(blue=CRASHES))
    (inputs / "wedge.png").write_bytes(picture(blue=HANGS))
    summary = run(job_of(inputs, f"crash={CRASHES}&hang={HANGS}", health_timeout_s=3))
    assert_complete(inputs, summary, {*DAMAGED, "poison.png", "wedge.png"})
    for letter in map(letters(inputs).get, ("poison.png", "wedge.png")):
        assert letter and (letter["stage"], letter["reason"]) == ("crash", "This input killed its actor 2 times")
    for file in (inputs.parent / "out" / "detections").iterdir():  # those that the driver committed as well
        about = json.loads(pq.read_schema(file).metadata[METADATA_KEY])
        assert about["job"]["weights_sha256"] and about["job"]["params"]["conf"] == 0.25
        assert about["versions"].keys() >= {"yolofleet", "torch"}


def test_a_killed_actor_loses_nothing_and_the_same_job_goes_on_with_what_is_new(inputs: Path) -> None:
    killed: list[int] = []

    def kill_one(progress: JobProgress) -> None:
        if progress.done and not killed:
            killed.append(processes("ShardActor")[0])
            os.kill(killed[0], signal.SIGKILL)

    summary = run(job_of(inputs, "slow_ms=20"), kill_one)
    assert killed
    assert_complete(inputs, summary, set(DAMAGED))
    assert job_of(inputs, "slow_ms=20").remaining == []
    (inputs / "late.png").write_bytes(picture(blue=2))
    again = job_of(inputs, "slow_ms=20")
    assert [Path(uri).name for uri in again.remaining] == ["late.png"]
    assert_complete(inputs, run(again), set(DAMAGED))


def test_a_model_that_cannot_be_loaded_ends_the_job_with_its_own_sentence(inputs: Path) -> None:
    with pytest.raises(EngineOutOfMemory, match="holds batches of 0"):
        run(job_of(inputs, "oom=0"))
