"""From yolo26n to yolo11n on real images: two good detectors that agree on much, and not on everything."""

from pathlib import Path

import httpx
import pytest

from actors.settings import ActorSettings
from deploy.config import HttpOptions
from deploy.rollout import rollout
from deploy.settings import AppSettings, RolloutRules, ServedModel
from tests.conftest import served

pytestmark = [
    pytest.mark.real,
    pytest.mark.ray,
    pytest.mark.long,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.timeout(300),
]

IMAGES = 24


def test_other_weights_are_refused_at_95_percent_and_pass_at_30(weights: Path, coco128: Path) -> None:
    weights_of = str(weights / "yolo26n.pt")
    running = ServedModel(name="coco", weights=weights_of, engine="torch", actor=ActorSettings(num_cpus=1))
    other = running.model_copy(update={"weights": str(weights / "yolo11n.pt")})
    with served(running) as address, httpx.Client(base_url=address, timeout=120) as client:
        for image in sorted(coco128.glob("*.jpg"))[:IMAGES]:
            client.post("/predict", files={"file": image.read_bytes()}).raise_for_status()
        refused = rollout(AppSettings(models=(other,)), HttpOptions(), print)
        (comparison,) = refused.comparisons
        print(f"agreement {comparison.found.share:.3f}: {comparison}")
        assert not refused.moved and comparison.images == IMAGES and not comparison.drawn
        assert 0.3 < comparison.found.share < 0.95
        lenient = AppSettings(models=(other,), rollout=RolloutRules(min_agreement=0.3))
        passed = rollout(lenient, HttpOptions(), print)
        assert passed.moved and passed.comparisons[0].found == comparison.found
        (model,) = client.get("/models").json()["models"]
        assert model["weights"] == "yolo11n.pt" and model["sha256"] == comparison.new_sha256
