"""What plan expects is what the configuration that it writes then gives, over HTTP, within 15 %."""

import json
from pathlib import Path
from statistics import median

import pytest

from actors.images import encode_jpeg
from deploy.bench.load import Closed, Target, run_load
from deploy.config import read_config
from deploy.demo.scene import draw_scene
from deploy.plan import ANSWERS
from deploy.weights import EMBEDDED
from tests.cli.test_command import run, serving

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(420)]

ROUNDS = 3


@pytest.mark.parametrize(("weights", "imgsz", "seconds", "slo"), [
    ("fake:?slow_ms=400", 64, 2, 1500),
    (EMBEDDED.weights, 320, 4, None),
])  # fmt: skip
def test_plan_predicts_what_its_configuration_then_gives(
    tmp_path: Path, weights: str, imgsz: int, seconds: float, slo: float | None
) -> None:
    images = [tmp_path / f"{seed}.jpg" for seed in range(8)]
    for seed, image in enumerate(images):
        image.write_bytes(encode_jpeg(draw_scene(seed, imgsz, imgsz * 3 // 4).image))
    config, report = tmp_path / "fleet.yaml", tmp_path / "plan.json"
    command = ["plan", "--model", f"planned={weights}", "--imgsz", str(imgsz), "--seconds", str(seconds)]
    command += ["--source", str(tmp_path)]
    command += ["--price-per-hour", "1", "--load", "500", "--out", str(config), "--json", str(report)]
    done = run(*command, *([] if slo is None else ["--slo-p95-ms", str(slo)]), timeout=300)
    assert done.returncode == 0, done.stderr
    plan = json.loads(report.read_text())
    expected = plan["expected"]
    assert slo is None or expected["p95_ms"] <= slo
    assert plan["nodes"] * expected["images_per_s"] >= 500 > (plan["nodes"] - 1) * expected["images_per_s"]
    settings, _ = read_config(config)
    assert f"{settings.models[0].replicas.max} replicas" in done.stdout

    with serving("--config", str(config)) as (_, address):
        target = Target(f"{address}/predict", form={"imgsz": str(imgsz)})
        load = Closed(expected["callers"], int(max(expected["images_per_s"] * seconds, ANSWERS * expected["callers"])))
        run_load(target, images, load)
        rounds = [run_load(target, images, load) for _ in range(ROUNDS)]
    assert not any(each.errors for each in rounds)
    assert median(each.per_s for each in rounds) == pytest.approx(expected["images_per_s"], rel=0.15)
