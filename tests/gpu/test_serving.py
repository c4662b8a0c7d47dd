"""The whole way on a GPU: replicas on fractions of it answer over HTTP and tell what they took; plan and bench share run."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from actors.images import encode_jpeg
from actors.settings import ActorSettings
from deploy.cli import app
from deploy.config import read_config
from deploy.demo.scene import draw_scene
from deploy.launch import local_ray, running_app
from deploy.settings import AppSettings, Replicas, ServedModel
from deploy.weights import EMBEDDED

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture
def address() -> Iterator[str]:
    replicas, actor = Replicas(min=2, max=2), ActorSettings(num_cpus=1, num_gpus=0.5)
    model = ServedModel(**EMBEDDED.model_dump(), replicas=replicas, actor=actor)
    with local_ray(), running_app(AppSettings(models=(model,), topology="routed"), "127.0.0.1", 0) as found:
        yield found


def test_replicas_on_half_a_gpu_each_answer_and_report_their_peak(address: str) -> None:
    image = encode_jpeg(draw_scene(3).image)
    for _ in range(8):
        assert httpx.post(f"{address}/predict", files={"file": image}, timeout=60).json()["images"][0]["results"]
    (model,) = httpx.get(f"{address}/models").json()["models"]
    assert model["device"] == "cuda:0" and model["gpu_peak_bytes"] > 0
    (model,) = httpx.get(f"{address}/fleet").json()["models"]
    assert [replica["vitals"]["gpu_peak_bytes"] > 0 for replica in model["replicas"]] == [True, True]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(8):
        (folder / f"{seed}.jpg").write_bytes(encode_jpeg(draw_scene(seed).image))
    return folder


def test_bench_share_compares_one_actor_with_several(images: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = ["bench", "share", str(images), "--model", EMBEDDED.weights, "--imgsz", "320", "--actors", "1,2,4"]
    done = CliRunner().invoke(app, [*command, "--rounds", "1", "--seconds", "2", "--json", str(report)])
    assert done.exit_code == 0, done.output
    (turn,) = json.loads(report.read_text())["shared"]
    assert [(each["actors"], each["refused"], each["gpu_bytes"] > 0) for each in turn] == [(n, None, True) for n in (1, 2, 4)]


def test_plan_writes_a_configuration_for_the_gpu(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "fleet.yaml"
    command = ["plan", "--model", f"parts={EMBEDDED.weights}", "--imgsz", "320", "--source", str(images), "--gpu", "1"]
    done = CliRunner().invoke(app, [*command, "--seconds", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    (model,) = read_config(out)[0].models
    assert 0 < model.actor.num_gpus * model.replicas.max <= 1
